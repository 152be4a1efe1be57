use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pingora_etcd::{ClusterEvent, MetricsCollector, NodeMetadata, metadata_keys};
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::{eventually, group, within};
use super::{Running, builder, ready};

/// The queue's depth, and how often it has been asked for.
#[derive(Clone, Default)]
struct Queue(Arc<AtomicU32>, Arc<AtomicU32>);

impl MetricsCollector for Queue {
    fn collect(&self) -> NodeMetadata {
        let depth = self.0.load(Ordering::SeqCst);
        self.1.fetch_add(1, Ordering::SeqCst);
        json!({ metadata_keys::QUEUE_DEPTH: depth, "nested": {"kept": [1, null, "x"]} })
    }
}

#[tokio::test]
async fn metadata_is_stored_and_read() {
    let etcd = Etcd::shared();
    let group = group("metadata");
    let node = builder(&etcd.options(), &group, "n1")
        .metrics_collector(Queue(Arc::new(7.into()), Arc::default()))
        .metrics_update_interval(1)
        .port(8080)
        .zone("z1")
        .tags(["blue"])
        .weight(2.0);
    let running = Running::new(node.try_build().unwrap());
    let discovery = ready(&etcd.options(), &group).await;
    let metric = || {
        let nodes = discovery.nodes();
        nodes.get("n1")?.metric(metadata_keys::QUEUE_DEPTH)
    };
    eventually("the metric is there", || metric() == Some(7.0)).await;
    let nodes = discovery.nodes();
    let node = nodes.get("n1").unwrap();
    assert_eq!(node.metadata["nested"], json!({"kept": [1, null, "x"]}));
    assert_eq!(node.addr(1), "127.0.0.1:8080".parse().unwrap());
    assert_eq!(node.zone.as_deref(), Some("z1"));
    assert!(node.tags.contains("blue"));
    assert_eq!(node.weight, Some(2.0));
    assert!(node.last_seen > 1_600_000_000_000);
    running.stop().await;
}

#[tokio::test]
async fn metadata_updates_arrive_as_node_updated_and_only_changes_are_written() {
    let etcd = Etcd::shared();
    let group = group("updates");
    let queue = Queue::default();
    let node = builder(&etcd.options(), &group, "n1")
        .metrics_collector(queue.clone())
        .metrics_update_interval(1);
    let running = Running::new(node.try_build().unwrap());
    let discovery = ready(&etcd.options(), &group).await;
    eventually("first metrics", || {
        discovery
            .nodes()
            .get("n1")
            .is_some_and(|node| !node.metadata.is_null())
    })
    .await;
    within("a leader", discovery.wait_for_leader()).await;
    let mut events = discovery.subscribe();
    for depth in [5, 9] {
        queue.0.store(depth, Ordering::SeqCst);
        let event = within("an event", events.recv()).await.unwrap();
        let ClusterEvent::NodeUpdated { old, new } = event else {
            panic!("{event}")
        };
        assert_ne!(old.metadata, new.metadata);
        let seen = new.metric(metadata_keys::QUEUE_DEPTH);
        assert_eq!(seen, Some(f64::from(depth)));
    }
    // More readings of the same, all but the last of which have been dealt with.
    let asked = || queue.1.load(Ordering::SeqCst);
    let enough = asked() + 4;
    eventually("more readings", || asked() >= enough).await;
    let mut client = etcd.raw_client().await;
    let key = format!("registry/{group}/n1");
    let entry = client.get(key, None).await.unwrap();
    let writes = entry.kvs()[0].version();
    assert!(
        (3..=4).contains(&writes),
        "registered, first metrics (or both at once), two changes: {writes}"
    );
    running.stop().await;
}

struct Hangs;

impl MetricsCollector for Hangs {
    fn collect(&self) -> NodeMetadata {
        loop {
            std::thread::park();
        }
    }
}

struct Panics;

impl MetricsCollector for Panics {
    fn collect(&self) -> NodeMetadata {
        panic!("on purpose")
    }
}

#[tokio::test]
async fn a_collector_that_hangs_or_panics_harms_nobody() {
    let etcd = Etcd::shared();
    let group = group("hang");
    let hangs = builder(&etcd.options(), &group, "hangs")
        .metrics_collector(Hangs)
        .metrics_update_interval(1);
    let panics = builder(&etcd.options(), &group, "panics")
        .metrics_collector(Panics)
        .metrics_update_interval(1);
    let discovery = ready(&etcd.options(), &group).await;
    let running = [hangs, panics].map(|node| Running::new(node.try_build().unwrap()));
    within("both are there", discovery.wait_for_nodes(2)).await;
    // For longer than the TTL: the leases are being renewed.
    super::common::throughout("both stay", std::time::Duration::from_secs(4), || {
        discovery.nodes().len() == 2
    })
    .await;
    for running in running {
        let took = running.stop().await;
        assert!(took < std::time::Duration::from_secs(2), "{took:?}");
    }
}
