//! The workers and discoveries that run in this process, each with its own connections to etcd, and
//! the check that all of them agree with what etcd stores.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use pingora_etcd::{
    Cluster as Sharing, ClusterError, ClusterNode, ClusterNodeBuilder, EtcdOptions, HealthStatus,
    MetricsCollector, NodeMetadata, ServiceDiscovery, discovery::DiscoveryStatus, metadata_keys,
};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::common::link::Link;
use super::common::{DEADLINE, group, local};
use super::etcd_cluster::Cluster;
use super::measure::Monitor;

/// The TTL of every lease, in seconds.
pub const TTL: u64 = 3;
const SERVICE_TIME: Duration = Duration::from_millis(1);
/// This many workers are in a second group as well, over one connection and one lease, and have
/// priorities there.
const SHARING: usize = 6;
/// How long a worker of the second group has to be a candidate before it takes over.
const TAKEOVER_AFTER: Duration = Duration::from_millis(500);

/// Metrics that change with every sample, so that every worker writes at every interval, and that
/// stay low, so that the balancer has no reason to avoid any worker.
struct ChangingMetrics;

impl MetricsCollector for ChangingMetrics {
    fn collect(&self) -> NodeMetadata {
        serde_json::json!({
            metadata_keys::CPU_USAGE_PERCENT: fastrand::f64() * 20.0,
        })
    }
}

/// The links of one process: one in front of every member of etcd.
pub struct Links(Vec<Link>);

impl Links {
    /// The member that is used first depends on `index`, so that the processes are spread over the
    /// members.
    async fn to(etcd: &[String], index: usize) -> Self {
        let mut links = Vec::new();
        for turn in 0..etcd.len() {
            links.push(Link::to(etcd[(index + turn) % etcd.len()].clone()).await);
        }
        Self(links)
    }

    fn options(&self) -> EtcdOptions {
        let addresses = self.0.iter().map(Link::address);
        let endpoints = addresses.map(|address| format!("http://{address}"));
        EtcdOptions::new(endpoints).shuffle_endpoints(false)
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
    /// The second group of this worker, and its priority there.
    second: Option<(String, u16)>,
    pub links: Links,
    running: Option<Running>,
}

/// A node and the task that runs it.
struct Run {
    node: ClusterNode,
    task: JoinHandle<Result<(), ClusterError>>,
    stop: Option<oneshot::Sender<()>>,
}

struct Running {
    /// The run in the common group first, then the one in the second group.
    runs: Vec<Run>,
    requests: Arc<AtomicU64>,
    /// The link in front of the HTTP server. Dropping it closes the connections that a crash would
    /// close.
    front: Link,
    server: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        for run in &self.runs {
            run.task.abort();
        }
        self.server.abort();
    }
}

impl Worker {
    pub async fn start(&mut self) {
        let listener = TcpListener::bind((local(), 0)).await;
        let listener = listener.unwrap_or_else(|error| panic!("no port for a worker: {error}"));
        let behind = listener.local_addr();
        let behind = behind.unwrap_or_else(|error| panic!("no address of a worker: {error}"));
        let (id, requests) = (self.id.clone(), Arc::new(AtomicU64::new(0)));
        let counted = requests.clone();
        let app = Router::new().fallback(|| async move {
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(SERVICE_TIME).await;
            id
        });
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                eprintln!("a worker's HTTP server failed: {error}");
            }
        });
        let front = Link::to(behind.to_string()).await;
        let (options, id) = (self.links.options(), self.id.as_str());
        let builders = match &self.second {
            None => {
                vec![ClusterNodeBuilder::new(options, id, local(), &self.group).ttl(TTL as i64)]
            }
            Some((second, priority)) => {
                let sharing = Sharing::builder(options).ttl(TTL as i64).try_build();
                let sharing = sharing.unwrap_or_else(|error| panic!("worker {id}: {error}"));
                vec![
                    sharing.node(id, local(), &self.group),
                    sharing
                        .node(id, local(), second)
                        .priority(*priority)
                        .takeover_after(TAKEOVER_AFTER),
                ]
            }
        };
        let start = |builder: ClusterNodeBuilder| {
            let node = builder
                .port(front.address().port())
                .metrics_collector(ChangingMetrics)
                .metrics_update_interval(1)
                .try_build()
                .unwrap_or_else(|error| panic!("worker {id}: {error}"));
            let (stop, stopped) = oneshot::channel::<()>();
            let runs = node.clone();
            Run {
                node,
                task: tokio::spawn(
                    async move { runs.run_until(async { _ = stopped.await }).await },
                ),
                stop: Some(stop),
            }
        };
        let runs = builders.into_iter().map(start).collect();
        self.running = Some(Running {
            runs,
            requests,
            front,
            server,
        });
    }

    /// Cuts the worker off and starts another process under its id, with its own connections.
    /// Returns the cut-off process, which keeps running without anybody's knowledge.
    pub async fn start_beside(&mut self, etcd: &[String], index: usize) -> Replaced {
        self.links.set_silent(true);
        let links = std::mem::replace(&mut self.links, Links::to(etcd, index).await);
        let replaced = Replaced {
            links,
            running: self.running.take(),
        };
        self.start().await;
        replaced
    }

    /// Ends the worker as `kill -9` would: its connections close, its lease remains.
    pub fn crash(&mut self) {
        self.running = None;
    }

    /// Lets the worker leave, and waits until it has ended.
    pub async fn stop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        for run in &mut running.runs {
            drop(run.stop.take());
        }
        for run in &mut running.runs {
            match tokio::time::timeout(DEADLINE, &mut run.task).await {
                Ok(Ok(Ok(()))) => {}
                other => panic!("worker {} did not leave: {other:?}", self.id),
            }
        }
    }

    /// The node in the common group.
    pub fn node(&self) -> Option<&ClusterNode> {
        Some(&self.running.as_ref()?.runs.first()?.node)
    }

    fn nodes(&self) -> impl Iterator<Item = &ClusterNode> {
        let runs = self.running.iter().flat_map(|running| &running.runs);
        runs.map(|run| &run.node)
    }

    /// How many requests this process has received.
    pub fn requests(&self) -> u64 {
        let running = self.running.as_ref();
        running.map_or(0, |running| running.requests.load(Ordering::Relaxed))
    }

    pub fn is_leader(&self) -> bool {
        self.node().is_some_and(ClusterNode::is_leader)
    }

    fn port(&self) -> Option<u16> {
        Some(self.running.as_ref()?.front.address().port())
    }
}

/// A process that keeps running after another one was started under its id.
pub struct Replaced {
    links: Links,
    running: Option<Running>,
}

impl Replaced {
    pub fn set_silent(&self, silent: bool) {
        self.links.set_silent(silent);
    }

    fn nodes(&self) -> impl Iterator<Item = &ClusterNode> {
        let runs = self.running.iter().flat_map(|running| &running.runs);
        runs.map(|run| &run.node)
    }

    pub fn leads(&self) -> bool {
        self.nodes().any(ClusterNode::is_leader)
    }

    /// Whether each of its nodes has noticed the other process.
    pub fn is_superseded(&self) -> bool {
        let mut nodes = self.nodes();
        nodes.all(|node| node.current_health() == HealthStatus::Unhealthy)
    }
}

pub struct Watching {
    pub links: Links,
    pub discovery: ServiceDiscovery,
    task: JoinHandle<Result<(), ClusterError>>,
}

impl Watching {
    async fn start(etcd: &[String], index: usize, group: &str) -> Self {
        let links = Links::to(etcd, index).await;
        let discovery = ServiceDiscovery::builder(links.options(), group)
            .try_build()
            .unwrap_or_else(|error| panic!("discovery {index} of {group}: {error}"));
        let runs = discovery.clone();
        Self {
            links,
            discovery,
            task: tokio::spawn(async move { runs.run(None).await }),
        }
    }
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
    /// The group that only some of the workers are in, and its discoveries.
    second: String,
    watches_second: Vec<Watching>,
    /// Processes that keep running although another process has taken over their id.
    pub replaced: Vec<Replaced>,
    etcd: Vec<String>,
    /// Workers in other processes that every discovery must also have, with their ports.
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
            second: group("chaos-second"),
            watches_second: Vec::new(),
            replaced: Vec::new(),
            etcd: etcd.to_vec(),
            others: BTreeMap::new(),
            monitor: monitor.clone(),
        };
        for index in 0..discoveries {
            let watching = Watching::start(etcd, index, &fleet.group).await;
            fleet.watching.push(watching);
        }
        let watching = Watching::start(etcd, 0, &fleet.second).await;
        fleet.watches_second.push(watching);
        for index in 0..workers {
            let mut worker = Worker {
                id: format!("w{index}"),
                group: fleet.group.clone(),
                second: (index < SHARING).then(|| (fleet.second.clone(), index as u16 / 2)),
                links: Links::to(etcd, index).await,
                running: None,
            };
            worker.start().await;
            fleet.workers.push(worker);
        }
        let discoveries = fleet.watching.iter().chain(&fleet.watches_second);
        let discoveries = discoveries.map(|watching| watching.discovery.clone());
        monitor.watch_discoveries(discoveries.collect());
        fleet.changed();
        fleet
    }

    /// Reports to the monitor that workers were started or have ended.
    pub fn changed(&self) {
        let nodes = self.workers.iter().flat_map(Worker::nodes);
        let nodes = nodes.chain(self.replaced.iter().flat_map(Replaced::nodes));
        let in_all = |node: &&ClusterNode| node.group_name() == self.group;
        let (nodes, second) = nodes.partition::<Vec<_>, _>(in_all);
        let cloned = |nodes: Vec<&ClusterNode>| nodes.into_iter().cloned().collect();
        self.monitor.watch_nodes(cloned(nodes), cloned(second));
    }

    /// Cuts a worker off and starts another process under its id.
    pub async fn start_beside(&mut self, worker: usize) {
        let replaced = self.workers[worker].start_beside(&self.etcd, worker).await;
        self.replaced.push(replaced);
        self.changed();
    }

    pub fn leader(&self) -> Option<usize> {
        self.workers.iter().position(Worker::is_leader)
    }

    /// The leases of the healthy workers, by id, as stored in etcd.
    pub async fn renewed_leases(&self, cluster: &Cluster) -> Result<BTreeMap<String, i64>, String> {
        let registry = format!("registry/{}/", self.group);
        let entries = cluster.until_listed(&registry).await?;
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

    /// The nodes that every discovery must have, with their ports.
    pub fn expected(&self) -> BTreeMap<String, u16> {
        let workers = self.workers.iter();
        let running = workers.filter_map(|worker| Some((worker.id.clone(), worker.port()?)));
        running.chain(self.others.clone()).collect()
    }

    /// Waits until no discovery has this node any more; returns how long that took.
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

    /// Everything that differs from the state in which all is well. It is compared with what etcd
    /// stores now, so that a stale view does not pass.
    pub async fn problems(&self, cluster: &Cluster) -> Vec<String> {
        let in_all: Vec<_> = self.workers.iter().filter_map(Worker::node).collect();
        let expected = self.expected();
        let all = (self.group.as_str(), &self.watching[..]);
        let mut problems = problems_in(cluster, all, &expected, &in_all).await;

        let sharing = self.workers.iter().filter(|worker| worker.second.is_some());
        let expected: BTreeMap<_, _> = sharing
            .clone()
            .filter_map(|worker| Some((worker.id.clone(), worker.port()?)))
            .collect();
        let nodes: Vec<_> = sharing.clone().filter_map(|it| it.nodes().nth(1)).collect();
        let second = (self.second.as_str(), &self.watches_second[..]);
        problems.extend(problems_in(cluster, second, &expected, &nodes).await);
        let priority = |worker: &Worker| worker.second.as_ref().map(|second| second.1);
        let running = sharing.filter(|worker| worker.running.is_some());
        let highest = running.clone().map(priority).max();
        let leads = |worker: &&Worker| worker.nodes().nth(1).is_some_and(ClusterNode::is_leader);
        if let Some(leader) = running.clone().find(leads)
            && Some(priority(leader)) != highest
        {
            problems.push(format!(
                "{} leads with priority {:?}, but the highest is {highest:?}",
                leader.id,
                priority(leader)
            ));
        }
        problems
    }
}

/// The same for one group: its discoveries, the nodes it must have, and the workers' own nodes.
async fn problems_in(
    cluster: &Cluster,
    (group, watching): (&str, &[Watching]),
    expected: &BTreeMap<String, u16>,
    workers: &[&ClusterNode],
) -> Vec<String> {
    let mut problems = Vec::new();
    let registry = format!("registry/{group}/");
    let election = format!("election/{group}/");
    let (nodes, mut candidates) =
        match (cluster.list(&registry).await, cluster.list(&election).await) {
            (Ok(nodes), Ok(candidates)) => (nodes, candidates),
            (Err(error), _) | (_, Err(error)) => return vec![error],
        };
    // The lease and the port of each node, by id.
    let mut stored = BTreeMap::new();
    for entry in &nodes {
        let id = entry.key_str().unwrap_or("?").trim_start_matches(&registry);
        let value: serde_json::Value = serde_json::from_slice(entry.value()).unwrap_or_default();
        let port = value["port"].as_u64().unwrap_or(0) as u16;
        stored.insert(id.to_owned(), (entry.lease(), port));
    }
    differences(
        "etcd",
        stored.iter().map(|(id, (_, port))| (id, *port)),
        expected,
        &mut problems,
    );

    candidates.sort_by_key(etcd_client::KeyValue::create_revision);
    if candidates.len() != expected.len() {
        problems.push(format!(
            "etcd: {} candidates instead of {}",
            candidates.len(),
            expected.len()
        ));
    }
    let token = candidates
        .first()
        .map_or(0, etcd_client::KeyValue::create_revision);
    let first = candidates.first().and_then(|entry| entry.value_str().ok());

    for (index, watching) in watching.iter().enumerate() {
        let name = format!("discovery {index} of {group}");
        let discovery = &watching.discovery;
        differing_view(&name, discovery, expected, &stored, &mut problems);
        let term = discovery.leadership();
        if term.as_ref().map(|term| term.epoch) != Some(token) {
            problems.push(format!(
                "{name}: leader {:?}, but in etcd {first:?} with token {token}",
                term.map(|term| (term.node.id.clone(), term.epoch))
            ));
        }
    }

    let mut leaders = Vec::new();
    for node in workers {
        if node.current_health() != HealthStatus::Healthy {
            problems.push(format!("{}: {:?}", node.id(), node.current_health()));
        }
        if let Some(term) = node.leadership() {
            leaders.push((node.id(), term.epoch));
        }
    }
    if leaders.len() != 1 || leaders[0].1 != token || Some(leaders[0].0) != first {
        problems.push(format!(
            "leaders of {group}: {leaders:?}, but in etcd {first:?} with token {token}"
        ));
    }
    problems
}

/// What a discovery shows that differs from etcd, except the leader.
fn differing_view(
    name: &str,
    discovery: &ServiceDiscovery,
    expected: &BTreeMap<String, u16>,
    stored: &BTreeMap<String, (i64, u16)>,
    problems: &mut Vec<String>,
) {
    if discovery.status() != DiscoveryStatus::Live {
        problems.push(format!("{name}: {:?}", discovery.status()));
    }
    let nodes = discovery.nodes();
    let ports = nodes.iter().map(|node| (&node.id, node.port.unwrap_or(0)));
    differences(name, ports, expected, problems);
    for node in nodes.iter() {
        let lease = stored.get(&node.id).map(|(lease, _)| *lease);
        if lease.is_some_and(|lease| lease != node.incarnation()) {
            problems.push(format!("{name}: {} with an old lease", node.id));
        }
    }
}

fn differences<'a>(
    who: &str,
    has: impl Iterator<Item = (&'a String, u16)>,
    expected: &BTreeMap<String, u16>,
    problems: &mut Vec<String>,
) {
    let has: BTreeMap<_, _> = has.collect();
    for (id, port) in expected {
        match has.get(id) {
            None => problems.push(format!("{who}: lost {id}")),
            Some(other) if other != port => {
                problems.push(format!("{who}: {id} on port {other} instead of {port}"));
            }
            Some(_) => {}
        }
    }
    for id in has.keys().filter(|id| !expected.contains_key(**id)) {
        problems.push(format!("{who}: phantom {id}"));
    }
}
