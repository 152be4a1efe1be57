//! One suite for both stores, so that the in-memory store behaves like etcd.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use pingora_etcd::ClusterError;
use pingora_etcd::store::{
    Condition, Entry, EtcdStore, LeaseId, MemoryStore, Revision, Selector, Store, Txn, WatchEvent,
    WatchRange, Watcher,
};

use common::etcd::Etcd;
use common::{DEADLINE, group, within};

/// How long leases last that a test waits for: a busy machine has the time to use them before.
const EXPIRING: Duration = Duration::from_secs(6);

/// A store with keys that no other test uses.
struct Subject {
    store: Arc<dyn Store>,
    prefix: String,
    backing: Backing,
}

enum Backing {
    Memory(MemoryStore),
    Etcd(Arc<Etcd>),
}

impl Subject {
    fn memory(test: &str) -> Self {
        let store = MemoryStore::new();
        Self {
            store: Arc::new(store.clone()),
            prefix: format!("{test}/"),
            backing: Backing::Memory(store),
        }
    }

    fn etcd(test: &str, etcd: Arc<Etcd>) -> Self {
        Self {
            store: Arc::new(EtcdStore::new(etcd.options()).unwrap()),
            prefix: format!("{}/", group(test)),
            backing: Backing::Etcd(etcd),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn all(&self) -> Selector {
        Selector::Prefix(self.prefix.clone())
    }

    async fn put(&self, name: &str, value: &str, lease: Option<LeaseId>) -> Revision {
        let txn = Txn::new().put(self.key(name), value.into(), lease);
        self.store.txn(txn).await.unwrap().unwrap()
    }

    async fn delete(&self, name: &str) -> Revision {
        let txn = Txn::new().delete(self.key(name));
        self.store.txn(txn).await.unwrap().unwrap()
    }

    async fn entries(&self) -> Vec<Entry> {
        self.store.list(&self.all(), None).await.unwrap().entries
    }

    async fn names(&self) -> Vec<String> {
        let entries = self.entries().await;
        entries
            .iter()
            .map(|entry| entry.key[self.prefix.len()..].to_owned())
            .collect()
    }

    async fn watch(&self, keys: Selector, from: Revision) -> Box<dyn Watcher> {
        self.store
            .watch(vec![WatchRange { keys, from }])
            .await
            .unwrap()
    }

    async fn compact(&self, revision: Revision) {
        match &self.backing {
            Backing::Memory(store) => store.compact(revision),
            Backing::Etcd(etcd) => {
                let mut client = etcd.raw_client().await;
                client.compact(revision, None).await.unwrap();
            }
        }
    }
}

async fn events(watcher: &mut dyn Watcher, count: usize) -> Vec<WatchEvent> {
    let mut events = Vec::new();
    while events.len() < count {
        events.extend(within("an event arrives", watcher.next()).await.unwrap());
    }
    assert_eq!(events.len(), count, "{events:?}");
    events
}

fn kinds_and_revisions(events: &[WatchEvent]) -> Vec<(bool, Revision)> {
    events
        .iter()
        .map(|event| (matches!(event, WatchEvent::Put(_)), event.revision()))
        .collect()
}

async fn revisions_grow_by_one_per_transaction(subject: Subject) {
    let first = subject.put("a", "1", None).await;
    assert_eq!(subject.put("a", "2", None).await, first + 1);
    let both = Txn::new()
        .put(subject.key("b"), vec![], None)
        .put(subject.key("c"), vec![], None);
    assert_eq!(subject.store.txn(both).await.unwrap(), Some(first + 2));
    assert_eq!(subject.delete("a").await, first + 3);
    // A transaction that changes nothing takes no revision.
    assert_eq!(subject.delete("a").await, first + 3);
    let refused =
        Txn::new()
            .when(Condition::Absent(subject.key("b")))
            .put(subject.key("b"), vec![1], None);
    assert_eq!(subject.store.txn(refused).await.unwrap(), None);
    subject.store.grant(Duration::from_secs(60)).await.unwrap();
    assert_eq!(subject.put("d", "", None).await, first + 4);
}

async fn create_and_modification_revisions(subject: Subject) {
    let created = subject.put("a", "1", None).await;
    let changed = subject.put("a", "2", None).await;
    let entry = &subject.entries().await[0];
    assert_eq!(
        (entry.create_revision, entry.mod_revision),
        (created, changed)
    );
    assert_eq!(entry.value, b"2");
    subject.delete("a").await;
    let again = subject.put("a", "3", None).await;
    let entry = &subject.entries().await[0];
    assert_eq!((entry.create_revision, entry.mod_revision), (again, again));
}

async fn leases_expire_and_take_their_keys_along(subject: Subject) {
    let lease = subject.store.grant(EXPIRING).await.unwrap();
    assert!(lease.ttl >= EXPIRING);
    let last = subject.put("a", "", Some(lease.id)).await;
    subject.put("b", "", Some(lease.id)).await;
    subject.put("stays", "", None).await;
    // A key that was moved to no lease is not deleted with this one.
    subject.put("moved", "", Some(lease.id)).await;
    subject.put("moved", "", None).await;
    let mut watcher = subject.watch(subject.all(), last + 5).await;
    let gone = events(&mut *watcher, 2).await;
    let keys: HashSet<_> = gone.iter().map(|event| event.key().to_owned()).collect();
    assert_eq!(keys, HashSet::from([subject.key("a"), subject.key("b")]));
    assert!(
        gone.iter()
            .all(|event| matches!(event, WatchEvent::Delete { .. }))
    );
    assert_eq!(
        gone[0].revision(),
        gone[1].revision(),
        "all keys of a lease must be deleted in one revision"
    );
    assert_eq!(subject.names().await, ["moved", "stays"]);
}

async fn a_renewed_lease_lives(subject: Subject) {
    let lease = subject.store.grant(EXPIRING).await.unwrap();
    subject.put("a", "", Some(lease.id)).await;
    let mut keeper = subject.store.keeper(lease);
    let start = tokio::time::Instant::now();
    while start.elapsed() < lease.ttl * 2 {
        assert_eq!(keeper.renew(DEADLINE).await.unwrap(), lease.ttl);
        tokio::time::sleep(lease.ttl / 4).await;
    }
    assert_eq!(subject.names().await, ["a"]);
}

async fn a_revoked_lease(subject: Subject) {
    let lease = subject.store.grant(Duration::from_secs(60)).await.unwrap();
    subject.put("a", "", Some(lease.id)).await;
    let mut keeper = subject.store.keeper(lease);
    keeper.renew(DEADLINE).await.unwrap();
    subject.store.revoke(lease.id).await.unwrap();
    assert!(subject.names().await.is_empty());
    let gone = ClusterError::LeaseNotFound { lease: lease.id };
    // Before 3.5.23 etcd may accept a renewal of a lease that has just been revoked; for everything
    // else the lease is gone.
    match keeper.renew(DEADLINE).await {
        Err(error) => assert_eq!(error, gone),
        Ok(_) => assert!(matches!(subject.backing, Backing::Etcd(_))),
    }
    assert_eq!(subject.store.revoke(lease.id).await.unwrap_err(), gone);
    let put = Txn::new().put(subject.key("a"), vec![], Some(lease.id));
    assert_eq!(subject.store.txn(put).await.unwrap_err(), gone);
}

async fn an_unknown_lease(subject: Subject) {
    let lease = LeaseId(0x0bad_cafe);
    let unknown = ClusterError::LeaseNotFound { lease };
    assert_eq!(subject.store.revoke(lease).await.unwrap_err(), unknown);
    let put = Txn::new().put(subject.key("a"), vec![], Some(lease));
    assert_eq!(subject.store.txn(put).await.unwrap_err(), unknown);
    let mut keeper = subject.store.keeper(pingora_etcd::store::Lease {
        id: lease,
        ttl: Duration::from_secs(5),
    });
    assert_eq!(keeper.renew(DEADLINE).await.unwrap_err(), unknown);
    assert!(subject.names().await.is_empty());
}

async fn list_at_a_revision(subject: Subject) {
    subject.put("a", "1", None).await;
    let then = subject.put("b", "1", None).await;
    subject.put("a", "2", None).await;
    subject.delete("b").await;
    let now = subject.put("c", "1", None).await;
    let at = subject
        .store
        .list(&subject.all(), Some(then))
        .await
        .unwrap();
    assert_eq!(at.revision, then);
    let values: Vec<_> = at.entries.iter().map(|entry| &entry.value[..]).collect();
    assert_eq!(values, [b"1", b"1"]);
    let latest = subject.store.list(&subject.all(), None).await.unwrap();
    assert!(latest.revision >= now);
    assert_eq!(subject.names().await, ["a", "c"]);
    let one = Selector::Key(subject.key("a"));
    let one = subject.store.list(&one, Some(now)).await.unwrap();
    assert_eq!(one.entries.len(), 1);
    assert_eq!(one.entries[0].value, b"2");
    let future = subject
        .store
        .list(&subject.all(), Some(now + 1_000_000))
        .await;
    assert!(future.unwrap_err().is_transient());
}

async fn a_long_list_comes_whole_and_in_order(subject: Subject) {
    let names: Vec<String> = (0..2_345).map(|index| format!("n{index:05}")).collect();
    for chunk in names.chunks(100) {
        let txn = chunk.iter().fold(Txn::new(), |txn, name| {
            txn.put(subject.key(name), vec![0; 100], None)
        });
        subject.store.txn(txn).await.unwrap();
    }
    assert_eq!(subject.names().await, names);
}

async fn watch_from_a_revision_tells_each_event_once_and_in_order(subject: Subject) {
    let start = subject.put("a", "0", None).await;
    // Half of the events are written before the watch begins, and half while it runs.
    for round in 1..50 {
        subject.put("a", &round.to_string(), None).await;
    }
    let mut watcher = subject.watch(subject.all(), start).await;
    let writer = {
        let (store, key) = (subject.store.clone(), subject.key("a"));
        tokio::spawn(async move {
            for round in 50..100 {
                let txn = Txn::new().put(key.clone(), round.to_string().into(), None);
                store.txn(txn).await.unwrap();
            }
            store.txn(Txn::new().delete(key)).await.unwrap();
        })
    };
    let events = events(&mut *watcher, 101).await;
    writer.await.unwrap();
    for (round, event) in events[..100].iter().enumerate() {
        let WatchEvent::Put(entry) = event else {
            panic!("{event:?}")
        };
        assert_eq!(entry.value, round.to_string().as_bytes());
        assert_eq!(entry.create_revision, start);
    }
    assert!(matches!(events[100], WatchEvent::Delete { .. }));
    assert!(events.is_sorted_by_key(WatchEvent::revision));
}

async fn a_watch_goes_on_from_its_position(subject: Subject) {
    let first = subject.put("a", "1", None).await;
    let mut watcher = subject.watch(subject.all(), first).await;
    events(&mut *watcher, 1).await;
    let position = watcher.position().to_vec();
    drop(watcher);
    let second = subject.put("b", "2", None).await;
    let third = subject.delete("a").await;
    let mut watcher = subject.store.watch(position).await.unwrap();
    let missed = events(&mut *watcher, 2).await;
    assert_eq!(
        kinds_and_revisions(&missed),
        [(true, second), (false, third)]
    );
}

async fn a_watch_from_the_future_starts_there(subject: Subject) {
    let now = subject.put("a", "1", None).await;
    let mut watcher = subject.watch(subject.all(), now + 2).await;
    subject.put("a", "2", None).await;
    let expected = subject.put("a", "3", None).await;
    assert_eq!(
        kinds_and_revisions(&events(&mut *watcher, 1).await),
        [(true, expected)]
    );
}

async fn several_ranges_in_one_watch(subject: Subject) {
    let start = subject.put("x/1", "", None).await;
    let range = |keys, from| WatchRange { keys, from };
    let prefix = |name: &str| Selector::Prefix(subject.key(name));
    let ranges = vec![
        range(prefix("x/"), start),
        range(prefix("y/"), start),
        range(Selector::Key(subject.key("z")), start),
    ];
    let mut watcher = subject.store.watch(ranges).await.unwrap();
    let together = Txn::new()
        .put(subject.key("x/2"), vec![], None)
        .put(subject.key("y/2"), vec![], None)
        .put(subject.key("other"), vec![], None);
    subject.store.txn(together).await.unwrap();
    subject.put("z", "", None).await;
    subject.put("z/not", "", None).await;
    subject.delete("y/2").await;
    let events = events(&mut *watcher, 5).await;
    let of = |name: &str| -> Vec<_> {
        let key = subject.key(name);
        let of = events.iter().filter(|event| event.key().starts_with(&key));
        of.map(|event| event.revision() - start).collect()
    };
    assert_eq!(of("x/"), [0, 1]);
    assert_eq!(of("y/"), [1, 4]);
    assert_eq!(of("z"), [2]);
    // Each range continues from its own position.
    let position = watcher.position().to_vec();
    drop(watcher);
    let last = subject.put("x/3", "", None).await;
    let mut watcher = subject.store.watch(position).await.unwrap();
    assert_eq!(
        kinds_and_revisions(&self::events(&mut *watcher, 1).await),
        [(true, last)]
    );
}

async fn compaction(subject: Subject) {
    let first = subject.put("a", "1", None).await;
    let second = subject.put("a", "2", None).await;
    let third = subject.put("a", "3", None).await;
    subject.compact(third).await;
    let listed = subject.store.list(&subject.all(), Some(first)).await;
    assert!(matches!(listed, Err(ClusterError::Compacted { .. })));
    let opened = subject
        .store
        .watch(vec![WatchRange {
            keys: subject.all(),
            from: second,
        }])
        .await;
    let error = match opened {
        Ok(mut watcher) => within("the error", watcher.next()).await.unwrap_err(),
        Err(error) => error,
    };
    let ClusterError::Compacted { oldest } = error else {
        panic!("{error:?}")
    };
    assert_eq!(oldest, Some(third));
    // From the oldest revision on, watching works.
    let mut watcher = subject.watch(subject.all(), third).await;
    assert_eq!(
        kinds_and_revisions(&events(&mut *watcher, 1).await),
        [(true, third)]
    );
    let at = subject.store.list(&subject.all(), Some(third)).await;
    assert_eq!(at.unwrap().entries.len(), 1);
}

async fn writes_only_under_the_stated_condition(subject: Subject) {
    let store = &subject.store;
    let lease = store.grant(Duration::from_secs(60)).await.unwrap().id;
    let other = store.grant(Duration::from_secs(60)).await.unwrap().id;
    let key = subject.key("a");
    let create = |lease| {
        let txn = Txn::new().when(Condition::Absent(key.clone()));
        txn.put(key.clone(), vec![], Some(lease))
    };
    let delete = |condition| Txn::new().when(condition).delete(key.clone());
    let held_by = |lease| Condition::HeldBy(key.clone(), lease);
    let created_at = |revision| Condition::CreatedAt(key.clone(), revision);

    assert_eq!(store.txn(delete(held_by(lease))).await.unwrap(), None);
    let created = store.txn(create(lease)).await.unwrap().unwrap();
    assert_eq!(store.txn(create(other)).await.unwrap(), None);
    assert_eq!(store.txn(delete(held_by(other))).await.unwrap(), None);
    let elsewhere = created_at(created - 1);
    assert_eq!(store.txn(delete(elsewhere)).await.unwrap(), None);
    assert_eq!(subject.entries().await[0].lease, Some(lease));
    // All conditions of a transaction must hold.
    let half = delete(held_by(lease)).when(created_at(created + 1));
    assert_eq!(store.txn(half).await.unwrap(), None);
    // What was written again is what it was created as, and not what it was.
    let again = Txn::new().when(Condition::ChangedAt(key.clone(), created));
    let again = again.put(key.clone(), vec![1], Some(lease));
    assert_eq!(store.txn(again.clone()).await.unwrap(), Some(created + 1));
    assert_eq!(store.txn(again).await.unwrap(), None);
    let nowhere = Txn::new().when(Condition::ChangedAt(format!("{key}-none"), created));
    assert_eq!(store.txn(nowhere.delete(key.clone())).await.unwrap(), None);
    let whole = delete(held_by(lease)).when(created_at(created));
    assert_eq!(store.txn(whole).await.unwrap(), Some(created + 2));
    assert!(subject.entries().await.is_empty());
}

async fn a_key_is_written_once_per_transaction(subject: Subject) {
    let twice = Txn::new()
        .put(subject.key("a"), vec![], None)
        .delete(subject.key("a"));
    let error = subject.store.txn(twice).await.unwrap_err();
    assert!(matches!(error, ClusterError::Rejected { .. }), "{error:?}");
    assert!(subject.names().await.is_empty());
}

async fn a_watch_from_now_tells_what_comes(subject: Subject) {
    subject.put("a", "1", None).await;
    let mut watcher = subject.watch(subject.all(), 0).await;
    let next = subject.put("a", "2", None).await;
    let first = events(&mut *watcher, 1).await;
    assert_eq!(kinds_and_revisions(&first), [(true, next)]);
    assert_eq!(watcher.position()[0].from, next + 1);
}

async fn several_lists_at_one_revision(subject: Subject) {
    for index in 0..1_200 {
        subject.put(&format!("long/{index:04}"), "", None).await;
    }
    subject.put("one", "1", None).await;
    let all = [
        Selector::Prefix(subject.key("long/")),
        Selector::Key(subject.key("one")),
        Selector::Key(subject.key("none")),
        Selector::Prefix(subject.key("on")),
    ];
    let listings = subject.store.list_all(&all).await.unwrap();
    let counts: Vec<_> = listings
        .iter()
        .map(|listing| listing.entries.len())
        .collect();
    assert_eq!(counts, [1_200, 1, 0, 1]);
    for (keys, listing) in all.iter().zip(&listings) {
        assert_eq!(listing.revision, listings[0].revision);
        assert_eq!(listing.cluster_id, listings[0].cluster_id);
        let alone = subject.store.list(keys, Some(listing.revision)).await;
        assert_eq!(alone.unwrap(), *listing);
    }
}

async fn many_watches_on_one_store_and_each_hears_its_own(subject: Subject) {
    const COUNT: usize = 50;
    let from = subject.put("start", "", None).await + 1;
    let mut watchers = Vec::new();
    for index in 0..COUNT {
        let keys = Selector::Prefix(subject.key(&format!("w{index:02}/")));
        watchers.push(subject.watch(keys, from).await);
    }
    for round in 0..3 {
        for index in 0..COUNT {
            let name = format!("w{index:02}/{round}");
            subject.put(&name, "", None).await;
        }
        // Some watchers are dropped in each round; the others continue.
        let step = round + 2;
        let mut index = 0;
        for watcher in &mut watchers {
            let received = events(&mut **watcher, 1).await;
            assert!(received[0].key().ends_with(&format!("/{round}")));
        }
        watchers.retain(|_| {
            index += 1;
            index % step != 0
        });
        if round == 0 {
            assert_eq!(watchers.len(), COUNT / 2);
        }
        // Later events are delivered to the remaining watchers.
        if round < 2 {
            let left: Vec<String> = watchers
                .iter()
                .map(|watcher| watcher.position()[0].keys.as_str().to_owned())
                .collect();
            for prefix in left {
                let name = prefix[subject.prefix.len()..].to_owned();
                subject.put(&format!("{name}extra"), "", None).await;
            }
            for watcher in &mut watchers {
                let received = events(&mut **watcher, 1).await;
                assert!(received[0].key().ends_with("/extra"));
            }
        }
    }
}

macro_rules! conformance {
    ($($test:ident: $etcd:ident,)*) => {
        mod memory {
            use super::*;
            $(#[tokio::test]
            async fn $test() {
                super::$test(Subject::memory(stringify!($test))).await;
            })*
        }

        mod etcd {
            use super::*;
            $(#[tokio::test]
            async fn $test() {
                let etcd = conformance!($etcd);
                super::$test(Subject::etcd(stringify!($test), etcd)).await;
            })*
        }
    };
    (shared) => { Etcd::shared() };
    // A separate etcd where transactions of other tests would disturb the test, or the test would
    // disturb them.
    (own) => { Arc::new(Etcd::own()) };
}

conformance! {
    revisions_grow_by_one_per_transaction: own,
    create_and_modification_revisions: shared,
    leases_expire_and_take_their_keys_along: own,
    a_renewed_lease_lives: shared,
    a_revoked_lease: shared,
    an_unknown_lease: shared,
    list_at_a_revision: shared,
    a_long_list_comes_whole_and_in_order: shared,
    watch_from_a_revision_tells_each_event_once_and_in_order: own,
    a_watch_goes_on_from_its_position: shared,
    a_watch_from_the_future_starts_there: own,
    several_ranges_in_one_watch: own,
    compaction: own,
    writes_only_under_the_stated_condition: own,
    a_key_is_written_once_per_transaction: shared,
    a_watch_from_now_tells_what_comes: shared,
    several_lists_at_one_revision: shared,
    many_watches_on_one_store_and_each_hears_its_own: shared,
}

#[tokio::test]
async fn one_name_is_one_memory_store() {
    let put = Txn::new().put("k", vec![], None);
    MemoryStore::named("other").txn(put.clone()).await.unwrap();
    let (one, same) = (MemoryStore::named("one"), MemoryStore::named("one"));
    one.txn(put).await.unwrap();
    assert_eq!(same.entries().len(), 1);
    drop((one, same));
    assert!(
        MemoryStore::named("one").entries().is_empty(),
        "a store is dropped with its last handle"
    );
}

#[tokio::test]
async fn a_dead_endpoint_is_named_and_the_next_one_used() {
    let dead = format!("http://127.0.0.1:{}", common::free_port());
    let etcd = Etcd::shared();
    let store = EtcdStore::new(pingora_etcd::EtcdOptions::new([dead.clone()])).unwrap();
    let any = Selector::Key("any".to_owned());
    let error = store.list(&any, None).await.unwrap_err();
    assert!(error.to_string().contains(&dead), "{error}");
    assert!(error.is_transient());

    let mut endpoints = vec![dead];
    endpoints.extend(etcd.endpoints());
    let store = EtcdStore::new(endpoints.into()).unwrap();
    for _ in 0..20 {
        store.list(&any, None).await.unwrap();
    }
}

#[tokio::test]
async fn a_watch_that_is_too_slow_ends_as_a_whole_and_goes_on_from_its_position() {
    const COUNT: usize = 2_500;
    let subject = Subject::etcd("slow", Etcd::shared());
    let from = subject.put("start", "", None).await + 1;
    let range = |name: &str| WatchRange {
        keys: Selector::Prefix(subject.key(name)),
        from,
    };
    let ranges = vec![range("busy/"), range("quiet/")];
    let mut watcher = subject.store.watch(ranges).await.unwrap();
    // Another watch on the same stream, which is read.
    let mut other = subject
        .watch(Selector::Prefix(subject.key("busy/")), from)
        .await;
    for index in 0..COUNT {
        subject.put(&format!("busy/{index:04}"), "", None).await;
        events(&mut *other, 1).await;
    }
    let mut received = 0;
    let error = loop {
        match within("an event or the end", watcher.next()).await {
            Ok(events) => received += events.len(),
            Err(error) => break error,
        }
    };
    assert!(error.is_transient(), "{error}");
    assert!(
        received < COUNT,
        "the watch must have ended before the last event"
    );
    let mut watcher = subject
        .store
        .watch(watcher.position().to_vec())
        .await
        .unwrap();
    while received < COUNT {
        received += within("an event arrives", watcher.next())
            .await
            .unwrap()
            .len();
    }
    subject.put("quiet/last", "", None).await;
    let last = events(&mut *watcher, 1).await;
    assert_eq!(last[0].key(), subject.key("quiet/last"));
    assert_eq!(received, COUNT, "each event must be delivered once");
}
