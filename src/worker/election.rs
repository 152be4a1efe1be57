//! Registration and election: read the state, do the one thing that is missing, wait for a change
//! that matters, read again.
//!
//! The recipe is that of etcd's own `concurrency` package, with its key layout, so that both can
//! take part in one election: each candidate creates `election/{group}/{lease}`; the one with the
//! least create revision leads; each other one watches the candidate just ahead of it, so that the
//! end of a leader wakes one node and not all.

mod announce;
mod carry_out;

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::decision::{Action, decide};
use super::handover::Handover;
use super::inbox::Inbox;
use super::participant::Participant;
use super::reading::{Reading, says_draining};
use super::session::{Input, Registered};
use crate::backoff::Backoff;
use crate::error::ClusterError;
use crate::node::HealthStatus;
use crate::store::{LeaseId, Selector, WatchEvent, WatchRange, Watcher};

/// After this many steps in a row that wrote something, the next one has to wait: whatever the
/// reason, the store must not be kept busy.
const MAX_WRITES_IN_A_ROW: u32 = 12;

/// How long after a candidate that waits has gone the leader announces its term again: those that go together are
/// answered together.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(500);

/// Keeps a node registered and in the election under one lease.
pub(super) async fn take_part(participant: &Participant<'_>, inbox: &mut Inbox) -> Infallible {
    let state = participant.state;
    let mut backoff = Backoff::new();
    let mut writes_in_a_row = 0;
    let mut election = Election {
        participant,
        handover: Handover::new(participant),
        interrupted: None,
    };
    loop {
        let error = match election.step(inbox).await {
            Ok(progress) => {
                backoff.reset();
                writes_in_a_row = match progress {
                    Progress::Waited => 0,
                    Progress::Wrote => {
                        inbox.forget_candidacy();
                        writes_in_a_row + 1
                    }
                };
                if writes_in_a_row < MAX_WRITES_IN_A_ROW {
                    continue;
                }
                state.unavailable("register", "what was written is not there when it is read")
            }
            Err(error) => {
                election.handover.fail_overdue(&error);
                error
            }
        };
        if matches!(error, ClusterError::LeaseNotFound { .. }) {
            // Another one is needed, and not only when this one is to be renewed.
            participant.lease.doubted.notify_one();
        }
        let pause = if error.is_transient() {
            Duration::from_millis(fastrand::u64(200..1000))
        } else {
            backoff.next_delay()
        };
        if error.is_transient() || state.session.borrow().is_registered() {
            debug!(%error, ?pause, "cannot read or write the election");
        } else {
            state.set_health(HealthStatus::Unhealthy);
            warn!(%error, ?pause, "cannot register");
        }
        inbox.wait(sleep(pause), state, &error).await;
    }
}

/// The election as one node takes part in it under one lease.
struct Election<'a> {
    participant: &'a Participant<'a>,
    handover: Handover<'a>,
    /// What a wait behind another candidate began with that ended because the store could not be reached.
    interrupted: Option<Reading>,
}

/// How a step ended.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// It wrote something, which the next step reads.
    Wrote,
    /// It waited for a change, or found one.
    Waited,
}

/// What was decided about a reading.
struct Decision {
    action: Action,
    /// How the node is registered, if it is.
    registered: Option<Registered>,
    /// On the store's clock: no leadership is claimed before.
    quiet_until: Duration,
    /// How often the deadline of the lease had lapsed before the reading.
    lapses: u64,
}

/// What a node waits with.
struct Watch {
    watcher: Box<dyn Watcher>,
    action: Action,
    reading: Reading,
}

impl Election<'_> {
    /// Reads, and does the one thing that is missing, or waits for a change that matters.
    async fn step(&mut self, inbox: &mut Inbox) -> Result<Progress, ClusterError> {
        let participant = self.participant;
        let mut lease_changes = participant.lease.listen();
        let revived = participant.lease.status().revived;
        // After it: what has lapsed in between is noticed by the wait below.
        let lapses = participant.tenure.lapses();
        let reading = self.read().await?;
        let decision = self.decide(&reading, lapses);
        self.report(&reading, &decision);
        let own = reading.candidacy(&participant.candidacy);
        inbox.settle(participant.state, &decision.action, own);
        let leads = matches!(decision.action, Action::Lead { .. });
        if self.handover.settle(&reading, leads).await? {
            return Ok(Progress::Wrote);
        }
        // Read once: the wait below is as long as the time that was missing for a claim here.
        let quiet_for = decision
            .quiet_until
            .saturating_sub(participant.tenure.now());
        if self.perform(&decision, &reading, quiet_for).await? == Progress::Wrote {
            return Ok(Progress::Wrote);
        }
        let Some(watcher) = self.watch(&decision.action, &reading).await? else {
            return Ok(Progress::Waited);
        };
        let mut watch = Watch {
            watcher,
            action: decision.action,
            reading,
        };
        inbox.store_works();
        let revived_again = lease_changes.wait_for(|status| status.revived != revived);
        let waited = self.wait(&mut watch, revived_again, quiet_for, inbox).await;
        if waited.is_err() && matches!(watch.action, Action::Follow { .. }) {
            self.interrupted = Some(watch.reading);
        }
        waited.map(|()| Progress::Waited)
    }

    /// Reads everything the election depends on. After a wait behind another candidate that was interrupted, only
    /// what that wait depends on, if it is as it was: when etcd restarts, every candidate of a group reads at the
    /// same time, and the whole queue for each of them would be the square of their number.
    async fn read(&mut self) -> Result<Reading, ClusterError> {
        if let Some(former) = &self.interrupted {
            let found = self.participant.read_neighbours(former).await;
            if let Err(error) = &found
                && error.is_transient()
            {
                return Err(error.clone());
            }
            self.interrupted = None;
            if let Ok(Some(reading)) = found {
                return Ok(reading);
            }
        }
        self.participant.read().await
    }

    fn decide(&self, reading: &Reading, lapses: u64) -> Decision {
        let participant = self.participant;
        let own = reading.candidacy(&participant.candidacy);
        let mut record = participant.state.record();
        if record.is_another_history(reading.cluster_id, reading.revision) {
            let ttl = participant.tenure.lease.ttl;
            warn!(revision = reading.revision, wait = ?ttl, "the store has another history than before; leadership is not claimed until the leases of the former history have expired");
            record.quiet_until = participant.tenure.now() + ttl;
            // A candidacy of the former history may be older than a term that began there later and
            // still counts. Only a candidacy that is created from here on is newer.
            record.abandoned = own.unwrap_or(0);
            participant.state.end_term();
        }
        let action = decide(reading, &participant.own_facts(reading, &record));
        let holder = reading.registration.as_ref().and_then(|entry| entry.lease);
        let is_registered = holder == Some(participant.lease_id());
        Decision {
            registered: is_registered.then(|| action.registered(own.is_some())),
            action,
            quiet_until: record.quiet_until,
            lapses,
        }
    }

    /// Makes known what was read and decided, and ends a term that is over.
    fn report(&self, reading: &Reading, decision: &Decision) {
        let state = self.participant.state;
        let action = &decision.action;
        debug!(revision = reading.revision, ?action, "election read");
        if let Some(first) = reading.candidates.first()
            && first.lease.is_none()
            && state.record().is_new_without_lease(&first.key)
        {
            warn!(
                key = first.key,
                "this election key has no lease, so no node leads the group until it is deleted"
            );
        }
        if decision.registered.is_some() {
            state.record().was_registered = true;
        }
        state.feed(Input::Read {
            registered: decision.registered,
        });
        if !action.keeps_term() {
            state.end_term();
        }
    }

    async fn perform(
        &self,
        decision: &Decision,
        reading: &Reading,
        quiet_for: Duration,
    ) -> Result<Progress, ClusterError> {
        let (participant, state) = (self.participant, self.participant.state);
        match &decision.action {
            Action::Enter { register, campaign } => {
                participant.enter(reading, *register, *campaign).await?;
            }
            Action::AnnounceDraining { candidacy } => {
                participant.announce_draining(*candidacy).await?;
            }
            Action::Withdraw { candidacy } => participant.withdraw(*candidacy).await?,
            Action::MakeWay { candidacy } => {
                info!("making way for the candidate that is to lead next");
                state.feed(Input::Read {
                    registered: decision.registered.map(|_| Registered::NoCandidate),
                });
                participant.withdraw(*candidacy).await?;
                // Queue again after leadership has passed on, and not at the same time as others.
                sleep(Duration::from_millis(fastrand::u64(250..750))).await;
            }
            Action::HandOver { epoch, to } => {
                // A term that ends for a process that has ended would leave the group without a leader.
                if participant.is_alive(to, reading.revision).await? {
                    info!(to = %to.key, "handing over to a candidate with a higher priority");
                    state.end_term();
                    if participant.hand_over(*epoch, to).await? {
                        return Ok(Progress::Wrote);
                    }
                }
                debug!(to = %to.key, "the candidate with a higher priority is not registered");
                state.record().pass_over(to);
            }
            Action::StandBack { by, candidacy } => {
                participant.withdraw_if_any(*candidacy).await?;
                if state.set_health(HealthStatus::Unhealthy) {
                    warn!(%by, "another process has registered this id; waiting until it leaves");
                }
                return Ok(Progress::Waited);
            }
            Action::Lead { epoch } => {
                if participant.tenure.is_valid() && quiet_for.is_zero() {
                    state.begin_term(*epoch, participant.tenure, decision.lapses);
                }
                return Ok(Progress::Waited);
            }
            Action::Follow { .. } | Action::StayDrained => return Ok(Progress::Waited),
        }
        Ok(Progress::Wrote)
    }

    /// Opens a watch on every key that can change the decision. `None` if the state has changed
    /// since it was read.
    async fn watch(
        &self,
        action: &Action,
        reading: &Reading,
    ) -> Result<Option<Box<dyn Watcher>>, ClusterError> {
        let participant = self.participant;
        // The candidacy is watched even where there should be none: a late request may still create
        // it, and at the head of the queue it would keep every node from leading.
        let mut watched = vec![
            Selector::Key(participant.registration.clone()),
            Selector::Key(participant.candidacy.clone()),
        ];
        let has_requests = !reading.requests.is_empty();
        match action {
            Action::Lead { .. } => {
                watched.extend(self.handover.watched());
                // To announce the term again, and to see who makes way.
                let election = participant.state.keys.election_prefix();
                watched.push(Selector::Prefix(election.to_owned()));
            }
            Action::Follow { ahead } => {
                watched.extend(self.handover.watched());
                watched.push(Selector::Key(ahead.clone()));
            }
            _ => {}
        }
        // etcd serves a watch that starts in the past up to 100 ms late until it has caught up.
        // While leadership is about to pass on, that would be time without a leader: then the watch
        // starts now, and what came before it is read.
        let from = if has_requests {
            0
        } else {
            reading.revision + 1
        };
        let ranges = watched.into_iter().map(|keys| WatchRange { keys, from });
        let watcher = participant.store.watch(ranges.collect()).await?;
        let is_same = if has_requests {
            participant.read().await?.is_same_election(reading)
        } else {
            // A watch from a revision that another history has not reached yet reports nothing.
            let registration = Selector::Key(participant.registration.clone());
            let now = participant.store.list(&registration, None).await?;
            now.cluster_id == reading.cluster_id && now.revision >= reading.revision
        };
        Ok(is_same.then_some(watcher))
    }

    /// Waits for whatever requires another reading.
    async fn wait(
        &mut self,
        watch: &mut Watch,
        revived_again: impl Future<Output = ()>,
        quiet_for: Duration,
        inbox: &mut Inbox,
    ) -> Result<(), ClusterError> {
        let (participant, state) = (self.participant, self.participant.state);
        let own = watch.reading.candidacy(&participant.candidacy);
        let quiet = async {
            if quiet_for.is_zero() {
                std::future::pending::<()>().await;
            }
            sleep(quiet_for).await;
        };
        let due = self.handover.due();
        let handover_due = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // A renewal after the deadline: a term must not resume by itself, only after reading
            // that its key is still there.
            () = revived_again => state.end_term(),
            // The same, if the deadline was noticed when it passed.
            () = state.reread.notified() => {}
            Some(command) = inbox.recv() => self.carry_out(command, own, inbox).await?,
            changed = self.until_it_matters(watch) => changed?,
            () = quiet => {}
            () = handover_due => {}
            () = state.access.until_requests_are_readable(participant.store) => {}
        }
        Ok(())
    }

    /// Waits for a change of the watched keys that matters. The holder of the registration may
    /// update it, whether that is this process or the one that has replaced it; but an own update
    /// that does not say that the node drains, such as a late write of metrics, has to be
    /// overwritten.
    async fn until_it_matters(&self, watch: &mut Watch) -> Result<(), ClusterError> {
        let Watch {
            watcher,
            action,
            reading,
        } = watch;
        let (participant, state) = (self.participant, self.participant.state);
        let holder = reading.registration.as_ref().and_then(|entry| entry.lease);
        let follows = matches!(action, Action::Follow { .. });
        let leads = action.term();
        // Candidates that make way for a successor are seen only by their keys.
        let hands_over = !reading.requests.is_empty() || self.handover.is_transferring();
        let mut announce_at = state.announce_at(leads);
        loop {
            let announce = async {
                match announce_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let events = tokio::select! {
                biased;
                events = watcher.next() => events?,
                () = announce => {
                    announce_at = self.announce(leads.unwrap_or(0)).await;
                    continue;
                }
            };
            let mut matters = false;
            for event in &events {
                let key = event.key();
                let is_of_others =
                    key.starts_with(state.keys.election_prefix()) && key != participant.candidacy;
                if leads.is_some() && is_of_others {
                    let is_deleted = matches!(event, WatchEvent::Delete { .. });
                    matters |= hands_over;
                    if is_deleted && state.keys.is_candidacy(key) {
                        let due =
                            announce_at.get_or_insert_with(|| Instant::now() + ANNOUNCE_AFTER);
                        // If this wait ends before, the next one announces it.
                        state.record().announce_due = Some(*due);
                    }
                } else if follows && state.keys.is_handover(event.key()) {
                    reading.apply_request(event);
                } else {
                    let is_announced =
                        leads.is_some_and(|epoch| self.is_announcement(event, epoch));
                    matters |= !is_announced && !self.is_plain_update(event, holder);
                }
            }
            // A request concerns those between its target and the leader, and not all who wait.
            if follows && !matters {
                let record = state.record();
                let own = participant.own_facts(reading, &record);
                matters = reading.is_outdated() || decide(reading, &own) != *action;
            }
            if matters {
                return Ok(());
            }
        }
    }

    /// Whether the event is an update of the registration by its holder.
    fn is_plain_update(&self, event: &WatchEvent, holder: Option<LeaseId>) -> bool {
        matches!(event, WatchEvent::Put(entry)
            if entry.key == self.participant.registration
                && entry.lease == holder
                && (!self.participant.state.is_draining() || says_draining(entry)))
    }
}
