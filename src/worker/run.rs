//! One run of a node: from the first lease to the clean-up at the end.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{Span, info, info_span, warn};

use super::election::take_part;
use super::inbox::Inbox;
use super::lease::{Cleanup, LeaseStatus, SharedLease, UNHEALTHY_AFTER, until_replaced};
use super::lease_driver::keep_alive;
use super::orphans::delete_held;
use super::participant::Participant;
use super::publisher::publish;
use super::run_record::RunRecord;
use super::session::{Input, SessionState};
use super::state::WorkerState;
use super::tenure::Tenure;
use crate::error::ClusterError;
use crate::metrics::Sampler;
use crate::node::HealthStatus;
use crate::store::{Condition, LeaseId, Store, Txn};
use crate::supervise::{in_span, new_span};

/// How long leaving may take. What is not done by then ends with the lease.
const LEAVE_BUDGET: Duration = Duration::from_millis(1500);

/// How much of that is for announcing that the node leaves.
const ANNOUNCE_BUDGET: Duration = Duration::from_millis(500);

/// How many commands wait while one is carried out; further callers wait for room.
const INBOX_SIZE: usize = 16;

/// Runs the node until `shutdown` resolves, then leaves.
pub(super) async fn run(
    state: &WorkerState,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ClusterError> {
    let span = state.span();
    let (running, mut inbox) = span.in_scope(|| Running::start(state))?;
    let store = state.store.get()?;
    // The task that keeps a lease of several nodes does not log as one of them.
    let lease_span = match state.config.pool {
        Some(_) => Span::none(),
        None => span.clone(),
    };
    tokio::select! {
        biased;
        () = shutdown => {}
        never = in_span(&span, keep_alive(&running.lease, &store, &lease_span)) => match never {},
        never = in_span(&span, live(state, &*store, &running.lease, &mut inbox)) => match never {},
    }
    inbox.end(state);
    in_span(&span, running.leave(&*store)).await;
    Ok(())
}

/// Makes sure that there is one run at a time, and leaves a clean state however the run ends.
struct Running<'a> {
    state: &'a WorkerState,
    lease: Arc<SharedLease>,
    has_left: bool,
}

impl<'a> Running<'a> {
    fn start(state: &'a WorkerState) -> Result<(Self, Inbox), ClusterError> {
        if !state.lifecycle.begin() {
            return Err(ClusterError::AlreadyRunning { what: state.name() });
        }
        let (commands, received) = mpsc::channel(INBOX_SIZE);
        *state.commands() = Some(commands);
        let config = &state.config;
        let lease = match &config.pool {
            Some(pool) => pool.enter(&state.keys, state.group(), state.id()),
            None => {
                let own = SharedLease::new(config.ttl.unsigned_abs(), &config.etcd.prefix());
                own.enter(&state.keys, state.group(), state.id());
                Arc::new(own)
            }
        };
        // From here on the clean-up happens, also if the subscriber panics.
        let running = Self {
            state,
            lease,
            has_left: false,
        };
        let run = state.config.run.unwrap_or_else(|| fastrand::u64(1..));
        state.entry().set_run(run);
        state.feed(Input::Start);
        info!("node starts");
        Ok((running, Inbox::new(received)))
    }

    /// Announces that the node leaves, and removes its keys. A node with a lease of its own revokes
    /// it, which removes the keys in one revision, but not a registration that another process has
    /// taken over: whoever waits for a key sees it now, not when the lease expires.
    async fn leave(mut self, store: &dyn Store) {
        let state = self.state;
        state.end_term();
        self.has_left = true;
        let cleanup = self.lease.leave(state.group());
        let leaving = async {
            if let Cleanup::Revoke(lease) | Cleanup::DeleteKeys(lease) = cleanup {
                // Best effort: without it readers may count the node as lost.
                let _ = timeout(ANNOUNCE_BUDGET, announce_leaving(state, store, lease)).await;
            }
            loop {
                match clean_up(state, store, cleanup).await {
                    // The connection may just have been lost: there is time for another one.
                    Err(error) if error.is_transient() => sleep(Duration::from_millis(50)).await,
                    // The lease is gone already, and every key with it.
                    Err(ClusterError::LeaseNotFound { .. }) => return Ok(()),
                    result => return result,
                }
            }
        };
        match timeout(LEAVE_BUDGET, leaving).await {
            Ok(Ok(())) => info!("node left"),
            Ok(Err(error)) => {
                warn!(%error, "node left without cleaning up, its lease will expire");
            }
            Err(_) => {
                warn!(budget = ?LEAVE_BUDGET, "node left without an answer from the store, its lease will expire");
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let state = self.state;
        *state.commands() = None;
        // Nothing is logged here. If this runs because a subscriber has panicked, a second panic
        // would end the process, and the rest would not be done.
        state.drop_term();
        if !self.has_left {
            // A lease of its own is not revoked: as after a crash, it expires.
            let _ = self.lease.leave(state.group());
        }
        *state.record() = RunRecord::default();
        state.close_session();
        state.lifecycle.end();
    }
}

/// Makes readers expect that the entry goes, and lets the next candidate lead.
async fn announce_leaving(
    state: &WorkerState,
    store: &dyn Store,
    lease: LeaseId,
) -> Result<(), ClusterError> {
    let registration = state.keys.registration(state.id());
    let txn = Txn::new()
        .when(Condition::HeldBy(registration.clone(), lease))
        .put(registration, state.leaving_entry_json(), Some(lease))
        .delete(state.keys.candidacy(lease));
    store.txn(txn).await.map(drop)
}

async fn clean_up(
    state: &WorkerState,
    store: &dyn Store,
    cleanup: Cleanup,
) -> Result<(), ClusterError> {
    match cleanup {
        Cleanup::Nothing => Ok(()),
        Cleanup::Revoke(lease) => store.revoke(lease).await,
        Cleanup::DeleteKeys(lease) => {
            let [registration, candidacy, request] = state.keys.own(state.id(), lease);
            let mut keys = vec![registration, candidacy];
            // The etcd user may have no right to read requests.
            if state.record().has_requested {
                keys.push(request);
            }
            delete_held(store, lease, &keys).await
        }
    }
}

/// Lives under one lease after another.
async fn live(
    state: &WorkerState,
    store: &dyn Store,
    lease: &SharedLease,
    inbox: &mut Inbox,
) -> Infallible {
    // One sampler for all leases: it never calls a collector that has not returned yet.
    let mut sampler = Sampler::new(state.config.collector.clone());
    let mut changes = lease.listen();
    loop {
        changes.catch_up();
        let LeaseStatus { tenure, error, .. } = lease.status();
        let Some(tenure) = tenure else {
            state.feed(Input::NoLease);
            if error.is_some() {
                state.set_health(HealthStatus::Unhealthy);
            }
            let error =
                error.unwrap_or_else(|| state.unavailable("register", "there is no lease yet"));
            inbox.wait(changes.changed(), state, &error).await;
            continue;
        };
        state.feed(Input::Granted);
        state.record().begin_lease(tenure.lease.id);
        let participant = Participant::new(state, store, lease, &tenure);
        let span = new_span(|| info_span!("session", lease = %tenure.lease.id));
        let session = async {
            let span = new_span(|| info_span!("election"));
            tokio::select! {
                biased;
                () = until_replaced(&mut changes, &tenure) => {}
                never = follow_renewals(state, lease, &tenure) => match never {},
                never = in_span(&span, take_part(&participant, inbox)) => match never {},
                never = publish(state, store, &tenure, &mut sampler) => match never {},
            }
        };
        in_span(&span, session).await;
        inbox.forget_candidacy();
        state.feed(Input::LeaseGone);
    }
}

/// Feeds the session and the health with the renewals of a lease.
async fn follow_renewals(state: &WorkerState, lease: &SharedLease, tenure: &Tenure) -> Infallible {
    let mut changes = lease.listen();
    loop {
        changes.catch_up();
        let LeaseStatus { missed, error, .. } = lease.status();
        let remaining = tenure.remaining();
        if remaining.is_zero() {
            state.feed(Input::DeadlinePassed);
        } else if *state.session.borrow() == SessionState::Doubtful {
            state.feed(Input::Renewed);
            state.reread.notify_one();
        }
        if missed >= UNHEALTHY_AFTER {
            if state.set_health(HealthStatus::Unhealthy) {
                let error = error.map(tracing::field::display);
                warn!(missed, error, "node is unhealthy");
            }
        } else if missed == 0 && state.session.borrow().is_registered() {
            // A renewed lease alone does not make a node healthy: it has to be registered.
            state.set_health(HealthStatus::Healthy);
        }
        let deadline = async {
            if remaining.is_zero() {
                std::future::pending::<()>().await;
            }
            tenure.until_over().await;
        };
        tokio::select! {
            biased;
            () = changes.changed() => {}
            () = deadline => {}
        }
    }
}
