//! The data of the in-memory store: entries, leases and history, without waiting and without a clock.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};
use crate::store::types::{
    Condition, Entry, Lease, Listing, Selector, Txn, WatchEvent, WatchRange, Write,
};

/// The store's name in errors.
pub(super) const ENDPOINT: &str = "memory://";
/// Changes kept for watches that start in the past. Older ones are compacted.
const HISTORY: usize = 16_384;

/// A fault that a test injects into the store (`MemoryStore::set_fault`, feature `test-util`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every call fails at once, every watch ends.
    Refuse,
    /// No call is executed or answered within its time, no watch reports anything. Leases run on.
    Silence,
    /// Calls are executed, but their answers are lost. Watches work.
    LoseAnswers,
}

#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) revision: Revision,
    /// The oldest revision that is kept.
    pub(super) compacted: Revision,
    pub(super) entries: BTreeMap<String, Entry>,
    history: VecDeque<Change>,
    pub(super) leases: HashMap<LeaseId, LeaseState>,
    pub(super) last_lease: i64,
    pub(super) cluster_id: u64,
    /// Watches that were opened in an earlier generation have ended.
    pub(super) generation: u64,
    pub(super) fault: Option<Fault>,
}

/// One change, with what it replaced.
#[derive(Debug, Clone)]
struct Change {
    event: WatchEvent,
    before: Option<Entry>,
}

#[derive(Debug, Clone)]
pub(super) struct LeaseState {
    /// The cluster that granted it.
    cluster_id: u64,
    pub(super) ttl: Duration,
    pub(super) ends: Instant,
    keys: BTreeSet<String>,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            revision: 1,
            cluster_id: 1,
            ..Self::default()
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let mut due: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ends <= now)
            .map(|(id, lease)| (lease.ends, *id))
            .collect();
        due.sort_unstable();
        for (_, id) in due {
            self.end_lease(id);
        }
    }

    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> Lease {
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        let lease = LeaseState {
            cluster_id: self.cluster_id,
            ttl,
            ends: now + ttl,
            keys: BTreeSet::new(),
        };
        self.leases.insert(id, lease);
        Lease { id, ttl }
    }

    /// Renews a lease of this cluster. A restored lease was granted by another one.
    pub(super) fn renew(&mut self, lease: LeaseId, now: Instant) -> Result<Duration, ClusterError> {
        let cluster_id = self.cluster_id;
        let held = self.leases.get_mut(&lease);
        let held = held
            .filter(|held| held.cluster_id == cluster_id)
            .ok_or(ClusterError::LeaseNotFound { lease })?;
        held.ends = now + held.ttl;
        Ok(held.ttl)
    }

    pub(super) fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        let held = self.leases.get(&lease);
        let held = held.ok_or(ClusterError::LeaseNotFound { lease })?;
        Ok(held.keys.iter().cloned().collect())
    }

    /// Ends a lease and deletes its keys. Returns whether it existed.
    pub(super) fn end_lease(&mut self, id: LeaseId) -> bool {
        let Some(lease) = self.leases.remove(&id) else {
            return false;
        };
        let revision = self.revision + 1;
        for key in lease.keys {
            self.delete(&key, revision);
        }
        true
    }

    pub(super) fn compact(&mut self, revision: Revision) {
        self.compacted = self.compacted.max(revision);
        let kept = self
            .history
            .partition_point(|change| change.event.revision() < self.compacted);
        self.history.drain(..kept);
    }

    pub(super) fn txn(&mut self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let holds = txn.conditions.iter().all(|condition| self.holds(condition));
        let mut written = BTreeSet::new();
        for write in &txn.writes {
            let (key, lease) = match write {
                Write::Put { key, lease, .. } => (key, *lease),
                Write::Delete { key } => (key, None),
            };
            if !written.insert(key) {
                return Err(ClusterError::Rejected {
                    endpoint: ENDPOINT.to_owned(),
                    operation: "txn",
                    reason: format!("key {key:?} is written twice"),
                });
            }
            if let Some(lease) = lease.filter(|lease| holds && !self.leases.contains_key(lease)) {
                return Err(ClusterError::LeaseNotFound { lease });
            }
        }
        if !holds {
            return Ok(None);
        }
        let revision = self.revision + 1;
        for write in txn.writes {
            match write {
                Write::Put { key, value, lease } => self.put(key, value, lease, revision),
                Write::Delete { key } => self.delete(&key, revision),
            }
        }
        Ok(Some(self.revision))
    }

    fn holds(&self, condition: &Condition) -> bool {
        match condition {
            Condition::Absent(key) => !self.entries.contains_key(key),
            Condition::HeldBy(key, lease) => self
                .entries
                .get(key)
                .is_some_and(|entry| entry.lease == Some(*lease)),
            Condition::CreatedAt(key, revision) => self
                .entries
                .get(key)
                .is_some_and(|entry| entry.create_revision == *revision),
            Condition::ChangedAt(key, revision) => self
                .entries
                .get(key)
                .is_some_and(|entry| entry.mod_revision == *revision),
        }
    }

    fn put(&mut self, key: String, value: Vec<u8>, lease: Option<LeaseId>, revision: Revision) {
        let before = self.entries.get(&key).cloned();
        if let Some(old) = before.as_ref().and_then(|entry| entry.lease)
            && let Some(old) = self.leases.get_mut(&old)
        {
            old.keys.remove(&key);
        }
        if let Some(lease) = lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.insert(key.clone());
        }
        let entry = Entry {
            create_revision: before
                .as_ref()
                .map_or(revision, |entry| entry.create_revision),
            mod_revision: revision,
            key: key.clone(),
            value,
            lease,
        };
        self.entries.insert(key, entry.clone());
        self.record(WatchEvent::Put(entry), before);
    }

    fn delete(&mut self, key: &str, revision: Revision) {
        let Some(before) = self.entries.remove(key) else {
            return;
        };
        if let Some(lease) = before.lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.remove(key);
        }
        let event = WatchEvent::Delete {
            key: key.to_owned(),
            revision,
        };
        self.record(event, Some(before));
    }

    fn record(&mut self, event: WatchEvent, before: Option<Entry>) {
        self.revision = event.revision();
        self.history.push_back(Change { event, before });
        while self.history.len() > HISTORY {
            if let Some(oldest) = self.history.front().map(|change| change.event.revision()) {
                self.compact(oldest + 1);
            }
        }
    }

    pub(super) fn list(
        &self,
        keys: &Selector,
        at: Option<Revision>,
    ) -> Result<Listing, ClusterError> {
        let revision = at.unwrap_or(self.revision);
        self.check_kept(revision)?;
        if revision > self.revision {
            return Err(ClusterError::Unavailable {
                endpoint: ENDPOINT.to_owned(),
                operation: "list",
                reason: format!("revision {revision} has not happened yet"),
            });
        }
        let mut found: BTreeMap<&str, &Entry> = self
            .entries
            .range::<str, _>((Bound::Included(keys.as_str()), Bound::Unbounded))
            .take_while(|(key, _)| keys.matches(key))
            .map(|(key, entry)| (key.as_str(), entry))
            .collect();
        // Undo the changes after the requested revision, newest first.
        for change in self.history.iter().rev() {
            if change.event.revision() <= revision {
                break;
            }
            let key = change.event.key();
            if keys.matches(key) {
                match &change.before {
                    Some(before) => found.insert(key, before),
                    None => found.remove(key),
                };
            }
        }
        Ok(Listing {
            revision,
            cluster_id: self.cluster_id,
            entries: found.into_values().cloned().collect(),
        })
    }

    /// The changes from this revision on, as far as history is kept.
    pub(super) fn events_from(&self, first: Revision) -> impl Iterator<Item = &WatchEvent> {
        let start = self
            .history
            .partition_point(|change| change.event.revision() < first);
        self.history.range(start..).map(|change| &change.event)
    }

    /// The changes that a watch has not reported yet. Moves its ranges past them.
    pub(super) fn take_events(
        &self,
        ranges: &mut [WatchRange],
    ) -> Result<Vec<WatchEvent>, ClusterError> {
        let Some(first) = ranges.iter().map(|range| range.from).min() else {
            return Ok(Vec::new());
        };
        self.check_kept(first)?;
        let is_watched = |event: &&WatchEvent| {
            ranges
                .iter()
                .any(|range| range.from <= event.revision() && range.keys.matches(event.key()))
        };
        let events = self
            .events_from(first)
            .filter(is_watched)
            .cloned()
            .collect();
        for range in ranges {
            range.from = range.from.max(self.revision + 1);
        }
        Ok(events)
    }

    /// Replaces the data, and ends every watch. The ids of leases are never reused.
    #[cfg(any(test, feature = "test-util"))]
    pub(super) fn replace(&mut self, with: Self, is_new_cluster: bool) {
        *self = Self {
            last_lease: self.last_lease,
            cluster_id: self.cluster_id + u64::from(is_new_cluster),
            fault: self.fault,
            generation: self.generation + 1,
            ..with
        };
    }

    fn check_kept(&self, revision: Revision) -> Result<(), ClusterError> {
        if revision < self.compacted {
            return Err(ClusterError::Compacted {
                oldest: Some(self.compacted),
            });
        }
        Ok(())
    }
}
