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

use std::time::Duration;

use pingora_etcd::{
    ClusterError, ClusterNode, ClusterNodeBuilder, EtcdOptions, HealthStatus, ServiceDiscovery,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use common::{local, within};

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

    /// A registered node with a TTL of 2 s.
    async fn start(etcd: &EtcdOptions, group: &str, id: &str) -> Self {
        let running = Self::new(builder(etcd, group, id).try_build().unwrap());
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
    ClusterNodeBuilder::new(etcd.clone(), id, local(), group).ttl(2)
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
