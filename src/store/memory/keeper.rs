//! Renews a lease of the in-memory store.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::server::MemoryServer;
use super::state::ENDPOINT;
use crate::error::ClusterError;
use crate::ids::LeaseId;
use crate::store::traits::LeaseKeeper;

pub(super) struct MemoryKeeper {
    pub(super) server: Arc<MemoryServer>,
    pub(super) lease: LeaseId,
}

#[async_trait]
impl LeaseKeeper for MemoryKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let lease = self.lease;
        let renewal = self
            .server
            .serve("renew", |state| state.renew(lease, Instant::now()));
        tokio::time::timeout(within, renewal)
            .await
            .unwrap_or(Err(ClusterError::Timeout {
                endpoint: ENDPOINT.to_owned(),
                operation: "renew",
                after: within,
            }))
    }
}
