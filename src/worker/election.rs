//! Registration and election: read the state, do the one thing that is missing, wait for a change
//! that matters, read again.
//!
//! The recipe is that of etcd's own `concurrency` package, with its key layout, so that both mix:
//! each candidate creates `election/{group}/{lease}`; the one with the least create revision
//! leads; each other one watches the candidate just ahead of it, so that a leader's end wakes one
//! node and not all. Nothing is claimed from the answer to a write, which may be lost: only from a
//! read that came after it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, sleep_until};
use tracing::{debug, info, warn};

use super::access::Right;
use super::handover::{Errand, Request};
use super::lease::LeaseHolder;
use super::session::{Registered, Tenure};
use super::{Command, Past, Reply, Shared};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::node::{HealthStatus, Node};
use crate::store::{
    Condition, Entry, LeaseId, Revision, Selector, Store, Txn, WatchEvent, WatchRange, Watcher,
};

/// Steps in a row that wrote something, until the next one is made to wait: whatever the reason,
/// the store must not be kept busy.
const RESTLESS: u32 = 12;

/// Where this node stands, read off the store at one revision.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Something of it is missing there: `register` or `campaign` or both have to be written.
    Outside { register: bool, campaign: bool },
    /// Another process has registered under the same id since.
    Superseded {
        by: LeaseId,
        candidacy: Option<Revision>,
    },
    /// First in line.
    Leads { epoch: Revision },
    /// First in line, with one of higher priority next that asks for it.
    HandsOver { epoch: Revision, to: Entry },
    /// In line behind the candidate with this key.
    Waits { ahead: String },
    /// In line ahead of one that is to lead next: it has to queue again behind it.
    MakesWay { candidacy: Revision },
    /// Registered, and not to campaign.
    Drained,
    /// Drains, but is still a candidate (created then), or its entry does not say so yet.
    Drains { candidacy: Option<Revision> },
    /// Still a candidate, although it has resigned.
    Abandoned { candidacy: Revision },
}

/// What a standing is judged by.
struct View<'a> {
    registration: Option<&'a Entry>,
    /// The registration says what this node says of itself, not what one says that ended before,
    /// under the same lease.
    is_current: bool,
    candidates: &'a [Entry],
    requests: &'a [Request],
}

/// Who is asking.
struct Me<'a> {
    id: &'a str,
    lease: LeaseId,
    candidacy: &'a str,
    priority: u16,
    /// Leases that this process has had.
    own_leases: &'a VecDeque<LeaseId>,
    /// It has seen itself registered before.
    was_registered: bool,
    /// The candidacy it has given up, by its create revision.
    abandoned: Revision,
    draining: bool,
}

fn says_draining(entry: &Entry) -> bool {
    serde_json::from_slice::<Node>(&entry.value).is_ok_and(|node| !node.is_serving())
}

fn standing(view: &View<'_>, me: &Me<'_>) -> Standing {
    let own = view
        .candidates
        .iter()
        .find(|entry| entry.key == me.candidacy);
    let candidacy = own.map(|entry| entry.create_revision);
    let registered = match view.registration.map(|entry| entry.lease) {
        None => false,
        Some(Some(lease)) if lease == me.lease => view.is_current,
        // Under no lease: nobody who lives holds it.
        Some(None) => false,
        // A process that starts takes its id over from its predecessor; one that held it and
        // lost it to another must not take it back, or the two would fight for ever.
        Some(Some(lease)) if !me.was_registered || me.own_leases.contains(&lease) => false,
        Some(Some(_)) if bugs::has(Bug::SupersededFightsBack) => false,
        Some(Some(by)) => return Standing::Superseded { by, candidacy },
    };
    if me.draining {
        let told = view.registration.is_some_and(says_draining);
        let candidacy = candidacy.filter(|_| !bugs::has(Bug::DrainingStaysCandidate));
        return match (registered, candidacy) {
            (true, None) if told && own.is_some() => Standing::Leads {
                epoch: own.map_or(0, |own| own.create_revision),
            },
            (true, None) if told => Standing::Drained,
            (true, candidacy) => Standing::Drains { candidacy },
            (false, _) => Standing::Outside {
                register: true,
                campaign: false,
            },
        };
    }
    if let Some(candidacy) = candidacy.filter(|created| *created == me.abandoned)
        && !bugs::has(Bug::AbandonedCandidacyLeads)
    {
        return Standing::Abandoned { candidacy };
    }
    // Of another node that has ended, under the lease that this one shares with others: readers would
    // take that one for the candidate.
    if let Some(candidacy) = candidacy
        && own.is_some_and(|own| own.value != me.id.as_bytes())
    {
        return Standing::Abandoned { candidacy };
    }
    let Some(own) = own.filter(|_| registered) else {
        return Standing::Outside {
            register: !registered,
            campaign: own.is_none(),
        };
    };
    in_line(view, me, own)
}

/// The standing of a candidate that is registered.
fn in_line(view: &View<'_>, me: &Me<'_>, own: &Entry) -> Standing {
    let mut line: Vec<&Entry> = view.candidates.iter().collect();
    line.sort_unstable_by_key(|entry| entry.create_revision);
    let place = line.partition_point(|entry| entry.create_revision < own.create_revision);
    let (ahead, behind) = (&line[..place], &line[place + 1..]);
    let outranks = |entry: &Entry| {
        let mut requests = view
            .requests
            .iter()
            .filter(|request| request.to == entry.key);
        requests.any(|request| {
            let priority = request.priority.filter(|_| request.is_from(entry));
            priority.is_some_and(|priority| priority > me.priority)
        })
    };
    let is_the_leaders_choice = |entry: &Entry| {
        let mut requests = view
            .requests
            .iter()
            .filter(|request| request.to == entry.key);
        requests.any(|request| {
            let leader = line.first().filter(|_| request.priority.is_none());
            leader.is_some_and(|leader| request.is_from(leader))
        })
    };
    match (ahead.last(), behind.first()) {
        // What it has asked for itself it does itself, while it is waited for.
        (None, Some(next)) if outranks(next) => Standing::HandsOver {
            epoch: own.create_revision,
            to: (*next).clone(),
        },
        (None, _) => Standing::Leads {
            epoch: own.create_revision,
        },
        (Some(_), _)
            if behind
                .iter()
                .any(|entry| outranks(entry) || is_the_leaders_choice(entry)) =>
        {
            Standing::MakesWay {
                candidacy: own.create_revision,
            }
        }
        (Some(ahead), _) => Standing::Waits {
            ahead: ahead.key.clone(),
        },
    }
}

/// The keys of the election, all read at one revision.
pub(super) struct Reading {
    pub(super) revision: Revision,
    pub(super) cluster_id: u64,
    pub(super) registration: Option<Entry>,
    /// The oldest first.
    pub(super) candidates: Vec<Entry>,
    pub(super) requests: Vec<Request>,
}

impl Past {
    /// Takes note of how far the store's history goes; true if it is another one than before.
    fn is_another_history(&mut self, reading: &Reading) -> bool {
        let before = self.history.replace((reading.cluster_id, reading.revision));
        before.is_some_and(|(cluster, revision)| {
            cluster != reading.cluster_id || revision > reading.revision
        }) && !bugs::has(Bug::HistoryNotChecked)
    }
}

impl Shared {
    /// Somebody put a key by hand that is first in line, and no lease will ever take it away.
    fn tell_without_lease(&self, reading: &Reading) {
        let first = reading.candidates.first();
        let Some(first) = first.filter(|entry| entry.lease.is_none()) else {
            return;
        };
        let mut past = self.past();
        if past.told_without_lease.as_ref() != Some(&first.key) {
            warn!(group = %self.config.group, node = %self.config.id, key = first.key, "this election key has no lease, so nobody leads the group until it is deleted");
            past.told_without_lease = Some(first.key.clone());
        }
    }
}

/// One node's part in the election under one lease.
pub(super) struct Part<'a> {
    pub(super) shared: &'a Shared,
    pub(super) store: &'a dyn Store,
    holder: &'a LeaseHolder,
    pub(super) tenure: &'a Arc<Tenure>,
    registration: String,
    pub(super) candidacy: String,
    pub(super) errand: Errand,
}

impl Shared {
    /// Keeps the node registered and in the election under this lease. Never returns.
    pub(super) async fn take_part(
        &self,
        store: &dyn Store,
        holder: &LeaseHolder,
        tenure: &Arc<Tenure>,
        inbox: &mut mpsc::Receiver<Command>,
    ) {
        let mut backoff = Backoff::new();
        let mut restless = 0;
        let mut part = Part {
            shared: self,
            store,
            holder,
            tenure,
            registration: self.keys.registration(&self.config.id),
            candidacy: self.keys.candidacy(tenure.lease.id),
            errand: Errand::None,
        };
        loop {
            let error = match part.step(inbox).await {
                Ok(waited) => {
                    backoff.reset();
                    restless = if waited { 0 } else { restless + 1 };
                    if restless < RESTLESS {
                        continue;
                    }
                    ClusterError::Unavailable {
                        endpoint: self.config.etcd.named(),
                        operation: "register",
                        reason: "what is written is never there when it is read".to_owned(),
                    }
                }
                Err(error) => {
                    part.refuse_overdue(&error);
                    error
                }
            };
            let pause = if error.is_transient() {
                Duration::from_millis(fastrand::u64(200..1000))
            } else {
                backoff.next_delay()
            };
            if error.is_transient() || self.state.borrow().is_registered() {
                debug!(group = %self.config.group, node = %self.config.id, %error, ?pause, "cannot read or write the election");
            } else {
                self.set_health(HealthStatus::Unhealthy);
                warn!(group = %self.config.group, node = %self.config.id, %error, ?pause, "cannot register");
            }
            self.refuse_while(sleep(pause), inbox, &error).await;
        }
    }
}

impl Part<'_> {
    pub(super) fn lease(&self) -> LeaseId {
        self.tenure.lease.id
    }

    /// Reads, and does the one thing that is missing, or waits for a change that matters. Answers
    /// whether it has waited.
    async fn step(&mut self, inbox: &mut mpsc::Receiver<Command>) -> Result<bool, ClusterError> {
        let shared = self.shared;
        let (group, node) = (&shared.config.group, &shared.config.id);
        let mut held = self.holder.listen();
        let revived = self.holder.held().revived;
        let mut reading = self.read().await?;
        let own = reading.candidacy(&self.candidacy);
        let (standing, quiet_until) = {
            let mut past = shared.past();
            if past.is_another_history(&reading) {
                let ttl = self.tenure.lease.ttl;
                warn!(%group, %node, revision = reading.revision, wait = ?ttl, "the store's history is another one; leadership is claimed when leases of the former one have run out");
                past.quiet_until = self.tenure.now() + ttl;
                // A place in line of the former history may be one ahead of a term that was later
                // there, and is still counted on: only what is created from here on is newer.
                past.abandoned = own.unwrap_or(0);
                shared.end_term();
            }
            (self.standing(&reading, &past), past.quiet_until)
        };
        debug!(%group, %node, revision = reading.revision, ?standing, "election read");
        shared.tell_without_lease(&reading);
        let holder = reading.registration.as_ref().and_then(|entry| entry.lease);
        let registered = (holder == Some(self.lease())).then_some(match (&standing, own) {
            (Standing::Drained, _) => Registered::Draining,
            (Standing::Drains { .. }, _) => Registered::NoCandidate,
            (_, Some(_)) => Registered::Candidate,
            (_, None) => Registered::NoCandidate,
        });
        if registered.is_some() {
            shared.past().was_registered = true;
        }
        shared.feed_read(registered);

        if !matches!(
            standing,
            Standing::Leads { .. } | Standing::HandsOver { .. }
        ) {
            shared.end_term();
        }
        let leads = matches!(standing, Standing::Leads { .. });
        if self.settle_errand(&reading, leads).await? {
            return Ok(false);
        }
        // Looked at once: what is waited for below is what kept it from claiming here.
        let quiet_for = quiet_until.saturating_sub(self.tenure.now());
        // The candidacy also where there is to be none: a late request may still create it, and at
        // the head of the line it would keep everybody from leading.
        let mut watched = vec![
            Selector::Key(self.registration.clone()),
            Selector::Key(self.candidacy.clone()),
        ];
        let mut predecessor = None;
        // In line, and not at its head: then requests matter only if they change that.
        let mut in_line = None;
        match standing {
            Standing::Outside { register, campaign } => {
                self.enter(&reading, register, campaign).await?;
                return Ok(false);
            }
            Standing::Drains { candidacy } => {
                self.write_draining(candidacy).await?;
                return Ok(false);
            }
            Standing::Abandoned { candidacy } => {
                self.withdraw(candidacy).await?;
                return Ok(false);
            }
            Standing::MakesWay { candidacy } => {
                info!(%group, %node, "makes way for the one that is to lead next");
                shared.feed_read(registered.map(|_| Registered::NoCandidate));
                self.withdraw(candidacy).await?;
                // In line again when leadership has changed hands, and not all at once.
                sleep(Duration::from_millis(fastrand::u64(250..750))).await;
                return Ok(false);
            }
            Standing::HandsOver { epoch, to } => {
                info!(%group, %node, to = %to.key, "hands over to a higher priority");
                shared.end_term();
                self.hand_over(epoch, &to).await?;
                return Ok(false);
            }
            Standing::Superseded { by, candidacy } => {
                if let Some(candidacy) = candidacy {
                    self.withdraw(candidacy).await?;
                }
                if shared.set_health(HealthStatus::Unhealthy) {
                    warn!(%group, %node, %by, "another process has registered this id; waiting until it leaves");
                }
            }
            Standing::Drained => {}
            Standing::Leads { epoch } => {
                if self.tenure.is_valid() && quiet_for.is_zero() {
                    shared.begin_term(epoch, self.tenure);
                }
                watched.extend(self.watched_in_line(!reading.requests.is_empty()));
            }
            Standing::Waits { ahead } => {
                watched.extend(self.watched_in_line(false));
                watched.push(Selector::Key(ahead.clone()));
                predecessor = Some(ahead.clone());
                in_line = Some(Standing::Waits { ahead });
            }
        }

        // etcd tells a watch that starts in the past what came before it, and all else until it has
        // caught up, up to 100 ms late. While leadership is about to change hands that would be a
        // time without a leader: so it starts now then, and what was before is read.
        let changes_hands = !reading.requests.is_empty();
        let from = if changes_hands {
            0
        } else {
            reading.revision + 1
        };
        let ranges = watched.into_iter().map(|keys| WatchRange { keys, from });
        let mut watcher = self.store.watch(ranges.collect()).await?;
        if changes_hands {
            let now = self.read().await?;
            if !now.is_as(&reading) {
                return Ok(true);
            }
        } else {
            // A watch from a revision that another history has not reached yet says nothing.
            let own = Selector::Key(self.registration.clone());
            let now = self.store.list(&own, None).await?;
            if now.cluster_id != reading.cluster_id || now.revision < reading.revision {
                return Ok(true);
            }
        }
        let quiet = async {
            if quiet_for.is_zero() {
                std::future::pending::<()>().await;
            }
            sleep(quiet_for).await;
        };
        let revived_again = held.wait_for(|held| held.revived != revived);
        let errand_due = self.errand.due();
        let errand = async {
            match errand_due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // A renewal past the deadline: a term is not to come back to life by itself, only
            // after reading that its key is still there.
            () = revived_again => {
                shared.end_term();
                Ok(true)
            }
            // The same, where the deadline was seen to pass.
            () = shared.reread.notified() => Ok(true),
            Some(command) = inbox.recv() => {
                self.obey(command, own).await;
                Ok(true)
            }
            events = self.until_it_matters(&mut *watcher, &mut reading, in_line.as_ref()) => {
                let events = events?;
                if let Some(ahead) = predecessor
                    && bugs::has(Bug::ClaimWhenPredecessorGoes)
                    && events.iter().any(|event| matches!(event, WatchEvent::Delete { key, .. } if *key == ahead))
                {
                    shared.begin_term(own.unwrap_or(0), self.tenure);
                }
                Ok(true)
            }
            () = quiet => Ok(true),
            () = errand => Ok(true),
            () = shared.until_requests_are_readable(self.store) => Ok(true),
        }
    }

    pub(super) fn may_hand_over(&self) -> bool {
        !self.shared.is_missing(Right::ReadRequests)
    }

    fn standing(&self, reading: &Reading, past: &Past) -> Standing {
        let registered = reading.registration.as_ref();
        let view = View {
            registration: registered,
            is_current: registered.is_some_and(|entry| self.shared.is_told_by(&entry.value)),
            candidates: &reading.candidates,
            requests: &reading.requests,
        };
        let me = Me {
            id: &self.shared.config.id,
            lease: self.lease(),
            candidacy: &self.candidacy,
            priority: self.shared.config.priority,
            own_leases: &past.leases,
            was_registered: past.was_registered,
            abandoned: past.abandoned,
            draining: self.shared.is_draining(),
        };
        standing(&view, &me)
    }

    /// Everything there is of the election, at one revision.
    pub(super) async fn read(&self) -> Result<Reading, ClusterError> {
        let keys = &self.shared.keys;
        let mut all = vec![
            Selector::Prefix(keys.election_prefix().to_owned()),
            Selector::Key(self.registration.clone()),
        ];
        if self.may_hand_over() {
            all.push(Selector::Prefix(keys.handover_prefix().to_owned()));
        }
        let listings = match self.store.list_all(&all).await {
            // An etcd user with the rights that the predecessor needs: everything else works.
            Err(error) if all.len() > 2 && error.is_missing_permission() => {
                let listings = self.store.list_all(&all[..2]).await?;
                self.shared.lacks(Right::ReadRequests, &error);
                listings
            }
            listings => listings?,
        };
        let mut listings = listings.into_iter();
        let mut next = || listings.next().unwrap_or_default();
        let (election, held, requests) = (next(), next(), next());
        let mut candidates = election.entries;
        candidates.retain(|entry| keys.is_candidacy(&entry.key));
        candidates.sort_by_key(|entry| entry.create_revision);
        Ok(Reading {
            revision: election.revision,
            cluster_id: election.cluster_id,
            registration: held.entries.into_iter().next(),
            candidates,
            requests: requests
                .entries
                .iter()
                .filter(|entry| keys.is_handover(&entry.key))
                .filter_map(Request::read)
                .collect(),
        })
    }

    /// Waits for any change of the watched keys but updates of the registration by its holder: this
    /// process, or the one that has replaced it. An own one that forgets that the node drains, a
    /// late write of metrics, has to be written over.
    async fn until_it_matters(
        &self,
        watcher: &mut dyn Watcher,
        reading: &mut Reading,
        in_line: Option<&Standing>,
    ) -> Result<Vec<WatchEvent>, ClusterError> {
        let holder = reading.registration.as_ref().and_then(|entry| entry.lease);
        loop {
            let events = watcher.next().await?;
            let update = |event: &WatchEvent| {
                matches!(event, WatchEvent::Put(entry)
                    if entry.key == self.registration
                        && entry.lease == holder
                        && (!self.shared.is_draining() || says_draining(entry)))
            };
            let mut matters = false;
            for event in &events {
                if self.shared.keys.is_handover(event.key()) && in_line.is_some() {
                    reading.apply_request(event);
                } else {
                    matters |= !update(event);
                }
            }
            // Of many in line a request concerns those between its target and the leader.
            if let Some(standing) = in_line
                && !matters
            {
                matters = reading.is_outdated()
                    || self.standing(reading, &self.shared.past()) != *standing;
            }
            if matters {
                return Ok(events);
            }
        }
    }

    /// Registers in place of who is registered, campaigns, or both; or neither, if that is not how
    /// things are any more: the next reading will tell.
    async fn enter(
        &self,
        reading: &Reading,
        register: bool,
        campaign: bool,
    ) -> Result<(), ClusterError> {
        let lease = self.lease();
        let mut txn = Txn::new();
        if register {
            let key = self.registration.clone();
            if !bugs::has(Bug::UnconditionalRegistration) {
                txn = txn.when(match &reading.registration {
                    None => Condition::Absent(key.clone()),
                    Some(entry) => match entry.lease {
                        Some(lease) => Condition::HeldBy(key.clone(), lease),
                        None => Condition::CreatedAt(key.clone(), entry.create_revision),
                    },
                });
            }
            txn = txn.put(key, self.shared.fresh_entry(), Some(lease));
        }
        if campaign {
            let key = self.candidacy.clone();
            txn = txn.when(Condition::Absent(key.clone())).put(
                key,
                self.shared.config.id.clone().into_bytes(),
                Some(lease),
            );
        }
        let entered = self.store.txn(txn).await?;
        if let Some(revision) = entered
            && campaign
            && reading.candidates.is_empty()
            && bugs::has(Bug::ClaimFromWrite)
        {
            self.shared.begin_term(revision, self.tenure);
        }
        Ok(())
    }

    /// Gives up the candidacy that was created then, and no later one: this request may be
    /// carried out long after it was given up on.
    async fn withdraw(&self, created: Revision) -> Result<(), ClusterError> {
        self.shared.past().abandoned = created;
        let resign = Txn::new()
            .when(Condition::CreatedAt(self.candidacy.clone(), created))
            .delete(self.candidacy.clone());
        self.store.txn(resign).await.map(drop)
    }

    async fn write_draining(&self, candidacy: Option<Revision>) -> Result<(), ClusterError> {
        let announce = Txn::new()
            .when(Condition::HeldBy(self.registration.clone(), self.lease()))
            .put(
                self.registration.clone(),
                self.shared.fresh_entry(),
                Some(self.lease()),
            );
        self.store.txn(announce).await?;
        match candidacy {
            Some(created) => self.withdraw(created).await,
            None => Ok(()),
        }
    }

    /// Carries out what the application asked for. In each case leadership ends here before
    /// anything is written, so that it never overlaps with the successor's; and if the answer gets
    /// lost, the candidacy stays given up.
    async fn obey(&mut self, command: Command, candidacy: Option<Revision>) {
        let shared = self.shared;
        match command {
            Command::Resign(reply) => {
                let late = bugs::has(Bug::TermEndsAfterResigning);
                if !late {
                    shared.end_term();
                }
                let result = match candidacy {
                    Some(created) => self.withdraw(created).await,
                    None => Ok(()),
                };
                if late {
                    shared.end_term();
                }
                answer(reply, result);
            }
            Command::Drain(reply) => {
                shared.set_draining();
                shared.end_term();
                answer(reply, self.write_draining(candidacy).await);
            }
            Command::Transfer(target, reply) => self.transfer(target, reply).await,
        }
    }
}

impl Reading {
    /// Whether it says the same, whatever has been written elsewhere.
    fn is_as(&self, other: &Self) -> bool {
        let holder = |reading: &Self| {
            let registration = reading.registration.as_ref();
            registration.map(|entry| (entry.lease, entry.create_revision))
        };
        self.cluster_id == other.cluster_id
            && self.candidates == other.candidates
            && self.requests == other.requests
            && holder(self) == holder(other)
    }

    /// Whether a request is for a candidate, or from a leader, that has come since, or that has
    /// queued again.
    fn is_outdated(&self) -> bool {
        let leader = self.candidates.first();
        self.requests.iter().any(|request| {
            self.candidacy(&request.to) != Some(request.created)
                || (request.priority.is_none()
                    && !leader.is_some_and(|leader| request.is_from(leader)))
        })
    }

    /// Takes over what a watch told of a request.
    fn apply_request(&mut self, event: &WatchEvent) {
        let from = event.key().rsplit('/').next().unwrap_or_default();
        self.requests
            .retain(|request| request.from.to_string() != from);
        if let WatchEvent::Put(entry) = event {
            self.requests.extend(Request::read(entry));
        }
    }

    pub(super) fn candidacy(&self, key: &str) -> Option<Revision> {
        let own = self.candidates.iter().find(|entry| entry.key == key);
        own.map(|entry| entry.create_revision)
    }
}

pub(super) fn answer(reply: Reply, result: Result<(), ClusterError>) {
    // Whoever asked may have stopped waiting.
    let _ = reply.send(result);
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: LeaseId = LeaseId(7);

    fn entry(key: &str, value: &str, create_revision: Revision, lease: i64) -> Entry {
        Entry {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
            create_revision,
            mod_revision: create_revision,
            lease: Some(LeaseId(lease)),
        }
    }

    fn judge(registration: Option<&Entry>, candidates: &[Entry], me: &Me<'_>) -> Standing {
        asked(registration, candidates, &[], me)
    }

    fn asked(
        registration: Option<&Entry>,
        candidates: &[Entry],
        requests: &[Request],
        me: &Me<'_>,
    ) -> Standing {
        let view = View {
            registration,
            is_current: true,
            candidates,
            requests,
        };
        standing(&view, me)
    }

    static NONE: VecDeque<LeaseId> = VecDeque::new();

    fn me() -> Me<'static> {
        Me {
            id: "n",
            lease: ME,
            candidacy: "e/7",
            priority: 0,
            own_leases: &NONE,
            was_registered: false,
            abandoned: 0,
            draining: false,
        }
    }

    #[test]
    fn enters_what_is_missing() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        let outside = |register, campaign| Standing::Outside { register, campaign };
        assert_eq!(judge(None, &[], &me()), outside(true, true));
        assert_eq!(judge(Some(&registration), &[], &me()), outside(false, true));
        assert_eq!(judge(None, &candidacy, &me()), outside(true, false));
    }

    #[test]
    fn least_create_revision_leads_and_others_watch_the_one_ahead() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidates = [
            entry("e/9", "a", 2, 9),
            entry("e/8", "b", 4, 8),
            entry("e/7", "n", 6, 7),
            entry("e/6", "c", 8, 6),
        ];
        assert_eq!(
            judge(Some(&registration), &candidates, &me()),
            Standing::Waits {
                ahead: "e/8".to_owned()
            }
        );
        assert_eq!(
            judge(Some(&registration), &candidates[2..], &me()),
            Standing::Leads { epoch: 6 }
        );
    }

    #[test]
    fn never_leads_without_its_own_live_registration() {
        let candidacy = [entry("e/7", "n", 6, 7)];
        assert!(matches!(
            judge(None, &candidacy, &me()),
            Standing::Outside { .. }
        ));
    }

    #[test]
    fn a_starting_process_takes_over_and_a_replaced_one_stands_back() {
        let other = entry("r/n", "{}", 5, 3);
        assert!(matches!(
            judge(Some(&other), &[], &me()),
            Standing::Outside { register: true, .. }
        ));
        let replaced = Me {
            was_registered: true,
            ..me()
        };
        assert_eq!(
            judge(Some(&other), &[], &replaced),
            Standing::Superseded {
                by: LeaseId(3),
                candidacy: None
            }
        );
        // Its own registration of an earlier session, whose lease has not run out yet.
        let own_leases = VecDeque::from([LeaseId(3), ME]);
        let earlier = Me {
            own_leases: &own_leases,
            ..replaced
        };
        assert!(matches!(
            judge(Some(&other), &[], &earlier),
            Standing::Outside { register: true, .. }
        ));
        // Written by hand, under no lease: nobody lives there.
        let nobodys = Entry {
            lease: None,
            ..other
        };
        assert!(matches!(
            judge(Some(&nobodys), &[], &replaced),
            Standing::Outside { register: true, .. }
        ));
    }

    #[test]
    fn a_candidacy_given_up_never_leads() {
        let registration = entry("r/n", "{}", 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        let resigned = Me {
            abandoned: 6,
            ..me()
        };
        assert_eq!(
            judge(Some(&registration), &candidacy, &resigned),
            Standing::Abandoned { candidacy: 6 }
        );
        let anothers = [entry("e/7", "other", 6, 7)];
        assert_eq!(
            judge(Some(&registration), &anothers, &me()),
            Standing::Abandoned { candidacy: 6 },
            "of a node that ended, under the lease that is shared"
        );
        let later = [entry("e/7", "n", 8, 7)];
        assert_eq!(
            judge(Some(&registration), &later, &resigned),
            Standing::Leads { epoch: 8 }
        );
    }

    #[test]
    fn draining_leaves_the_election_and_says_so() {
        let draining = Me {
            draining: true,
            ..me()
        };
        let serving = entry("r/n", r#"{"id":"n","ip":"::1"}"#, 5, 7);
        let told = entry("r/n", r#"{"id":"n","ip":"::1","state":"draining"}"#, 5, 7);
        let candidacy = [entry("e/7", "n", 6, 7)];
        let drains = |candidacy| Standing::Drains { candidacy };
        assert_eq!(judge(Some(&serving), &[], &draining), drains(None));
        assert_eq!(judge(Some(&told), &candidacy, &draining), drains(Some(6)));
        assert_eq!(judge(Some(&told), &[], &draining), Standing::Drained);
    }

    #[test]
    fn makes_way_for_a_higher_priority_or_when_the_leader_says_so_and_for_nobody_else() {
        let registration = entry("r/n", "{}", 5, 7);
        let line = [
            entry("e/9", "leader", 2, 9),
            entry("e/7", "n", 6, 7),
            entry("e/8", "target", 8, 8),
        ];
        let ask = |from: i64, priority| Request {
            from: LeaseId(from),
            to: "e/8".to_owned(),
            created: 8,
            priority,
        };
        let makes_way = Standing::MakesWay { candidacy: 6 };
        let waits = Standing::Waits {
            ahead: "e/9".to_owned(),
        };
        for (request, then) in [
            (ask(8, Some(1)), &makes_way),
            (ask(8, Some(0)), &waits),
            (ask(9, None), &makes_way),
            // Neither the leader's nor the target's own.
            (ask(7, None), &waits),
            (ask(9, Some(1)), &waits),
        ] {
            let standing = asked(Some(&registration), &line, &[request], &me());
            assert_eq!(standing, *then);
        }
        // For one that is ahead anyway there is no way to make.
        let ahead = Request {
            from: LeaseId(9),
            to: "e/9".to_owned(),
            created: 2,
            priority: Some(9),
        };
        assert_eq!(asked(Some(&registration), &line, &[ahead], &me()), waits);
    }

    #[test]
    fn a_leader_hands_over_to_a_higher_priority_once_that_is_next() {
        let registration = entry("r/n", "{}", 5, 7);
        let line = [
            entry("e/7", "n", 6, 7),
            entry("e/8", "a", 8, 8),
            entry("e/9", "b", 9, 9),
        ];
        let ask = |key: &str, from: i64, priority: u16| Request {
            from: LeaseId(from),
            to: key.to_owned(),
            created: if key == "e/8" { 8 } else { 9 },
            priority: Some(priority),
        };
        let leads = Standing::Leads { epoch: 6 };
        let judge = |request, me: &Me<'_>| asked(Some(&registration), &line, &[request], me);
        assert_eq!(judge(ask("e/9", 9, 1), &me()), leads);
        assert_eq!(
            judge(ask("e/8", 8, 1), &me()),
            Standing::HandsOver {
                epoch: 6,
                to: line[1].clone()
            }
        );
        // Its own choice is carried out by whoever made it.
        let own = Request {
            from: ME,
            to: "e/8".to_owned(),
            created: 8,
            priority: None,
        };
        assert_eq!(judge(own, &me()), leads);
        let equal = Me {
            priority: 1,
            ..me()
        };
        assert_eq!(judge(ask("e/8", 8, 1), &equal), leads);
    }
}
