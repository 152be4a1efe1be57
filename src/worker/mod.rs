//! A process that serves: it registers, campaigns for leadership and publishes its metrics.

mod access;
mod builder;
mod election;
mod handover;
mod lease;
mod lease_pool;
mod publisher;
mod run;
mod session;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::lifecycle::Lifecycle;
use crate::metrics::LoadReporter;
use crate::node::{HealthStatus, Node};
use crate::store::{LazyStore, LeaseId, Revision};
use crate::sync::lock;
use crate::view::Leadership;

use access::Access;
pub use builder::ClusterNodeBuilder;
use builder::NodeConfig;
pub(crate) use builder::check_ttl;
pub(crate) use lease_pool::LeasePool;
use publisher::Refusals;
pub use publisher::RefusedSamples;
use run::Running;
pub use session::SessionState;
use session::Tenure;

/// How many of its latest leases a run remembers as its own.
const OWN_LEASES: usize = 16;
/// How long no request may have been in flight until a draining node counts as idle: balancers
/// need a moment to hear of it.
const IDLE_FOR: Duration = Duration::from_millis(500);

/// A member of a group: registers under a lease, campaigns for leadership, publishes metrics.
///
/// Clones are handles to the same member. [`run_until`](Self::run_until) does the work;
/// everything else reads what it found or asks it for something.
///
/// ```
/// use pingora_etcd::{ClusterNodeBuilder, EtcdOptions};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let node = ClusterNodeBuilder::new(
///     EtcdOptions::memory("doc-node"), // or ["http://10.0.0.1:2379"]
///     "node-1",
///     "192.168.1.10".parse()?,
///     "my-service",
/// )
/// .port(8080)
/// .ttl(5)
/// .try_build()?;
///
/// let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
/// let running = node.clone();
/// let task = tokio::spawn(async move {
///     running.run_until(async { _ = stopped.await }).await
/// });
///
/// node.until_leading().await?;
/// assert!(node.is_leader());
/// stop.send(()).unwrap();
/// task.await??;
/// assert!(!node.is_leader());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ClusterNode {
    shared: Arc<Shared>,
}

struct Shared {
    config: NodeConfig,
    /// Where `new` and `build` leave what `try_build` would have returned.
    invalid: Option<ClusterError>,
    keys: GroupKeys,
    store: Arc<LazyStore>,
    life: Lifecycle,
    draining: AtomicBool,
    /// What it turned out not to be allowed.
    access: Mutex<Access>,
    health: watch::Sender<HealthStatus>,
    state: watch::Sender<SessionState>,
    /// The entry as it was last put together: what `leadership` answers with.
    entry: Mutex<Node>,
    reporter: LoadReporter,
    refused: Refusals,
    past: Mutex<Past>,
    term: ArcSwapOption<Term>,
    /// Bumped whenever `term` changes.
    term_changed: watch::Sender<()>,
    /// What is known of the election has to be read again.
    reread: Notify,
    /// To the run in progress.
    commands: Mutex<Option<mpsc::Sender<Command>>>,
}

/// What this run has been through.
#[derive(Debug, Default)]
struct Past {
    /// Its leases, the latest last. Older ones than these have run out.
    leases: VecDeque<LeaseId>,
    /// It has seen itself registered.
    was_registered: bool,
    /// The create revision of a candidacy that has been given up, 0 for none. Whatever became of
    /// the request to delete it, it never leads again.
    abandoned: Revision,
    /// It has asked who is to lead next, and may have left a request behind.
    has_asked: bool,
    /// The history that the store was last seen to have: its cluster, and how far it went.
    history: Option<(u64, Revision)>,
    /// The candidate without a lease that was told in the log.
    told_without_lease: Option<String>,
    /// On the store's clock: until then nobody's leadership is claimed, because leases of another
    /// history may still be counted on.
    quiet_until: Duration,
}

/// Leadership under one lease: it ends with the lease's deadline, whoever notices.
struct Term {
    epoch: Revision,
    key: Arc<str>,
    tenure: Arc<Tenure>,
}

type Reply = oneshot::Sender<Result<(), ClusterError>>;

enum Command {
    Resign(Reply),
    Transfer(String, Reply),
    Drain(Reply),
}

impl fmt::Debug for ClusterNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterNode")
            .field("id", &self.shared.config.id)
            .field("group", &self.shared.config.group)
            .field("state", &self.session_state())
            .field("leader", &self.is_leader())
            .finish_non_exhaustive()
    }
}

impl ClusterNode {
    /// A member with this lease TTL in seconds (5 by default) and no metrics. Prefer
    /// [`ClusterNodeBuilder`], which says what is wrong at once: here a bad argument is reported
    /// by [`run`](Self::run).
    pub fn new(
        etcd_endpoints: Vec<String>,
        node_id: String,
        node_ip: IpAddr,
        group_name: String,
        ttl: Option<i64>,
    ) -> Self {
        let mut builder = ClusterNodeBuilder::new(etcd_endpoints, node_id, node_ip, group_name);
        if let Some(ttl) = ttl {
            builder = builder.ttl(ttl);
        }
        builder.build()
    }

    fn from_config(config: NodeConfig, invalid: Option<ClusterError>) -> Self {
        let store = match &config.pool {
            Some(pool) => pool.store().clone(),
            None => Arc::new(LazyStore::new(config.etcd.clone(), config.store.clone())),
        };
        Self {
            shared: Arc::new(Shared {
                keys: GroupKeys::new(&config.etcd.prefix(), &config.group),
                store,
                entry: Mutex::new(config.node()),
                config,
                invalid,
                life: Lifecycle::default(),
                draining: AtomicBool::new(false),
                access: Mutex::default(),
                health: watch::Sender::new(HealthStatus::Unknown),
                state: watch::Sender::default(),
                reporter: LoadReporter::new(),
                refused: Refusals::default(),
                past: Mutex::default(),
                term: ArcSwapOption::empty(),
                term_changed: watch::Sender::new(()),
                reread: Notify::new(),
                commands: Mutex::new(None),
            }),
        }
    }

    /// Says in responses how loaded this node is, with what its collector said last. The collector
    /// is asked while the node runs and
    /// [`metrics_update_interval`](ClusterNodeBuilder::metrics_update_interval) is set; until then
    /// the reporter knows of requests in flight only.
    pub fn load_reporter(&self) -> LoadReporter {
        self.shared.reporter.clone()
    }

    /// How many samples of its collector were not published since it was built, because no reader
    /// would have taken them. The node stays registered with the last good one, and each limit is
    /// logged once.
    pub fn refused_samples(&self) -> RefusedSamples {
        self.shared.refused.so_far()
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.shared.config.id
    }

    /// Its group.
    pub fn group_name(&self) -> &str {
        &self.shared.config.group
    }

    /// Registers, campaigns and publishes until `shutdown` resolves; then gives up leadership, removes
    /// its own keys, and returns. A lost connection or lease is never a reason to return: it
    /// registers again, for ever, after 0.5 s to 2 s while
    /// etcd is away, and up to 30 s where it refuses.
    ///
    /// Returns within 2 s of `shutdown`, even if the store is silent; the lease then ends by
    /// itself. Its lease is renewed by a task of its own, so that it lives on while this future has to
    /// wait for its turn. Dropping the future ends that task and everything else, without the
    /// clean-up.
    ///
    /// # Errors
    ///
    /// What [`try_build`](ClusterNodeBuilder::try_build) would have said, and
    /// [`AlreadyRunning`](ClusterError::AlreadyRunning).
    pub async fn run_until(
        &self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ClusterError> {
        let shared = &*self.shared;
        if let Some(error) = &shared.invalid {
            return Err(error.clone());
        }
        let (running, mut inbox) = Running::start(shared)?;
        let store = shared.store.get()?;
        tokio::select! {
            biased;
            () = shutdown => {}
            never = running.lease().be_kept(&store) => match never {},
            () = shared.live(&*store, running.lease(), &mut inbox) => {}
        }
        running.leave(&*store).await;
        Ok(())
    }

    /// [`run_until`](Self::run_until) a message arrives on `shutdown`, or its sender is dropped.
    ///
    /// # Errors
    ///
    /// As [`run_until`](Self::run_until).
    pub async fn run(&self, shutdown: &mut broadcast::Receiver<()>) -> Result<(), ClusterError> {
        self.run_until(async {
            // A message, a sender that is gone and missed messages all mean the same here.
            let _ = shutdown.recv().await;
        })
        .await
    }

    /// Whether this node leads its group at this instant. Compares the clock with the local
    /// deadline, so that it turns false in time even if every task is stuck. Costs a clock read
    /// and an atomic load; never blocks.
    ///
    /// The deadline is the instant at which the last renewal that was answered had been *sent*,
    /// plus the lease's TTL, less a margin of 500 ms or a tenth of the TTL, whichever is more; on
    /// a clock that goes on while the machine is suspended, where there is one.
    pub fn is_leader(&self) -> bool {
        self.shared.term().is_some()
    }

    /// The term this node holds at this instant, with its fencing token; `None` unless
    /// [`is_leader`](Self::is_leader).
    pub fn leadership(&self) -> Option<Leadership> {
        let term = self.shared.term()?;
        let node = self.shared.entry().clone();
        Some(Leadership {
            node: Arc::new(node),
            epoch: term.epoch,
            key: term.key.clone(),
        })
    }

    /// Waits until this node leads.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning) as soon as the run ends, or if there is none within
    /// five seconds; what is wrong with the arguments, after [`build`](ClusterNodeBuilder::build).
    /// It does not end because somebody else leads.
    pub async fn until_leading(&self) -> Result<Leadership, ClusterError> {
        self.until(self.wait_for_leadership()).await
    }

    /// Waits until this node's entry is known to be in the store.
    ///
    /// # Errors
    ///
    /// As [`until_leading`](Self::until_leading).
    pub async fn until_registered(&self) -> Result<(), ClusterError> {
        let mut state = self.watch_session_state();
        let registered = async {
            // The sender lives in `self`, so this cannot fail.
            let _ = state.wait_for(|state| state.is_registered()).await;
        };
        self.until(registered).await
    }

    async fn until<T>(&self, wanted: impl Future<Output = T>) -> Result<T, ClusterError> {
        if let Some(error) = &self.shared.invalid {
            return Err(error.clone());
        }
        let shared = &self.shared;
        shared.life.wait(wanted, || shared.what()).await
    }

    /// Waits until this node leads: for ever if nobody calls `run`, or if it ends. Prefer
    /// [`until_leading`](Self::until_leading), which says so.
    pub async fn wait_for_leadership(&self) -> Leadership {
        let mut changed = self.shared.term_changed.subscribe();
        loop {
            if let Some(leadership) = self.leadership() {
                return leadership;
            }
            // The sender lives in `self`, so this cannot fail.
            let _ = changed.changed().await;
        }
    }

    /// Waits until this node does not lead, or does so in another term than `epoch`: what a
    /// leader's work runs in a `select!` with. Notices the deadline by itself, but only as soon as
    /// its task is run: see [`is_leader`](Self::is_leader) for what holds at any instant.
    pub async fn wait_for_loss(&self, epoch: Revision) {
        let mut changed = self.shared.term_changed.subscribe();
        loop {
            let Some(term) = self.shared.term().filter(|term| term.epoch == epoch) else {
                return;
            };
            tokio::select! {
                biased;
                // The sender lives in `self`, so this cannot fail.
                _ = changed.changed() => {}
                () = sleep(term.tenure.remaining()) => {}
            }
        }
    }

    /// Where it stands with its lease and its entry, in detail.
    pub fn session_state(&self) -> SessionState {
        *self.shared.state.borrow()
    }

    /// Follows [`session_state`](Self::session_state).
    pub fn watch_session_state(&self) -> watch::Receiver<SessionState> {
        self.shared.state.subscribe()
    }

    /// How it stands with the store.
    pub fn current_health(&self) -> HealthStatus {
        *self.shared.health.borrow()
    }

    /// Follows [`current_health`](Self::current_health).
    pub fn watch_health(&self) -> watch::Receiver<HealthStatus> {
        self.shared.health.subscribe()
    }

    /// Gives up leadership, or its place in the queue, and queues again behind all others. With
    /// nobody else waiting it leads again at once, with a greater token.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning), or the store's.
    pub async fn resign(&self) -> Result<(), ClusterError> {
        self.ask(Command::Resign).await
    }

    /// Hands leadership to `target`. Candidates ahead of it make way first, while this node still
    /// leads: then there is one change of leader and a few milliseconds without one. To itself it
    /// hands nothing.
    ///
    /// # Errors
    ///
    /// [`NotLeader`](ClusterError::NotLeader);
    /// [`TransferRefused`](ClusterError::TransferRefused) when the target is not a candidate, has
    /// just left, or has a candidate ahead of it that does not make way: because it cannot, being
    /// a node of `photon-etcd-cluster`, or not within 2 s; and while another transfer is under way.
    /// The term then goes on, if the target has just left after a moment without it.
    /// [`PermissionDenied`](ClusterError::PermissionDenied) when the etcd user lacks a right that
    /// this needs, which is named; the term goes on.
    /// [`NotRunning`](ClusterError::NotRunning); or the store's, and then it is not known whether
    /// leadership was handed over, and this node has given it up.
    pub async fn transfer_to(&self, target: impl Into<String>) -> Result<(), ClusterError> {
        let target = target.into();
        self.ask(|reply| Command::Transfer(target, reply)).await
    }

    /// Announces that it takes no new requests: its entry says `draining`, it gives up leadership
    /// and no longer campaigns, but stays registered until it is stopped. Balancers stop picking
    /// it and let requests in flight end. There is no way back short of a new `ClusterNode`.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning), and then nothing has happened; or the store's, and
    /// the node drains all the same as soon as the store can be written.
    pub async fn drain(&self) -> Result<(), ClusterError> {
        self.ask(Command::Drain).await
    }

    /// Drains, and waits until its [`load_reporter`](Self::load_reporter) has had no request in
    /// flight for half a second, or until `grace` is over. What a process does between being told
    /// to stop and stopping:
    ///
    /// ```no_run
    /// # async fn example(node: pingora_etcd::ClusterNode) -> Result<(), pingora_etcd::ClusterError> {
    /// node.run_until(async {
    ///     let _ = tokio::signal::ctrl_c().await;
    ///     node.drain_until_idle(std::time::Duration::from_secs(30)).await;
    /// }).await
    /// # }
    /// ```
    ///
    /// Answers whether it is idle. Where nothing counts its requests (no
    /// [`enter`](LoadReporter::enter), no layer), that is not known: it waits for all of `grace`
    /// then, and answers false. While the store is away balancers cannot hear of it, and it ends all
    /// the same.
    pub async fn drain_until_idle(&self, grace: Duration) -> bool {
        let reporter = &self.shared.reporter;
        let idle = async {
            // Refused or not: the drain itself is a promise.
            let _ = self.drain().await;
            let mut busy = Instant::now();
            while busy.elapsed() < IDLE_FOR {
                sleep(Duration::from_millis(20)).await;
                if reporter.in_flight() > 0 || !reporter.is_counting() {
                    busy = Instant::now();
                }
            }
        };
        tokio::time::timeout(grace, idle).await.is_ok()
    }

    async fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), ClusterError>>) -> Command,
    ) -> Result<(), ClusterError> {
        let not_running = || ClusterError::NotRunning {
            what: self.shared.what(),
        };
        let commands = self.shared.commands().clone().ok_or_else(not_running)?;
        let (reply, answer) = oneshot::channel();
        // The run may end at any time, and takes with it what it has not answered.
        let sent = commands.send(command(reply)).await;
        drop(commands);
        sent.map_err(|_| not_running())?;
        answer.await.unwrap_or_else(|_| {
            if !self.shared.life.is_running() {
                return Err(not_running());
            }
            Err(ClusterError::Unavailable {
                endpoint: self.shared.config.etcd.named(),
                operation: "command",
                reason: "the lease was lost before it was carried out".to_owned(),
            })
        })
    }
}

impl Shared {
    fn what(&self) -> String {
        format!("node {}/{}", self.config.group, self.config.id)
    }

    fn entry(&self) -> MutexGuard<'_, Node> {
        lock(&self.entry)
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        lock(&self.past)
    }

    fn access(&self) -> MutexGuard<'_, Access> {
        lock(&self.access)
    }

    fn commands(&self) -> MutexGuard<'_, Option<mpsc::Sender<Command>>> {
        lock(&self.commands)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// The term of this instant.
    fn term(&self) -> Option<Arc<Term>> {
        let term = self.term.load();
        let term = term.as_ref()?;
        let counts = term.tenure.is_valid() || bugs::has(Bug::FlagInsteadOfClock);
        counts.then(|| term.clone())
    }
}
