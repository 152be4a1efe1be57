//! The handle to a discovery: runs it, reads it, and waits for it.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{broadcast, watch};
use tracing::error_span;

use super::changes::Changes;
use super::follower::Follower;
use super::published::Published;
use super::rejected::RejectedEntries;
use super::settings::Settings;
use super::status::DiscoveryStatus;
use crate::error::ClusterError;
use crate::lifecycle::Lifecycle;
use crate::node::Node;
use crate::store::{LazyStore, StoreStatus};
use crate::supervise::in_span;
use crate::view::{ClusterEvent, Leadership, Nodes};

/// A live view of one group, kept current by a watch.
///
/// Clones are handles to the same view. [`run_until`](Self::run_until) follows the store; reads never
/// wait for it. While the store is away, the last view stays in use.
///
/// ```
/// use pingora_etcd::{EtcdOptions, ServiceDiscovery};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let discovery = ServiceDiscovery::builder(EtcdOptions::memory("doc-disc"), "my-service").try_build()?;
/// let running = discovery.clone();
/// let task = tokio::spawn(async move { running.run_until(std::future::pending()).await });
///
/// discovery.until_ready().await?;
/// for node in discovery.nodes().iter() {
///     println!("{} at {}", node.id, node.addr(8080));
/// }
/// if let Some(leadership) = discovery.leadership() {
///     println!("{} leads, token {}", leadership.node.id, leadership.epoch);
/// }
/// # task.abort();
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ServiceDiscovery {
    pub(super) source: Arc<Source>,
    pub(super) published: Arc<Published>,
}

/// What a discovery follows, and how.
pub(super) struct Source {
    pub(super) group: String,
    /// The error is one that `new` and `build` could not return: `run` returns it.
    pub(super) settings: Result<Settings, ClusterError>,
    pub(super) store: Arc<LazyStore>,
    pub(super) life: Lifecycle,
}

impl fmt::Debug for ServiceDiscovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceDiscovery")
            .field("group", &self.source.group)
            .field("status", &self.status())
            .field("nodes", &self.nodes().len())
            .finish_non_exhaustive()
    }
}

impl ServiceDiscovery {
    /// Whether this crate's nodes write the entries of the group, so that it has a leader, and operators have a word.
    /// Not so with another [`Registry`](super::Registry).
    pub fn is_ours(&self) -> bool {
        self.source
            .settings
            .as_ref()
            .is_ok_and(|settings| settings.keys.are_ours())
    }

    /// The name of the group.
    pub fn group_name(&self) -> &str {
        &self.source.group
    }

    /// Follows the group until `shutdown` resolves. A lost connection never makes it return: the view
    /// stays as it was, and following is resumed where it stopped, with attempts every 0.5 s to 2 s
    /// while etcd is away, and up to 30 s apart if etcd refuses. Dropping the future stops following;
    /// the tasks of the connection end with the last handle that uses it.
    ///
    /// # Errors
    ///
    /// The errors of [`try_build`](super::ServiceDiscoveryBuilder::try_build), and
    /// [`AlreadyRunning`](ClusterError::AlreadyRunning).
    pub async fn run_until(
        &self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ClusterError> {
        let Source {
            group,
            settings,
            store,
            life,
        } = &*self.source;
        let settings = settings.as_ref().map_err(Clone::clone)?;
        let _run = Run::begin(group, life, &self.published)?;
        let store = store.get()?;
        // At the level of errors, so that no filter by level removes the group from warnings.
        let span = error_span!("discovery", %group);
        let mut follower = Follower::new(group, settings, &self.published, &*store);
        tokio::select! {
            biased;
            () = shutdown => {}
            () = in_span(&span, follower.follow()) => {}
        }
        in_span(&span, follower.finish()).await;
        Ok(())
    }

    /// Follows the group until a message arrives on `shutdown`, or its sender is dropped; without
    /// limit if it is `None`. Prefer [`run_until`](Self::run_until).
    ///
    /// # Errors
    ///
    /// The same as [`run_until`](Self::run_until).
    pub async fn run(
        &self,
        shutdown: Option<&mut broadcast::Receiver<()>>,
    ) -> Result<(), ClusterError> {
        self.run_until(async {
            match shutdown {
                // A message, a dropped sender and missed messages all mean the same here.
                Some(shutdown) => drop(shutdown.recv().await),
                None => std::future::pending().await,
            }
        })
        .await
    }

    /// Whether a `run` is in progress.
    pub fn is_running(&self) -> bool {
        self.source.life.is_running()
    }

    /// The nodes. Costs one atomic load and one reference count; never blocks.
    pub fn nodes(&self) -> Arc<Nodes> {
        self.published.nodes.load_full()
    }

    /// The leader, if there is one and it is registered, with its current metadata. Costs as much as
    /// [`nodes`](Self::nodes).
    pub fn leader(&self) -> Option<Arc<Node>> {
        let leadership = self.published.leadership.load();
        Some(leadership.as_ref()?.node.clone())
    }

    /// The leader with its fencing token.
    pub fn leadership(&self) -> Option<Leadership> {
        self.published.leader()
    }

    /// Follows [`nodes`](Self::nodes). The receiver sees the latest view, not each one.
    pub fn watch_nodes(&self) -> watch::Receiver<Arc<Nodes>> {
        self.published.nodes_watch.subscribe()
    }

    /// Follows [`leader`](Self::leader). The receiver sees the latest leader, not each one.
    pub fn watch_leader(&self) -> watch::Receiver<Option<Arc<Node>>> {
        self.published.leader_watch.subscribe()
    }

    /// How current the view is.
    pub fn status(&self) -> DiscoveryStatus {
        self.published.status()
    }

    /// Follows [`status`](Self::status).
    pub fn watch_status(&self) -> watch::Receiver<DiscoveryStatus> {
        self.published.status.subscribe()
    }

    /// Whether the last write of the snapshot file has failed; false without such a file. The view does not depend on
    /// it, but the next start does if etcd is away then. The write is repeated, and the log says why it fails.
    pub fn is_snapshot_failing(&self) -> bool {
        self.published.snapshot_failing.load(Ordering::Relaxed)
    }

    /// How many entries were rejected since the start, by reason. Each such key is logged once for
    /// each reason.
    pub fn rejected_entries(&self) -> RejectedEntries {
        self.published.rejected_entries()
    }

    /// The state of the connection to the store: which endpoint is in use, and whether calls are
    /// attempted.
    pub fn store_status(&self) -> StoreStatus {
        match self.source.store.get() {
            Ok(store) => store.status(),
            Err(_) => StoreStatus::default(),
        }
    }

    /// The events from now on. A subscriber that is more than 256 events behind gets `Lagged` and has
    /// to start over from [`nodes`](Self::nodes); [`changes`](Self::changes) does that by itself.
    pub fn subscribe(&self) -> broadcast::Receiver<ClusterEvent> {
        self.published.events.subscribe()
    }

    /// The current state, then every change to it: applying them in order gives
    /// [`nodes`](Self::nodes) and [`leadership`](Self::leadership) at any time. A reader that is too
    /// slow is given the whole state again, and so are all readers after a relist.
    ///
    /// ```
    /// # use pingora_etcd::{Change, EtcdOptions, ServiceDiscovery};
    /// # async fn example(discovery: ServiceDiscovery) {
    /// let mut changes = discovery.changes();
    /// loop {
    ///     match changes.next().await {
    ///         Change::Reset(nodes) => println!("{} nodes", nodes.len()),
    ///         Change::Joined(node) => println!("{} joined", node.id),
    ///         Change::Left(node) => println!("{} left", node.id),
    ///         _ => {}
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// The stream does not end. Nothing changes while no run is in progress, which
    /// [`watch_status`](Self::watch_status) reports.
    pub fn changes(&self) -> Changes {
        Changes::new(self.published.clone())
    }

    /// Whether there has been a complete view since the start.
    pub fn is_ready(&self) -> bool {
        self.published.is_ready()
    }

    /// Waits for the first complete view.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning) as soon as the run ends, or if no run begins within
    /// five seconds. After [`build`](super::ServiceDiscoveryBuilder::build) with invalid arguments,
    /// the error about them. It does not fail because the store is away: add a timeout if that
    /// matters.
    pub async fn until_ready(&self) -> Result<(), ClusterError> {
        self.until(self.wait_ready()).await
    }

    /// Waits until there are at least `count` nodes, and returns all nodes.
    ///
    /// # Errors
    ///
    /// The same as [`until_ready`](Self::until_ready).
    pub async fn until_nodes(&self, count: usize) -> Result<Arc<Nodes>, ClusterError> {
        let mut nodes = self.watch_nodes();
        let enough = async {
            // The sender lives in `self`, so this cannot fail.
            match nodes.wait_for(|nodes| nodes.len() >= count).await {
                Ok(nodes) => nodes.clone(),
                Err(_) => self.nodes(),
            }
        };
        self.until(enough).await
    }

    /// Waits until there is a leader.
    ///
    /// # Errors
    ///
    /// The same as [`until_ready`](Self::until_ready).
    pub async fn until_leader(&self) -> Result<Leadership, ClusterError> {
        let mut leader = self.watch_leader();
        let led = async {
            loop {
                leader.mark_unchanged();
                if let Some(leadership) = self.leadership() {
                    return leadership;
                }
                // The sender lives in `self`, so this cannot fail.
                let _ = leader.changed().await;
            }
        };
        self.until(led).await
    }

    async fn until<T>(&self, wanted: impl Future<Output = T>) -> Result<T, ClusterError> {
        let Source {
            group,
            settings,
            life,
            ..
        } = &*self.source;
        if let Err(error) = settings {
            return Err(error.clone());
        }
        life.wait(wanted, || name_of(group)).await
    }

    /// Waits for the first complete view; without limit if nobody calls `run`, or if the run ends.
    /// Prefer [`until_ready`](Self::until_ready), which returns an error then.
    pub async fn wait_ready(&self) {
        // The sender lives in `self`, so this cannot fail; the same holds below.
        let mut ready = self.published.ready.subscribe();
        let _ = ready.wait_for(|ready| *ready).await;
    }

    /// Waits until there are at least `count` nodes; without limit if nobody calls `run`, or if the
    /// run ends. Prefer [`until_nodes`](Self::until_nodes), which returns an error then.
    pub async fn wait_for_nodes(&self, count: usize) {
        let mut nodes = self.watch_nodes();
        let _ = nodes.wait_for(|nodes| nodes.len() >= count).await;
    }

    /// Waits until there is a leader; without limit if nobody calls `run`, or if the run ends. Prefer
    /// [`until_leader`](Self::until_leader), which returns an error then.
    pub async fn wait_for_leader(&self) -> Arc<Node> {
        let mut leader = self.watch_leader();
        loop {
            if let Some(node) = &*leader.borrow_and_update() {
                return node.clone();
            }
            let _ = leader.changed().await;
        }
    }
}

/// What errors call a discovery.
fn name_of(group: &str) -> String {
    format!("discovery of {group}")
}

/// One run at a time; it ends when this is dropped.
struct Run<'a> {
    life: &'a Lifecycle,
    published: &'a Published,
}

impl<'a> Run<'a> {
    fn begin(
        group: &str,
        life: &'a Lifecycle,
        published: &'a Published,
    ) -> Result<Self, ClusterError> {
        if !life.begin() {
            return Err(ClusterError::AlreadyRunning {
                what: name_of(group),
            });
        }
        published.run_begins();
        Ok(Self { life, published })
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.published.run_ended();
        self.life.end();
    }
}
