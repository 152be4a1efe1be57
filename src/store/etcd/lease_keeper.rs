//! Renews one lease over a stream of its own.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::connect::RENEW;
use super::connector::{Connector, ConnectorHandle};
use super::keep_alive::{KeepAliveStream, Renewed};
use super::status::{CallError, Failure, Subject};
use crate::error::ClusterError;
use crate::store::clock::{BootClock, Clock};
use crate::store::traits::LeaseKeeper;
use crate::store::types::Lease;

pub(super) struct EtcdKeeper {
    connector: ConnectorHandle,
    lease: Lease,
    /// When it ends if it is not renewed, on the clock of leases.
    ends: Duration,
    /// The cluster that granted it, once that is known.
    granted_by: Option<u64>,
    stream: Option<KeepAliveStream>,
    /// A stream whose connection was given up because it was late, until there is another connection:
    /// it may be slow, not dead.
    late: Option<KeepAliveStream>,
    /// The connection of the renewal in progress.
    used: Option<UsedConnection>,
}

struct UsedConnection {
    generation: u64,
    endpoint: Arc<str>,
    token_version: u64,
}

impl EtcdKeeper {
    pub(super) fn new(connector: ConnectorHandle, lease: Lease, granted_by: Option<u64>) -> Self {
        Self {
            connector,
            lease,
            ends: BootClock.now() + lease.ttl,
            granted_by,
            stream: None,
            late: None,
            used: None,
        }
    }

    /// Renews once more with a fresh token on a new stream, if the token is refused.
    async fn renew_with_token(&mut self) -> Result<Renewed, CallError> {
        let error = match self.renew_on_stream().await {
            Err(error) if self.connector.may_refresh(&error) => error,
            result => return result,
        };
        let Some(used) = &self.used else {
            return Err(error);
        };
        self.stream = None;
        self.connector
            .refresh_token(used.generation, used.token_version)
            .await?;
        self.renew_on_stream().await
    }

    async fn renew_on_stream(&mut self) -> Result<Renewed, CallError> {
        // A stream on a connection that has been replaced is not used any more.
        let generation = self.connector.link().generation;
        if self.used.as_ref().map(|used| used.generation) != Some(generation) {
            self.stream = None;
        }
        let stream = match &mut self.stream {
            Some(stream) => {
                stream.send().await?;
                stream
            }
            none => {
                self.used = None;
                let connection = self.connector.connection(RENEW).await?;
                if is_another(&mut self.granted_by, connection.cluster) {
                    return Err(Failure::LeaseNotFound.into());
                }
                self.used = Some(UsedConnection {
                    generation: connection.generation,
                    endpoint: connection.endpoint.clone(),
                    token_version: connection.token.version(),
                });
                none.insert(KeepAliveStream::new(connection, self.lease))
            }
        };
        loop {
            let renewed = stream.answer().await?;
            // Otherwise it is the answer to an earlier renewal that had timed out.
            if !stream.is_waiting() {
                return Ok(renewed);
            }
        }
    }

    /// How long to wait for an answer: longer if answers were measured to take longer. But a few slow answers do not
    /// take all of the time that the lease has left: another member may have to be asked.
    fn patience(&self, within: Duration) -> Duration {
        let link = self.connector.link();
        let current = link.connection.as_ref();
        let late = self.late.as_ref().map(|late| &late.round_trips);
        let Some(measured) = current.map(|current| &current.round_trips).or(late) else {
            return within;
        };
        let left = self.ends.saturating_sub(BootClock.now());
        let most = within.max(left * 2 / 3).max(measured.mean() * 2);
        measured.patience(within).min(most)
    }

    /// The remaining time to live from `start` on. An answer of another cluster does not count.
    fn accept(&mut self, renewed: &Renewed, start: Duration) -> Result<Duration, ClusterError> {
        if is_another(&mut self.granted_by, renewed.cluster) {
            let lease = self.lease.id;
            return Err(ClusterError::LeaseNotFound { lease });
        }
        let ttl = renewed.ttl_from(start);
        self.ends = self.ends.max(start + ttl);
        Ok(ttl)
    }

    fn explain(&self, error: &CallError) -> ClusterError {
        let endpoint = self.used.as_ref().map(|used| &*used.endpoint);
        explain(
            &self.connector,
            endpoint.unwrap_or_default(),
            self.lease,
            error,
        )
    }

    /// Handles a renewal that was not answered in time, or not at all.
    async fn failed(&mut self, error: CallError, late: Option<KeepAliveStream>) -> ClusterError {
        // The stream is not used for another renewal, but an answer that still comes on it counts.
        let stream = self.stream.take();
        self.late = if error.is_timeout() {
            stream.or(late)
        } else {
            late
        };
        if let Some(late) = &mut self.late {
            // At once: if it is slow, the lease may end before the next renewal is answered.
            late.try_send().await;
        }
        let explained = self.explain(&error);
        if let Some(used) = &self.used
            && error.blames_connection()
        {
            self.connector.discard(used.generation, &explained);
        }
        explained
    }
}

fn explain(connector: &Connector, endpoint: &str, lease: Lease, error: &CallError) -> ClusterError {
    let subject = Subject {
        keys: &[],
        lease: Some(lease.id),
    };
    connector.explain(RENEW, endpoint, subject, error)
}

/// Whether the cluster that answers is not the one that granted the lease. It has a lease of the same
/// number because the data of the other one was restored into it. Whoever relies on that lease, and on
/// its position among the candidates there, must start over.
fn is_another(granted_by: &mut Option<u64>, answering: Option<u64>) -> bool {
    let Some(answering) = answering else {
        return false;
    };
    *granted_by.get_or_insert(answering) != answering
}

/// Waits for the answer to an earlier renewal, on a connection that has been given up since. Waits
/// indefinitely if there is none.
async fn late_answer(
    connector: &Connector,
    lease: Lease,
    late: &mut Option<KeepAliveStream>,
) -> Result<Renewed, ClusterError> {
    loop {
        let Some(stream) = late.as_mut().filter(|late| late.is_waiting()) else {
            return std::future::pending().await;
        };
        match stream.answer().await {
            Err(error) if error.blames_connection() => *late = None,
            Err(error) => return Err(explain(connector, &stream.endpoint, lease, &error)),
            Ok(renewed) => return Ok(renewed),
        }
    }
}

#[async_trait]
impl LeaseKeeper for EtcdKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let start = BootClock.now();
        let within = self.patience(within);
        let mut late = self.late.take();
        if let Some(late) = &mut late
            && self.connector.current().is_none()
        {
            // Until there is another connection this one is as good as any.
            late.try_send().await;
        }
        let (connector, lease) = (self.connector.clone(), self.lease);
        let renewal = tokio::time::timeout(within, async {
            tokio::select! {
                biased;
                renewed = self.renew_with_token() => renewed,
                renewed = late_answer(&connector, lease, &mut late) => Ok(renewed?),
            }
        });
        let error = match renewal.await {
            Ok(Ok(renewed)) => {
                let ttl = self.accept(&renewed, start)?;
                if self.stream.is_none() {
                    self.late = late;
                }
                self.connector.link().breaker.succeeded();
                return Ok(ttl);
            }
            Ok(Err(error)) => error,
            Err(_) => CallError::from(ClusterError::Timeout {
                endpoint: self.connector.endpoints_text(),
                operation: RENEW,
                after: within,
            }),
        };
        Err(self.failed(error, late).await)
    }

    async fn late(&mut self) -> Result<Duration, ClusterError> {
        let start = BootClock.now();
        let renewed = late_answer(&self.connector, self.lease, &mut self.late).await?;
        self.accept(&renewed, start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_does_not_say_its_id_is_taken_for_the_one_that_granted() {
        let mut known = Some(7);
        assert!(!is_another(&mut known, Some(7)) && !is_another(&mut known, None));
        assert!(is_another(&mut known, Some(8)));
        // Learned from the first answer with an id.
        let mut unknown = None;
        assert!(!is_another(&mut unknown, None) && !is_another(&mut unknown, Some(8)));
        assert!(is_another(&mut unknown, Some(7)));
    }
}
