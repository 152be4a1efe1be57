//! Tests how workers publish metrics: what is written and when, and collectors that hang, panic or
//! return too much.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pingora_etcd::{
    ClusterEvent, HealthStatus, MetricsCollector, Node, NodeMetadata, metadata_keys,
    worker::RefusedSamples,
};
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::stalls::Stalls;
use super::common::{eventually, group, throughout, within};
use super::{LONGER_THAN_WATCHED, Running, WATCHED_TTL, builder, ready};

/// Reports the depth of a queue, and counts how often it was asked.
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
    eventually("the discovery shows the metric", || metric() == Some(7.0)).await;
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
    eventually("the discovery shows the first metrics", || {
        discovery
            .nodes()
            .get("n1")
            .is_some_and(|node| !node.metadata.is_null())
    })
    .await;
    within("the discovery shows a leader", discovery.wait_for_leader()).await;
    let mut events = discovery.subscribe();
    for depth in [5, 9] {
        queue.0.store(depth, Ordering::SeqCst);
        let event = within("an event arrives", events.recv()).await.unwrap();
        let ClusterEvent::NodeUpdated { old, new } = event else {
            panic!("{event}")
        };
        assert_ne!(old.metadata, new.metadata);
        let seen = new.metric(metadata_keys::QUEUE_DEPTH);
        assert_eq!(seen, Some(f64::from(depth)));
    }
    // Four more samples of the same value; all but the last have certainly been processed.
    let asked = || queue.1.load(Ordering::SeqCst);
    let enough = asked() + 4;
    eventually("more samples were taken", || asked() >= enough).await;
    let mut client = etcd.raw_client().await;
    let key = format!("registry/{group}/n1");
    let entry = client.get(key, None).await.unwrap();
    let writes = entry.kvs()[0].version();
    assert!(
        (3..=4).contains(&writes),
        "registration, first metrics (or both in one write), two changes: {writes}"
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
        .ttl(WATCHED_TTL)
        .metrics_collector(Hangs)
        .metrics_update_interval(1);
    let panics = builder(&etcd.options(), &group, "panics")
        .ttl(WATCHED_TTL)
        .metrics_collector(Panics)
        .metrics_update_interval(1);
    let discovery = ready(&etcd.options(), &group).await;
    let running = [hangs, panics].map(|node| Running::new(node.try_build().unwrap()));
    within("both nodes are registered", discovery.wait_for_nodes(2)).await;
    // So the leases must have been renewed.
    throughout("both nodes stay registered", LONGER_THAN_WATCHED, || {
        discovery.nodes().len() == 2
    })
    .await;
    for running in running {
        let stalls = Stalls::watch();
        let took = running.stop().await;
        assert!(took < Duration::from_secs(2) + stalls.so_far(), "{took:?}");
    }
}

/// Reports a valid sample until the flag is set, and then one that no reader would accept.
struct Oversized(Arc<AtomicBool>, fn() -> NodeMetadata);

impl MetricsCollector for Oversized {
    fn collect(&self) -> NodeMetadata {
        if self.0.load(Ordering::SeqCst) {
            (self.1)()
        } else {
            json!({ metadata_keys::QUEUE_DEPTH: 7 })
        }
    }
}

fn nested(levels: usize) -> NodeMetadata {
    // Without `json!`, which would process it recursively.
    (0..levels).fold(NodeMetadata::Null, |inner, _| {
        NodeMetadata::Array(vec![inner])
    })
}

type Counted = fn(RefusedSamples) -> u64;
type Made = fn() -> NodeMetadata;

/// Samples that are refused: their name, the sample, and the counter that must count them.
const REFUSED: [(&str, Made, Counted); 6] = [
    (
        "70-kB",
        || json!({ "a": "x".repeat(70_000) }),
        |r| r.too_long,
    ),
    // Small enough by itself, but too large with the rest of the entry.
    (
        "65-kB",
        || json!({ "a": "x".repeat(65_500) }),
        |r| r.too_long,
    ),
    (
        "2-MB",
        || json!({ "a": "x".repeat(2 << 20) }),
        |r| r.too_long,
    ),
    (
        "1100-numbers",
        || json!({ "a": vec![1; 1_100] }),
        |r| r.too_many_values,
    ),
    ("130-levels", || nested(130), |r| r.too_deep),
    ("100000-levels", || nested(100_000), |r| r.too_deep),
];

#[tokio::test]
async fn a_collector_that_returns_too_much_does_not_lose_the_node() {
    let etcd = Etcd::shared();
    let group = group("samples");
    let discovery = ready(&etcd.options(), &group).await;
    let (is_oversized, always) = (Arc::default(), Arc::new(AtomicBool::new(true)));
    let start = |id: String, when: &Arc<AtomicBool>, sample| {
        let node = builder(&etcd.options(), &group, &id)
            .ttl(WATCHED_TTL)
            .metrics_collector(Oversized(when.clone(), sample))
            .metrics_update_interval(1);
        Running::new(node.try_build().unwrap())
    };
    let (mut late, mut early) = (Vec::new(), Vec::new());
    for (name, sample, _) in REFUSED {
        late.push(start(name.to_owned(), &is_oversized, sample));
        early.push(start(format!("always-{name}"), &always, sample));
    }
    let at = |node: &Running| discovery.nodes().get(node.node.id()).cloned();
    let is_good = |node: &Node| node.metric(metadata_keys::QUEUE_DEPTH) == Some(7.0);
    eventually(
        "all nodes are registered, with their last valid sample",
        || {
            late.iter()
                .all(|node| at(node).is_some_and(|node| is_good(&node)))
                && early.iter().all(|node| at(node).is_some())
        },
    )
    .await;
    is_oversized.store(true, Ordering::SeqCst);
    eventually("each node has had two samples refused", || {
        late.iter()
            .chain(&early)
            .zip(REFUSED.iter().cycle())
            .all(|(node, (_, _, counted))| {
                let refused = node.node.refused_samples();
                counted(refused) >= 2 && counted(refused) == refused.total()
            })
    })
    .await;
    throughout("all nodes stay as they were", LONGER_THAN_WATCHED, || {
        late.iter()
            .all(|node| at(node).is_some_and(|node| is_good(&node)))
            && early.iter().all(|node| at(node).is_some())
            && late
                .iter()
                .chain(&early)
                .all(|node| node.node.current_health() == HealthStatus::Healthy)
            && discovery.leader().is_some()
    })
    .await;
    for node in &late {
        within("the node drains", node.node.drain()).await.unwrap();
        eventually("the discovery shows that it drains", || {
            at(node).is_some_and(|node| !node.is_serving() && is_good(&node))
        })
        .await;
    }
    let mut events = discovery.subscribe();
    for node in late.into_iter().chain(early) {
        let id = node.node.id().to_owned();
        let stalls = Stalls::watch();
        let took = node.stop().await;
        assert!(
            took < Duration::from_secs(1) + stalls.so_far(),
            "{id}: {took:?}"
        );
        loop {
            let event = within("the node leaves", events.recv()).await.unwrap();
            if let ClusterEvent::NodeLeft(node) = event
                && node.id == id
            {
                // The node had announced its departure with a write that was accepted.
                assert!(node.is_leaving(), "{id}");
                break;
            }
        }
    }
    assert_eq!(discovery.rejected_entries().total(), 0);
}

#[tokio::test]
async fn a_node_of_weight_zero_is_a_member_without_traffic() {
    let etcd = Etcd::shared();
    let group = group("zero");
    let running = Running::new(
        builder(&etcd.options(), &group, "n1")
            .weight(0.0)
            .try_build()
            .unwrap(),
    );
    let discovery = ready(&etcd.options(), &group).await;
    within("the node is registered", discovery.wait_for_nodes(1)).await;
    within("the node leads", discovery.wait_for_leader()).await;
    let balancer = pingora_etcd::balance::Balancer::builder()
        .try_build()
        .unwrap();
    let now = std::time::Instant::now();
    balancer.apply(&pingora_etcd::Change::Reset(discovery.nodes()), now);
    balancer.publish(now);
    assert!(balancer.pick().is_none());
    running.stop().await;
}
