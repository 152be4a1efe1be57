//! Controls of the in-memory store for tests: faults, compaction, expiry, backups, and direct reads.

use std::ops::Bound;

use tokio::time::Instant;

use super::handle::MemoryStore;
use super::state::{Fault, State};
use crate::ids::{LeaseId, Revision};
use crate::store::types::{Entry, WatchEvent};

/// A copy of a store's data ([`MemoryStore::backup`]).
#[derive(Debug, Clone)]
pub struct Backup(State);

/// Controls for tests.
impl MemoryStore {
    /// Forgets history before `revision`, as etcd's compaction does: a watch or a list from before
    /// it fails from now on.
    pub fn compact(&self, revision: Revision) {
        self.server.state().compact(revision);
        self.server.wake();
    }

    /// The current revision.
    pub fn revision(&self) -> Revision {
        self.server.state().revision
    }

    /// Makes the store misbehave, or serve again with `None`.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.server.state().fault = fault;
        self.server.wake();
    }

    /// Ends a lease and its keys at once, as if it had expired.
    pub fn expire_lease(&self, lease: LeaseId) {
        self.server.state().end_lease(lease);
        self.server.wake();
    }

    /// Forgets everything and starts over at revision 1 in a new cluster, as an etcd does that has
    /// lost its data.
    pub fn wipe(&self) {
        self.replace(State::new(), true);
    }

    /// A copy of the current data, to be restored later.
    pub fn backup(&self) -> Backup {
        Backup(self.server.current_state().clone())
    }

    /// Returns to that data as `etcdctl snapshot restore` does: as a new cluster, or with `bump`
    /// with a revision that is higher by this much than any before, so that no revision is used
    /// twice. Every lease gets its whole TTL again, watches end, and there is no history before the
    /// revision.
    pub fn restore(&self, backup: &Backup, bump: Option<Revision>) {
        let mut state = backup.0.clone();
        if let Some(bump) = bump {
            state.revision = state.revision.max(self.revision()) + bump;
        }
        let revision = state.revision;
        state.compact(revision);
        self.replace(state, bump.is_none());
        self.extend_leases();
    }

    /// Returns to that data as if nothing had happened since: the cluster is the same, and revisions
    /// are used a second time.
    pub fn put_back(&self, backup: &Backup) {
        self.replace(backup.0.clone(), false);
        self.extend_leases();
    }

    /// Gives every lease its whole TTL again, as etcd does when its leader changes.
    pub fn extend_leases(&self) {
        let now = Instant::now();
        for lease in self.server.state().leases.values_mut() {
            lease.ends = now + lease.ttl;
        }
        self.server.wake();
    }

    fn replace(&self, with: State, new_cluster: bool) {
        self.server.state().replace(with, new_cluster);
        self.server.wake();
    }

    /// Ends every watch, as a restart of the store does.
    pub fn end_watches(&self) {
        self.server.state().generation += 1;
        self.server.wake();
    }

    /// The leases that are alive.
    pub fn leases(&self) -> Vec<LeaseId> {
        let state = self.server.current_state();
        let mut leases: Vec<_> = state.leases.keys().copied().collect();
        leases.sort_unstable();
        leases
    }

    /// One entry.
    pub fn entry(&self, key: &str) -> Option<Entry> {
        self.server.current_state().entries.get(key).cloned()
    }

    /// The create revision and the lease of the oldest key with this prefix.
    pub fn oldest(&self, prefix: &str) -> Option<(Revision, Option<LeaseId>)> {
        self.server
            .current_state()
            .entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| (entry.create_revision, entry.lease))
            .min_by_key(|(created, _)| *created)
    }

    /// The changes after this revision, as far as history is kept. Unlike the other reads it does
    /// not expire leases: an expiry that no call has noticed yet has not happened.
    pub fn events_after(&self, revision: Revision) -> Vec<WatchEvent> {
        let state = self.server.state();
        state.events_from(revision + 1).cloned().collect()
    }

    /// Every entry, ordered by key.
    pub fn entries(&self) -> Vec<Entry> {
        let state = self.server.current_state();
        state.entries.values().cloned().collect()
    }
}
