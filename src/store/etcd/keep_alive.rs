//! A stream of renewals of one lease, and the answers to them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Error as EtcdError, LeaseKeepAliveResponse, LeaseKeepAliveStream, LeaseKeeper};
use tokio::time::Instant;

use super::convert::cluster_of;
use super::link::Connection;
use super::round_trips::RoundTrips;
use super::status::{CallError, Failure};
use crate::store::clock::{BootClock, Clock};
use crate::store::types::Lease;

/// Renewals without an answer that are remembered.
const MOST_UNANSWERED: usize = 16;

type Open = (LeaseKeeper, LeaseKeepAliveStream);

enum State {
    /// The stream is opened by its first renewal, and is open with the answer to it.
    Opening(Pin<Box<dyn Future<Output = Result<Open, EtcdError>> + Send>>),
    Open(Box<Open>),
}

pub(super) struct KeepAliveStream {
    state: State,
    /// The granted TTL. The client does not pass on the answer that opens the stream.
    ttl: Duration,
    pub(super) endpoint: Arc<str>,
    cluster: Option<u64>,
    pub(super) round_trips: RoundTrips,
    /// The renewals without an answer. Answers come in their order.
    unanswered: VecDeque<Sent>,
}

/// When a renewal was sent: for measuring, and by the clock of leases, which does not stop while the
/// machine is suspended.
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

/// The answer to a renewal.
pub(super) struct Renewed {
    ttl: Duration,
    /// When the renewal was sent.
    sent: Duration,
    pub(super) cluster: Option<u64>,
}

impl Renewed {
    /// The time to live, counted from this time on the clock of leases. It may be later than the time
    /// when the renewal was sent.
    pub(super) fn ttl_from(&self, start: Duration) -> Duration {
        self.ttl.saturating_sub(start.saturating_sub(self.sent))
    }
}

impl KeepAliveStream {
    /// A stream for this lease. The first renewal is sent when its answer is waited for.
    pub(super) fn new(connection: Connection, lease: Lease) -> Self {
        let mut client = connection.client;
        let opening = async move { client.lease_keep_alive(lease.id.0).await };
        Self {
            state: State::Opening(Box::pin(opening)),
            ttl: Duration::from_secs(lease.ttl.as_secs()),
            endpoint: connection.endpoint,
            cluster: connection.cluster,
            round_trips: connection.round_trips,
            unanswered: VecDeque::from([Sent::now()]),
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// Sends one more renewal, unless the first one is still unanswered.
    pub(super) async fn send(&mut self) -> Result<(), EtcdError> {
        let sent = Sent::now();
        if let State::Open(open) = &mut self.state {
            open.0.keep_alive().await?;
            self.unanswered.push_back(sent);
        }
        Ok(())
    }

    /// Sends one more renewal if that is possible without waiting: it may never be answered.
    pub(super) async fn try_send(&mut self) {
        if self.unanswered.len() < MOST_UNANSWERED {
            let _ = tokio::time::timeout(Duration::ZERO, self.send()).await;
        }
    }

    /// Waits for the next answer. Dropping the future loses nothing.
    pub(super) async fn answer(&mut self) -> Result<Renewed, CallError> {
        let (ttl, cluster) = match &mut self.state {
            State::Opening(opening) => match opening.await {
                Ok(open) => {
                    self.state = State::Open(Box::new(open));
                    (Some(self.ttl).filter(|ttl| !ttl.is_zero()), self.cluster)
                }
                Err(error) => {
                    // A future that has ended must not be polled again.
                    self.state = State::Opening(Box::pin(std::future::pending()));
                    return Err(error.into());
                }
            },
            State::Open(open) => match open.1.message().await? {
                Some(answer) => (ttl_of(&answer), cluster_of(answer.header())),
                None => {
                    return Err(Failure::Unavailable("the stream has ended".to_owned()).into());
                }
            },
        };
        let sent = self.unanswered.pop_front();
        if let Some(sent) = sent.filter(|_| self.unanswered.is_empty()) {
            // Earlier answers may have arrived long before they were read.
            self.round_trips.answered(sent.at);
        }
        Ok(Renewed {
            // etcd reports the end of a lease by a TTL of 0, not by an error.
            ttl: ttl.ok_or(Failure::LeaseNotFound)?,
            // An answer without a renewal must not extend the lease: it counts as one to a renewal at
            // time zero.
            sent: sent.map_or(Duration::ZERO, |sent| sent.on_clock),
            cluster,
        })
    }
}

/// The TTL of a lease that is alive.
fn ttl_of(answer: &LeaseKeepAliveResponse) -> Option<Duration> {
    let seconds = u64::try_from(answer.ttl()).ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
