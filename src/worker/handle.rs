//! The handle of a node: what an application reads from it, and what it asks it to do.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep};

use super::command::{Command, Reply};
use super::config::NodeConfig;
use super::refusals::RefusedSamples;
use super::run::run;
use super::session::SessionState;
use super::state::WorkerState;
use crate::error::ClusterError;
use crate::metrics::LoadReporter;
use crate::node::HealthStatus;
use crate::store::Revision;
use crate::view::Leadership;

/// How long no request may have been in flight until a draining node counts as idle: balancers
/// need a moment to learn that it drains.
const IDLE_FOR: Duration = Duration::from_millis(500);

/// A member of a group: registers under a lease, campaigns for leadership, publishes metrics.
///
/// Clones are handles to the same member. [`run_until`](Self::run_until) does the work; the other
/// methods read what the run has found out, or ask it to do something.
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
    state: Arc<WorkerState>,
}

impl fmt::Debug for ClusterNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterNode")
            .field("id", &self.id())
            .field("group", &self.group_name())
            .field("state", &self.session_state())
            .field("leader", &self.is_leader())
            .finish_non_exhaustive()
    }
}

/// What the node is, and its run.
impl ClusterNode {
    /// A node with this configuration. If it is `invalid`, that is what a run returns.
    pub(super) fn from_config(config: NodeConfig, invalid: Option<ClusterError>) -> Self {
        Self {
            state: Arc::new(WorkerState::new(config, invalid)),
        }
    }

    /// The node's id.
    pub fn id(&self) -> &str {
        self.state.id()
    }

    /// The node's group.
    pub fn group_name(&self) -> &str {
        self.state.group()
    }

    /// Reports in responses how loaded this node is, from the last sample of its collector. The
    /// collector is called while the node runs and
    /// [`metrics_update_interval`](crate::ClusterNodeBuilder::metrics_update_interval) is set; until
    /// then the reporter knows the number of requests in flight only.
    pub fn load_reporter(&self) -> LoadReporter {
        self.state.reporter.clone()
    }

    /// How many samples of its collector were not published since the node was built, because no
    /// reader would have accepted the entry. The node stays registered with the last good sample,
    /// and each limit is logged once.
    pub fn refused_samples(&self) -> RefusedSamples {
        self.state.refusals.counts()
    }

    /// Registers, campaigns and publishes until `shutdown` resolves; then gives up leadership,
    /// removes its own keys, and returns. A lost connection or lease never ends the run: the node
    /// registers again, without limit, after 0.5 s to 2 s while etcd is away, and after up to 30 s
    /// if it refuses.
    ///
    /// Returns within 2 s of `shutdown`, even if the store does not answer; the lease then expires
    /// by itself. A task of its own renews the lease, so that the lease stays alive while this
    /// future is not polled. Dropping the future ends that task and everything else, without the
    /// clean-up.
    ///
    /// # Errors
    ///
    /// The error that [`try_build`](crate::ClusterNodeBuilder::try_build) would have returned, and
    /// [`AlreadyRunning`](ClusterError::AlreadyRunning).
    pub async fn run_until(
        &self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ClusterError> {
        self.check_valid()?;
        let state = &*self.state;
        run(state, shutdown).await
    }

    /// Calls [`run_until`](Self::run_until) until a message arrives on `shutdown`, or its sender is
    /// dropped.
    ///
    /// # Errors
    ///
    /// The same as [`run_until`](Self::run_until).
    pub async fn run(&self, shutdown: &mut broadcast::Receiver<()>) -> Result<(), ClusterError> {
        self.run_until(async {
            // A message, a dropped sender and missed messages all mean the same here.
            let _ = shutdown.recv().await;
        })
        .await
    }

    fn check_valid(&self) -> Result<(), ClusterError> {
        match &self.state.invalid {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// How far the node has come with its lease and its registration.
    pub fn session_state(&self) -> SessionState {
        *self.state.session.borrow()
    }

    /// Follows [`session_state`](Self::session_state).
    pub fn watch_session_state(&self) -> watch::Receiver<SessionState> {
        self.state.session.subscribe()
    }

    /// Whether the node is registered and its lease is renewed.
    pub fn current_health(&self) -> HealthStatus {
        *self.state.health.borrow()
    }

    /// Follows [`current_health`](Self::current_health).
    pub fn watch_health(&self) -> watch::Receiver<HealthStatus> {
        self.state.health.subscribe()
    }

    /// Waits until this node's entry is known to be in the store.
    ///
    /// # Errors
    ///
    /// The same as [`until_leading`](Self::until_leading).
    pub async fn until_registered(&self) -> Result<(), ClusterError> {
        let mut state = self.watch_session_state();
        let registered = async {
            // The sender lives in `self`, so this cannot fail.
            let _ = state.wait_for(|state| state.is_registered()).await;
        };
        self.while_running(registered).await
    }

    /// Waits for `wanted`, but not longer than the run.
    async fn while_running<T>(&self, wanted: impl Future<Output = T>) -> Result<T, ClusterError> {
        self.check_valid()?;
        let state = &self.state;
        state.lifecycle.wait(wanted, || state.name()).await
    }
}

/// Leadership.
impl ClusterNode {
    /// Whether this node leads its group at this instant. It compares the clock with a local
    /// deadline, so that it turns false in time even if every task is blocked. Costs a clock read
    /// and an atomic load; never blocks.
    ///
    /// The deadline is the instant at which the last answered renewal was *sent*, plus the lease's
    /// TTL, less a margin of 500 ms or a tenth of the TTL, whichever is more. The clock goes on
    /// while the machine is suspended, on systems that have such a clock.
    pub fn is_leader(&self) -> bool {
        self.state.term().is_some()
    }

    /// The term that this node holds at this instant, with its fencing token; `None` unless
    /// [`is_leader`](Self::is_leader).
    pub fn leadership(&self) -> Option<Leadership> {
        let term = self.state.term()?;
        let node = self.state.entry().clone();
        Some(Leadership {
            node: Arc::new(node),
            epoch: term.epoch,
            key: term.key.clone(),
        })
    }

    /// Waits until this node leads, however long another node leads before.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning) as soon as the run ends, or if there is no run
    /// within five seconds; the error in the arguments, after
    /// [`build`](crate::ClusterNodeBuilder::build).
    pub async fn until_leading(&self) -> Result<Leadership, ClusterError> {
        self.while_running(self.wait_for_leadership()).await
    }

    /// Waits until this node leads; indefinitely if nobody calls `run`, or if the run ends. Prefer
    /// [`until_leading`](Self::until_leading), which returns an error then.
    pub async fn wait_for_leadership(&self) -> Leadership {
        let mut changed = self.state.term_changed.subscribe();
        loop {
            if let Some(leadership) = self.leadership() {
                return leadership;
            }
            // The sender lives in `self`, so this cannot fail.
            let _ = changed.changed().await;
        }
    }

    /// Waits until this node no longer leads in the term `epoch`: for a `select!` with the work of
    /// a leader. It observes the deadline itself, but only when its task is polled, and up to a second after a machine
    /// that was suspended goes on: [`is_leader`](Self::is_leader) is right at every instant.
    pub async fn wait_for_loss(&self, epoch: Revision) {
        let mut changed = self.state.term_changed.subscribe();
        loop {
            let Some(term) = self.state.term().filter(|term| term.epoch == epoch) else {
                return;
            };
            tokio::select! {
                biased;
                // The sender lives in `self`, so this cannot fail.
                _ = changed.changed() => {}
                () = term.tenure.until_over() => {}
            }
        }
    }

    /// Gives up leadership, or the place in the queue, and queues again behind all others. If no
    /// other candidate waits, the node leads again at once, with a greater token.
    ///
    /// Dropping the future takes back what has not begun, and nothing else.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning), or an error of the store, for which the call waits as
    /// [`drain`](Self::drain) does. A leader has given up its term all the same.
    pub async fn resign(&self) -> Result<(), ClusterError> {
        self.send(Command::Resign).await
    }

    /// Hands leadership to the node `target`. Candidates ahead of the target make way first, while
    /// this node still leads, so that there is one change of leader and a few milliseconds without
    /// one. If the target is this node itself, nothing happens.
    ///
    /// Dropping the future takes back a transfer that has not begun. One that has goes on, so after a time-out of one's
    /// own leadership may still be handed over.
    ///
    /// # Errors
    ///
    /// [`NotLeader`](ClusterError::NotLeader).
    ///
    /// [`TransferRefused`](ClusterError::TransferRefused) if another transfer is under way, or if
    /// the target is not a candidate, has just left, or has a candidate ahead of it that does not
    /// make way: because it cannot, as a node of `photon-etcd-cluster`, or not within 2 s. The term
    /// then goes on, after a short interruption if the target has just left.
    ///
    /// [`PermissionDenied`](ClusterError::PermissionDenied) if the etcd user lacks a right that a
    /// transfer needs, which the error names. The term goes on.
    ///
    /// [`NotRunning`](ClusterError::NotRunning), or an error of the store. After an error of the
    /// store it is unknown whether leadership was handed over; this node has given it up if that has begun. While the
    /// store fails, the call waits for it, as [`drain`](Self::drain) does, and hands over in the same term only:
    /// otherwise it is `NotLeader`.
    pub async fn transfer_to(&self, target: impl Into<String>) -> Result<(), ClusterError> {
        let target = target.into();
        let term = self.state.term().map(|term| term.epoch);
        let command = |reply| Command::Transfer {
            target,
            term,
            reply,
        };
        self.send(command).await
    }
}

/// Draining.
impl ClusterNode {
    /// Announces that the node takes no new requests: its entry says `draining`, it gives up
    /// leadership and no longer campaigns, but stays registered until it is stopped. Balancers stop
    /// picking it and let requests in flight end. Only a new `ClusterNode` serves again.
    ///
    /// Dropping the future does not stop it: the node drains.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning), and then nothing was written; or an error of the
    /// store, and then the node drains as soon as the store can be written. While the store fails,
    /// the call waits for it: for two seconds, and as long as the request that is under way takes.
    pub async fn drain(&self) -> Result<(), ClusterError> {
        self.send(Command::Drain).await
    }

    /// Drains, and waits until its [`load_reporter`](Self::load_reporter) has had no request in
    /// flight for half a second, or until `grace` is over. This is for the time between a process's
    /// signal to stop and its end:
    ///
    /// ```no_run
    /// # async fn example(node: pingora_etcd::ClusterNode) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut signals = pingora_etcd::worker::EndSignals::new()?;
    /// node.run_until(async {
    ///     signals.next().await;
    ///     node.drain_until_idle(std::time::Duration::from_secs(30)).await;
    /// }).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// Returns whether the node is idle. If nothing counts its requests (no
    /// [`enter`](LoadReporter::enter), no layer), that is unknown: then it waits for all of `grace`
    /// and returns false. While the store is away balancers cannot learn that the node drains, but
    /// the wait ends all the same; whether it is idle is looked at when [`drain`](Self::drain) has returned, which takes
    /// two seconds then.
    pub async fn drain_until_idle(&self, grace: Duration) -> bool {
        let reporter = &self.state.reporter;
        let idle = async {
            // Even after an error the node drains as soon as it can.
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
}

impl ClusterNode {
    /// Sends a command to the run, and waits for its outcome.
    async fn send(&self, command: impl FnOnce(Reply) -> Command) -> Result<(), ClusterError> {
        let state = &self.state;
        let not_running = || ClusterError::NotRunning { what: state.name() };
        let commands = state.commands().clone().ok_or_else(not_running)?;
        let (reply, outcome) = Reply::new();
        // The run may end at any time, and drops the commands that it has not carried out.
        let sent = commands.send(command(reply)).await;
        drop(commands);
        sent.map_err(|_| not_running())?;
        outcome.await.unwrap_or_else(|_| {
            if !state.lifecycle.is_running() {
                return Err(not_running());
            }
            let reason = "the lease was lost before it was carried out";
            Err(state.unavailable("command", reason))
        })
    }
}
