//! Renews one lease over a stream of its own.

use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{LeaseKeepAliveStream, LeaseKeeper as EtcdLeaseKeeper};

use super::connection::RENEW;
use super::{EtcdStore, about_lease, explain};
use crate::error::ClusterError;
use crate::store::{Lease, LeaseKeeper};

pub(super) struct EtcdKeeper {
    store: EtcdStore,
    lease: Lease,
    stream: Option<KeepAliveStream>,
    /// The connection that the renewal in progress is on, and which token it had.
    used: Option<(u64, u64)>,
}

struct KeepAliveStream {
    requests: EtcdLeaseKeeper,
    replies: LeaseKeepAliveStream,
    endpoint: std::sync::Arc<str>,
}

impl EtcdKeeper {
    pub(super) fn new(store: EtcdStore, lease: Lease) -> Self {
        Self {
            store,
            lease,
            stream: None,
            used: None,
        }
    }

    /// With a new token and a new stream, if the token is refused.
    async fn renew_with_token(&mut self) -> Result<i64, ClusterError> {
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

    async fn renew_on_stream(&mut self) -> Result<i64, ClusterError> {
        const OPERATION: &str = RENEW;
        let after = self.store.timeout();
        // One on a connection that has been replaced is not used any more.
        if self.used.map(|(generation, _)| generation) != Some(self.store.link().generation) {
            self.stream = None;
        }
        match &mut self.stream {
            None => {
                self.used = None;
                let connection = self.store.connection(OPERATION).await?;
                self.used = Some((connection.generation, connection.token.version()));
                let mut client = connection.client;
                // Sends the first renewal and waits for its reply.
                let opened = client.lease_keep_alive(self.lease.id.0).await;
                let (requests, replies) = opened
                    .map_err(|error| explain(OPERATION, &connection.endpoint, after, &error))?;
                self.stream = Some(KeepAliveStream {
                    requests,
                    replies,
                    endpoint: connection.endpoint,
                });
                Ok(i64::try_from(self.lease.ttl.as_secs()).unwrap_or(i64::MAX))
            }
            Some(stream) => {
                let failed = |error| explain(OPERATION, &stream.endpoint, after, &error);
                stream.requests.keep_alive().await.map_err(failed)?;
                match stream.replies.message().await {
                    Ok(Some(reply)) => Ok(reply.ttl()),
                    Ok(None) => Err(ClusterError::Unavailable {
                        endpoint: stream.endpoint.to_string(),
                        operation: OPERATION,
                        reason: "the stream has ended".to_owned(),
                    }),
                    Err(error) => Err(failed(error)),
                }
            }
        }
    }
}

#[async_trait]
impl LeaseKeeper for EtcdKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let lease = self.lease.id;
        let renewal = tokio::time::timeout(within, self.renew_with_token()).await;
        let error = match renewal {
            Ok(Ok(ttl)) if ttl > 0 => {
                self.store.link().breaker.succeeded();
                return Ok(Duration::from_secs(ttl.unsigned_abs()));
            }
            // Not an error for etcd: the lease has ended.
            Ok(Ok(_)) => return Err(ClusterError::LeaseNotFound { lease }),
            Ok(Err(error)) => error,
            Err(_) => ClusterError::Timeout {
                endpoint: self.store.shared.options.named(),
                operation: RENEW,
                after: within,
            },
        };
        // A late reply must never be taken for the answer to the next renewal.
        self.stream = None;
        if let Some((generation, _)) = self.used
            && error.blames_connection()
        {
            self.store.discard(generation, &error);
        }
        about_lease(lease, Err(error))
    }
}
