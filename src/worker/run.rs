//! The I/O of a run: it feeds the session's state machine, and follows the lease.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::lease::{Held, LeaseHolder, Leave, UNHEALTHY_AFTER, delete_held, replaced};
use super::session::{Input, Registered, SessionState, Tenure};
use super::{Command, OWN_LEASES, Past, Shared, Term};
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::metrics::Sampler;
use crate::node::{HealthStatus, Node, NodeState};
use crate::store::{Condition, LeaseId, Revision, Store, Txn};

/// How long leaving may take: the rest is left to the lease running out.
const LEAVE_BUDGET: Duration = Duration::from_millis(1500);

/// How much of that is for telling that it leaves.
const GOODBYE_BUDGET: Duration = Duration::from_millis(500);

/// Makes sure that there is one run at a time, and leaves a clean state however it ends.
pub(super) struct Running<'a> {
    shared: &'a Shared,
    lease: Arc<LeaseHolder>,
    has_left: bool,
}

impl<'a> Running<'a> {
    pub(super) fn start(
        shared: &'a Shared,
    ) -> Result<(Self, mpsc::Receiver<Command>), ClusterError> {
        if !shared.life.begin() {
            return Err(ClusterError::AlreadyRunning {
                what: shared.what(),
            });
        }
        let (commands, inbox) = mpsc::channel(16);
        *shared.commands() = Some(commands);
        let config = &shared.config;
        let lease = match &config.pool {
            Some(pool) => pool.enter(&shared.keys, &config.group, &config.id),
            None => {
                let own = LeaseHolder::new(config.ttl, &config.etcd.prefix());
                own.enter(&shared.keys, &config.group, &config.id);
                Arc::new(own)
            }
        };
        shared.entry().set_run(fastrand::u64(1..));
        shared.feed(Input::Start);
        info!(group = %config.group, node = %config.id, "node starts");
        let running = Self {
            shared,
            lease,
            has_left: false,
        };
        Ok((running, inbox))
    }

    pub(super) fn lease(&self) -> &Arc<LeaseHolder> {
        &self.lease
    }

    /// Says goodbye, and removes what is this node's. Alone it does so by revoking the lease, which
    /// takes the registration unless another process has taken it over, in one revision:
    /// who waits for any of them sees it now, not when the lease runs out.
    pub(super) async fn leave(mut self, store: &dyn Store) {
        let shared = self.shared;
        let (group, node) = (&shared.config.group, &shared.config.id);
        shared.end_term();
        self.has_left = true;
        let leave = self.lease.leave(group);
        let leaving = async {
            if let Leave::Revoke(lease) | Leave::Delete(lease) = &leave {
                // Best effort: without it readers may take it for one of many that are lost.
                let _ = timeout(GOODBYE_BUDGET, shared.say_goodbye(store, *lease)).await;
            }
            loop {
                let result = match &leave {
                    Leave::Nothing => Ok(()),
                    Leave::Revoke(lease) => {
                        if bugs::has(Bug::UnconditionalDelete) {
                            let keys = [shared.keys.registration(node)];
                            let _ = delete_held(store, *lease, &keys).await;
                        }
                        store.revoke(*lease).await
                    }
                    Leave::Delete(lease) => {
                        delete_held(store, *lease, &shared.own_keys(*lease)).await
                    }
                };
                match result {
                    // The connection may just have broken: there is time for another.
                    Err(error) if error.is_transient() => sleep(Duration::from_millis(50)).await,
                    // Gone already, and every key with it.
                    Err(ClusterError::LeaseNotFound { .. }) => return Ok(()),
                    result => return result,
                }
            }
        };
        let budget = if bugs::has(Bug::ShutdownWithoutBudget) {
            Duration::from_secs(3600)
        } else {
            LEAVE_BUDGET
        };
        match timeout(budget, leaving).await {
            Ok(Ok(())) => info!(%group, %node, "node left"),
            Ok(Err(error)) => {
                warn!(%group, %node, %error, "node left without cleaning up, its lease will run out");
            }
            Err(_) => {
                warn!(%group, %node, ?budget, "node left without an answer from the store, its lease will run out");
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let shared = self.shared;
        *shared.commands() = None;
        // Nothing is logged here: where a subscriber has panicked, a second panic would end the process,
        // and all that follows would be left undone.
        if shared.term.swap(None).is_some() {
            shared.term_changed.send_replace(());
        }
        if !self.has_left {
            // A lease of its own is not revoked: as after a crash, it runs out.
            let _ = self.lease.leave(&shared.config.group);
        }
        *shared.past() = Past::default();
        let closed = shared.state.borrow().after(Input::Close);
        shared.state.send_replace(closed);
        shared.set_health(HealthStatus::Unknown);
        shared.life.end();
    }
}

impl Shared {
    /// What it may have in the store under this lease.
    fn own_keys(&self, lease: LeaseId) -> Vec<String> {
        let [registration, candidacy, handover] = self.keys.own(&self.config.id, lease);
        // Its user may not be allowed to look there.
        let handover = self.past().has_asked.then_some(handover);
        [registration, candidacy]
            .into_iter()
            .chain(handover)
            .collect()
    }

    /// Tells readers that it is not lost when its entry goes, and lets the next one lead.
    async fn say_goodbye(&self, store: &dyn Store, lease: LeaseId) -> Result<(), ClusterError> {
        let registration = self.keys.registration(&self.config.id);
        let goodbye = self.entry_with(Node::set_leaving);
        let txn = Txn::new()
            .when(Condition::HeldBy(registration.clone(), lease))
            .put(registration, goodbye, Some(lease))
            .delete(self.keys.candidacy(lease));
        store.txn(txn).await.map(drop)
    }

    /// Whether an entry says of this run what does not change while it lasts.
    pub(super) fn is_told_by(&self, entry: &[u8]) -> bool {
        // Its own entry goes through JSON too: a number may come out of it a little different.
        let own = self.entry().clone().to_json();
        let own = serde_json::from_slice::<Node>(&own);
        let (Ok(mut own), Ok(entry)) = (own, serde_json::from_slice::<Node>(entry)) else {
            return false;
        };
        own.state = entry.state;
        own.metadata.clone_from(&entry.metadata);
        !own.differs(&entry)
    }

    /// The entry to write now, as JSON.
    pub(super) fn fresh_entry(&self) -> Vec<u8> {
        self.entry_with(|_| {})
    }

    fn entry_with(&self, change: impl FnOnce(&mut Node)) -> Vec<u8> {
        let mut entry = self.entry().clone();
        entry.last_seen = unix_millis();
        if self.is_draining() {
            entry.state = NodeState::Draining;
        }
        change(&mut entry);
        entry.to_json()
    }

    pub(super) fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Answers whether that is a change.
    pub(super) fn set_health(&self, health: HealthStatus) -> bool {
        self.health.send_if_modified(|current| {
            let modified = *current != health;
            *current = health;
            modified
        })
    }

    /// Gives the state machine an input, and carries out what the change of state means here.
    pub(super) fn feed(&self, input: Input) {
        let before = *self.state.borrow();
        let state = before.after(input);
        if state == before {
            return;
        }
        self.state.send_replace(state);
        let (group, node) = (&self.config.group, &self.config.id);
        debug!(%group, %node, %before, %state, "session");
        match state {
            SessionState::Registered | SessionState::Active | SessionState::Draining => {
                if !before.is_registered() {
                    info!(%group, %node, "node is registered");
                    self.set_health(HealthStatus::Healthy);
                }
            }
            // What was known does not hold: read before anything is claimed.
            SessionState::Doubtful | SessionState::Lost => {
                self.end_term();
                self.set_health(HealthStatus::Unhealthy);
            }
            SessionState::BackingOff => self.end_term(),
            SessionState::Granted | SessionState::Closed => {}
        }
    }

    pub(super) fn begin_term(&self, epoch: Revision, tenure: &Arc<Tenure>) {
        let current = self.term.load();
        if current
            .as_ref()
            .is_some_and(|term| term.epoch == epoch && Arc::ptr_eq(&term.tenure, tenure))
        {
            return;
        }
        self.term.store(Some(Arc::new(Term {
            epoch,
            key: self.keys.candidacy(tenure.lease.id).into(),
            tenure: tenure.clone(),
        })));
        self.term_changed.send_replace(());
        info!(group = %self.config.group, node = %self.config.id, epoch, "node leads");
    }

    pub(super) fn end_term(&self) {
        if let Some(term) = self.term.swap(None) {
            self.term_changed.send_replace(());
            info!(group = %self.config.group, node = %self.config.id, epoch = term.epoch, "node leads no longer");
        }
    }

    /// One lease after another, for ever.
    pub(super) async fn live(
        &self,
        store: &dyn Store,
        lease: &LeaseHolder,
        inbox: &mut mpsc::Receiver<Command>,
    ) {
        // One for all leases: a collector that hangs is still called once at a time.
        let mut sampler = Sampler::new(self.config.collector.clone());
        let mut held = lease.listen();
        loop {
            held.catch_up();
            let Held { tenure, error, .. } = lease.held();
            let Some(tenure) = tenure else {
                self.feed(Input::NoLease);
                if error.is_some() {
                    self.set_health(HealthStatus::Unhealthy);
                }
                let error = error.unwrap_or_else(|| self.not_registered());
                self.refuse_while(held.changed(), inbox, &error).await;
                continue;
            };
            self.feed(Input::Granted);
            {
                let mut past = self.past();
                past.leases.push_back(tenure.lease.id);
                if past.leases.len() > OWN_LEASES {
                    past.leases.pop_front();
                }
                past.abandoned = 0;
            }
            tokio::select! {
                biased;
                () = replaced(&mut held, &tenure) => {}
                () = self.follow(lease, &tenure) => {}
                () = self.take_part(store, lease, &tenure, inbox) => {}
                () = self.publish(store, &tenure, &mut sampler) => {}
            }
            self.feed(Input::LeaseGone);
        }
    }

    fn not_registered(&self) -> ClusterError {
        ClusterError::Unavailable {
            endpoint: self.config.etcd.named(),
            operation: "register",
            reason: "there is no lease yet".to_owned(),
        }
    }

    /// Follows how the renewals of a lease go. Never returns.
    async fn follow(&self, lease: &LeaseHolder, tenure: &Tenure) {
        let mut held = lease.listen();
        loop {
            held.catch_up();
            let Held { missed, error, .. } = lease.held();
            let left = tenure.remaining();
            if left.is_zero() {
                self.feed(Input::DeadlinePassed);
            } else if *self.state.borrow() == SessionState::Doubtful {
                self.feed(Input::Renewed);
                self.reread.notify_one();
            }
            if missed >= UNHEALTHY_AFTER {
                if self.set_health(HealthStatus::Unhealthy) {
                    let error = error.map(tracing::field::display);
                    warn!(group = %self.config.group, node = %self.config.id, missed, error, "node is unhealthy");
                }
            } else if missed == 0 && self.state.borrow().is_registered() {
                // A renewed lease alone says little.
                self.set_health(HealthStatus::Healthy);
            }
            let deadline = async {
                if left.is_zero() {
                    std::future::pending::<()>().await;
                }
                sleep(left).await;
            };
            tokio::select! {
                biased;
                () = held.changed() => {}
                () = deadline => {}
            }
        }
    }

    /// What was read of the keys under a lease, as the state machine's input.
    pub(super) fn feed_read(&self, registered: Option<Registered>) {
        self.feed(Input::Read { registered });
    }

    /// Answers whoever asks for something in the meantime, instead of letting them wait.
    pub(super) async fn refuse_while(
        &self,
        pause: impl Future<Output = ()>,
        inbox: &mut mpsc::Receiver<Command>,
        error: &ClusterError,
    ) {
        tokio::pin!(pause);
        loop {
            let command = tokio::select! {
                biased;
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

fn unix_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
}
