//! A discovery on the in-memory store under a paused clock.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::*;
use crate::store::{Fault, MemoryStore, Txn};
use crate::testing::until;

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
async fn a_store_whose_history_went_back_is_listed_again() {
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

#[tokio::test(start_paused = true)]
async fn it_says_once_that_it_is_cut_off_and_keeps_the_view() {
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
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        told.push(event);
    }
    assert_eq!(
        told,
        [ClusterEvent::Disconnected, ClusterEvent::Reconnected]
    );
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_leaves_a_stale_view_and_another_goes_on_from_it() {
    let store = MemoryStore::new();
    put(&store, "a").await;
    let (discovery, task) = follow(&store).await;
    let again = discovery.run(None).await;
    assert!(matches!(again, Err(ClusterError::AlreadyRunning { .. })));
    task.abort();
    let _ = task.await;
    assert!(matches!(discovery.status(), DiscoveryStatus::Stale { .. }));
    put(&store, "b").await;
    let mut events = discovery.subscribe();
    let running = discovery.clone();
    let _task = tokio::spawn(async move { running.run(None).await });
    discovery.wait_for_nodes(2).await;
    // The difference only: `a` has been there all the time.
    let first = events.recv().await.unwrap();
    assert_eq!(first.to_string(), "node b joined at 10.0.0.1");
}
