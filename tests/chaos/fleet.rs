//! Workers and discoveries of this process, each with connections of its own to etcd, and whether
//! all of them agree with what etcd has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use pingora_etcd::{
    ClusterError, ClusterNode, ClusterNodeBuilder, DiscoveryStatus, EtcdOptions, HealthStatus,
    MetricsCollector, NodeMetadata, ServiceDiscovery, metadata_keys,
};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::common::link::Link;
use super::common::{DEADLINE, group, local};
use super::etcd_cluster::Cluster;
use super::measure::Monitor;

/// In seconds.
pub const TTL: u64 = 3;
const SERVICE: Duration = Duration::from_millis(1);

/// Metrics that always changed, so that every worker writes at every interval, and are always low,
/// so that the balancer has no reason to spare any.
struct Restless;

impl MetricsCollector for Restless {
    fn collect(&self) -> NodeMetadata {
        serde_json::json!({
            metadata_keys::CPU_USAGE_PERCENT: fastrand::f64() * 20.0,
        })
    }
}

/// Links in front of every member, for one process.
pub struct Links(Vec<Link>);

impl Links {
    /// The first one to be used is another member's for each `index`.
    async fn to(etcd: &[String], index: usize) -> Self {
        let mut links = Vec::new();
        for turn in 0..etcd.len() {
            links.push(Link::to(etcd[(index + turn) % etcd.len()].clone()).await);
        }
        Self(links)
    }

    fn options(&self) -> EtcdOptions {
        let addresses = self.0.iter().map(Link::address);
        EtcdOptions::new(addresses.map(|address| format!("http://{address}")))
    }

    pub fn set_silent(&self, silent: bool) {
        for link in &self.0 {
            link.set_silent(silent);
        }
    }

    pub fn cut(&self) {
        for link in &self.0 {
            link.cut();
        }
    }

    pub fn connections(&self) -> usize {
        self.0.iter().map(Link::connections).sum()
    }
}

pub struct Worker {
    pub id: String,
    group: String,
    pub links: Links,
    running: Option<Running>,
}

struct Running {
    node: ClusterNode,
    /// In front of the HTTP server. Dropping it closes what a crash would close.
    front: Link,
    server: JoinHandle<()>,
    task: JoinHandle<Result<(), ClusterError>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        self.server.abort();
    }
}

impl Worker {
    pub async fn start(&mut self) {
        let listener = TcpListener::bind((local(), 0)).await;
        let listener = listener.unwrap_or_else(|error| panic!("no port for a worker: {error}"));
        let behind = listener.local_addr();
        let behind = behind.unwrap_or_else(|error| panic!("no address of a worker: {error}"));
        let id = self.id.clone();
        let app = Router::new().fallback(|| async {
            tokio::time::sleep(SERVICE).await;
            id
        });
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                eprintln!("a worker's HTTP server failed: {error}");
            }
        });
        let front = Link::to(behind.to_string()).await;
        let node = ClusterNodeBuilder::new(self.links.options(), &self.id, local(), &self.group)
            .ttl(TTL as i64)
            .port(front.address().port())
            .metrics_collector(Restless)
            .metrics_update_interval(1)
            .try_build()
            .unwrap_or_else(|error| panic!("worker {}: {error}", self.id));
        let (stop, stopped) = oneshot::channel::<()>();
        let runs = node.clone();
        let task = tokio::spawn(async move { runs.run_until(async { _ = stopped.await }).await });
        self.running = Some(Running {
            node,
            front,
            server,
            task,
            stop: Some(stop),
        });
    }

    /// As `kill -9` would end it: its connections close, its lease stays.
    pub fn crash(&mut self) {
        self.running = None;
    }

    /// Leaves, then ends.
    pub async fn stop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        drop(running.stop.take());
        match tokio::time::timeout(DEADLINE, &mut running.task).await {
            Ok(Ok(Ok(()))) => {}
            other => panic!("worker {} does not leave: {other:?}", self.id),
        }
    }

    pub fn node(&self) -> Option<&ClusterNode> {
        Some(&self.running.as_ref()?.node)
    }

    pub fn is_leader(&self) -> bool {
        self.node().is_some_and(ClusterNode::is_leader)
    }

    fn port(&self) -> Option<u16> {
        Some(self.running.as_ref()?.front.address().port())
    }
}

pub struct Watching {
    pub links: Links,
    pub discovery: ServiceDiscovery,
    task: JoinHandle<Result<(), ClusterError>>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub struct Fleet {
    pub group: String,
    pub workers: Vec<Worker>,
    pub watching: Vec<Watching>,
    /// Workers of other processes that have to be there too, with their ports.
    pub others: BTreeMap<String, u16>,
    monitor: Arc<Monitor>,
}

impl Fleet {
    pub async fn start(
        etcd: &[String],
        workers: usize,
        discoveries: usize,
        monitor: &Arc<Monitor>,
    ) -> Self {
        let mut fleet = Self {
            group: group("chaos"),
            workers: Vec::new(),
            watching: Vec::new(),
            others: BTreeMap::new(),
            monitor: monitor.clone(),
        };
        for index in 0..discoveries {
            let links = Links::to(etcd, index).await;
            let discovery = ServiceDiscovery::builder(links.options(), &fleet.group)
                .try_build()
                .unwrap_or_else(|error| panic!("discovery {index}: {error}"));
            let runs = discovery.clone();
            fleet.watching.push(Watching {
                links,
                discovery,
                task: tokio::spawn(async move { runs.run(None).await }),
            });
        }
        for index in 0..workers {
            let mut worker = Worker {
                id: format!("w{index}"),
                group: fleet.group.clone(),
                links: Links::to(etcd, index).await,
                running: None,
            };
            worker.start().await;
            fleet.workers.push(worker);
        }
        let discoveries = fleet.watching.iter().map(|w| w.discovery.clone());
        monitor.watch_discoveries(discoveries.collect());
        fleet.changed();
        fleet
    }

    /// Workers have been started or ended: tells the monitor.
    pub fn changed(&self) {
        let nodes = self.workers.iter().filter_map(Worker::node);
        self.monitor.watch_nodes(nodes.cloned().collect());
    }

    pub fn leader(&self) -> Option<usize> {
        self.workers.iter().position(Worker::is_leader)
    }

    /// The leases of the workers that are being renewed, by id, as etcd has them.
    pub async fn renewed_leases(&self, cluster: &Cluster) -> Result<BTreeMap<String, i64>, String> {
        let registry = format!("registry/{}/", self.group);
        let entries = cluster.list(&registry).await?;
        let healthy: BTreeSet<_> = self
            .workers
            .iter()
            .filter(|worker| {
                let health = worker.node().map(ClusterNode::current_health);
                health == Some(HealthStatus::Healthy)
            })
            .map(|worker| worker.id.as_str())
            .collect();
        let leases = entries.iter().filter_map(|entry| {
            let id = entry.key_str().ok()?.strip_prefix(&registry)?;
            healthy.contains(id).then(|| (id.to_owned(), entry.lease()))
        });
        Ok(leases.collect())
    }

    /// Who has to be there, and on which port.
    pub fn expected(&self) -> BTreeMap<String, u16> {
        let workers = self.workers.iter();
        let running = workers.filter_map(|worker| Some((worker.id.clone(), worker.port()?)));
        running.chain(self.others.clone()).collect()
    }

    /// Waits until no discovery has this node any more; how long that took.
    pub async fn until_gone(&self, id: &str, limit: Duration) -> Result<Duration, String> {
        let start = Instant::now();
        loop {
            let views = self.watching.iter();
            let have = views.filter(|w| w.discovery.nodes().get(id).is_some());
            let have = have.count();
            if have == 0 {
                return Ok(start.elapsed());
            }
            if start.elapsed() > limit {
                return Err(format!(
                    "{have} discoveries still have {id} after {limit:?}"
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What is not as it has to be when all is well. Compared with what etcd has now, so that a
    /// view that is merely old does not pass.
    pub async fn wrong(&self, cluster: &Cluster) -> Vec<String> {
        let mut wrong = Vec::new();
        let registry = format!("registry/{}/", self.group);
        let election = format!("election/{}/", self.group);
        let (nodes, mut candidates) =
            match (cluster.list(&registry).await, cluster.list(&election).await) {
                (Ok(nodes), Ok(candidates)) => (nodes, candidates),
                (Err(error), _) | (_, Err(error)) => return vec![error],
            };
        // By id, the lease and the port.
        let mut stored = BTreeMap::new();
        for entry in &nodes {
            let id = entry.key_str().unwrap_or("?").trim_start_matches(&registry);
            let value: serde_json::Value =
                serde_json::from_slice(entry.value()).unwrap_or_default();
            let port = value["port"].as_u64().unwrap_or(0) as u16;
            stored.insert(id.to_owned(), (entry.lease(), port));
        }
        let expected = self.expected();
        differences(
            "etcd",
            stored.iter().map(|(id, (_, port))| (id, *port)),
            &expected,
            &mut wrong,
        );

        candidates.sort_by_key(|entry| entry.create_revision());
        if candidates.len() != expected.len() {
            wrong.push(format!("etcd: {} candidates", candidates.len()));
        }
        let token = candidates
            .first()
            .map_or(0, |entry| entry.create_revision());
        let first = candidates.first().and_then(|entry| entry.value_str().ok());

        for (index, watching) in self.watching.iter().enumerate() {
            let (name, discovery) = (format!("discovery {index}"), &watching.discovery);
            if discovery.status() != DiscoveryStatus::Live {
                wrong.push(format!("{name}: {:?}", discovery.status()));
            }
            let nodes = discovery.nodes();
            let ports = nodes.iter().map(|node| (&node.id, node.port.unwrap_or(0)));
            differences(&name, ports, &expected, &mut wrong);
            for node in nodes.iter() {
                let lease = stored.get(&node.id).map(|(lease, _)| *lease);
                if lease.is_some_and(|lease| lease != node.incarnation()) {
                    wrong.push(format!("{name}: {} of an old lease", node.id));
                }
            }
            let term = discovery.leadership();
            if term.as_ref().map(|term| term.epoch) != Some(token) {
                wrong.push(format!(
                    "{name}: leader {:?}, in etcd {first:?} with {token}",
                    term.map(|term| (term.node.id.clone(), term.epoch))
                ));
            }
        }

        let mut leaders = Vec::new();
        for worker in &self.workers {
            let Some(node) = worker.node() else { continue };
            if node.current_health() != HealthStatus::Healthy {
                wrong.push(format!("{}: {:?}", worker.id, node.current_health()));
            }
            if let Some(term) = node.leadership() {
                leaders.push((worker.id.as_str(), term.epoch));
            }
        }
        if leaders.len() != 1 || leaders[0].1 != token || Some(leaders[0].0) != first {
            wrong.push(format!(
                "leaders {leaders:?}, in etcd {first:?} with {token}"
            ));
        }
        wrong
    }
}

fn differences<'a>(
    who: &str,
    has: impl Iterator<Item = (&'a String, u16)>,
    expected: &BTreeMap<String, u16>,
    wrong: &mut Vec<String>,
) {
    let has: BTreeMap<_, _> = has.collect();
    for (id, port) in expected {
        match has.get(id) {
            None => wrong.push(format!("{who}: lost {id}")),
            Some(other) if other != port => {
                wrong.push(format!("{who}: {id} on port {other} instead of {port}"));
            }
            Some(_) => {}
        }
    }
    for id in has.keys().filter(|id| !expected.contains_key(**id)) {
        wrong.push(format!("{who}: phantom {id}"));
    }
}
