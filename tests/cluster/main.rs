//! Tests workers and discoveries on a real etcd: elections, faults, authentication, TLS, sharing
//! and slow networks.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

#[path = "../chaos/etcd_cluster.rs"]
#[allow(dead_code)] // the chaos test uses the rest
mod etcd_cluster;

mod access;
mod auth;
mod compatibility;
mod discovery;
mod election;
mod faults;
mod members;
mod metrics;
mod panics;
mod resilience;
mod sharing;
mod slow;
#[cfg(feature = "tls")]
mod tls;

use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions};
use pingora_etcd::{
    ClusterError, ClusterNode, ClusterNodeBuilder, EtcdOptions, HealthStatus, ServiceDiscovery,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use common::{DEADLINE, local, within};

/// The TTL of most nodes, in seconds: a machine that is busy with other tests does not end their leases.
const TTL: i64 = 10;
/// The TTL of nodes whose leases have to expire, in seconds: the shortest that etcd grants.
const EXPIRING_TTL: i64 = 2;
/// The TTL of nodes that are watched for longer than their leases last, in seconds.
const WATCHED_TTL: i64 = 5;
/// For longer than that: etcd takes up to half a second to notice that a lease has expired.
const LONGER_THAN_WATCHED: Duration = Duration::from_secs(6);

/// A node whose run is a background task.
struct Running {
    node: ClusterNode,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ClusterError>>,
}

impl Running {
    fn new(node: ClusterNode) -> Self {
        let (stop, stopped) = oneshot::channel();
        let running = node.clone();
        let task = tokio::spawn(async move {
            running
                .run_until(async {
                    // The future also completes when the test ends without stopping the node.
                    let _ = stopped.await;
                })
                .await
        });
        Self {
            node,
            stop: Some(stop),
            task,
        }
    }

    /// A registered node.
    async fn start(etcd: &EtcdOptions, group: &str, id: &str) -> Self {
        Self::start_with_ttl(etcd, group, id, TTL).await
    }

    /// A registered node with this TTL, in seconds.
    async fn start_with_ttl(etcd: &EtcdOptions, group: &str, id: &str, ttl: i64) -> Self {
        let node = builder(etcd, group, id).ttl(ttl);
        let running = Self::new(node.try_build().unwrap());
        running.wait_until_healthy().await;
        running
    }

    async fn wait_until_healthy(&self) {
        let mut health = self.node.watch_health();
        within(
            "the node is healthy",
            health.wait_for(|health| *health == HealthStatus::Healthy),
        )
        .await
        .unwrap();
    }

    /// Stops the node as a shutdown does; returns how long that took.
    async fn stop(mut self) -> Duration {
        let start = tokio::time::Instant::now();
        drop(self.stop.take());
        within("run returns", &mut self.task)
            .await
            .unwrap()
            .unwrap();
        start.elapsed()
    }

    /// Stops the node as a crash does: nothing is cleaned up.
    fn crash(self) {
        self.task.abort();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn builder(etcd: &EtcdOptions, group: &str, id: &str) -> ClusterNodeBuilder {
    ClusterNodeBuilder::new(etcd.clone(), id, local(), group).ttl(TTL)
}

/// A discovery that runs in the background until the test ends.
fn watch_group(etcd: &EtcdOptions, group: &str) -> ServiceDiscovery {
    let discovery = ServiceDiscovery::builder(etcd.clone(), group)
        .try_build()
        .unwrap();
    let running = discovery.clone();
    tokio::spawn(async move { running.run(None).await });
    discovery
}

async fn ready(etcd: &EtcdOptions, group: &str) -> ServiceDiscovery {
    let discovery = watch_group(etcd, group);
    within("the discovery is ready", discovery.wait_ready()).await;
    discovery
}

fn leader_id(discovery: &ServiceDiscovery) -> Option<String> {
    discovery.leader().map(|leader| leader.id.clone())
}

/// Waits until the node is a candidate in etcd: what the node knows of itself may be older.
async fn until_candidate(client: &mut Client, group: &str, id: &str) {
    let queued = async {
        loop {
            let prefix = GetOptions::new().with_prefix();
            let queue = client.get(format!("election/{group}/"), Some(prefix)).await;
            let queue = queue.unwrap();
            if queue
                .kvs()
                .iter()
                .any(|entry| entry.value() == id.as_bytes())
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("the node is a candidate", queued).await;
}

/// Registers a node without a lease. etcd refuses writes for a moment when its members change.
async fn put_node(client: &mut Client, group: &str, id: &str) {
    let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1","port":8080}}"#);
    let key = format!("registry/{group}/{id}");
    let start = Instant::now();
    while let Err(error) = client.put(key.as_str(), value.as_str(), None).await {
        assert!(start.elapsed() < DEADLINE, "{key}: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
