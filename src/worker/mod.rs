//! A process that serves: it registers, campaigns for leadership and publishes its metrics.

mod builder;
mod election;
mod publisher;
mod session;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::metrics::{LoadReporter, Sampler};
use crate::node::{HealthStatus, Node, NodeState};
use crate::store::{LazyStore, LeaseId, Revision, Store};

pub use builder::ClusterNodeBuilder;
use builder::NodeConfig;
use session::Session;

/// How long leaving may take: the rest is left to the lease running out.
const LEAVE_BUDGET: Duration = Duration::from_millis(1500);
/// How many of its latest leases a run remembers as its own.
const OWN_LEASES: usize = 16;

/// A term of leadership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leadership {
    /// Who leads. Its metadata is as of the moment of asking.
    pub node: Arc<Node>,
    /// The fencing token: the revision that created the leader's election key. Every later term
    /// in the group has a greater one, so a system that remembers the greatest token it has seen
    /// can refuse a leader that does not know yet that it was replaced.
    pub epoch: Revision,
}

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
/// node.wait_for_leadership().await;
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
    store: LazyStore,
    running: AtomicBool,
    draining: AtomicBool,
    health: watch::Sender<HealthStatus>,
    /// The entry as it was last put together: what `leadership` answers with.
    entry: Mutex<Node>,
    reporter: LoadReporter,
    session: ArcSwapOption<Session>,
    past: Mutex<Past>,
    term: ArcSwapOption<Term>,
    /// Bumped whenever `term` changes.
    term_changed: watch::Sender<()>,
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
}

/// Leadership under one session: it ends with the session's deadline, whoever notices.
struct Term {
    epoch: Revision,
    session: Arc<Session>,
}

enum Command {
    Resign(oneshot::Sender<Result<(), ClusterError>>),
    Transfer(String, oneshot::Sender<Result<(), ClusterError>>),
    Drain(oneshot::Sender<Result<(), ClusterError>>),
}

impl fmt::Debug for ClusterNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterNode")
            .field("id", &self.shared.config.id)
            .field("group", &self.shared.config.group)
            .field("health", &self.current_health())
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
        Self {
            shared: Arc::new(Shared {
                keys: GroupKeys::new(&config.etcd.key_prefix, &config.group),
                store: LazyStore::new(config.etcd.clone(), config.store.clone()),
                entry: Mutex::new(config.node()),
                config,
                invalid,
                running: AtomicBool::new(false),
                draining: AtomicBool::new(false),
                health: watch::Sender::new(HealthStatus::Unknown),
                reporter: LoadReporter::new(),
                session: ArcSwapOption::empty(),
                past: Mutex::default(),
                term: ArcSwapOption::empty(),
                term_changed: watch::Sender::new(()),
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

    /// Its id.
    pub fn id(&self) -> &str {
        &self.shared.config.id
    }

    /// Its group.
    pub fn group_name(&self) -> &str {
        &self.shared.config.group
    }

    /// Registers, campaigns and publishes until `shutdown` resolves; then gives up leadership, removes
    /// its own keys by revoking the lease, and returns. A lost connection or lease is never a reason to
    /// return: it registers again, for ever, after 1 s to 30 s.
    ///
    /// Returns within 2 s of `shutdown`, even if the store is silent; the lease then ends by
    /// itself. Spawns no task, so dropping the future stops everything, but without the clean-up.
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
        let (_running, mut inbox) = Running::start(shared)?;
        let store = shared.store.get()?;
        info!(group = %shared.config.group, node = %shared.config.id, "node starts");
        tokio::select! {
            () = shutdown => {}
            () = shared.live(&*store, &mut inbox) => {}
        }
        shared.leave(&*store).await;
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
    /// plus the lease's TTL, less a margin of 500 ms or a tenth of the TTL, whichever is more.
    pub fn is_leader(&self) -> bool {
        self.shared.epoch().is_some()
    }

    /// The term this node holds at this instant, with its fencing token; `None` unless
    /// [`is_leader`](Self::is_leader).
    pub fn leadership(&self) -> Option<Leadership> {
        let epoch = self.shared.epoch()?;
        let node = self.shared.entry().clone();
        Some(Leadership {
            node: Arc::new(node),
            epoch,
        })
    }

    /// Waits until this node leads.
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

    /// Hands leadership to `target`, if it is next in line. From there on it is not the leader;
    /// the target sees it within the time of one watch event. To itself it hands nothing.
    ///
    /// # Errors
    ///
    /// [`NotLeader`](ClusterError::NotLeader);
    /// [`TransferRefused`](ClusterError::TransferRefused) when the target is not a candidate, or
    /// another one is ahead of it: this node then still leads.
    /// [`NotRunning`](ClusterError::NotRunning), or the store's.
    pub async fn transfer_to(&self, target: impl Into<String>) -> Result<(), ClusterError> {
        let target = target.into();
        self.ask(|reply| Command::Transfer(target, reply)).await
    }

    /// Announces that it takes no new requests: its entry says `draining`, it gives up leadership
    /// and no longer campaigns, but stays registered until it is stopped. There is no way back
    /// short of a new `ClusterNode`.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning), or the store's; the node drains all the same as
    /// soon as the store can be written.
    pub async fn drain(&self) -> Result<(), ClusterError> {
        self.ask(Command::Drain).await
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
        answer.await.map_err(|_| not_running())?
    }
}

/// Makes sure that there is one run at a time, and leaves a clean state however it ends.
struct Running<'a>(&'a Shared);

impl<'a> Running<'a> {
    fn start(shared: &'a Shared) -> Result<(Self, mpsc::Receiver<Command>), ClusterError> {
        if shared.running.swap(true, Ordering::AcqRel) {
            return Err(ClusterError::AlreadyRunning {
                what: shared.what(),
            });
        }
        let (commands, inbox) = mpsc::channel(16);
        *shared.commands() = Some(commands);
        Ok((Self(shared), inbox))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.commands() = None;
        self.0.end_term();
        self.0.session.store(None);
        *self.0.past() = Past::default();
        self.0.set_health(HealthStatus::Unknown);
        self.0.running.store(false, Ordering::Release);
    }
}

impl Shared {
    fn what(&self) -> String {
        format!("node {}/{}", self.config.group, self.config.id)
    }

    fn entry(&self) -> MutexGuard<'_, Node> {
        self.entry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry to write now, as JSON.
    fn fresh_entry(&self) -> Vec<u8> {
        let mut entry = self.entry();
        entry.last_seen = unix_millis();
        if self.is_draining() {
            entry.state = NodeState::Draining;
        }
        // Only a map with keys that are no strings could fail, and `Node` has none.
        serde_json::to_vec(&*entry).unwrap_or_default()
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commands(&self) -> MutexGuard<'_, Option<mpsc::Sender<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Answers whether that is a change.
    fn set_health(&self, health: HealthStatus) -> bool {
        self.health.send_if_modified(|current| {
            let modified = *current != health;
            *current = health;
            modified
        })
    }

    fn epoch(&self) -> Option<Revision> {
        let term = self.term.load();
        let term = term.as_ref()?;
        term.session.is_valid().then_some(term.epoch)
    }

    fn begin_term(&self, epoch: Revision, session: &Arc<Session>) {
        let current = self.term.load();
        if current
            .as_ref()
            .is_some_and(|term| term.epoch == epoch && Arc::ptr_eq(&term.session, session))
        {
            return;
        }
        info!(group = %self.config.group, node = %self.config.id, epoch, "node leads");
        self.term.store(Some(Arc::new(Term {
            epoch,
            session: session.clone(),
        })));
        self.term_changed.send_replace(());
    }

    fn end_term(&self) {
        if let Some(term) = self.term.swap(None) {
            info!(group = %self.config.group, node = %self.config.id, epoch = term.epoch, "node leads no longer");
            self.term_changed.send_replace(());
        }
    }

    /// One session after another, for ever.
    async fn live(&self, store: &dyn Store, inbox: &mut mpsc::Receiver<Command>) {
        let mut backoff = Backoff::new();
        // One for all sessions: a collector that hangs is still called once at a time.
        let mut sampler = Sampler::new(self.config.collector.clone());
        loop {
            let started = Instant::now();
            let error = self.session(store, inbox, &mut sampler).await;
            self.end_term();
            self.set_health(HealthStatus::Unhealthy);
            let session = self.session.load_full();
            // A session that lasted proves that the store works: start over without delay, but
            // not at the same instant as every other node that lost its lease with this one.
            let lasted = session.as_ref().is_some_and(|session| {
                session.is_registered() && started.elapsed() > session.lease.ttl
            });
            let delay = if lasted {
                backoff.reset();
                Duration::from_millis(fastrand::u64(0..250))
            } else {
                backoff.next_delay()
            };
            warn!(group = %self.config.group, node = %self.config.id, %error, ?delay, "session lost, will register again");
            if matches!(error, ClusterError::LeaseNotFound { .. }) {
                self.session.store(None);
            } else if let Some(session) = session
                && !error.is_transient()
            {
                // Not to leave a lease behind that nobody renews. Best effort: it ends anyway.
                let _ = timeout(LEAVE_BUDGET, store.revoke(session.lease.id)).await;
            }
            self.refuse_while(tokio::time::sleep(delay), inbox, &error)
                .await;
        }
    }

    /// One lease's life, until it is lost.
    async fn session(
        &self,
        store: &dyn Store,
        inbox: &mut mpsc::Receiver<Command>,
        sampler: &mut Sampler,
    ) -> ClusterError {
        let sent = Instant::now();
        let lease = match store.grant(Duration::from_secs(self.config.ttl)).await {
            Ok(lease) => lease,
            Err(error) => return error,
        };
        debug!(group = %self.config.group, node = %self.config.id, lease = %lease.id, ttl = ?lease.ttl, "lease granted");
        let session = Arc::new(Session::new(lease, sent));
        self.session.store(Some(session.clone()));
        {
            let mut past = self.past();
            past.leases.push_back(lease.id);
            if past.leases.len() > OWN_LEASES {
                past.leases.pop_front();
            }
        }
        tokio::select! {
            error = self.keep_alive(store, &session) => error,
            error = self.take_part(store, &session, inbox) => error,
            error = self.publish(store, &session, sampler) => error,
        }
    }

    /// Revokes the lease. That removes what hangs on it, in one revision: the candidacy, and the
    /// registration unless another process has taken it over. Who waits for any of these keys sees
    /// them go now, not when the lease runs out.
    async fn leave(&self, store: &dyn Store) {
        self.end_term();
        let Some(session) = self.session.swap(None) else {
            return;
        };
        let leaving = async {
            loop {
                match store.revoke(session.lease.id).await {
                    // The connection may just have broken: there is time for another.
                    Err(error) if error.is_transient() => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    // Gone already, and every key with it.
                    Err(ClusterError::LeaseNotFound { .. }) => return Ok(()),
                    result => return result,
                }
            }
        };
        match timeout(LEAVE_BUDGET, leaving).await {
            Ok(Ok(())) => info!(group = %self.config.group, node = %self.config.id, "node left"),
            Ok(Err(error)) => {
                warn!(group = %self.config.group, node = %self.config.id, %error, "node left without cleaning up, its lease will run out");
            }
            Err(_) => {
                warn!(group = %self.config.group, node = %self.config.id, budget = ?LEAVE_BUDGET, "node left without an answer from the store, its lease will run out");
            }
        }
    }

    /// Answers whoever asks for something in the meantime, instead of letting them wait.
    async fn refuse_while(
        &self,
        pause: impl Future<Output = ()>,
        inbox: &mut mpsc::Receiver<Command>,
        error: &ClusterError,
    ) {
        tokio::pin!(pause);
        loop {
            let command = tokio::select! {
                () = &mut pause => return,
                Some(command) = inbox.recv() => command,
            };
            let reply = match command {
                Command::Resign(reply) | Command::Transfer(_, reply) => reply,
                Command::Drain(reply) => {
                    // That is a promise: it is kept as soon as the store can be written.
                    self.set_draining();
                    self.end_term();
                    reply
                }
            };
            let _ = reply.send(Err(error.clone()));
        }
    }
}

fn unix_millis() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
