//! What the handles of a node and its run share: its configuration, its entry, its session and its
//! term.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tracing::{Span, debug, error_span, info};

use super::access::Access;
use super::command::Command;
use super::config::NodeConfig;
use super::refusals::Refusals;
use super::run_record::RunRecord;
use super::session::{Input, SessionState};
use super::tenure::Tenure;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::lifecycle::Lifecycle;
use crate::metrics::LoadReporter;
use crate::node::{HealthStatus, Node, NodeState, unix_millis};
use crate::store::{LazyStore, Revision};
use crate::sync::lock;

/// The state of one node.
pub(super) struct WorkerState {
    pub(super) config: NodeConfig,
    /// What is wrong with the configuration of a node that was built without checking it.
    pub(super) invalid: Option<ClusterError>,
    pub(super) keys: GroupKeys,
    pub(super) store: Arc<LazyStore>,
    pub(super) lifecycle: Lifecycle,
    pub(super) access: Access,
    pub(super) reporter: LoadReporter,
    pub(super) refusals: Refusals,
    pub(super) health: watch::Sender<HealthStatus>,
    pub(super) session: watch::Sender<SessionState>,
    /// Sent to whenever a term begins or ends.
    pub(super) term_changed: watch::Sender<()>,
    /// The election has to be read again.
    pub(super) reread: Notify,
    is_draining: AtomicBool,
    /// What the node's entry says, but for its time and for draining.
    entry: Mutex<Node>,
    record: Mutex<RunRecord>,
    term: ArcSwapOption<Term>,
    /// To the run in progress.
    commands: Mutex<Option<mpsc::Sender<Command>>>,
}

/// Leadership under one lease. It counts only while the lease's deadline has not passed.
pub(super) struct Term {
    /// The fencing token: the create revision of the candidacy.
    pub(super) epoch: Revision,
    /// The key of the candidacy.
    pub(super) key: Arc<str>,
    pub(super) tenure: Arc<Tenure>,
    /// How often the deadline had lapsed before the candidacy was read.
    lapses: u64,
}

impl WorkerState {
    pub(super) fn new(config: NodeConfig, invalid: Option<ClusterError>) -> Self {
        let store = match &config.pool {
            Some(pool) => pool.store().clone(),
            None => Arc::new(LazyStore::new(config.etcd.clone(), config.store.clone())),
        };
        let keys = GroupKeys::new(&config.etcd.prefix(), &config.group);
        Self {
            access: Access::new(keys.clone()),
            keys,
            store,
            entry: Mutex::new(config.node.clone()),
            reporter: config.reporter.clone(),
            config,
            invalid,
            lifecycle: Lifecycle::default(),
            refusals: Refusals::default(),
            health: watch::Sender::new(HealthStatus::Unknown),
            session: watch::Sender::default(),
            term_changed: watch::Sender::new(()),
            reread: Notify::new(),
            is_draining: AtomicBool::new(false),
            record: Mutex::default(),
            term: ArcSwapOption::empty(),
            commands: Mutex::new(None),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.config.node.id
    }

    pub(super) fn group(&self) -> &str {
        &self.config.group
    }

    /// The node in the words of an error.
    pub(super) fn name(&self) -> String {
        format!("node {}/{}", self.group(), self.id())
    }

    /// The span of a run. Its level is that of errors, so that a filter for warnings does not remove
    /// these fields from them.
    pub(super) fn span(&self) -> Span {
        error_span!("node", group = %self.group(), node = %self.id())
    }

    pub(super) fn record(&self) -> MutexGuard<'_, RunRecord> {
        lock(&self.record)
    }

    /// When the term of a node that leads is to be announced, if it is: its beginning at once.
    pub(super) fn announce_at(&self, leads: Option<Revision>) -> Option<Instant> {
        let epoch = leads?;
        let has_begun = self.term().is_some_and(|term| term.epoch == epoch);
        let record = self.record();
        let is_new = has_begun && record.announced != epoch;
        is_new.then(Instant::now).or(record.announce_due)
    }

    pub(super) fn commands(&self) -> MutexGuard<'_, Option<mpsc::Sender<Command>>> {
        lock(&self.commands)
    }

    pub(super) fn not_leader(&self) -> ClusterError {
        ClusterError::NotLeader {
            node: self.id().to_owned(),
            group: self.group().to_owned(),
        }
    }

    pub(super) fn unavailable(&self, operation: &'static str, reason: &str) -> ClusterError {
        ClusterError::Unavailable {
            endpoint: self.config.etcd.named(),
            operation,
            reason: reason.to_owned(),
        }
    }
}

/// The entry.
impl WorkerState {
    pub(super) fn entry(&self) -> MutexGuard<'_, Node> {
        lock(&self.entry)
    }

    pub(super) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    /// From here on every entry that is written says that the node drains.
    pub(super) fn set_draining(&self) {
        self.is_draining.store(true, Ordering::Release);
    }

    /// The entry to write now, as JSON.
    pub(super) fn entry_json(&self) -> Vec<u8> {
        self.entry_now().to_json()
    }

    /// The last entry before the node leaves, as JSON.
    pub(super) fn leaving_entry_json(&self) -> Vec<u8> {
        let mut entry = self.entry_now();
        entry.set_leaving();
        entry.to_json()
    }

    fn entry_now(&self) -> Node {
        let mut entry = self.entry().clone();
        entry.last_seen = unix_millis();
        if self.is_draining() {
            entry.state = NodeState::Draining;
        }
        entry
    }

    /// Whether an entry says of this run what does not change while the run lasts.
    pub(super) fn is_entry_current(&self, json: &[u8]) -> bool {
        // The own entry is converted to JSON and back, too, which may change a number slightly.
        let own = self.entry().clone().to_json();
        let own = serde_json::from_slice::<Node>(&own);
        let (Ok(mut own), Ok(entry)) = (own, serde_json::from_slice::<Node>(json)) else {
            return false;
        };
        own.state = entry.state;
        own.metadata.clone_from(&entry.metadata);
        !own.differs(&entry)
    }
}

/// The session and the term.
impl WorkerState {
    /// Sets the health. Returns whether it has changed.
    pub(super) fn set_health(&self, health: HealthStatus) -> bool {
        self.health.send_if_modified(|current| {
            let is_modified = *current != health;
            *current = health;
            is_modified
        })
    }

    /// Gives the session an input, and carries out what a change of its state implies.
    pub(super) fn feed(&self, input: Input) {
        let before = *self.session.borrow();
        let state = before.after(input);
        if state == before {
            return;
        }
        self.session.send_replace(state);
        debug!(%before, %state, "session state changed");
        match state {
            SessionState::Registered | SessionState::Active | SessionState::Draining => {
                if !before.is_registered() {
                    info!("node registered");
                    self.set_health(HealthStatus::Healthy);
                }
            }
            // What was read before may be outdated: nothing is claimed until it was read again.
            SessionState::Doubtful | SessionState::Lost => {
                self.end_term();
                self.set_health(HealthStatus::Unhealthy);
            }
            SessionState::BackingOff => self.end_term(),
            SessionState::Granted | SessionState::Closed => {}
        }
    }

    /// Resets the session when a run ends. Logs nothing: see `Running::drop`.
    pub(super) fn close_session(&self) {
        let closed = self.session.borrow().after(Input::Close);
        self.session.send_replace(closed);
        self.set_health(HealthStatus::Unknown);
    }

    /// The term at this instant; `None` as soon as its deadline has passed.
    pub(super) fn term(&self) -> Option<Arc<Term>> {
        let term = self.term.load();
        let term = term.as_ref()?;
        // In this order: a deadline that is extended late counts before it moves.
        let is_valid = term.tenure.is_valid() && term.tenure.lapses() == term.lapses;
        is_valid.then(|| term.clone())
    }

    /// `lapses` is how often the deadline had lapsed when the candidacy was read: a term never goes on by itself after that.
    pub(super) fn begin_term(&self, epoch: Revision, tenure: &Arc<Tenure>, lapses: u64) {
        let current = self.term.load();
        let is_same = current.as_ref().is_some_and(|term| {
            term.epoch == epoch && term.lapses == lapses && Arc::ptr_eq(&term.tenure, tenure)
        });
        if is_same {
            return;
        }
        self.term.store(Some(Arc::new(Term {
            epoch,
            key: self.keys.candidacy(tenure.lease.id).into(),
            tenure: tenure.clone(),
            lapses,
        })));
        self.term_changed.send_replace(());
        info!(epoch, "node leads");
    }

    pub(super) fn end_term(&self) {
        if let Some(term) = self.drop_term() {
            info!(epoch = term.epoch, "node no longer leads");
        }
    }

    /// Ends the term without logging it. Returns it, if there was one.
    pub(super) fn drop_term(&self) -> Option<Arc<Term>> {
        let term = self.term.swap(None);
        if term.is_some() {
            self.term_changed.send_replace(());
        }
        term
    }
}
