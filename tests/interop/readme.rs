// Included twice; `cluster` is one crate, and then the other. One program for each block of code in the
// README of photon-etcd-cluster, in its order.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use cluster::{
    ClusterEvent, ClusterNode, ClusterNodeBuilder, HealthStatus, MetricsCollector, NodeMetadata,
    ServiceDiscovery, SystemMetricsCollector, metadata_keys,
};
use tokio::sync::broadcast;

/// A node in the background; sending, or dropping, ends it.
fn started(endpoint: &str, group: &str, id: &str) -> broadcast::Sender<()> {
    let ip: IpAddr = "127.0.0.1".parse().unwrap();
    let node = ClusterNode::new(vec![endpoint.to_string()], id.to_string(), ip, group.to_string(), Some(5));
    let (shutdown_tx, mut shutdown_rx) = broadcast::channel(1);
    tokio::spawn(async move { node.run(&mut shutdown_rx).await });
    shutdown_tx
}

pub async fn worker(endpoint: String, group: String) {
    let (shutdown_tx, _) = broadcast::channel(1);
    let node = ClusterNode::new(
        vec![endpoint],
        "node-1".to_string(),
        "192.168.1.10".parse().unwrap(),
        group,
        Some(5), // TTL in seconds
    );
    let n = node.clone();
    let mut shutdown_rx = shutdown_tx.subscribe();
    let running = tokio::spawn(async move { n.run(&mut shutdown_rx).await });
    while !node.is_leader() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    loop {
        match node.current_health() {
            HealthStatus::Healthy => break,
            HealthStatus::Unhealthy => panic!("unhealthy"),
            HealthStatus::Unknown => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    shutdown_tx.send(()).unwrap();
    running.await.unwrap().unwrap();
}

pub async fn load_balancer(endpoint: String, group: String) {
    let discovery = ServiceDiscovery::new(vec![endpoint.clone()], group.clone());
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    discovery.wait_ready().await;
    // A discovery of photon-etcd-cluster need not learn of a leader from before.
    let _node = started(&endpoint, &group, "node-1");
    discovery.wait_for_nodes(1).await;
    let mut seen = Vec::new();
    for node in discovery.nodes().iter() {
        seen.push(format!("{} at {}", node.id, node.ip));
    }
    assert_eq!(seen, ["node-1 at 127.0.0.1"]);
    discovery.wait_for_leader().await;
    if let Some(leader) = discovery.leader() {
        assert_eq!(leader.id, "node-1");
    }
}

pub async fn events(endpoint: String, group: String) {
    let discovery = ServiceDiscovery::new(vec![endpoint.clone()], group.clone());
    // Subscribed before it runs.
    let mut events = discovery.subscribe();
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    let mut node = None;
    let (mut joined, mut led) = (String::new(), String::new());
    loop {
        match events.recv().await {
            Ok(ClusterEvent::Ready) => node = Some(started(&endpoint, &group, "node-1")),
            Ok(ClusterEvent::NodeJoined(n)) => joined = format!("{} at {}", n.id, n.ip),
            Ok(ClusterEvent::LeaderElected(n)) => {
                led = n.id.clone();
                if let Some(shutdown) = node.take() {
                    shutdown.send(()).unwrap();
                }
            }
            Ok(ClusterEvent::NodeLeft(n)) => {
                assert_eq!(n.id, "node-1");
                break;
            }
            Ok(ClusterEvent::LeaderLost) => {}
            Err(broadcast::error::RecvError::Lagged(n)) => panic!("missed {n} events"),
            Err(_) => panic!("closed"),
            _ => {}
        }
    }
    assert_eq!((joined.as_str(), led.as_str()), ("node-1 at 127.0.0.1", "node-1"));
}

async fn update_metrics(discovery: ServiceDiscovery, gauge: Arc<AtomicI64>) {
    let mut watch = discovery.watch_nodes();
    let count = watch.borrow().len();
    gauge.store(count as i64, Ordering::Relaxed);
    while watch.changed().await.is_ok() {
        let count = watch.borrow().len();
        gauge.store(count as i64, Ordering::Relaxed);
    }
}

pub async fn watched_count(endpoint: String, group: String) {
    let discovery = ServiceDiscovery::new(vec![endpoint.clone()], group.clone());
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    let gauge = Arc::new(AtomicI64::new(-1));
    tokio::spawn(update_metrics(discovery, gauge.clone()));
    let _node = started(&endpoint, &group, "node-1");
    while gauge.load(Ordering::Relaxed) != 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn system_metrics(endpoint: String, group: String) {
    let (shutdown_tx, _) = broadcast::channel(1);
    let node = ClusterNodeBuilder::new(
        vec![endpoint.clone()],
        "worker-1".to_string(),
        "192.168.1.10".parse().unwrap(),
        group.clone(),
    )
    .ttl(5)
    .metrics_collector(SystemMetricsCollector::new())
    .metrics_update_interval(1)
    .build();
    let n = node.clone();
    let mut shutdown_rx = shutdown_tx.subscribe();
    tokio::spawn(async move { n.run(&mut shutdown_rx).await });
    let discovery = ServiceDiscovery::new(vec![endpoint], group);
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    loop {
        for node in discovery.nodes().iter() {
            let number = |key: &str| node.metadata.get(key).and_then(|v| v.as_f64());
            let known = [
                metadata_keys::CPU_USAGE_PERCENT,
                metadata_keys::MEMORY_USAGE_PERCENT,
                metadata_keys::MEMORY_AVAILABLE_BYTES,
                metadata_keys::LOAD_AVG_1M,
            ];
            if known.iter().all(|key| number(key).is_some()) {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

struct AppMetricsCollector {
    queue: i64,
}

impl MetricsCollector for AppMetricsCollector {
    fn collect(&self) -> NodeMetadata {
        serde_json::json!({
            "cpu_usage_percent": 45.0,
            "memory_usage_percent": 60.0,
            "queue_depth": self.queue,
            "active_connections": 42,
            "requests_per_second": 1000.0
        })
    }
}

fn with_collector(endpoint: &str, group: &str) -> ClusterNode {
    let (endpoints, id) = (vec![endpoint.to_string()], "node-1".to_string());
    let ip: IpAddr = "127.0.0.1".parse().unwrap();
    ClusterNodeBuilder::new(endpoints, id, ip, group.to_string())
        .metrics_collector(AppMetricsCollector { queue: 150 })
        .metrics_update_interval(1)
        .build()
}

pub async fn own_collector(endpoint: String, group: String) {
    let node = with_collector(&endpoint, &group);
    let (_shutdown_tx, mut shutdown_rx) = broadcast::channel(1);
    tokio::spawn(async move { node.run(&mut shutdown_rx).await });
    let discovery = ServiceDiscovery::new(vec![endpoint], group);
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    loop {
        for node in discovery.nodes().iter() {
            let number = |key: &str| node.metadata.get(key).and_then(|v| v.as_f64());
            let known = [
                metadata_keys::QUEUE_DEPTH,
                metadata_keys::ACTIVE_CONNECTIONS,
                metadata_keys::REQUESTS_PER_SECOND,
            ];
            if known.map(number) == [Some(150.0), Some(42.0), Some(1000.0)] {
                return;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn metrics_read(endpoint: String, group: String) {
    let discovery = ServiceDiscovery::new(vec![endpoint.clone()], group.clone());
    let mut events = discovery.subscribe();
    let d = discovery.clone();
    tokio::spawn(async move { d.run(None).await });
    discovery.wait_ready().await;
    let node = with_collector(&endpoint, &group);
    let (_shutdown_tx, mut shutdown_rx) = broadcast::channel(1);
    tokio::spawn(async move { node.run(&mut shutdown_rx).await });
    let mut cpu_seen = None;
    while let Ok(event) = events.recv().await {
        match event {
            ClusterEvent::NodeUpdated { old, new } => {
                assert_eq!(old.id, new.id);
                if let Some(cpu) = new.metadata.get(metadata_keys::CPU_USAGE_PERCENT) {
                    cpu_seen = cpu.as_f64();
                    break;
                }
            }
            ClusterEvent::NodeJoined(new) if new.metadata.get("cpu_usage_percent").is_some() => {
                cpu_seen = new.metadata["cpu_usage_percent"].as_f64();
                break;
            }
            _ => {}
        }
    }
    assert_eq!(cpu_seen, Some(45.0));
    for node in discovery.nodes().iter() {
        let cpu = node.metadata.get("cpu_usage_percent")
            .and_then(|v| v.as_f64())
            .unwrap_or(0.0);
        let mem = node.metadata.get("memory_usage_percent")
            .and_then(|v| v.as_f64())
            .unwrap_or(0.0);
        assert_eq!((cpu, mem), (45.0, 60.0));
    }
}

struct BackendDiscovery {
    discovery: ServiceDiscovery,
}

impl BackendDiscovery {
    fn new(discovery: ServiceDiscovery) -> Self {
        Self { discovery }
    }

    fn get_backends(&self) -> Vec<SocketAddr> {
        self.discovery
            .nodes()
            .iter()
            .map(|node| SocketAddr::new(node.ip, 8080))
            .collect()
    }

    fn get_leader_backend(&self) -> Option<SocketAddr> {
        self.discovery
            .leader()
            .map(|leader| SocketAddr::new(leader.ip, 8080))
    }
}

pub async fn proxy_backends(endpoint: String, group: String) {
    let _worker = started(&endpoint, &group, "worker");
    let caches = format!("{group}-cache-nodes");
    let _cache = started(&endpoint, &caches, "cache");
    // The program has a runtime of its own, as a `main` has.
    let program = move || {
        let rt = tokio::runtime::Runtime::new().unwrap();
        let etcd_endpoints = vec![endpoint];
        let workers_discovery = ServiceDiscovery::new(etcd_endpoints.clone(), group);
        let cache_discovery = ServiceDiscovery::new(etcd_endpoints.clone(), caches);
        rt.block_on(async {
            let w = workers_discovery.clone();
            let c = cache_discovery.clone();
            tokio::spawn(async move { w.run(None).await });
            tokio::spawn(async move { c.run(None).await });
            workers_discovery.wait_for_nodes(1).await;
            cache_discovery.wait_for_nodes(1).await;
        });
        let worker_backends = BackendDiscovery::new(workers_discovery.clone());
        let cache_backends = BackendDiscovery::new(cache_discovery.clone());
        let expected: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        assert_eq!(worker_backends.get_backends(), [expected]);
        assert_eq!(cache_backends.get_backends(), [expected]);
        if let Some(leader) = worker_backends.get_leader_backend() {
            assert_eq!(leader, expected);
        }
        rt.shutdown_background();
    };
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        program();
        let _ = ended.send(());
    });
    end.await.expect("the program has not panicked");
}
