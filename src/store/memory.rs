//! A store inside this process: the embedded default, unit tests, simulation.
//!
//! Nothing runs in the background. Leases are expired by whoever looks next: every call, and every
//! watcher, which sleeps until the next lease is due. So it works in any runtime, in several at
//! once, and under a paused clock.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{
    Clock, Condition, Entry, Lease, LeaseId, LeaseKeeper, Listing, Revision, Selector, Store,
    TokioClock, Txn, WatchEvent, WatchRange, Watcher, Write,
};
use crate::error::ClusterError;
use crate::signal::Signal;
use crate::sync::lock;

/// How long a call waits while the store is silent.
const PATIENCE: Duration = Duration::from_secs(3);
/// Changes kept for watches that start in the past. Older ones are compacted away.
const HISTORY: usize = 16_384;

/// What the store does instead of serving, when a test says so (`MemoryStore::set_fault`, feature
/// `test-util`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every call fails at once, every watch ends.
    Refuse,
    /// No call is carried out or answered within its time, no watch tells anything. Leases run on.
    Silence,
    /// Calls are carried out, but their answers get lost. Watches work.
    LoseAnswers,
}

/// A coordination store in this process. It is lost with the process.
///
/// Clones are handles to the same store.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Bumped after each change of state that somebody may be waiting for.
    changed: Signal,
    clock: TokioClock,
}

/// A store's data at some time (`MemoryStore::backup`, feature `test-util`).
#[cfg(any(test, feature = "test-util"))]
#[derive(Debug, Clone)]
pub struct Backup(State);

#[derive(Debug, Clone, Default)]
struct State {
    revision: Revision,
    compacted: Revision,
    entries: BTreeMap<String, Entry>,
    history: VecDeque<Change>,
    leases: HashMap<LeaseId, LeaseState>,
    last_lease: i64,
    cluster_id: u64,
    /// Watches of an earlier one have ended.
    generation: u64,
    fault: Option<Fault>,
}

#[derive(Debug, Clone)]
struct Change {
    event: WatchEvent,
    before: Option<Entry>,
}

#[derive(Debug, Clone)]
struct LeaseState {
    /// The cluster that granted it.
    cluster_id: u64,
    ttl: Duration,
    ends: Instant,
    keys: BTreeSet<String>,
}

static NAMED: Mutex<BTreeMap<String, Weak<Shared>>> = Mutex::new(BTreeMap::new());

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// A store of its own.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    revision: 1,
                    cluster_id: 1,
                    ..State::default()
                }),
                changed: Signal::default(),
                clock: TokioClock::new(),
            }),
        }
    }

    /// The store of that name in this process, which lives as long as somebody holds it.
    pub fn named(name: &str) -> Self {
        let mut named = lock(&NAMED);
        named.retain(|_, store| store.strong_count() > 0);
        if let Some(shared) = named.get(name).and_then(Weak::upgrade) {
            return Self { shared };
        }
        let store = Self::new();
        named.insert(name.to_owned(), Arc::downgrade(&store.shared));
        store
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn wake(&self) {
        self.shared.changed.update(|()| {});
    }

    /// Runs `call` on the state once the store serves, with leases that are due expired.
    async fn serve<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&mut State) -> Result<T, ClusterError>,
    ) -> Result<T, ClusterError> {
        let timeout = || ClusterError::Timeout {
            endpoint: ENDPOINT.to_owned(),
            operation,
            after: PATIENCE,
        };
        let mut changed = self.shared.changed.listen();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let fault = self.lock().fault;
            match fault {
                None => return self.carry_out(call),
                Some(Fault::Refuse) => return Err(refused(operation)),
                Some(Fault::LoseAnswers) => {
                    drop(self.carry_out(call));
                    tokio::time::sleep_until(deadline).await;
                    return Err(timeout());
                }
                Some(Fault::Silence) => {}
            }
            // The sender lives in `self`, so waiting cannot fail, but it can be too long.
            if tokio::time::timeout_at(deadline, changed.changed())
                .await
                .is_err()
            {
                return Err(timeout());
            }
        }
    }

    fn carry_out<T>(
        &self,
        call: impl FnOnce(&mut State) -> Result<T, ClusterError>,
    ) -> Result<T, ClusterError> {
        let mut state = self.lock();
        let before = state.revision;
        state.expire(Instant::now());
        let result = call(&mut state);
        let moved = state.revision != before;
        drop(state);
        if moved {
            self.wake();
        }
        result
    }
}

/// Controls for tests.
#[cfg(any(test, feature = "test-util"))]
impl MemoryStore {
    /// Forgets history before `revision`, as etcd's compaction does: a watch from before it, or a
    /// list at a revision before it, fails from now on.
    pub fn compact(&self, revision: Revision) {
        self.lock().compact(revision);
        self.wake();
    }

    /// The current revision.
    pub fn revision(&self) -> Revision {
        self.lock().revision
    }

    /// Makes the store misbehave, or serve again with `None`.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
        self.wake();
    }

    /// Ends a lease and its keys at once, as if it had run out.
    pub fn expire_lease(&self, lease: LeaseId) {
        self.lock().end_lease(lease);
        self.wake();
    }

    /// Forgets everything and starts over at revision 1 in a new cluster, as an etcd does whose
    /// data was lost.
    pub fn wipe(&self) {
        let empty = State {
            revision: 1,
            ..State::default()
        };
        self.replace(empty, true);
    }

    /// The data as it is now, to be restored later.
    pub fn backup(&self) -> Backup {
        let mut state = self.lock();
        state.expire(Instant::now());
        Backup(state.clone())
    }

    /// Goes back to that data, in one of the two ways in which `etcdctl snapshot restore` does:
    /// as a new cluster; or, with `bump`, with a revision that is so much higher than any there was,
    /// so that none is used twice. Leases get their whole TTL anew, watches end, and there is no history
    /// before the revision.
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

    /// Puts a copy of the data back as if nothing had happened since: the cluster is the same, and
    /// revisions are given out a second time.
    pub fn put_back(&self, backup: &Backup) {
        self.replace(backup.0.clone(), false);
        self.extend_leases();
    }

    /// Gives every lease its whole TTL anew, as etcd does when its leader changes.
    pub fn extend_leases(&self) {
        let now = Instant::now();
        for lease in self.lock().leases.values_mut() {
            lease.ends = now + lease.ttl;
        }
        self.wake();
    }

    fn replace(&self, with: State, new_cluster: bool) {
        let mut state = self.lock();
        *state = State {
            // Ids are not given out twice, whatever the data.
            last_lease: state.last_lease,
            cluster_id: state.cluster_id + u64::from(new_cluster),
            fault: state.fault,
            generation: state.generation + 1,
            ..with
        };
        drop(state);
        self.wake();
    }

    /// Ends every watch, as a restart of the store does.
    pub fn end_watches(&self) {
        self.lock().generation += 1;
        self.wake();
    }

    /// The leases that are alive.
    pub fn leases(&self) -> Vec<LeaseId> {
        let mut state = self.lock();
        state.expire(Instant::now());
        let mut leases: Vec<_> = state.leases.keys().copied().collect();
        leases.sort_unstable();
        leases
    }

    /// One entry.
    pub fn entry(&self, key: &str) -> Option<Entry> {
        let mut state = self.lock();
        state.expire(Instant::now());
        state.entries.get(key).cloned()
    }

    /// Of the keys with this prefix the one with the least create revision: that, and its lease.
    pub fn oldest(&self, prefix: &str) -> Option<(Revision, Option<LeaseId>)> {
        let mut state = self.lock();
        state.expire(Instant::now());
        state
            .entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| (entry.create_revision, entry.lease))
            .min_by_key(|(created, _)| *created)
    }

    /// What has happened after this revision, as far back as history goes. Unlike every other look at
    /// the store it does not let leases run out: what nobody has noticed has not happened.
    pub fn events_after(&self, revision: Revision) -> Vec<WatchEvent> {
        let state = self.lock();
        if state.revision <= revision {
            return Vec::new();
        }
        let start = state
            .history
            .partition_point(|change| change.event.revision() <= revision);
        let after = state.history.range(start..);
        after.map(|change| change.event.clone()).collect()
    }

    /// Every entry, in the order of keys.
    pub fn entries(&self) -> Vec<Entry> {
        let mut state = self.lock();
        state.expire(Instant::now());
        state.entries.values().cloned().collect()
    }
}

impl State {
    fn expire(&mut self, now: Instant) {
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

    fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.ends).min()
    }

    fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        if !self.leases.contains_key(&lease) {
            return Err(ClusterError::LeaseNotFound { lease });
        }
        let all = self.entries.values();
        let of_it = all.filter(|entry| entry.lease == Some(lease));
        Ok(of_it.map(|entry| entry.key.clone()).collect())
    }

    fn end_lease(&mut self, id: LeaseId) -> bool {
        let Some(lease) = self.leases.remove(&id) else {
            return false;
        };
        let revision = self.revision + 1;
        for key in lease.keys {
            self.delete(&key, revision);
        }
        true
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

    fn compact(&mut self, revision: Revision) {
        self.compacted = self.compacted.max(revision);
        let kept = self
            .history
            .partition_point(|change| change.event.revision() < self.compacted);
        self.history.drain(..kept);
    }

    fn txn(&mut self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        let mut written = BTreeSet::new();
        for write in &txn.writes {
            let (key, lease) = match write {
                Write::Put { key, lease, .. } => (key, *lease),
                Write::Delete { key } => (key, None),
            };
            if !written.insert(key) {
                return Err(rejected("txn", format!("key {key:?} is written twice")));
            }
            if let Some(lease) = lease
                && !self.leases.contains_key(&lease)
                && txn.conditions.iter().all(|condition| self.holds(condition))
            {
                return Err(ClusterError::LeaseNotFound { lease });
            }
        }
        if !txn.conditions.iter().all(|condition| self.holds(condition)) {
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

    fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        let revision = at.unwrap_or(self.revision);
        if revision < self.compacted {
            return Err(ClusterError::Compacted {
                oldest: self.compacted,
            });
        }
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
        // Undo, newest first, what came after the revision asked for.
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
}

const ENDPOINT: &str = "memory://";

fn refused(operation: &'static str) -> ClusterError {
    ClusterError::Unavailable {
        endpoint: ENDPOINT.to_owned(),
        operation,
        reason: "the store refuses to serve".to_owned(),
    }
}

fn rejected(operation: &'static str, reason: String) -> ClusterError {
    ClusterError::Rejected {
        endpoint: ENDPOINT.to_owned(),
        operation,
        reason,
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.shared.clock)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.serve("grant", |state| {
            state.last_lease += 1;
            let id = LeaseId(state.last_lease);
            let lease = LeaseState {
                cluster_id: state.cluster_id,
                ttl,
                ends: Instant::now() + ttl,
                keys: BTreeSet::new(),
            };
            state.leases.insert(id, lease);
            Ok(Lease { id, ttl })
        })
        .await
        // A watcher sleeps until the next lease is due: it has to hear of this one.
        .inspect(|_| self.wake())
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        Box::new(MemoryKeeper {
            store: self.clone(),
            lease: lease.id,
        })
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.serve("revoke", |state| {
            if state.end_lease(lease) {
                Ok(())
            } else {
                Err(ClusterError::LeaseNotFound { lease })
            }
        })
        .await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.serve("lease", |state| state.keys_of(lease)).await
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        self.serve("txn", |state| state.txn(txn)).await
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.serve("list", |state| state.list(keys, at)).await
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        let opened = self.serve("watch", |state| Ok((state.generation, state.revision)));
        let (generation, revision) = opened.await?;
        let ranges = ranges.into_iter().map(|mut range| {
            if range.from == 0 {
                range.from = revision + 1;
            }
            range
        });
        Ok(Box::new(MemoryWatcher {
            store: self.clone(),
            generation,
            ranges: ranges.collect(),
        }))
    }
}

struct MemoryKeeper {
    store: MemoryStore,
    lease: LeaseId,
}

#[async_trait]
impl LeaseKeeper for MemoryKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        let lease = self.lease;
        let renewal = self.store.serve("renew", |state| {
            let cluster_id = state.cluster_id;
            let held = state.leases.get_mut(&lease);
            let state = held
                .filter(|held| held.cluster_id == cluster_id)
                .ok_or(ClusterError::LeaseNotFound { lease })?;
            state.ends = Instant::now() + state.ttl;
            Ok(state.ttl)
        });
        tokio::time::timeout(within, renewal)
            .await
            .unwrap_or(Err(ClusterError::Timeout {
                endpoint: ENDPOINT.to_owned(),
                operation: "renew",
                after: within,
            }))
    }
}

struct MemoryWatcher {
    store: MemoryStore,
    generation: u64,
    ranges: Vec<WatchRange>,
}

impl MemoryWatcher {
    fn take(&mut self, state: &State) -> Result<Vec<WatchEvent>, ClusterError> {
        let first = self.ranges.iter().map(|range| range.from).min();
        let Some(first) = first else {
            return Ok(Vec::new());
        };
        if first < state.compacted {
            return Err(ClusterError::Compacted {
                oldest: state.compacted,
            });
        }
        let start = state
            .history
            .partition_point(|change| change.event.revision() < first);
        let events = state
            .history
            .range(start..)
            .map(|change| &change.event)
            .filter(|event| {
                self.ranges
                    .iter()
                    .any(|range| range.from <= event.revision() && range.keys.matches(event.key()))
            })
            .cloned()
            .collect();
        for range in &mut self.ranges {
            range.from = range.from.max(state.revision + 1);
        }
        Ok(events)
    }
}

#[async_trait]
impl Watcher for MemoryWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        let store = self.store.clone();
        let mut changed = store.shared.changed.listen();
        loop {
            let due = {
                let mut state = store.lock();
                match state.fault {
                    _ if state.generation != self.generation => return Err(refused("watch")),
                    Some(Fault::Refuse) => return Err(refused("watch")),
                    Some(Fault::Silence) => {
                        changed.catch_up();
                        None
                    }
                    Some(Fault::LoseAnswers) | None => {
                        let before = state.revision;
                        state.expire(Instant::now());
                        if state.revision != before {
                            store.wake();
                        }
                        changed.catch_up();
                        let events = self.take(&state)?;
                        if !events.is_empty() {
                            return Ok(events);
                        }
                        state.next_expiry()
                    }
                }
            };
            let expiry = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = changed.changed() => {}
                () = expiry => {}
            }
        }
    }

    fn position(&self) -> &[WatchRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The leases of a snapshot are there in the cluster that it is restored into, for their whole TTL,
    /// but those who hold them have to begin anew: what they were in the former one they are not here.
    #[tokio::test(start_paused = true)]
    async fn a_lease_of_another_cluster_is_not_renewed() {
        let store = MemoryStore::default();
        let lease = store.grant(Duration::from_secs(5)).await.unwrap();
        let mut keeper = store.keeper(lease);
        let mut renew = async || keeper.renew(Duration::from_secs(1)).await;
        assert_eq!(renew().await, Ok(lease.ttl));
        let backup = store.backup();
        // The same cluster, with a revision that goes on.
        store.restore(&backup, Some(1_000));
        assert_eq!(renew().await, Ok(lease.ttl));
        store.restore(&backup, None);
        let gone = ClusterError::LeaseNotFound { lease: lease.id };
        assert_eq!(renew().await, Err(gone));
        assert_eq!(store.leases(), [lease.id]);
        let new = store.grant(Duration::from_secs(5)).await.unwrap();
        let renewed = store.keeper(new).renew(Duration::from_secs(1)).await;
        assert_eq!(renewed, Ok(new.ttl));
    }
}
