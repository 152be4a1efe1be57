//! Leadership goes to a node of choice: because the leader says so, or because that node has a
//! higher priority.
//!
//! The order of candidates is that of their create revisions, and shared with nodes that know
//! nothing else. So the target has to become the next in line before the leader goes: a request
//! under `handover/{group}/` asks those between the two to queue again, behind it. Each removes
//! its own candidacy only. The leader leads until it is the only one ahead of the target, then it
//! deletes its candidacy on the condition that the target's is still there. A request that was not
//! fulfilled in time is taken back; it ends with the lease of whoever made it anyway.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{debug, info};

use super::Reply;
use super::access::Right;
use super::election::{Part, Reading, answer};
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::node::Node;
use crate::store::{Condition, Entry, LeaseId, Revision, Selector, Txn};

/// How long candidates are given to make way.
const PATIENCE: Duration = Duration::from_secs(2);

/// A wish for who is to lead next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The lease of who asks.
    pub(super) from: LeaseId,
    /// The candidacy that is to lead.
    pub(super) to: String,
    /// Which revision created that.
    pub(super) created: Revision,
    /// Why, if it asks for itself; `None` if the leader asks.
    pub(super) priority: Option<u16>,
}

#[derive(Serialize, Deserialize)]
struct Wish {
    to: String,
    created: Revision,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<u16>,
}

impl Request {
    /// A value that says nothing is no request.
    pub(super) fn read(entry: &Entry) -> Option<Self> {
        let wish: Wish = serde_json::from_slice(&entry.value).ok()?;
        Some(Self {
            from: entry.lease?,
            to: wish.to,
            created: wish.created,
            priority: wish.priority,
        })
    }

    pub(super) fn is_from(&self, candidate: &Entry) -> bool {
        candidate.lease == Some(self.from)
    }
}

/// What this node wants of the election besides taking part.
#[derive(Debug)]
pub(super) enum Errand {
    None,
    /// It leads, and those ahead of the target are asked to make way.
    Transfer(Transfer),
    /// It has a priority, and compares it with the leader's then.
    Compare(Instant),
    /// It has asked for leadership, until then.
    TakeOver(Instant),
}

#[derive(Debug)]
pub(super) struct Transfer {
    target: String,
    candidacy: String,
    created: Revision,
    until: Instant,
    reply: Reply,
}

impl Errand {
    /// When it has to be looked at, whatever happens.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::None => None,
            Self::Transfer(transfer) => Some(transfer.until),
            Self::Compare(due) | Self::TakeOver(due) => Some(*due),
        }
    }
}

fn refused(target: &str, reason: impl Into<String>) -> Result<(), ClusterError> {
    Err(ClusterError::TransferRefused {
        target: target.to_owned(),
        reason: reason.into(),
    })
}

/// With each of these bugs leadership is handed to a candidacy, whoever has its id by now.
const IGNORES_LIFE: [Bug; 3] = [
    Bug::TransferWithoutCondition,
    Bug::TransferById,
    Bug::TransferToFormerLife,
];

/// Whether a registration and a candidacy are of one process: their lease is one.
fn is_one_life(registration: &Entry, candidate: &Entry) -> bool {
    registration.lease.is_some() && registration.lease == candidate.lease
}

impl Part<'_> {
    /// What a candidate watches of the election beside its own keys. `asked`: it leads, and somebody
    /// is to lead next.
    pub(super) fn watched_in_line(&self, asked: bool) -> Vec<Selector> {
        let keys = &self.shared.keys;
        let mut watched = Vec::new();
        if self.may_hand_over() {
            watched.push(Selector::Prefix(keys.handover_prefix().to_owned()));
        }
        if asked || matches!(self.errand, Errand::Transfer(_)) {
            // Whoever makes way tells nobody else.
            watched.push(Selector::Prefix(keys.election_prefix().to_owned()));
        }
        watched
    }

    /// Sees to the errand. Answers whether something was written, so that everything has to be
    /// read again.
    pub(super) async fn settle_errand(
        &mut self,
        reading: &Reading,
        leads: bool,
    ) -> Result<bool, ClusterError> {
        let own_request = reading
            .requests
            .iter()
            .any(|request| request.from == self.lease());
        match std::mem::replace(&mut self.errand, Errand::None) {
            Errand::Transfer(transfer) => {
                return self.settle_transfer(transfer, reading, leads).await;
            }
            Errand::TakeOver(until) if !leads && own_request && Instant::now() < until => {
                self.errand = Errand::TakeOver(until);
                return Ok(false);
            }
            Errand::TakeOver(_) | Errand::None => {}
            Errand::Compare(due) if Instant::now() < due => self.errand = Errand::Compare(due),
            Errand::Compare(_) if leads => self.compare_later(),
            Errand::Compare(_) => {
                self.compare_later();
                if !own_request && self.ask_for_leadership(reading).await? {
                    return Ok(true);
                }
            }
        }
        if own_request {
            // Fulfilled, or not in time.
            self.compare_later();
            match self.take_request_back().await {
                // It ends with the lease.
                Err(error) if error.is_missing_permission() => {
                    self.shared.lacks(Right::WriteRequests, &error);
                }
                result => return result.map(|()| true),
            }
        }
        let in_line = reading.candidacy(&self.candidacy).is_some();
        if in_line && matches!(self.errand, Errand::None) {
            self.compare_later();
        }
        Ok(false)
    }

    /// Sets the time at which a node with a priority compares it.
    fn compare_later(&mut self) {
        if self.shared.config.priority > 0 && self.may_hand_over() {
            let after = self.shared.config.takeover_after;
            // Not at the same instant as others of its priority.
            let jitter = after.mul_f64(0.1 * fastrand::f64());
            self.errand = Errand::Compare(Instant::now() + after + jitter);
        }
    }

    /// Asks for leadership, if this node outranks the leader. Answers whether it did. Without the
    /// rights it goes on as it is, and tries again when it compares the next time.
    async fn ask_for_leadership(&mut self, reading: &Reading) -> Result<bool, ClusterError> {
        let shared = self.shared;
        let config = &shared.config;
        match self.outranks_the_leader(reading).await {
            Err(error) if error.is_missing_permission() => {
                shared.lacks(Right::ReadNodes, &error);
                return Ok(false);
            }
            Ok(false) => return Ok(false),
            outranks => outranks?,
        };
        let created = reading.candidacy(&self.candidacy).unwrap_or(0);
        let asked = self.ask(self.candidacy.clone(), created, Some(config.priority));
        match asked.await {
            Err(error) if error.is_missing_permission() => {
                shared.lacks(Right::WriteRequests, &error);
                return Ok(false);
            }
            asked => asked?,
        }
        shared.has(Right::WriteRequests);
        info!(group = %config.group, node = %config.id, priority = config.priority, "asks for leadership");
        self.errand = Errand::TakeOver(Instant::now() + PATIENCE);
        Ok(true)
    }

    async fn outranks_the_leader(&self, reading: &Reading) -> Result<bool, ClusterError> {
        let own = reading.candidacy(&self.candidacy);
        let Some(leader) = reading.candidates.first().filter(|_| own.is_some()) else {
            return Ok(false);
        };
        let node = self.registered_as(leader, reading.revision).await?;
        Ok(node
            .and_then(|node| node.priority)
            .is_some_and(|priority| priority < self.shared.config.priority))
    }

    /// The registration of an id.
    async fn registration_of(&self, id: &str, at: Revision) -> Result<Option<Entry>, ClusterError> {
        let key = Selector::Key(self.shared.keys.registration(id));
        let listing = self.store.list(&key, Some(at)).await?;
        self.shared.has(Right::ReadNodes);
        Ok(listing.entries.into_iter().next())
    }

    /// The entry of a candidate, if it is registered: under the same lease, for another process may
    /// have its id by now.
    async fn registered_as(
        &self,
        candidate: &Entry,
        at: Revision,
    ) -> Result<Option<Node>, ClusterError> {
        let Ok(id) = std::str::from_utf8(&candidate.value) else {
            return Ok(None);
        };
        let entry = self.registration_of(id, at).await?;
        let entry = entry.filter(|entry| is_one_life(entry, candidate));
        Ok(entry.and_then(|entry| serde_json::from_slice(&entry.value).ok()))
    }

    async fn ask(
        &self,
        to: String,
        created: Revision,
        priority: Option<u16>,
    ) -> Result<(), ClusterError> {
        let lease = self.lease();
        // From here on: a request that is given up on may be carried out later.
        self.shared.past().has_asked = true;
        // Strings and numbers cannot fail.
        let wish = Wish {
            to,
            created,
            priority,
        };
        let wish = serde_json::to_vec(&wish).unwrap_or_default();
        let ask = Txn::new()
            .when(Condition::HeldBy(self.candidacy.clone(), lease))
            .put(self.shared.keys.handover(lease), wish, Some(lease));
        self.store.txn(ask).await.map(drop)
    }

    async fn take_request_back(&self) -> Result<(), ClusterError> {
        let key = self.shared.keys.handover(self.lease());
        let take_back = Txn::new()
            .when(Condition::HeldBy(key.clone(), self.lease()))
            .delete(key);
        self.store.txn(take_back).await.map(drop)
    }

    /// Deletes the own candidacy if the target's is there, and the target has not been restarted.
    /// Answers whether that is so.
    pub(super) async fn hand_over(
        &self,
        epoch: Revision,
        to: &Entry,
    ) -> Result<bool, ClusterError> {
        self.shared.past().abandoned = epoch;
        let candidacy = &self.candidacy;
        let mut txn = Txn::new()
            .when(Condition::CreatedAt(candidacy.clone(), epoch))
            .delete(candidacy.clone());
        if !bugs::has(Bug::TransferWithoutCondition) {
            txn = txn.when(Condition::CreatedAt(to.key.clone(), to.create_revision));
        }
        let lives = to.lease.and_then(|lease| {
            let id = std::str::from_utf8(&to.value).ok()?;
            let registration = self.shared.keys.registration(id);
            Some(Condition::HeldBy(registration, lease))
        });
        let Some(lives) = lives else {
            self.shared.past().abandoned = 0;
            return Ok(false);
        };
        let mut conditional = txn.clone();
        if !IGNORES_LIFE.into_iter().any(bugs::has) {
            conditional = conditional.when(lives);
        }
        let handed = match self.store.txn(conditional).await {
            // A user that may not look at other registrations: the candidacy alone has to do.
            Err(error) if error.is_missing_permission() => self.store.txn(txn).await?,
            handed => handed?,
        };
        if handed.is_some() {
            return Ok(true);
        }
        // Nothing was written, and nothing will be: the next reading finds this node still first,
        // and its term goes on.
        self.shared.past().abandoned = 0;
        Ok(false)
    }

    /// Answers whoever waits for a transfer, when its time is over and the store is away.
    pub(super) fn refuse_overdue(&mut self, error: &ClusterError) {
        if matches!(&self.errand, Errand::Transfer(transfer) if Instant::now() >= transfer.until)
            && let Errand::Transfer(transfer) = std::mem::replace(&mut self.errand, Errand::None)
        {
            answer(transfer.reply, Err(error.clone()));
        }
    }

    /// Begins a transfer that the application asked for.
    pub(super) async fn transfer(&mut self, target: String, reply: Reply) {
        if matches!(self.errand, Errand::Transfer(_)) {
            return answer(reply, refused(&target, "another transfer is under way"));
        }
        match self.begin_transfer(&target).await {
            Ok(Some((candidacy, created))) => {
                debug!(group = %self.shared.config.group, node = %self.shared.config.id, target, "asks those ahead of the target to make way");
                self.errand = Errand::Transfer(Transfer {
                    target,
                    candidacy,
                    created,
                    until: Instant::now() + PATIENCE,
                    reply,
                });
            }
            Ok(None) => answer(reply, Ok(())),
            Err(error) => answer(reply, Err(error)),
        }
    }

    /// Answers with the target's candidacy if others have to make way for it; `None` if all is
    /// done.
    async fn begin_transfer(
        &self,
        target: &str,
    ) -> Result<Option<(String, Revision)>, ClusterError> {
        let shared = self.shared;
        let Some(term) = shared.term() else {
            return Err(ClusterError::NotLeader {
                node: shared.config.id.clone(),
                group: shared.config.group.clone(),
            });
        };
        if target == shared.config.id {
            return Ok(None);
        }
        let reading = self.read().await?;
        let between = |entry: &&Entry| entry.key != self.candidacy;
        let others: Vec<_> = reading.candidates.iter().filter(between).collect();
        // One that was restarted is in line twice until the lease of its former life has run out.
        let registration = self.registration_of(target, reading.revision).await?;
        let place = others.iter().position(|entry| {
            let lives = registration
                .as_ref()
                .is_some_and(|own| is_one_life(own, entry));
            entry.value == target.as_bytes() && (lives || bugs::has(Bug::TransferById))
        });
        let Some(place) = place else {
            let reason = match registration {
                None => "it is not registered",
                Some(_) => "it is not a candidate",
            };
            return refused(target, reason).map(|()| None);
        };
        for ahead in &others[..place] {
            // Those of photon-etcd-cluster know nothing of requests, nor of priorities.
            let node = self.registered_as(ahead, reading.revision).await?;
            if node.is_none_or(|node| node.priority.is_none()) {
                let ahead = String::from_utf8_lossy(&ahead.value);
                let reason = format!(
                    "{ahead:?} is ahead of it in the queue, and cannot make way: it is no node of \
                     this crate, or has ended and its lease not yet"
                );
                return refused(target, reason).map(|()| None);
            }
        }
        let to = others[place];
        if place == 0 {
            shared.end_term();
            return match self.hand_over(term.epoch, to).await? {
                true => Ok(None),
                false => refused(target, "it has just left").map(|()| None),
            };
        }
        if bugs::has(Bug::OthersDeletedForTransfer) {
            shared.end_term();
            let txn = others[..place]
                .iter()
                .fold(Txn::new(), |txn, ahead| txn.delete(ahead.key.clone()));
            self.store.txn(txn.delete(self.candidacy.clone())).await?;
            return Ok(None);
        }
        self.ask(to.key.clone(), to.create_revision, None).await?;
        Ok(Some((to.key.clone(), to.create_revision)))
    }

    async fn settle_transfer(
        &mut self,
        transfer: Transfer,
        reading: &Reading,
        leads: bool,
    ) -> Result<bool, ClusterError> {
        let shared = self.shared;
        let mut result = None;
        if !leads {
            result = Some(Err(ClusterError::NotLeader {
                node: shared.config.id.clone(),
                group: shared.config.group.clone(),
            }));
        }
        let to = reading.candidates.iter().find(|entry| {
            entry.key == transfer.candidacy && entry.create_revision == transfer.created
        });
        let ahead = reading
            .candidates
            .iter()
            .find(|entry| entry.key != self.candidacy && entry.create_revision < transfer.created);
        let result = match (result, to, ahead, shared.term()) {
            (Some(result), ..) => result,
            (None, None, ..) => refused(&transfer.target, "it has just left"),
            (None, Some(to), None, Some(term)) => {
                shared.end_term();
                match self.hand_over(term.epoch, to).await {
                    Ok(true) => Ok(()),
                    Ok(false) => refused(&transfer.target, "it has just left"),
                    Err(error) => Err(error),
                }
            }
            (None, Some(_), Some(ahead), _) if Instant::now() >= transfer.until => {
                let ahead = String::from_utf8_lossy(&ahead.value);
                let reason = format!(
                    "{ahead:?} is ahead of it in the queue and has not made way within \
                     {PATIENCE:?}: perhaps its etcd user may not read {}",
                    shared.keys.handover_prefix()
                );
                refused(&transfer.target, reason)
            }
            // The way is free, but it does not lead at the moment.
            (None, Some(_), None, None) if Instant::now() >= transfer.until => {
                Err(ClusterError::NotLeader {
                    node: shared.config.id.clone(),
                    group: shared.config.group.clone(),
                })
            }
            (None, Some(_), ..) => {
                self.errand = Errand::Transfer(transfer);
                return Ok(false);
            }
        };
        // The request goes with the next reading, now that there is no errand for it.
        answer(transfer.reply, result);
        Ok(true)
    }
}
