//! [`MemoryStore`], the handle to an in-memory store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::keeper::MemoryKeeper;
use super::server::MemoryServer;
use super::watch::MemoryWatcher;
use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};
use crate::store::clock::Clock;
use crate::store::traits::{LeaseKeeper, Store, Watcher};
use crate::store::types::{Lease, Listing, Selector, Txn, WatchRange};
use crate::sync::lock;

/// A coordination store in this process, for demos and tests. Its data is lost with the process.
///
/// Clones are handles to the same store. It works in any runtime, also under tokio's paused clock, where leases expire
/// and time-outs end at once. With the feature `test-util` it can be made to fail: `set_fault` (refusal, silence),
/// `expire_lease`, `end_watches`, `compact`.
///
/// ```
/// use std::sync::Arc;
/// use pingora_etcd::store::MemoryStore;
/// use pingora_etcd::{ClusterNodeBuilder, EtcdOptions, ServiceDiscovery};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?.block_on(async {
/// // In a test with `#[tokio::test(start_paused = true)]`:
/// let store = MemoryStore::new();
/// let options = EtcdOptions::memory(""); // for the key prefix and the times
/// let node = ClusterNodeBuilder::new(options.clone(), "w1", "10.0.0.1".parse()?, "web")
///     .store(Arc::new(store.clone()))
///     .try_build()?;
/// let discovery = ServiceDiscovery::builder(options, "web")
///     .store(Arc::new(store.clone()))
///     .try_build()?;
/// let (running, following) = (node.clone(), discovery.clone());
/// tokio::spawn(async move { running.run_until(std::future::pending()).await });
/// tokio::spawn(async move { following.run_until(std::future::pending()).await });
/// node.until_leading().await?;
/// discovery.wait_ready().await;
/// assert_eq!(discovery.leader().map(|leader| leader.id.clone()).as_deref(), Some("w1"));
/// # Ok::<(), Box<dyn std::error::Error>>(()) })?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct MemoryStore {
    pub(super) server: Arc<MemoryServer>,
}

static NAMED: Mutex<BTreeMap<String, Weak<MemoryServer>>> = Mutex::new(BTreeMap::new());

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// A new, empty store.
    pub fn new() -> Self {
        Self {
            server: Arc::new(MemoryServer::new()),
        }
    }

    /// The store of that name in this process. It lives as long as a handle to it does.
    pub fn named(name: &str) -> Self {
        let mut named = lock(&NAMED);
        named.retain(|_, server| server.strong_count() > 0);
        if let Some(server) = named.get(name).and_then(Weak::upgrade) {
            return Self { server };
        }
        let store = Self::new();
        named.insert(name.to_owned(), Arc::downgrade(&store.server));
        store
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.server.clock)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.server
            .serve("grant", |state| Ok(state.grant(ttl, Instant::now())))
            .await
            // Watchers sleep until the next lease is due, which may be this one now.
            .inspect(|_| self.server.wake())
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        Box::new(MemoryKeeper {
            server: self.server.clone(),
            lease: lease.id,
        })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.server
            .serve("revoke", |state| {
                if state.end_lease(lease) {
                    Ok(())
                } else {
                    Err(ClusterError::LeaseNotFound { lease })
                }
            })
            .await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.server
            .serve("lease", |state| state.keys_of(lease))
            .await
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        self.server.serve("txn", |state| state.txn(txn)).await
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.server
            .serve("list", |state| state.list(keys, at))
            .await
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let (generation, revision) = self
            .server
            .serve("watch", |state| Ok((state.generation, state.revision)))
            .await?;
        let server = self.server.clone();
        Ok(Box::new(MemoryWatcher::new(
            server, generation, revision, ranges,
        )))
    }
}
