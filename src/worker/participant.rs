//! One node's part in the election under one lease: what it reads, and what it writes.
//!
//! Nothing is claimed from the answer to a write, which may be lost: only from a reading after it.

use std::sync::Arc;

use super::access::Right;
use super::lease::SharedLease;
use super::reading::Reading;
use super::request::{Request, Wanted};
use super::run_record::RunRecord;
use super::standing::OwnFacts;
use super::state::WorkerState;
use super::tenure::Tenure;
use crate::error::ClusterError;
use crate::node::Node;
use crate::store::{Condition, Entry, LeaseId, Listing, Revision, Selector, Store, Txn};

/// As many keys are read in one request.
const READ_TOGETHER: usize = 100;

/// A node with one of its leases, and its keys under that lease.
pub(super) struct Participant<'a> {
    pub(super) state: &'a WorkerState,
    pub(super) store: &'a dyn Store,
    pub(super) lease: &'a SharedLease,
    pub(super) tenure: &'a Arc<Tenure>,
    /// The key of its registration.
    pub(super) registration: String,
    /// The key of its candidacy.
    pub(super) candidacy: String,
}

/// Whether a registration and a candidacy are of the same process: under the same lease.
pub(super) fn is_same_process(registration: &Entry, candidate: &Entry) -> bool {
    registration.lease.is_some() && registration.lease == candidate.lease
}

/// Whether the listing of a candidacy's key contains that candidacy, and no later one.
fn is_same_candidacy(listing: &Listing, candidacy: &Entry) -> bool {
    listing.entries.first().is_some_and(|entry| {
        // The leader writes its own again, unchanged.
        entry.create_revision == candidacy.create_revision
            && entry.lease == candidacy.lease
            && entry.value == candidacy.value
    })
}

impl<'a> Participant<'a> {
    pub(super) fn new(
        state: &'a WorkerState,
        store: &'a dyn Store,
        lease: &'a SharedLease,
        tenure: &'a Arc<Tenure>,
    ) -> Self {
        Self {
            state,
            store,
            lease,
            tenure,
            registration: state.keys.registration(state.id()),
            candidacy: state.keys.candidacy(tenure.lease.id),
        }
    }

    pub(super) fn lease_id(&self) -> LeaseId {
        self.tenure.lease.id
    }

    pub(super) fn may_read_requests(&self) -> bool {
        !self.state.access.is_missing(Right::ReadRequests)
    }

    /// What decides about this node beside the reading.
    pub(super) fn own_facts<'r>(
        &'r self,
        reading: &Reading,
        record: &'r RunRecord,
    ) -> OwnFacts<'r> {
        let registration = reading.registration.as_ref();
        OwnFacts {
            id: self.state.id(),
            lease: self.lease_id(),
            candidacy_key: &self.candidacy,
            priority: self.state.config.priority(),
            own_leases: &record.leases,
            was_registered: record.was_registered,
            abandoned: record.abandoned,
            passed_over: record.passed_over(),
            is_draining: self.state.is_draining(),
            is_entry_current: registration
                .is_some_and(|entry| self.state.is_entry_current(&entry.value)),
        }
    }
}

/// What it reads.
impl Participant<'_> {
    /// Reads everything the election depends on, at one revision.
    pub(super) async fn read(&self) -> Result<Reading, ClusterError> {
        let keys = &self.state.keys;
        let mut all = vec![
            Selector::Prefix(keys.election_prefix().to_owned()),
            Selector::Key(self.registration.clone()),
        ];
        if self.may_read_requests() {
            all.push(Selector::Prefix(keys.handover_prefix().to_owned()));
        }
        let listings = match self.store.list_all(&all).await {
            // An etcd user with the rights that photon-etcd-cluster needs: all but handovers works.
            Err(error) if all.len() > 2 && error.is_missing_permission() => {
                let listings = self.store.list_all(&all[..2]).await?;
                self.state.access.set_missing(Right::ReadRequests, &error);
                listings
            }
            listings => listings?,
        };
        let mut listings = listings.into_iter();
        let mut next = || listings.next().unwrap_or_default();
        let (election, registration, requests) = (next(), next(), next());
        let mut candidates = election.entries;
        candidates.retain(|entry| keys.is_candidacy(&entry.key));
        candidates.sort_by_key(|entry| entry.create_revision);
        Ok(Reading {
            revision: election.revision,
            cluster_id: election.cluster_id,
            registration: registration.entries.into_iter().next(),
            candidates,
            requests: self.requests(&requests),
        })
    }

    /// Reads again what a candidate depends on that waits behind another one: its own two keys, the candidacy just
    /// ahead, that of the leader, and the requests. `None` if a candidacy or a request is not as it was in the former
    /// reading.
    ///
    /// Who else is in the queue does not matter to it, as it does not while its watch lasts.
    pub(super) async fn read_neighbours(
        &self,
        former: &Reading,
    ) -> Result<Option<Reading>, ClusterError> {
        let neighbours = former.with_predecessor(&self.candidacy);
        let Some(([ahead, own], leader)) = neighbours.zip(former.candidates.first()) else {
            return Ok(None);
        };
        let mut all = vec![
            Selector::Key(self.registration.clone()),
            Selector::Key(own.key.clone()),
            Selector::Key(ahead.key.clone()),
            Selector::Key(leader.key.clone()),
        ];
        if self.may_read_requests() {
            all.push(Selector::Prefix(
                self.state.keys.handover_prefix().to_owned(),
            ));
        }
        let mut listings = self.store.list_all(&all).await?.into_iter();
        let mut next = || listings.next().unwrap_or_default();
        let registration = next();
        let candidacies = [own, ahead, leader].map(|candidacy| (next(), candidacy));
        let requests = self.requests(&next());
        let mut candidacies = candidacies.iter();
        let is_same = candidacies.all(|(listing, candidacy)| is_same_candidacy(listing, candidacy))
            && requests == former.requests;
        Ok(is_same.then(|| Reading {
            revision: registration.revision,
            cluster_id: registration.cluster_id,
            registration: registration.entries.into_iter().next(),
            candidates: former.candidates.clone(),
            requests,
        }))
    }

    fn requests(&self, listing: &Listing) -> Vec<Request> {
        let keys = &self.state.keys;
        let entries = listing.entries.iter();
        entries
            .filter(|entry| keys.is_handover(&entry.key))
            .filter_map(Request::parse)
            .collect()
    }

    /// The registration under an id.
    pub(super) async fn registration_of(
        &self,
        id: &str,
        at: Revision,
    ) -> Result<Option<Entry>, ClusterError> {
        let key = Selector::Key(self.state.keys.registration(id));
        let listing = self.store.list(&key, Some(at)).await?;
        self.state.access.set_granted(Right::ReadNodes);
        Ok(listing.entries.into_iter().next())
    }

    /// The node of a candidate, if it is registered under the same lease: another process may have
    /// its id by now.
    pub(super) async fn node_of(
        &self,
        candidate: &Entry,
        at: Revision,
    ) -> Result<Option<Node>, ClusterError> {
        let Ok(id) = std::str::from_utf8(&candidate.value) else {
            return Ok(None);
        };
        let entry = self.registration_of(id, at).await?;
        Ok(node_in(entry, candidate))
    }

    /// The same for many: a request for each of them would keep a leader busy for long.
    pub(super) async fn nodes_of(
        &self,
        candidates: &[&Entry],
    ) -> Result<Vec<Option<Node>>, ClusterError> {
        let mut nodes = Vec::with_capacity(candidates.len());
        for some in candidates.chunks(READ_TOGETHER) {
            let keys = some.iter().map(|candidate| {
                // What is no id names no registration.
                let id = String::from_utf8_lossy(&candidate.value);
                Selector::Key(self.state.keys.registration(&id))
            });
            let listings = self.store.list_all(&keys.collect::<Vec<_>>()).await?;
            let entries = listings.into_iter().map(|it| it.entries.into_iter().next());
            let found = entries
                .zip(some)
                .map(|(entry, candidate)| node_in(entry, candidate));
            nodes.extend(found);
        }
        self.state.access.set_granted(Right::ReadNodes);
        Ok(nodes)
    }

    /// Whether the candidate's process is registered. Whoever may not read that takes it for registered.
    pub(super) async fn is_alive(
        &self,
        candidate: &Entry,
        at: Revision,
    ) -> Result<bool, ClusterError> {
        let Ok(id) = std::str::from_utf8(&candidate.value) else {
            return Ok(false);
        };
        match self.registration_of(id, at).await {
            Ok(entry) => Ok(entry.is_some_and(|entry| is_same_process(&entry, candidate))),
            Err(error) if error.is_missing_permission() => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// The node that this entry registers, if it is that of the candidate's process.
fn node_in(entry: Option<Entry>, candidate: &Entry) -> Option<Node> {
    let entry = entry.filter(|entry| is_same_process(entry, candidate))?;
    serde_json::from_slice(&entry.value).ok()
}

/// What it writes. Each write is conditional, and the next reading shows whether it took effect.
impl Participant<'_> {
    /// Registers in place of the registration that was read, campaigns, or both; nothing at all if
    /// the keys have changed since.
    pub(super) async fn enter(
        &self,
        reading: &Reading,
        register: bool,
        campaign: bool,
    ) -> Result<(), ClusterError> {
        let lease = Some(self.lease_id());
        let mut txn = Txn::new();
        if register {
            txn = txn.when(self.is_unchanged(reading.registration.as_ref()));
            txn = txn.put(self.registration.clone(), self.state.entry_json(), lease);
        }
        if campaign {
            let id = self.state.id().as_bytes().to_vec();
            txn = txn.when(Condition::Absent(self.candidacy.clone())).put(
                self.candidacy.clone(),
                id,
                lease,
            );
        }
        self.store.txn(txn).await?;
        Ok(())
    }

    fn is_unchanged(&self, registration: Option<&Entry>) -> Condition {
        let key = self.registration.clone();
        match registration {
            None => Condition::Absent(key),
            Some(entry) => match entry.lease {
                Some(lease) => Condition::HeldBy(key, lease),
                None => Condition::CreatedAt(key, entry.create_revision),
            },
        }
    }

    /// Writes the candidacy of a term once more, as it is. The term does not depend on it, nor does this crate's
    /// discovery; but that of `photon-etcd-cluster` learns of a leader from a write to an election key only, and shows
    /// none any more when another key goes.
    pub(super) async fn announce_term(&self, epoch: Revision) -> Result<(), ClusterError> {
        let id = self.state.id().as_bytes().to_vec();
        let announce = Txn::new()
            .when(Condition::CreatedAt(self.candidacy.clone(), epoch))
            .put(self.candidacy.clone(), id, Some(self.lease_id()));
        self.store.txn(announce).await.map(drop)
    }

    /// Deletes the candidacy that was created at this revision, and no later one: the request may
    /// be carried out long after this node has stopped waiting for it.
    pub(super) async fn withdraw(&self, created: Revision) -> Result<(), ClusterError> {
        self.state.record().abandoned = created;
        let withdraw = Txn::new()
            .when(Condition::CreatedAt(self.candidacy.clone(), created))
            .delete(self.candidacy.clone());
        self.store.txn(withdraw).await.map(drop)
    }

    pub(super) async fn withdraw_if_any(
        &self,
        created: Option<Revision>,
    ) -> Result<(), ClusterError> {
        match created {
            Some(created) => self.withdraw(created).await,
            None => Ok(()),
        }
    }

    /// Writes the entry, which says that the node drains, and deletes the candidacy, if there is
    /// one. Returns whether the entry was written: it is not while the registration is not this process's.
    pub(super) async fn announce_draining(
        &self,
        candidacy: Option<Revision>,
    ) -> Result<bool, ClusterError> {
        let (registration, lease) = (self.registration.clone(), self.lease_id());
        let announce = Txn::new()
            .when(Condition::HeldBy(registration.clone(), lease))
            .put(registration, self.state.entry_json(), Some(lease));
        let written = self.store.txn(announce).await?;
        self.withdraw_if_any(candidacy).await?;
        Ok(written.is_some())
    }

    /// Asks the other candidates to make way for this candidacy.
    pub(super) async fn write_request(&self, wanted: &Wanted) -> Result<(), ClusterError> {
        let lease = self.lease_id();
        // Set before the write: a request whose answer is lost may be carried out later.
        self.state.record().has_requested = true;
        let key = self.state.keys.handover(lease);
        let write = Txn::new()
            .when(Condition::HeldBy(self.candidacy.clone(), lease))
            .put(key, wanted.to_json(), Some(lease));
        self.store.txn(write).await.map(drop)
    }

    pub(super) async fn delete_request(&self) -> Result<(), ClusterError> {
        let lease = self.lease_id();
        let key = self.state.keys.handover(lease);
        let delete = Txn::new()
            .when(Condition::HeldBy(key.clone(), lease))
            .delete(key);
        self.store.txn(delete).await.map(drop)
    }

    /// Deletes its own candidacy on the condition that the target is still a candidate, and that
    /// its process has not been restarted. Returns whether it was deleted.
    pub(super) async fn hand_over(
        &self,
        epoch: Revision,
        to: &Entry,
    ) -> Result<bool, ClusterError> {
        let Some(target_lives) = self.is_registered(to) else {
            return Ok(false);
        };
        self.state.record().abandoned = epoch;
        let txn = Txn::new()
            .when(Condition::CreatedAt(self.candidacy.clone(), epoch))
            .when(Condition::CreatedAt(to.key.clone(), to.create_revision))
            .delete(self.candidacy.clone());
        let conditional = txn.clone().when(target_lives);
        let revision = match self.store.txn(conditional).await {
            // The etcd user may not read other registrations: the target's candidacy has to do.
            Err(error) if error.is_missing_permission() => self.store.txn(txn).await?,
            revision => revision?,
        };
        if revision.is_none() {
            // Nothing was written. The next reading finds this node still first in the queue, and
            // its term goes on.
            self.state.record().abandoned = 0;
        }
        Ok(revision.is_some())
    }

    /// That the candidate's process is registered; `None` for a candidate without a lease or id.
    fn is_registered(&self, candidate: &Entry) -> Option<Condition> {
        let id = std::str::from_utf8(&candidate.value).ok()?;
        let registration = self.state.keys.registration(id);
        Some(Condition::HeldBy(registration, candidate.lease?))
    }
}
