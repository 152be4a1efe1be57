//! A discovery on the in-memory store with a paused clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::{DiscoveryStatus, EntryLimits, ServiceDiscovery};
use crate::error::ClusterError;
use crate::store::{
    EtcdOptions, Fault, Lease, LeaseId, LeaseKeeper, Listing, MemoryStore, Page, Revision,
    Selector, Store, Txn, WatchRange, Watcher,
};
use crate::testing::until;
use crate::view::{Change, ClusterEvent};

async fn follow(store: &MemoryStore) -> (ServiceDiscovery, JoinHandle<()>) {
    let discovery = ServiceDiscovery::builder(EtcdOptions::memory(""), "g")
        .store(Arc::new(store.clone()))
        .try_build()
        .unwrap();
    let running = discovery.clone();
    let task = tokio::spawn(async move { running.run(None).await.unwrap() });
    discovery.wait_ready().await;
    (discovery, task)
}

async fn put(store: &MemoryStore, id: &str) {
    let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1"}}"#);
    let txn = Txn::new().put(format!("registry/g/{id}"), value.into(), None);
    store.txn(txn).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_store_with_an_older_history_is_listed_again() {
    let store = MemoryStore::new();
    let (discovery, _task) = follow(&store).await;
    for id in ["a", "b", "c", "d"] {
        put(&store, id).await;
    }
    discovery.wait_for_nodes(4).await;
    store.set_fault(Some(Fault::Refuse));
    until("it is stale", || {
        discovery.status() != DiscoveryStatus::Live
    })
    .await;
    store.wipe();
    store.set_fault(None);
    put(&store, "e").await;
    until("the new state", || {
        let nodes = discovery.nodes();
        nodes.len() == 1 && nodes.get("e").is_some()
    })
    .await;
    put(&store, "f").await;
    discovery.wait_for_nodes(2).await;
}

/// The same key at the same revision: processes that write every second write in the same order again.
#[tokio::test(start_paused = true)]
async fn another_history_with_the_same_key_at_the_same_revision_is_recognised() {
    let store = MemoryStore::new();
    let (discovery, _task) = follow(&store).await;
    put(&store, "a").await;
    let backup = store.backup();
    put(&store, "b").await;
    discovery.wait_for_nodes(2).await;
    store.set_fault(Some(Fault::Refuse));
    until("it is stale", || {
        discovery.status() != DiscoveryStatus::Live
    })
    .await;
    store.put_back(&backup);
    store.set_fault(None);
    let moved = r#"{"id":"b","ip":"10.0.0.9"}"#;
    let txn = Txn::new().put("registry/g/b".to_owned(), moved.into(), None);
    store.txn(txn).await.unwrap();
    until("the new state", || {
        let nodes = discovery.nodes();
        nodes
            .get("b")
            .is_some_and(|node| node.ip.to_string() == "10.0.0.9")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_disconnect_is_reported_once_and_the_view_is_kept() {
    let store = MemoryStore::new();
    put(&store, "a").await;
    let (discovery, _task) = follow(&store).await;
    let mut events = discovery.subscribe();
    store.set_fault(Some(Fault::Refuse));
    sleep(Duration::from_secs(120)).await;
    assert_eq!(discovery.nodes().len(), 1);
    assert!(matches!(discovery.status(), DiscoveryStatus::Stale { .. }));
    store.set_fault(None);
    let back = until("it is live", || discovery.status() == DiscoveryStatus::Live).await;
    assert!(back <= Duration::from_secs(30), "{back:?}");
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        seen.push(event);
    }
    assert_eq!(
        seen,
        [ClusterEvent::Disconnected, ClusterEvent::Reconnected]
    );
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_leaves_its_view_and_another_run_continues_from_it() {
    let store = MemoryStore::new();
    put(&store, "a").await;
    let (discovery, task) = follow(&store).await;
    let again = discovery.run(None).await;
    assert!(matches!(again, Err(ClusterError::AlreadyRunning { .. })));
    task.abort();
    let _ = task.await;
    assert!(matches!(discovery.status(), DiscoveryStatus::Ended { .. }));
    put(&store, "b").await;
    let mut events = discovery.subscribe();
    let running = discovery.clone();
    let _task = tokio::spawn(async move { running.run(None).await });
    discovery.wait_for_nodes(2).await;
    // Only the difference: `a` was there all the time.
    let first = events.recv().await.unwrap();
    assert_eq!(first.to_string(), "node b joined at 10.0.0.1");
}

/// A store that lists in pages of ten, and compacts its history between the second and the third page
/// a given number of times.
#[derive(Debug)]
struct Compacting {
    inner: MemoryStore,
    pages: AtomicUsize,
    compactions: AtomicUsize,
}

#[async_trait]
impl Store for Compacting {
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.inner.grant(ttl).await
    }
    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        self.inner.keeper(lease)
    }
    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.inner.revoke(lease).await
    }
    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.inner.keys_of(lease).await
    }
    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        self.inner.txn(txn).await
    }
    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.inner.list(keys, at).await
    }
    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        self.inner.watch(ranges).await
    }
    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        let number = self.pages.fetch_add(1, Ordering::Relaxed);
        if start.is_some() && number % 3 == 2 && self.compactions.load(Ordering::Relaxed) > 0 {
            self.compactions.fetch_sub(1, Ordering::Relaxed);
            put(&self.inner, "late").await;
            self.inner.compact(self.inner.revision());
        }
        let mut listing = self.inner.list(keys, at).await?;
        if let Some(start) = &start {
            listing
                .entries
                .retain(|entry| entry.key.as_bytes() >= &start[..]);
        }
        let more = listing.entries.len() > 10;
        listing.entries.truncate(10);
        let next = listing.entries.last().filter(|_| more).map(|last| {
            let mut next = last.key.clone().into_bytes();
            next.push(0);
            next
        });
        Ok(Page { listing, next })
    }
}

#[tokio::test(start_paused = true)]
async fn a_compaction_between_two_pages_restarts_the_listing() {
    // Once, and often enough that the listing is not restarted at once any more.
    for compactions in [1, 8] {
        let inner = MemoryStore::new();
        for index in 0..55 {
            put(&inner, &format!("n{index}")).await;
        }
        let store = Arc::new(Compacting {
            inner,
            pages: AtomicUsize::new(0),
            compactions: AtomicUsize::new(compactions),
        });
        let discovery = ServiceDiscovery::builder(EtcdOptions::memory(""), "g")
            .store(store.clone())
            .try_build()
            .unwrap();
        let mut changes = discovery.changes();
        let running = discovery.clone();
        let _task = tokio::spawn(async move { running.run(None).await.unwrap() });
        let start = tokio::time::Instant::now();
        discovery.wait_ready().await;
        assert_eq!(
            discovery.nodes().len(),
            56,
            "with the node that joined meanwhile"
        );
        assert_eq!(store.compactions.load(Ordering::Relaxed), 0);
        if compactions == 1 {
            assert!(start.elapsed() < Duration::from_millis(10), "at once");
        }
        // Readers never see an incomplete listing.
        assert!(matches!(changes.next().await, Change::Reset(nodes) if nodes.is_empty()));
        assert!(matches!(changes.next().await, Change::Leader(None)));
        assert!(matches!(changes.next().await, Change::Reset(nodes) if nodes.len() == 56));
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_change_is_published_at_once_and_a_burst_together() {
    let store = MemoryStore::new();
    let (discovery, _task) = follow(&store).await;
    let start = tokio::time::Instant::now();
    let mut nodes = discovery.watch_nodes();
    let mut seen = Vec::new();
    let writing = async {
        for index in 0..100 {
            put(&store, &format!("n{index:02}")).await;
            sleep(Duration::from_millis(1)).await;
        }
    };
    let watching = async {
        while nodes.borrow_and_update().len() < 100 {
            nodes.changed().await.unwrap();
            seen.push((start.elapsed(), nodes.borrow().len()));
        }
    };
    tokio::join!(writing, watching);
    assert_eq!(seen[0].1, 1, "{seen:?}");
    assert!(seen[0].0 < Duration::from_millis(2), "{seen:?}");
    assert!(seen.len() <= 7, "every 20 ms at most: {seen:?}");
    for pair in seen.windows(2) {
        assert!(
            pair[1].0 - pair[0].0 >= Duration::from_millis(20),
            "{seen:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn suspects_are_removed_after_their_time_but_not_while_the_store_is_away() {
    let store = MemoryStore::new();
    for index in 0..10 {
        put(&store, &format!("n{index}")).await;
    }
    let (discovery, _task) = follow(&store).await;
    let mut events = discovery.subscribe();
    let mut txn = Txn::new();
    for index in 0..10 {
        txn = txn.delete(format!("registry/g/n{index}"));
    }
    store.txn(txn).await.unwrap();
    until("all are suspects", || discovery.nodes().suspects() == 10).await;
    assert_eq!(discovery.nodes().len(), 10);
    store.set_fault(Some(Fault::Refuse));
    sleep(Duration::from_secs(300)).await;
    assert_eq!(discovery.nodes().len(), 10);
    store.set_fault(None);
    until("it is live", || discovery.status() == DiscoveryStatus::Live).await;
    put(&store, "n0").await;
    sleep(Duration::from_secs(29)).await;
    assert_eq!(discovery.nodes().len(), 10);
    assert_eq!(discovery.nodes().suspects(), 9);
    until("the others are gone", || discovery.nodes().len() == 1).await;
    let mut left = 0;
    while let Ok(event) = events.try_recv() {
        left += usize::from(matches!(event, ClusterEvent::NodeLeft(_)));
    }
    assert_eq!(left, 9);
}

#[tokio::test(start_paused = true)]
async fn who_found_no_room_is_taken_in_as_soon_as_there_is_some() {
    let store = MemoryStore::new();
    for index in 0..10 {
        put(&store, &format!("n{index}")).await;
    }
    let limits = EntryLimits {
        nodes: 10,
        ..EntryLimits::default()
    };
    let discovery = ServiceDiscovery::builder(EtcdOptions::memory(""), "g")
        .store(Arc::new(store.clone()))
        .limits(limits)
        .try_build()
        .unwrap();
    let running = discovery.clone();
    tokio::spawn(async move { running.run(None).await.unwrap() });
    discovery.wait_ready().await;
    let has = |id: &str| discovery.nodes().get(id).is_some();
    // One more, which does not write its entry again.
    put(&store, "late").await;
    sleep(Duration::from_secs(5)).await;
    assert!(!has("late") && discovery.nodes().len() == 10);
    let leaves = Txn::new().delete("registry/g/n0".to_owned());
    store.txn(leaves).await.unwrap();
    let took = until("it has room", || has("late")).await;
    assert!(took <= Duration::from_secs(3), "{took:?}");
    // Those that have vanished together make room for who is there.
    let gone = (1..10).fold(Txn::new(), |txn, index| {
        txn.delete(format!("registry/g/n{index}"))
    });
    store.txn(gone).await.unwrap();
    until("they are suspects", || discovery.nodes().suspects() == 9).await;
    put(&store, "new").await;
    until("it is there at once", || has("new")).await;
    assert_eq!(discovery.nodes().len(), 10);
}

#[tokio::test(start_paused = true)]
async fn waits_end_with_the_run_and_the_status_reports_its_end() {
    let store = MemoryStore::new();
    let discovery = ServiceDiscovery::builder(EtcdOptions::memory(""), "g")
        .store(Arc::new(store.clone()))
        .try_build()
        .unwrap();
    let error = discovery.until_ready().await.unwrap_err();
    assert!(matches!(error, ClusterError::NotRunning { .. }), "{error}");
    let mut events = discovery.subscribe();
    for _ in 0..2 {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = discovery.clone();
        let task =
            tokio::spawn(async move { running.run_until(async { drop(stopped.await) }).await });
        discovery.until_ready().await.unwrap();
        until("it is live", || discovery.status() == DiscoveryStatus::Live).await;
        let waiting = {
            let discovery = discovery.clone();
            tokio::spawn(async move { discovery.until_leader().await })
        };
        sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished());
        drop(stop);
        task.await.unwrap().unwrap();
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, ClusterError::NotRunning { .. }), "{error}");
        assert!(matches!(discovery.status(), DiscoveryStatus::Ended { .. }));
    }
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        seen.push(event.to_string());
    }
    assert_eq!(
        seen,
        ["ready", "disconnected", "reconnected", "disconnected"]
    );
}
