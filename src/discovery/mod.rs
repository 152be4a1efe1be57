//! A process that watches a group: its nodes, its leader, and what changes.

mod admission;
mod file;
#[cfg(feature = "test-util")]
#[doc(hidden)]
pub mod fuzzing;
mod snapshot;
mod suspects;
mod sync;
#[cfg(test)]
mod tests;
mod told;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use futures_core::Stream;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;

use crate::error::ClusterError;
use crate::keys::{self, GroupKeys};
use crate::lifecycle::Lifecycle;
use crate::node::Node;
use crate::store::{EtcdOptions, LazyStore, Store, StoreStatus};
use crate::sync::lock;
use crate::view::{Change, ClusterEvent, Leadership, Nodes};

use admission::Admission;
use sync::Follower;

pub use admission::{EntryLimits, NodeFilter};
pub use file::SnapshotFile;
pub use snapshot::RejectedEntries;
pub use suspects::SelfPreservation;

/// Events a slow subscriber may be behind before it misses some.
const EVENT_BUFFER: usize = 256;
/// Changes a slow reader may be behind before it is given a `Reset` instead.
const CHANGE_BUFFER: usize = 1_024;

/// How often changes are published at most, unless it is set.
pub(crate) const PUBLISH_INTERVAL: Duration = Duration::from_millis(20);

/// How current the view is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoveryStatus {
    /// There is no view yet.
    #[default]
    Connecting,
    /// The view follows the store.
    Live,
    /// The store is not heard; the view is as it was at that time.
    Stale {
        /// When it stopped being heard.
        since: SystemTime,
    },
    /// The view was read from a snapshot file, the store has not been heard yet. Nobody leads.
    FromDisk {
        /// When the view was what the store had.
        written: SystemTime,
    },
    /// Nobody follows the store any more, because the run has ended: the view is as it was at that
    /// time, and stays so until there is another run.
    Ended {
        /// When the run ended.
        since: SystemTime,
    },
}

impl fmt::Display for DiscoveryStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let age = |since: &SystemTime| {
            let age = SystemTime::now().duration_since(*since);
            age.unwrap_or_default().as_secs()
        };
        match self {
            Self::Connecting => f.write_str("connecting"),
            Self::Live => f.write_str("live"),
            Self::Stale { since } => write!(f, "stale for {} s", age(since)),
            Self::FromDisk { written } => write!(f, "from disk, {} s old", age(written)),
            Self::Ended { since } => write!(f, "not followed for {} s", age(since)),
        }
    }
}

/// A live view of one group, kept current by a watch.
///
/// Clones are handles to the same view. [`run_until`](Self::run_until) does the work; reads never
/// wait for it. While the store is away the last view keeps being served.
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
    shared: Arc<Shared>,
}

struct Shared {
    group: String,
    /// Where `new` and `build` leave what `try_build` would have returned.
    invalid: Option<ClusterError>,
    keys: GroupKeys,
    store: Arc<LazyStore>,
    life: Lifecycle,
    nodes: ArcSwap<Nodes>,
    leadership: ArcSwapOption<Leadership>,
    nodes_watch: watch::Sender<Arc<Nodes>>,
    leader_watch: watch::Sender<Option<Arc<Node>>>,
    status: watch::Sender<DiscoveryStatus>,
    ready: watch::Sender<bool>,
    key_prefix: String,
    admission: Admission,
    preserve: SelfPreservation,
    snapshot: Option<SnapshotFile>,
    publish_interval: Duration,
    serializable_fallback: bool,
    skipped: Mutex<RejectedEntries>,
    events: broadcast::Sender<ClusterEvent>,
    changes: broadcast::Sender<Change>,
    /// Held while a view is published together with its changes, so that a reader who joins sees
    /// either both or none.
    publishing: Mutex<()>,
}

impl fmt::Debug for ServiceDiscovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceDiscovery")
            .field("group", &self.shared.group)
            .field("status", &self.status())
            .field("nodes", &self.nodes().len())
            .finish_non_exhaustive()
    }
}

/// Builds a [`ServiceDiscovery`].
#[derive(Debug)]
pub struct ServiceDiscoveryBuilder {
    etcd: EtcdOptions,
    group: String,
    store: Option<Arc<dyn Store>>,
    /// A cluster's.
    lazy_store: Option<Arc<LazyStore>>,
    filter: NodeFilter,
    limits: EntryLimits,
    networks: Vec<String>,
    ports: Vec<String>,
    preserve: SelfPreservation,
    snapshot: Option<SnapshotFile>,
    publish_interval: Duration,
}

impl ServiceDiscoveryBuilder {
    /// A view of this group.
    pub fn new(etcd: impl Into<EtcdOptions>, group_name: impl Into<String>) -> Self {
        Self {
            etcd: etcd.into(),
            group: group_name.into(),
            store: None,
            lazy_store: None,
            filter: NodeFilter::default(),
            limits: EntryLimits::default(),
            networks: Vec::new(),
            ports: Vec::new(),
            preserve: SelfPreservation::default(),
            snapshot: None,
            publish_interval: PUBLISH_INTERVAL,
        }
    }

    /// Only these nodes. Default: all.
    #[must_use]
    pub fn filter(mut self, filter: NodeFilter) -> Self {
        self.filter = filter;
        self
    }

    /// Only nodes whose address is in one of these networks (`10.0.0.0/8`, `fd00::/8`, or a single
    /// address). Whoever can write to the store can point traffic anywhere: this says where it may
    /// go. Others are skipped, counted ([`ServiceDiscovery::rejected_entries`]), and logged once. Default:
    /// everywhere.
    #[must_use]
    pub fn allowed_networks<T: Into<String>>(
        mut self,
        networks: impl IntoIterator<Item = T>,
    ) -> Self {
        self.networks = networks.into_iter().map(Into::into).collect();
        self
    }

    /// Only nodes whose port is one of these (`8080`, or `9000-9100`); those that registered none
    /// are reached at the reader's own default. Default: any.
    #[must_use]
    pub fn allowed_ports<T: Into<String>>(mut self, ports: impl IntoIterator<Item = T>) -> Self {
        self.ports = ports.into_iter().map(Into::into).collect();
        self
    }

    /// How much an entry may take, and all of them.
    #[must_use]
    pub fn limits(mut self, limits: EntryLimits) -> Self {
        self.limits = limits;
        self
    }

    /// When nodes stay though their leases are gone. Default: on.
    #[must_use]
    pub fn self_preservation(mut self, preserve: SelfPreservation) -> Self {
        self.preserve = preserve;
        self
    }

    /// Keeps the nodes in this file, and serves them at a start without the store. A run that ends
    /// writes what has changed since the last write, for 1 s at most. Needs a runtime
    /// that has threads for blocking work, which every one of tokio's has. Default: none.
    #[must_use]
    pub fn snapshot_file(mut self, file: SnapshotFile) -> Self {
        self.snapshot = Some(file);
        self
    }

    /// How long after a change is published the next ones wait, to be published together. A change
    /// of leader does not wait. Default: 20 ms. Range: 0 to 10 s.
    #[must_use]
    pub fn publish_interval(mut self, interval: Duration) -> Self {
        self.publish_interval = interval;
        self
    }

    /// Uses this store instead of opening one: to share a connection between nodes and
    /// discoveries of one runtime, or for tests. Of the etcd options only the key prefix then
    /// matters.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self
    }

    pub(crate) fn lazy_store(mut self, store: &Arc<LazyStore>) -> Self {
        self.lazy_store = Some(store.clone());
        self
    }

    /// Checks everything and builds the discovery. Connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn try_build(self) -> Result<ServiceDiscovery, ClusterError> {
        let admission = self.validate()?;
        Ok(self.finish(Ok(admission)))
    }

    /// Builds the discovery; what [`try_build`](Self::try_build) would have refused is reported
    /// by `run`.
    pub fn build(self) -> ServiceDiscovery {
        let admission = self.validate();
        self.finish(admission)
    }

    fn validate(&self) -> Result<Admission, ClusterError> {
        if self.store.is_none() && self.lazy_store.is_none() {
            self.etcd.validate()?;
        } else {
            self.etcd.check_key_prefix()?;
        }
        keys::check_group(&self.group)?;
        self.limits.validate("limits")?;
        self.preserve.validate("self_preservation")?;
        if let Some(file) = &self.snapshot {
            file.validate("snapshot")?;
        }
        if self.publish_interval > Duration::from_secs(10) {
            let reason = format!("{:?} is out of range, 0 to 10 s", self.publish_interval);
            return Err(ClusterError::config("publish_interval", reason));
        }
        let networks = admission::networks(&self.networks)?;
        let ports: Vec<RangeInclusive<u16>> = admission::ports(&self.ports)?;
        Ok(Admission {
            filter: self.filter.clone(),
            limits: self.limits,
            networks,
            ports,
        })
    }

    fn finish(self, admission: Result<Admission, ClusterError>) -> ServiceDiscovery {
        let (admission, invalid) = match admission {
            Ok(admission) => (admission, None),
            Err(error) => (Admission::default(), Some(error)),
        };
        let key_prefix = self.etcd.prefix();
        let serializable_fallback = self.etcd.serializable_fallback;
        let nodes = Arc::new(Nodes::default());
        ServiceDiscovery {
            shared: Arc::new(Shared {
                keys: GroupKeys::new(&key_prefix, &self.group),
                group: self.group,
                invalid,
                store: match (self.store, self.lazy_store) {
                    (None, Some(shared)) => shared,
                    (store, _) => Arc::new(LazyStore::new(self.etcd, store)),
                },
                life: Lifecycle::default(),
                nodes: ArcSwap::new(nodes.clone()),
                leadership: ArcSwapOption::empty(),
                nodes_watch: watch::Sender::new(nodes),
                leader_watch: watch::Sender::new(None),
                status: watch::Sender::new(DiscoveryStatus::Connecting),
                ready: watch::Sender::new(false),
                key_prefix,
                admission,
                preserve: self.preserve,
                snapshot: self.snapshot,
                publish_interval: self.publish_interval,
                serializable_fallback,
                skipped: Mutex::default(),
                events: broadcast::Sender::new(EVENT_BUFFER),
                changes: broadcast::Sender::new(CHANGE_BUFFER),
                publishing: Mutex::new(()),
            }),
        }
    }
}

impl ServiceDiscovery {
    /// A view of this group. Prefer [`builder`](Self::builder), which says what is wrong at once:
    /// here a bad argument is reported by [`run`](Self::run).
    pub fn new(etcd_endpoints: Vec<String>, group_name: String) -> Self {
        ServiceDiscoveryBuilder::new(etcd_endpoints, group_name).build()
    }

    /// A builder for a view of this group.
    pub fn builder(
        etcd: impl Into<EtcdOptions>,
        group_name: impl Into<String>,
    ) -> ServiceDiscoveryBuilder {
        ServiceDiscoveryBuilder::new(etcd, group_name)
    }

    /// The group.
    pub fn group_name(&self) -> &str {
        &self.shared.group
    }

    /// Follows the group until `shutdown` resolves. A lost connection is never a reason to
    /// return: the view stays as it was, and following resumes where it stopped, for ever, after
    /// 0.5 s to 2 s while etcd is away, and up to 30 s where it refuses. Dropping the future stops
    /// following; the connection's own tasks end with the last handle that uses it.
    ///
    /// # Errors
    ///
    /// What [`try_build`](ServiceDiscoveryBuilder::try_build) would have said, and
    /// [`AlreadyRunning`](ClusterError::AlreadyRunning).
    pub async fn run_until(
        &self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ClusterError> {
        let shared = &*self.shared;
        if let Some(error) = &shared.invalid {
            return Err(error.clone());
        }
        let _running = Running::start(shared)?;
        let store = shared.store.get()?;
        let mut follower = Follower::new(shared);
        tokio::select! {
            biased;
            () = shutdown => {}
            () = follower.follow(&*store) => {}
        }
        follower.finish().await;
        Ok(())
    }

    /// [`run_until`](Self::run_until) a message arrives on `shutdown`, or its sender is dropped;
    /// for ever with `None`.
    ///
    /// # Errors
    ///
    /// As [`run_until`](Self::run_until).
    pub async fn run(
        &self,
        shutdown: Option<&mut broadcast::Receiver<()>>,
    ) -> Result<(), ClusterError> {
        self.run_until(async {
            match shutdown {
                // A message, a sender that is gone and missed messages all mean the same here.
                Some(shutdown) => drop(shutdown.recv().await),
                None => std::future::pending().await,
            }
        })
        .await
    }

    /// Whether a `run` is in progress.
    pub fn is_running(&self) -> bool {
        self.shared.life.is_running()
    }

    /// The nodes. One atomic load and one reference count; never blocks.
    pub fn nodes(&self) -> Arc<Nodes> {
        self.shared.nodes.load_full()
    }

    /// The leader, if there is one and it is registered. Its metadata is current. Costs as much
    /// as [`nodes`](Self::nodes).
    pub fn leader(&self) -> Option<Arc<Node>> {
        let leadership = self.shared.leadership.load();
        Some(leadership.as_ref()?.node.clone())
    }

    /// The leader with its fencing token.
    pub fn leadership(&self) -> Option<Leadership> {
        let leadership = self.shared.leadership.load();
        leadership.as_ref().map(|leadership| (**leadership).clone())
    }

    /// Follows [`nodes`](Self::nodes). Sees the latest view, not each one.
    pub fn watch_nodes(&self) -> watch::Receiver<Arc<Nodes>> {
        self.shared.nodes_watch.subscribe()
    }

    /// Follows [`leader`](Self::leader). Sees the latest one, not each one.
    pub fn watch_leader(&self) -> watch::Receiver<Option<Arc<Node>>> {
        self.shared.leader_watch.subscribe()
    }

    /// How current the view is.
    pub fn status(&self) -> DiscoveryStatus {
        *self.shared.status.borrow()
    }

    /// Follows [`status`](Self::status).
    pub fn watch_status(&self) -> watch::Receiver<DiscoveryStatus> {
        self.shared.status.subscribe()
    }

    /// How many entries have been rejected since the start, by reason. Each such key is logged once
    /// for each reason.
    pub fn rejected_entries(&self) -> RejectedEntries {
        *self.shared.lock_rejected()
    }

    /// How it stands with the store: which endpoint is in use, and whether calls are tried at all.
    pub fn store_status(&self) -> StoreStatus {
        match self.shared.store.get() {
            Ok(store) => store.status(),
            Err(_) => StoreStatus::default(),
        }
    }

    /// Events from now on. A subscriber more than 256 behind gets `Lagged` and has to start over
    /// from [`nodes`](Self::nodes); [`changes`](Self::changes) does that by itself.
    pub fn subscribe(&self) -> broadcast::Receiver<ClusterEvent> {
        self.shared.events.subscribe()
    }

    /// The state of now, then every change to it: folding them over nothing gives
    /// [`nodes`](Self::nodes) and [`leadership`](Self::leadership) at any time. A reader that is
    /// too slow is given the state anew, as is everybody after a relist.
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
    /// It does not end: while no run is in progress nothing changes, which
    /// [`watch_status`](Self::watch_status) tells.
    pub fn changes(&self) -> Changes {
        let mut changes = Changes {
            inner: BroadcastStream::new(self.shared.changes.subscribe()),
            shared: self.shared.clone(),
            first: VecDeque::new(),
        };
        changes.start_over();
        changes
    }

    /// Whether there has been a complete view since the start.
    pub fn is_ready(&self) -> bool {
        *self.shared.ready.borrow()
    }

    /// Waits for the first complete view.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning) as soon as the run ends, or if there is none within
    /// five seconds; what is wrong with the arguments, after [`build`](ServiceDiscoveryBuilder::build).
    /// It does not end because the store is away: add a timeout where that matters.
    pub async fn until_ready(&self) -> Result<(), ClusterError> {
        self.until(self.wait_ready()).await
    }

    /// Waits until there are at least `count` nodes, and answers with all of them.
    ///
    /// # Errors
    ///
    /// As [`until_ready`](Self::until_ready).
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
    /// As [`until_ready`](Self::until_ready).
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
        let shared = &self.shared;
        if let Some(error) = &shared.invalid {
            return Err(error.clone());
        }
        let what = || format!("discovery of {}", shared.group);
        shared.life.wait(wanted, what).await
    }

    /// Waits for the first complete view: for ever if nobody calls `run`, or if it ends. Prefer
    /// [`until_ready`](Self::until_ready), which says so.
    pub async fn wait_ready(&self) {
        // The sender lives in `self`, so this cannot fail; the same holds below.
        let _ = self.shared.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Waits until there are at least `count` nodes: for ever if nobody calls `run`, or if it ends.
    /// Prefer [`until_nodes`](Self::until_nodes), which says so.
    pub async fn wait_for_nodes(&self, count: usize) {
        let mut nodes = self.watch_nodes();
        let _ = nodes.wait_for(|nodes| nodes.len() >= count).await;
    }

    /// Waits until there is a leader: for ever if nobody calls `run`, or if it ends. Prefer
    /// [`until_leader`](Self::until_leader), which says so.
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

/// See [`ServiceDiscovery::changes`].
pub struct Changes {
    shared: Arc<Shared>,
    inner: BroadcastStream<Change>,
    /// Goes before what `inner` has.
    first: VecDeque<Change>,
}

impl Changes {
    /// The next change. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Change {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn start_over(&mut self) {
        let _publishing = self.shared.lock_publishing();
        self.inner = BroadcastStream::new(self.shared.changes.subscribe());
        self.first = self.shared.state_as_changes().into();
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Change> {
        loop {
            if let Some(change) = self.first.pop_front() {
                return Poll::Ready(change);
            }
            match Pin::new(&mut self.inner).poll_next(context) {
                Poll::Ready(Some(Ok(change))) => return Poll::Ready(change),
                // Too slow. (The sender lives in `shared`, so the stream cannot end.)
                Poll::Ready(_) => self.start_over(),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Stream for Changes {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Change>> {
        self.poll(context).map(Some)
    }
}

/// Makes sure that there is one run at a time.
struct Running<'a>(&'a Shared);

impl<'a> Running<'a> {
    fn start(shared: &'a Shared) -> Result<Self, ClusterError> {
        if !shared.life.begin() {
            return Err(ClusterError::AlreadyRunning {
                what: format!("discovery of {}", shared.group),
            });
        }
        // Somebody follows again, from a view that is as old as it is.
        let has_view = *shared.ready.borrow();
        shared.status.send_if_modified(|status| {
            let DiscoveryStatus::Ended { since } = *status else {
                return false;
            };
            *status = match has_view {
                true => DiscoveryStatus::Stale { since },
                false => DiscoveryStatus::Connecting,
            };
            true
        });
        Ok(Self(shared))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // Nobody follows any more: what is served from here on grows old.
        let since = SystemTime::now();
        let before = self.0.status.send_replace(DiscoveryStatus::Ended { since });
        if before == DiscoveryStatus::Live {
            let _ = self.0.events.send(ClusterEvent::Disconnected);
        }
        self.0.life.end();
    }
}

impl Shared {
    fn lock_publishing(&self) -> MutexGuard<'_, ()> {
        lock(&self.publishing)
    }

    fn lock_rejected(&self) -> MutexGuard<'_, RejectedEntries> {
        lock(&self.skipped)
    }

    fn state_as_changes(&self) -> [Change; 2] {
        let leadership = self.leadership.load();
        [
            Change::Reset(self.nodes.load_full()),
            Change::Leader(leadership.as_ref().map(|leadership| (**leadership).clone())),
        ]
    }

    /// Answers whether it had been live.
    fn went_stale(&self) -> bool {
        self.status.send_if_modified(|status| {
            let was_live = *status == DiscoveryStatus::Live;
            if was_live {
                *status = DiscoveryStatus::Stale {
                    since: SystemTime::now(),
                };
            }
            was_live
        })
    }
}
