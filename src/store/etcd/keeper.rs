//! Renews one lease over a stream of its own.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{LeaseKeepAliveStream, LeaseKeeper as EtcdLeaseKeeper};
use tokio::time::Instant;

use super::connection::RENEW;
use super::round_trips::RoundTrips;
use super::{EtcdStore, about_lease, explain};
use crate::error::ClusterError;
use crate::store::{BootClock, Clock, Lease, LeaseKeeper};

/// Renewals on one stream whose answers are waited for.
const MOST_UNANSWERED: usize = 16;

pub(super) struct EtcdKeeper {
    store: EtcdStore,
    lease: Lease,
    /// The id of the cluster that granted it; 0 until that is known.
    cluster: u64,
    stream: Option<KeepAliveStream>,
    /// One whose connection has been given up because it was late, until there is another
    /// connection: it may be slow, not dead.
    late: Option<KeepAliveStream>,
    /// The connection that the renewal in progress is on, and which token it had.
    used: Option<(u64, u64)>,
}

type Opened = Result<(EtcdLeaseKeeper, LeaseKeepAliveStream), etcd_client::Error>;

enum State {
    /// With the first renewal, whose reply opens it.
    Opening(Pin<Box<dyn Future<Output = Opened> + Send>>),
    Open(Box<(EtcdLeaseKeeper, LeaseKeepAliveStream)>),
}

struct KeepAliveStream {
    state: State,
    /// What the lease is granted for: the reply that opens a stream is not passed on.
    ttl: i64,
    endpoint: std::sync::Arc<str>,
    /// Of the connection.
    cluster: u64,
    round_trips: RoundTrips,
    /// When those were sent that are not answered yet. Answers come in their order.
    unanswered: VecDeque<Sent>,
}

/// When a renewal was sent: for measuring, and on the clock that leases are counted by, which goes on
/// while the machine is suspended.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    on_clock: Duration,
}

impl Sent {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            on_clock: BootClock.now(),
        }
    }
}

/// The time to live that was answered, and when the renewal was sent that it is the answer to.
struct Renewed {
    ttl: i64,
    sent: Duration,
    /// The id of the cluster that answered; 0 if it did not say.
    cluster: u64,
}

impl KeepAliveStream {
    fn explain(&self, error: &etcd_client::Error, after: Duration) -> ClusterError {
        explain(RENEW, &self.endpoint, after, error)
    }

    /// Sends one more renewal, where it can be.
    async fn send(&mut self) -> Result<(), etcd_client::Error> {
        let sent = Sent::now();
        if let State::Open(open) = &mut self.state {
            open.0.keep_alive().await?;
            self.unanswered.push_back(sent);
        }
        Ok(())
    }

    /// The same without waiting, for what may never be answered.
    async fn send_if_there_is_room(&mut self) {
        if self.unanswered.len() < MOST_UNANSWERED {
            let _ = tokio::time::timeout(Duration::ZERO, self.send()).await;
        }
    }

    /// Dropping the future loses nothing.
    async fn reply(&mut self, after: Duration) -> Result<Renewed, ClusterError> {
        let ttl = match &mut self.state {
            State::Opening(opening) => match opening.await {
                Ok(open) => {
                    self.state = State::Open(Box::new(open));
                    Ok(Some((self.ttl, self.cluster)))
                }
                Err(error) => {
                    // Not to be asked again.
                    self.state = State::Opening(Box::pin(std::future::pending()));
                    Err(error)
                }
            },
            State::Open(open) => open.1.message().await.map(|reply| {
                let reply = reply?;
                let cluster = reply.header().map_or(0, |header| header.cluster_id());
                Some((reply.ttl(), cluster))
            }),
        };
        match ttl {
            Ok(Some((ttl, cluster))) => {
                // One that nobody asked for promises nothing: as if it had been sent long ago.
                let sent = self.unanswered.pop_front();
                if let Some(sent) = sent.filter(|_| self.unanswered.is_empty()) {
                    // Those before it may have come long before they were looked at.
                    self.round_trips.answered(sent.at);
                }
                let sent = sent.map_or(Duration::ZERO, |sent| sent.on_clock);
                Ok(Renewed { ttl, sent, cluster })
            }
            Ok(None) => Err(ClusterError::Unavailable {
                endpoint: self.endpoint.to_string(),
                operation: RENEW,
                reason: "the stream has ended".to_owned(),
            }),
            Err(error) => Err(self.explain(&error, after)),
        }
    }
}

impl EtcdKeeper {
    pub(super) fn new(store: EtcdStore, lease: Lease, cluster: u64) -> Self {
        Self {
            store,
            lease,
            cluster,
            stream: None,
            late: None,
            used: None,
        }
    }

    /// With a new token and a new stream, if the token is refused.
    async fn renew_with_token(&mut self) -> Result<Renewed, ClusterError> {
        let error = match self.renew_on_stream().await {
            Err(error) if self.store.may_renew(&error) => error,
            result => return result,
        };
        let Some((generation, version)) = self.used else {
            return Err(error);
        };
        self.stream = None;
        self.store.renew_token(generation, version).await?;
        self.renew_on_stream().await
    }

    async fn renew_on_stream(&mut self) -> Result<Renewed, ClusterError> {
        let after = self.store.timeout();
        // One on a connection that has been replaced is not used any more.
        if self.used.map(|(generation, _)| generation) != Some(self.store.link().generation) {
            self.stream = None;
        }
        let stream = match &mut self.stream {
            Some(stream) => {
                if let Err(error) = stream.send().await {
                    return Err(stream.explain(&error, after));
                }
                stream
            }
            none => {
                self.used = None;
                let connection = self.store.connection(RENEW).await?;
                if is_of_another(&mut self.cluster, connection.cluster) {
                    let lease = self.lease.id;
                    return Err(ClusterError::LeaseNotFound { lease });
                }
                self.used = Some((connection.generation, connection.token.version()));
                let (mut client, lease) = (connection.client, self.lease.id.0);
                let opening = async move { client.lease_keep_alive(lease).await };
                none.insert(KeepAliveStream {
                    state: State::Opening(Box::pin(opening)),
                    ttl: i64::try_from(self.lease.ttl.as_secs()).unwrap_or(i64::MAX),
                    endpoint: connection.endpoint,
                    cluster: connection.cluster,
                    round_trips: connection.round_trips,
                    unanswered: VecDeque::from([Sent::now()]),
                })
            }
        };
        loop {
            let renewed = stream.reply(after).await?;
            // One that its caller gave up may have left its answer behind.
            if stream.unanswered.is_empty() {
                return Ok(renewed);
            }
        }
    }

    /// How long to wait for an answer: longer where they were measured to take longer.
    fn patience(&self, within: Duration) -> Duration {
        let link = self.store.link();
        let current = link.connection.as_ref();
        let late = self.late.as_ref().map(|late| &late.round_trips);
        match current.map(|current| &current.round_trips).or(late) {
            Some(measured) => measured.patience(within),
            None => within,
        }
    }
}

/// Whether the cluster that answers is not the one that granted the lease. It has a lease of that number
/// because the other one's data was restored into it: who counts on that lease, and on what it was to
/// the others there, has to begin anew.
fn is_of_another(granted_by: &mut u64, answers: u64) -> bool {
    if *granted_by == 0 {
        *granted_by = answers;
    }
    answers != 0 && answers != *granted_by
}

/// The answer to an earlier renewal, on a connection that has been given up since.
async fn late_reply(
    late: &mut Option<KeepAliveStream>,
    after: Duration,
) -> Result<Renewed, ClusterError> {
    loop {
        let Some(stream) = late.as_mut().filter(|late| !late.unanswered.is_empty()) else {
            return std::future::pending().await;
        };
        match stream.reply(after).await {
            Err(error) if error.blames_connection() => *late = None,
            result => return result,
        }
    }
}

#[async_trait]
impl LeaseKeeper for EtcdKeeper {
    async fn late(&mut self) -> Result<Duration, ClusterError> {
        let (lease, asked) = (self.lease.id, BootClock.now());
        let after = self.store.timeout();
        match late_reply(&mut self.late, after).await {
            Ok(renewed) if is_of_another(&mut self.cluster, renewed.cluster) => {
                Err(ClusterError::LeaseNotFound { lease })
            }
            Ok(Renewed { ttl, sent, .. }) if ttl > 0 => {
                let ttl = Duration::from_secs(ttl.unsigned_abs());
                Ok(ttl.saturating_sub(asked.saturating_sub(sent)))
            }
            Ok(_) => Err(ClusterError::LeaseNotFound { lease }),
            Err(error) => about_lease(lease, Err(error)),
        }
    }

    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let lease = self.lease.id;
        let asked = BootClock.now();
        let within = self.patience(within);
        let mut late = self.late.take();
        if let Some(late) = &mut late
            && self.store.link().connection.is_none()
        {
            // Until there is another connection this one is as good as any.
            late.send_if_there_is_room().await;
        }
        let renewal = tokio::time::timeout(within, async {
            tokio::select! {
                biased;
                renewed = self.renew_with_token() => renewed,
                renewed = late_reply(&mut late, within) => renewed,
            }
        })
        .await;
        let error = match renewal {
            Ok(Ok(renewed)) if is_of_another(&mut self.cluster, renewed.cluster) => {
                return Err(ClusterError::LeaseNotFound { lease });
            }
            Ok(Ok(Renewed { ttl, sent, .. })) if ttl > 0 => {
                if self.stream.is_none() {
                    self.late = late;
                }
                self.store.link().breaker.succeeded();
                // The caller counts from when it asked, and this may be the answer to an earlier one.
                let ttl = Duration::from_secs(ttl.unsigned_abs());
                return Ok(ttl.saturating_sub(asked.saturating_sub(sent)));
            }
            // Not an error for etcd: the lease has ended.
            Ok(Ok(_)) => return Err(ClusterError::LeaseNotFound { lease }),
            Ok(Err(error)) => error,
            Err(_) => ClusterError::Timeout {
                endpoint: self.store.endpoints().join(","),
                operation: RENEW,
                after: within,
            },
        };
        // Not used for another renewal, but what it answers yet is the answer to one.
        let stream = self.stream.take();
        self.late = match &error {
            ClusterError::Timeout { .. } => stream.or(late),
            _ => late,
        };
        if let Some(late) = &mut self.late {
            // At once: if it is slow, the lease may end before the next one is answered.
            late.send_if_there_is_room().await;
        }
        if let Some((generation, _)) = self.used
            && error.blames_connection()
        {
            self.store.discard(generation, &error);
        }
        about_lease(lease, Err(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_is_the_one_that_granted_unless_it_says_otherwise() {
        let mut known = 7;
        assert!(!is_of_another(&mut known, 7) && !is_of_another(&mut known, 0));
        assert!(is_of_another(&mut known, 8));
        // Learned from the first that says so.
        let mut unknown = 0;
        assert!(!is_of_another(&mut unknown, 0) && !is_of_another(&mut unknown, 8));
        assert!(is_of_another(&mut unknown, 7));
    }
}
