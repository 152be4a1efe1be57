//! Tests that nodes of this crate and of its predecessor share a group: the same keys, the same
//! JSON and the same way to campaign.

use super::common::etcd::Etcd;
use super::common::{eventually, group, throughout, within};
use super::{Running, leader_id, ready};

#[tokio::test]
async fn a_peer_that_campaigns_by_the_election_rpcs_shares_the_queue() {
    let etcd = Etcd::shared();
    let group = group("peer");
    let mut peer = etcd.raw_client().await;
    let lease = peer.lease_grant(60, None).await.unwrap().id();
    let under = etcd_client::PutOptions::new().with_lease(lease);
    let entry = r#"{"id":"peer","ip":"192.168.1.10","last_seen":1234567890}"#;
    peer.put(format!("registry/{group}/peer"), entry, Some(under))
        .await
        .unwrap();
    let election = format!("election/{group}");
    let won = peer
        .campaign(election.as_str(), "peer", lease)
        .await
        .unwrap();
    let key = won.leader().unwrap().key().to_vec();
    assert_eq!(
        String::from_utf8(key).unwrap(),
        format!("election/{group}/{lease:x}"),
        "the predecessor's key must have the layout of this crate"
    );

    let ours = Running::start(&etcd.options(), &group, "ours").await;
    let discovery = ready(&etcd.options(), &group).await;
    eventually("the discovery shows the peer as leader", || {
        leader_id(&discovery).as_deref() == Some("peer") && discovery.nodes().len() == 2
    })
    .await;
    throughout(
        "our node waits",
        std::time::Duration::from_millis(500),
        || !ours.node.is_leader(),
    )
    .await;

    // The peer resigns: our node leads, and the peer, which campaigns again, sees that.
    let resign = etcd_client::ResignOptions::new().with_leader(won.leader().unwrap().clone());
    peer.resign(Some(resign)).await.unwrap();
    within("our node leads", ours.node.wait_for_leadership()).await;
    let seen = peer.leader(election.as_str()).await.unwrap();
    assert_eq!(seen.kv().unwrap().value(), b"ours");
    let mut waiting = peer.clone();
    let again = tokio::spawn(async move {
        let won = waiting.campaign(election.as_str(), "peer", lease).await;
        won.map(drop)
    });
    eventually("the peer's campaign waits", || !again.is_finished()).await;
    ours.stop().await;
    within("the peer wins again", again).await.unwrap().unwrap();
    eventually("the discovery shows the peer as leader", || {
        leader_id(&discovery).as_deref() == Some("peer")
    })
    .await;
    peer.lease_revoke(lease).await.unwrap();
}

#[tokio::test]
async fn what_is_written_is_what_the_predecessor_reads() {
    let etcd = Etcd::shared();
    let group = group("wire");
    let running = Running::start(&etcd.options(), &group, "n1").await;
    within("the node leads", running.node.wait_for_leadership()).await;
    let mut client = etcd.raw_client().await;
    let entry = client
        .get(format!("registry/{group}/n1"), None)
        .await
        .unwrap();
    let entry = &entry.kvs()[0];
    let value: serde_json::Value = serde_json::from_slice(entry.value()).unwrap();
    let fields: Vec<_> = value.as_object().unwrap().keys().collect();
    // The predecessor ignores the two additional fields. `priority` distinguishes our nodes from
    // the predecessor's, and `run` one process from the next one with the same id.
    assert_eq!(fields, ["id", "ip", "last_seen", "priority", "run"]);
    let candidacy = format!("election/{group}/{:x}", entry.lease());
    let candidate = client.get(candidacy, None).await.unwrap();
    assert_eq!(candidate.kvs()[0].value(), b"n1");
    assert_eq!(
        candidate.kvs()[0].lease(),
        entry.lease(),
        "registration and candidacy use one lease"
    );
    running.stop().await;
}

/// Every public call of the predecessor, as its users write it; only the name of the crate differs.
#[cfg(feature = "system-metrics")]
#[tokio::test]
async fn the_predecessors_calls_compile_and_work() {
    use std::net::{IpAddr, SocketAddr};
    use std::sync::atomic::{AtomicU32, Ordering};

    use pingora_etcd::cluster_node::{ClusterNode, ClusterNodeBuilder};
    use pingora_etcd::discovery::ServiceDiscovery;
    use pingora_etcd::error::ClusterError;
    use pingora_etcd::event::ClusterEvent;
    use pingora_etcd::metrics::{
        CompositeMetricsCollector, MetricsCollector, NoopMetricsCollector, SystemMetricsCollector,
    };
    use pingora_etcd::types::{HealthStatus, NodeMetadata, metadata_keys};
    use tokio::sync::broadcast;

    struct Fixed(AtomicU32);
    impl MetricsCollector for Fixed {
        fn collect(&self) -> NodeMetadata {
            // Each sample is far from the last one, so that it is written.
            let calls = 2_u32.pow(self.0.fetch_add(1, Ordering::Relaxed) % 31);
            serde_json::json!({ "queue_depth": 150, "cpu_usage_percent": -1, "calls": calls })
        }
    }

    let etcd = Etcd::shared();
    let endpoints: Vec<String> = etcd.endpoints();
    let group: String = group("calls");
    let ip: IpAddr = "127.0.0.1".parse().unwrap();
    let (shutdown_tx, _) = broadcast::channel::<()>(1);

    let plain = ClusterNode::new(endpoints.clone(), "a".into(), ip, group.clone(), Some(5));
    let with_metrics =
        ClusterNodeBuilder::new(endpoints.clone(), "b".to_string(), ip, group.clone())
            .ttl(5)
            .metrics_collector(
                CompositeMetricsCollector::new()
                    .with_collector(NoopMetricsCollector::new())
                    .with_collector(Fixed(AtomicU32::new(0)))
                    .with_collector(SystemMetricsCollector::new()),
            )
            .metrics_update_interval(1)
            .build();
    let mut tasks = Vec::new();
    for node in [plain.clone(), with_metrics.clone()] {
        let mut shutdown_rx = shutdown_tx.subscribe();
        tasks.push(tokio::spawn(async move {
            let ended: Result<(), ClusterError> = node.run(&mut shutdown_rx).await;
            ended
        }));
    }

    let discovery = ServiceDiscovery::new(endpoints, group.clone());
    assert_eq!(discovery.group_name(), group);
    let mut events: broadcast::Receiver<ClusterEvent> = discovery.subscribe();
    let d = discovery.clone();
    let mut shutdown_rx = shutdown_tx.subscribe();
    tasks.push(tokio::spawn(
        async move { d.run(Some(&mut shutdown_rx)).await },
    ));
    within("the discovery is ready", discovery.wait_ready()).await;
    assert!(discovery.is_ready());
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;
    within("the discovery shows a leader", discovery.wait_for_leader()).await;
    let addresses: Vec<SocketAddr> = discovery
        .nodes()
        .iter()
        .map(|node| SocketAddr::new(node.ip, 8080))
        .collect();
    assert_eq!(addresses.len(), 2);
    let leader: Option<SocketAddr> = discovery
        .leader()
        .map(|leader| SocketAddr::new(leader.ip, 8080));
    assert!(leader.is_some());
    let mut watch = discovery.watch_nodes();
    let mut leaders = discovery.watch_leader();
    assert_eq!(watch.borrow_and_update().len(), 2);
    assert!(leaders.borrow_and_update().is_some());
    eventually("one of them knows that it leads", || {
        plain.is_leader() || with_metrics.is_leader()
    })
    .await;
    assert_eq!(plain.current_health(), HealthStatus::Healthy);

    // For a metric with several collectors the later one wins; the others are kept.
    eventually("the discovery shows the metrics", || {
        discovery.nodes().iter().any(|node| {
            let number = |key: &str| node.metadata.get(key).and_then(serde_json::Value::as_f64);
            let cpu = number(metadata_keys::CPU_USAGE_PERCENT);
            cpu.is_some_and(|cpu| cpu >= 0.0) && number("queue_depth") == Some(150.0)
        })
    })
    .await;
    let mut updated = false;
    while !updated {
        let event = within("an update", events.recv()).await.unwrap();
        println!("{event} {event:?}");
        match event {
            ClusterEvent::NodeJoined(node) | ClusterEvent::NodeLeft(node) => {
                println!("{} {}", node.id, node.ip);
            }
            ClusterEvent::NodeUpdated { old, new } => updated |= old == new,
            ClusterEvent::LeaderElected(node) => println!("{}", node.id),
            _ => {}
        }
    }
    shutdown_tx.send(()).unwrap();
    for task in tasks {
        within("run returns", task).await.unwrap().unwrap();
    }
    assert_eq!(plain.current_health(), HealthStatus::Unknown);
}
