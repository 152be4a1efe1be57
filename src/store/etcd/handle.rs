//! [`EtcdStore`], the store over etcd.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::LeaseTimeToLiveOptions;

use super::call::Repeat;
use super::connector::{Connector, ConnectorHandle, NewConnection};
use super::convert::{cluster_of, compare, operation, revision_of};
use super::grants::Grants;
use super::lease_keeper::EtcdKeeper;
use super::listing::Lister;
use super::options::EtcdOptions;
use super::status::Subject;
use super::watcher::EtcdWatcher;
use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};
use crate::store::traits::{LeaseKeeper, Store, Watcher};
use crate::store::types::{Lease, Listing, Page, Selector, StoreStatus, Txn, WatchRange};

/// The client of an etcd cluster; tested with 3.5. Clones share one connection.
#[derive(Debug, Clone)]
pub struct EtcdStore {
    connector: ConnectorHandle,
    lister: Lister,
    grants: Arc<Grants>,
}

/// Starts the background tasks of a new connection.
fn follow_up(connector: &Arc<Connector>, new: NewConnection) {
    #[cfg(feature = "tls")]
    super::cert_reload::follow(connector, &new);
    super::members::follow(connector, new);
}

fn about_lease(lease: LeaseId) -> Subject<'static> {
    Subject {
        keys: &[],
        lease: Some(lease),
    }
}

impl EtcdStore {
    /// A store that connects when it is first used.
    ///
    /// # Errors
    ///
    /// If an option is out of range, an endpoint is invalid, or a file cannot be used.
    pub fn new(options: EtcdOptions) -> Result<Self, ClusterError> {
        options.validate()?;
        Ok(Self::with(options))
    }

    /// With options that have been validated.
    pub(crate) fn with(options: EtcdOptions) -> Self {
        Self {
            connector: ConnectorHandle::new(options, follow_up),
            lister: Lister::new(),
            grants: Arc::default(),
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        // etcd counts whole seconds. Rounding up keeps the promise of at least `ttl`.
        let seconds = ttl.as_millis().div_ceil(1000).max(1);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let granted = self
            .connector
            .call(
                "grant",
                Subject::default(),
                Repeat::Never,
                |mut client| async move { client.lease_grant(seconds, None).await },
            )
            .await?;
        let id = LeaseId(granted.id());
        self.grants.add(id, cluster_of(granted.header()));
        Ok(Lease {
            id,
            ttl: Duration::from_secs(granted.ttl().unsigned_abs()),
        })
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        let granted_by = self.grants.cluster_of(lease.id);
        Box::new(EtcdKeeper::new(self.connector.clone(), lease, granted_by))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.connector
            .call(
                "revoke",
                about_lease(lease),
                Repeat::Never,
                |mut client| async move { client.lease_revoke(lease.0).await },
            )
            .await
            .map(drop)
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        let answer = self
            .connector
            .call(
                "lease",
                about_lease(lease),
                Repeat::OnAnotherConnection,
                |mut client| async move {
                    let options = LeaseTimeToLiveOptions::new().with_keys();
                    client.lease_time_to_live(lease.0, Some(options)).await
                },
            )
            .await?;
        // etcd reports an unknown lease by a TTL of -1, not by an error.
        if answer.ttl() < 0 {
            return Err(ClusterError::LeaseNotFound { lease });
        }
        let text = |key: &Vec<u8>| String::from_utf8_lossy(key).into_owned();
        Ok(answer.keys().iter().map(text).collect())
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let (lease, keys) = (txn.lease(), txn.keys());
        let keys: Vec<_> = keys.iter().map(String::as_str).collect();
        let conditions: Vec<_> = txn.conditions.iter().map(compare).collect();
        let writes: Vec<_> = txn.writes.into_iter().map(operation).collect();
        let request = etcd_client::Txn::new().when(conditions).and_then(writes);
        let subject = Subject { keys: &keys, lease };
        let response = self
            .connector
            .call("txn", subject, Repeat::Never, |mut client| {
                let request = request.clone();
                async move { client.txn(request).await }
            })
            .await?;
        let revision = revision_of(response.header());
        Ok(response.succeeded().then_some(revision))
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.lister.list(&self.connector, keys, at).await
    }

    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        self.lister.page(&self.connector, keys, start, at).await
    }

    async fn list_stale(&self, keys: &Selector) -> Result<Listing, ClusterError> {
        self.lister.stale(&self.connector, keys).await
    }

    fn status(&self) -> StoreStatus {
        let link = self.connector.link();
        let connection = link.connection.as_ref();
        StoreStatus {
            endpoint: connection.map(|connection| connection.endpoint.to_string()),
            round_trip: connection.map(|connection| connection.round_trips.mean()),
            circuit: link.breaker.circuit(),
        }
    }

    async fn list_all(&self, all: &[Selector]) -> Result<Vec<Listing>, ClusterError> {
        self.lister.all(&self.connector, all).await
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let watcher = EtcdWatcher::open(&self.connector, &ranges).await?;
        Ok(Box::new(watcher))
    }
}
