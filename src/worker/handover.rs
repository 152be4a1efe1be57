//! Hands leadership to a chosen node: because the leader asks for it, or because that node has a
//! higher priority.
//!
//! The order of candidates is that of their create revisions, which nodes of `photon-etcd-cluster`
//! depend on. So the target has to become the next in the queue before the leader leaves it: a
//! request under `handover/{group}/` asks those between the two to queue again, behind the target.
//! Each node deletes its own candidacy only. The leader leads until it is the only one ahead of
//! the target; then it deletes its candidacy on the condition that the target's still exists. A
//! request that was not fulfilled in time is deleted, and ends with the lease of its writer anyway.

use tokio::time::Instant;
use tracing::{debug, info};

use super::access::Right;
use super::command::{Command, Reply, respond};
use super::inbox::may_pass;
use super::participant::{Participant, is_same_process};
use super::reading::Reading;
use super::request::Wanted;
use super::takeover::{self, Takeover};
use super::transfer::{self, MAKE_WAY_WITHIN, Transfer, refused};
use crate::error::ClusterError;
use crate::store::{Entry, Revision, Selector};

/// What one node does to change the order of leaders, under one lease.
pub(super) struct Handover<'a> {
    participant: &'a Participant<'a>,
    /// The application's transfer, if one is under way. Nothing is taken over meanwhile.
    transfer: Option<Transfer>,
    takeover: Takeover,
}

impl<'a> Handover<'a> {
    pub(super) fn new(participant: &'a Participant<'a>) -> Self {
        Self {
            participant,
            transfer: None,
            takeover: Takeover::Idle,
        }
    }

    /// What a candidate watches beside the keys of the election.
    pub(super) fn watched(&self) -> Option<Selector> {
        let requests = self.participant.state.keys.handover_prefix();
        let may_read = self.participant.may_read_requests();
        may_read.then(|| Selector::Prefix(requests.to_owned()))
    }

    /// Whether the application has asked this node to hand over, and it has not yet.
    pub(super) fn is_transferring(&self) -> bool {
        self.transfer.is_some()
    }

    /// When the next step is due, even if nothing changes.
    pub(super) fn due(&self) -> Option<Instant> {
        let transfer = self.transfer.as_ref().map(|transfer| transfer.until);
        transfer.or_else(|| self.takeover.due())
    }

    /// Takes the next step. Returns whether something was written, so that everything has to be
    /// read again.
    pub(super) async fn settle(
        &mut self,
        reading: &Reading,
        leads: bool,
    ) -> Result<bool, ClusterError> {
        match self.transfer.take() {
            Some(transfer) => Ok(self.settle_transfer(transfer, reading, leads).await),
            None => self.settle_takeover(reading, leads).await,
        }
    }
}

/// Transfers that the application requests.
impl Handover<'_> {
    /// Begins a transfer, and reports its outcome when it is known. After an error that may pass it can be tried again,
    /// if nothing was handed over.
    pub(super) async fn begin_transfer(
        &mut self,
        target: String,
        term: Option<Revision>,
        reply: Reply,
    ) -> Result<(), (Command, ClusterError)> {
        if self.transfer.is_some() {
            let error = refused(&target, "another transfer is under way");
            respond(reply, Err(error));
            return Ok(());
        }
        match self.try_transfer(&target, term).await {
            Ok(None) => respond(reply, Ok(())),
            Ok(Some(wanted)) => {
                debug!(
                    target,
                    "asked the candidates ahead of the target to make way"
                );
                self.takeover = Takeover::Idle;
                self.transfer = Some(Transfer {
                    target,
                    candidacy: wanted.to,
                    created: wanted.created,
                    until: Instant::now() + MAKE_WAY_WITHIN,
                    reply,
                });
            }
            Err(error) if may_pass(&error) && self.participant.state.term().is_some() => {
                let again = Command::Transfer {
                    target,
                    term,
                    reply,
                };
                return Err((again, error));
            }
            Err(error) => respond(reply, Err(error)),
        }
        Ok(())
    }

    /// Hands over at once if the target is next in the queue. Otherwise it asks those ahead of the
    /// target to make way, and returns that request.
    async fn try_transfer(
        &self,
        target: &str,
        asked: Option<Revision>,
    ) -> Result<Option<Wanted>, ClusterError> {
        let (participant, state) = (self.participant, self.participant.state);
        // Another term may have begun while the store was away.
        let Some(term) = state.term().filter(|term| Some(term.epoch) == asked) else {
            return Err(state.not_leader());
        };
        if target == state.id() {
            return Ok(None);
        }
        let reading = participant.read().await?;
        let others = reading.candidates.iter();
        let others: Vec<_> = others
            .filter(|entry| entry.key != participant.candidacy)
            .collect();
        let registration = participant
            .registration_of(target, reading.revision)
            .await?;
        // A process that was restarted has two candidacies until its former lease has expired.
        let place = others.iter().position(|entry| {
            let is_current = registration
                .as_ref()
                .is_some_and(|registration| is_same_process(registration, entry));
            entry.value == target.as_bytes() && is_current
        });
        let Some(place) = place else {
            let reason = match registration {
                None => "it is not registered",
                Some(_) => "it is not a candidate",
            };
            return Err(refused(target, reason));
        };
        let (ahead, to) = (&others[..place], others[place]);
        if ahead.is_empty() {
            state.end_term();
            return match participant.hand_over(term.epoch, to).await? {
                true => Ok(None),
                false => Err(refused(target, "it has just left")),
            };
        }
        self.check_ahead(target, ahead).await?;
        let wanted = Wanted {
            to: to.key.clone(),
            created: to.create_revision,
            priority: None,
        };
        participant.write_request(&wanted).await?;
        Ok(Some(wanted))
    }

    /// Checks that every candidate ahead of the target can make way.
    async fn check_ahead(&self, target: &str, ahead: &[&Entry]) -> Result<(), ClusterError> {
        let nodes = self.participant.nodes_of(ahead).await?;
        for (candidate, node) in ahead.iter().zip(nodes) {
            // Nodes of photon-etcd-cluster know neither requests nor priorities.
            if node.is_none_or(|node| node.priority.is_none()) {
                let id = String::from_utf8_lossy(&candidate.value);
                let reason = format!(
                    "{id:?} is ahead of it in the queue and cannot make way: it is not a node of \
                     this crate, or it has ended and its lease has not expired yet"
                );
                return Err(refused(target, reason));
            }
        }
        Ok(())
    }

    /// Returns whether the transfer has ended. Its request is deleted after the next reading, when
    /// there is no transfer that it belongs to.
    async fn settle_transfer(
        &mut self,
        transfer: Transfer,
        reading: &Reading,
        leads: bool,
    ) -> bool {
        let state = self.participant.state;
        let facts = transfer::Facts {
            own_candidacy: &self.participant.candidacy,
            leads,
            term: state.term().map(|term| term.epoch),
            now: Instant::now(),
        };
        let target = &transfer.target;
        let outcome = match transfer.step(reading, facts) {
            transfer::Step::Wait => {
                self.transfer = Some(transfer);
                return false;
            }
            transfer::Step::HandOver { epoch, to } => {
                state.end_term();
                match self.participant.hand_over(epoch, &to).await {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(refused(target, "it has just left")),
                    Err(error) => Err(error),
                }
            }
            transfer::Step::NotLeader => Err(state.not_leader()),
            transfer::Step::TargetLeft => Err(refused(target, "it has just left")),
            transfer::Step::NotMadeWay { ahead } => {
                let reason = format!(
                    "{ahead:?} is ahead of it in the queue and has not made way within \
                     {MAKE_WAY_WITHIN:?}: perhaps its etcd user may not read {}",
                    state.keys.handover_prefix()
                );
                Err(refused(target, reason))
            }
        };
        respond(transfer.reply, outcome);
        true
    }

    /// Ends a transfer whose time is over while the store is away.
    pub(super) fn fail_overdue(&mut self, error: &ClusterError) {
        let now = Instant::now();
        let overdue = self.transfer.take_if(|transfer| transfer.is_overdue(now));
        if let Some(transfer) = overdue {
            respond(transfer.reply, Err(error.clone()));
        }
    }
}

/// Take-overs by priority.
impl Handover<'_> {
    async fn settle_takeover(
        &mut self,
        reading: &Reading,
        leads: bool,
    ) -> Result<bool, ClusterError> {
        let own_lease = self.participant.lease_id();
        let facts = takeover::Facts {
            leads,
            is_candidate: reading.candidacy(&self.participant.candidacy).is_some(),
            has_request: reading
                .requests
                .iter()
                .any(|request| request.from == own_lease),
            now: Instant::now(),
        };
        match self.takeover.step(facts) {
            takeover::Step::Wait => Ok(false),
            takeover::Step::Stop => {
                self.takeover = Takeover::Idle;
                Ok(false)
            }
            takeover::Step::CompareLater => {
                self.takeover = self.compare_later();
                Ok(false)
            }
            takeover::Step::Compare => {
                self.takeover = self.compare_later();
                self.ask_for_leadership(reading).await
            }
            takeover::Step::DeleteRequest => {
                self.takeover = self.compare_later();
                self.delete_request().await
            }
        }
    }

    fn compare_later(&self) -> Takeover {
        let config = &self.participant.state.config;
        if config.priority() > 0 && self.participant.may_read_requests() {
            Takeover::compare_after(config.takeover_after)
        } else {
            Takeover::Idle
        }
    }

    /// Asks for leadership if this node has a higher priority than the leader. Returns whether it
    /// has asked. Without the rights it goes on as before, and tries again with the next comparison.
    async fn ask_for_leadership(&mut self, reading: &Reading) -> Result<bool, ClusterError> {
        let (participant, state) = (self.participant, self.participant.state);
        match self.outranks_leader(reading).await {
            Err(error) if error.is_missing_permission() => {
                state.access.set_missing(Right::ReadNodes, &error);
                return Ok(false);
            }
            Ok(false) => return Ok(false),
            outranks => outranks?,
        };
        let priority = state.config.priority();
        let wanted = Wanted {
            to: participant.candidacy.clone(),
            created: reading.candidacy(&participant.candidacy).unwrap_or(0),
            priority: Some(priority),
        };
        match participant.write_request(&wanted).await {
            Err(error) if error.is_missing_permission() => {
                state.access.set_missing(Right::WriteRequests, &error);
                return Ok(false);
            }
            written => written?,
        }
        state.access.set_granted(Right::WriteRequests);
        info!(priority, "asked for leadership");
        self.takeover = Takeover::RequestedUntil(Instant::now() + MAKE_WAY_WITHIN);
        Ok(true)
    }

    async fn outranks_leader(&self, reading: &Reading) -> Result<bool, ClusterError> {
        let own = reading.candidacy(&self.participant.candidacy);
        let Some(leader) = reading.candidates.first().filter(|_| own.is_some()) else {
            return Ok(false);
        };
        let leader = self.participant.node_of(leader, reading.revision).await?;
        let priority = leader.and_then(|leader| leader.priority);
        Ok(priority.is_some_and(|priority| priority < self.participant.state.config.priority()))
    }

    /// Returns whether the request was deleted.
    async fn delete_request(&self) -> Result<bool, ClusterError> {
        match self.participant.delete_request().await {
            // The request ends with the lease.
            Err(error) if error.is_missing_permission() => {
                let access = &self.participant.state.access;
                access.set_missing(Right::WriteRequests, &error);
                Ok(false)
            }
            deleted => deleted.map(|()| true),
        }
    }
}
