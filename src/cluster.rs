//! The nodes and discoveries of one process over one connection, with one lease and one watch stream.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

#[cfg(feature = "discovery")]
use crate::discovery::ServiceDiscoveryBuilder;
use crate::error::ClusterError;
use crate::store::{EtcdOptions, LazyStore, Store};
use crate::worker::{ClusterNodeBuilder, DEFAULT_TTL, LeasePool, check_ttl};

/// One connection, one lease and one watch stream for all the nodes and discoveries of a process,
/// however many groups they are in.
///
/// A process that is a member of ten groups then costs etcd as much as a member of one group: one
/// renewal per third of the TTL, and one stream for watches. If the process dies, it leaves all
/// groups at the same instant. Clones are handles to the same cluster.
///
/// The connection belongs to the runtime in which it is first used: run everything in that one. A
/// task of its own renews the lease for as long as any of the nodes runs. A node that ends deletes
/// its own keys, and the last one ends the lease. A second node of the *same* group has another
/// lease, because candidates are distinguished by their leases; so has a node that is run again
/// while others go on.
///
/// ```
/// use pingora_etcd::{Cluster, EtcdOptions};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cluster = Cluster::connect(EtcdOptions::memory("doc-cluster"))?;
/// let ip = "10.0.0.1".parse()?;
/// let web = cluster.node("n1", ip, "web").port(8080).try_build()?;
/// let jobs = cluster.node("n1", ip, "jobs").try_build()?;
/// let peers = cluster.discovery("web").try_build()?;
///
/// let (stop, _) = tokio::sync::broadcast::channel(1);
/// let (mut a, mut b, mut c) = (stop.subscribe(), stop.subscribe(), stop.subscribe());
/// let run = async { tokio::try_join!(web.run(&mut a), jobs.run(&mut b), peers.run(Some(&mut c))) };
/// let work = async {
///     web.wait_for_leadership().await;
///     jobs.wait_for_leadership().await;
///     peers.wait_for_nodes(1).await;
///     stop.send(())
/// };
/// let (ran, stopped) = tokio::join!(run, work);
/// ran?;
/// stopped?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Cluster {
    etcd: EtcdOptions,
    pool: Arc<LeasePool>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("endpoints", &self.etcd.named())
            .field("ttl", &self.pool.ttl())
            .finish_non_exhaustive()
    }
}

/// Builds a [`Cluster`].
#[derive(Debug)]
pub struct ClusterBuilder {
    etcd: EtcdOptions,
    ttl: i64,
    store: Option<Arc<dyn Store>>,
}

impl ClusterBuilder {
    /// A cluster over this etcd.
    pub fn new(etcd: impl Into<EtcdOptions>) -> Self {
        Self {
            etcd: etcd.into(),
            ttl: DEFAULT_TTL,
            store: None,
        }
    }

    /// Time to live of the lease, in seconds: how long its nodes stay listed after a crash.
    /// Default: 5. Range: 1 to 86,400; etcd grants at least 2 by default.
    #[must_use]
    pub fn ttl(mut self, seconds: i64) -> Self {
        self.ttl = seconds;
        self
    }

    /// Uses this store instead of opening one. Of the etcd options only the key prefix matters then.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self
    }

    /// Checks everything. Does not connect yet: the first node or discovery that runs does.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn try_build(self) -> Result<Cluster, ClusterError> {
        if self.store.is_none() {
            self.etcd.validate()?;
        } else {
            self.etcd.check_key_prefix()?;
        }
        check_ttl(self.ttl)?;
        let store = Arc::new(LazyStore::new(self.etcd.clone(), self.store));
        Ok(Cluster {
            pool: Arc::new(LeasePool::new(self.ttl, self.etcd.prefix(), store)),
            etcd: self.etcd,
        })
    }
}

impl Cluster {
    /// A cluster over this etcd, with a TTL of 5 s. It connects when it is first used.
    ///
    /// # Errors
    ///
    /// The same as [`ClusterBuilder::try_build`].
    pub fn connect(etcd: impl Into<EtcdOptions>) -> Result<Self, ClusterError> {
        Self::builder(etcd).try_build()
    }

    /// A builder, to set another TTL or a store.
    pub fn builder(etcd: impl Into<EtcdOptions>) -> ClusterBuilder {
        ClusterBuilder::new(etcd)
    }

    /// A builder for a node that uses this cluster's connection and lease. The TTL is the
    /// cluster's.
    pub fn node(
        &self,
        id: impl Into<String>,
        ip: IpAddr,
        group: impl Into<String>,
    ) -> ClusterNodeBuilder {
        ClusterNodeBuilder::new(self.etcd.clone(), id, ip, group)
            .ttl(self.pool.ttl())
            .pool(self.pool.clone())
    }

    /// A builder for a discovery that uses this cluster's connection.
    #[cfg(feature = "discovery")]
    pub fn discovery(&self, group: impl Into<String>) -> ServiceDiscoveryBuilder {
        ServiceDiscoveryBuilder::new(self.etcd.clone(), group).lazy_store(self.pool.store())
    }

    /// The prefix of all keys; empty, or with a slash at its end.
    pub(crate) fn key_prefix(&self) -> String {
        self.etcd.prefix()
    }

    /// The store, which is opened at the first call.
    pub(crate) fn store(&self) -> Result<Arc<dyn Store>, ClusterError> {
        self.pool.store().get()
    }
}
