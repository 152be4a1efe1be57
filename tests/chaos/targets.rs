//! Measures how fast common operations are on a quiet etcd of one member, and compares them with
//! limits.

use std::path::Path;
use std::time::{Duration, Instant};

use pingora_etcd::{
    ClusterError, ClusterNode, ClusterNodeBuilder, EtcdOptions, HealthStatus, ServiceDiscovery,
};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::common::link::Link;
use super::common::{DEADLINE, group, local};
use super::etcd_cluster::Cluster;

/// A measured figure with its limit.
pub struct Target {
    pub name: String,
    pub figure: f64,
    pub unit: &'static str,
    pub limit: f64,
    pub detail: String,
}

impl Target {
    pub fn met(&self) -> bool {
        self.figure <= self.limit
    }

    fn times(name: impl Into<String>, figure: Duration, limit: Duration, all: &[Duration]) -> Self {
        let (least, most) = (all.iter().min(), all.iter().max());
        let (least, most) = (
            least.copied().unwrap_or_default(),
            most.copied().unwrap_or_default(),
        );
        Self {
            name: name.into(),
            figure: figure.as_secs_f64() * 1e3,
            unit: "ms",
            limit: limit.as_secs_f64() * 1e3,
            detail: format!("{} runs, {least:.1?} to {most:.1?}", all.len()),
        }
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

struct Node {
    node: ClusterNode,
    task: JoinHandle<Result<(), ClusterError>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Node {
    fn start(etcd: &EtcdOptions, group: &str, id: &str, ttl: i64) -> Self {
        let node = ClusterNodeBuilder::new(etcd.clone(), id, local(), group)
            .ttl(ttl)
            .try_build()
            .unwrap_or_else(|error| panic!("node {id}: {error}"));
        let (stop, stopped) = oneshot::channel::<()>();
        let runs = node.clone();
        Self {
            node,
            task: tokio::spawn(async move { runs.run_until(async { _ = stopped.await }).await }),
            stop: Some(stop),
        }
    }

    async fn healthy(self) -> Self {
        let mut health = self.node.watch_health();
        let healthy = health.wait_for(|health| *health == HealthStatus::Healthy);
        let id = self.node.id();
        within(&format!("{id} is registered"), healthy).await.ok();
        self
    }

    /// Lets the node leave; returns how long that took.
    async fn stop(mut self) -> Duration {
        let start = Instant::now();
        drop(self.stop.take());
        let ended = within("a node leaves", &mut self.task).await;
        if !matches!(ended, Ok(Ok(()))) {
            panic!("{} left with {ended:?}", self.node.id());
        }
        start.elapsed()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct View(ServiceDiscovery, JoinHandle<Result<(), ClusterError>>);

impl View {
    async fn start(etcd: &EtcdOptions, group: &str) -> Self {
        let discovery = ServiceDiscovery::builder(etcd.clone(), group)
            .try_build()
            .unwrap_or_else(|error| panic!("discovery: {error}"));
        let runs = discovery.clone();
        let view = Self(discovery, tokio::spawn(async move { runs.run(None).await }));
        within("a discovery is ready", view.0.wait_ready()).await;
        view
    }

    /// Waits until the discovery shows a leader for whose id `is` holds.
    async fn until_leads(&self, what: &str, mut is: impl FnMut(&str) -> bool) {
        let mut leader = self.0.watch_leader();
        let leads = leader.wait_for(|leader| leader.as_ref().is_some_and(|node| is(&node.id)));
        within(what, leads).await.ok();
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.1.abort();
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("targets: not within {DEADLINE:?}: {what}"),
    }
}

pub async fn measure(binary: &Path, long: bool) -> Vec<Target> {
    let cluster = Cluster::start(binary, 1, None).await;
    let mut to_stop = Cluster::start(binary, 1, None).await;
    let options = options(&cluster);
    let mut targets = start_up(&options).await;
    targets.extend(hand_over(&options).await);
    // These spend most of their time waiting, so they run concurrently.
    let (crashes, connections, shutdowns) = tokio::join!(
        crashes(&options, if long { 9 } else { 5 }),
        connections(&cluster),
        shutdowns(&mut to_stop),
    );
    targets.extend(crashes);
    targets.extend([connections, shutdowns]);
    targets
}

fn options(cluster: &Cluster) -> EtcdOptions {
    EtcdOptions::new([format!("http://{}", cluster.addresses()[0])])
}

/// Groups of two nodes, all at once: in each, the leader crashes at a random time between two
/// renewals.
async fn crashes(etcd: &EtcdOptions, count: usize) -> Vec<Target> {
    let mut runs = JoinSet::new();
    for ttl in [3, 5] {
        for _ in 0..count {
            let etcd = etcd.clone();
            runs.spawn(async move {
                let group = group("crash");
                let view = View::start(&etcd, &group).await;
                let first = Node::start(&etcd, &group, "a", ttl).healthy().await;
                view.until_leads("a leads", |id| id == "a").await;
                let _second = Node::start(&etcd, &group, "b", ttl).healthy().await;
                sleep(Duration::from_millis(fastrand::u64(0..ttl as u64 * 400))).await;
                let start = Instant::now();
                drop(first);
                view.until_leads("b leads after the crash of a", |id| id == "b")
                    .await;
                (ttl, start.elapsed())
            });
        }
    }
    let runs = runs.join_all().await;
    let of = |ttl: i64| {
        let times = runs.iter().filter(|(its, _)| *its == ttl);
        let mut times: Vec<_> = times.map(|(_, time)| *time).collect();
        let limit = Duration::from_secs(ttl.unsigned_abs()) + Duration::from_millis(500);
        let name = format!("crash of the leader to the next one seen, TTL {ttl} s, median");
        Target::times(name, median(&mut times), limit, &times)
    };
    vec![of(3), of(5)]
}

async fn hand_over(etcd: &EtcdOptions) -> Vec<Target> {
    let limit = Duration::from_millis(20);
    let group = group("handover");
    let view = View::start(etcd, &group).await;
    let mut leads = Node::start(etcd, &group, "n0", 5).healthy().await;
    view.until_leads("n0 leads", |id| id == "n0").await;
    let mut waits = Node::start(etcd, &group, "n1", 5).healthy().await;
    let (mut resigned, mut stopped) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let next = waits.node.id().to_owned();
        let start = Instant::now();
        let seen = view.until_leads("the next leads after a resignation", |id| id == next);
        let (result, ()) = tokio::join!(leads.node.resign(), seen);
        resigned.push(start.elapsed());
        result.unwrap_or_else(|error| panic!("targets: resign: {error}"));
        std::mem::swap(&mut leads, &mut waits);
        // Until both are candidates again.
        queued(etcd, &group, 2).await;
    }
    for turn in 2..22 {
        let next = waits.node.id().to_owned();
        let start = Instant::now();
        let seen = view.until_leads("the next leads after a stop", |id| id == next);
        let leaving = leads.stop();
        let took = async {
            seen.await;
            start.elapsed()
        };
        let (_, took) = tokio::join!(leaving, took);
        stopped.push(took);
        leads = waits;
        waits = Node::start(etcd, &group, &format!("n{turn}"), 5)
            .healthy()
            .await;
    }
    vec![
        Target::times(
            "resignation to the next leader seen, median",
            median(&mut resigned),
            limit,
            &resigned,
        ),
        Target::times(
            "stop of the leader to the next one seen, median",
            median(&mut stopped),
            limit,
            &stopped,
        ),
    ]
}

/// Waits until the group has this many candidates.
async fn queued(etcd: &EtcdOptions, group: &str, count: i64) {
    let client = etcd_client::Client::connect(&etcd.endpoints, None).await;
    let mut client = client.unwrap_or_else(|error| panic!("targets: a client: {error}"));
    let start = Instant::now();
    loop {
        let options = etcd_client::GetOptions::new()
            .with_prefix()
            .with_count_only();
        let election = format!("election/{group}/");
        let counted = within("a count", client.get(election, Some(options))).await;
        let counted = counted.map(|counted| counted.count());
        if matches!(counted, Ok(counted) if counted == count) {
            return;
        }
        assert!(
            start.elapsed() < DEADLINE,
            "targets: candidates: {counted:?}"
        );
        sleep(Duration::from_millis(2)).await;
    }
}

/// From no connection to registered and elected.
async fn start_up(etcd: &EtcdOptions) -> Vec<Target> {
    let mut times = Vec::new();
    for _ in 0..20 {
        let group = group("start");
        let start = Instant::now();
        let node = Node::start(etcd, &group, "a", 5);
        within("the first node leads", node.node.wait_for_leadership()).await;
        times.push(start.elapsed());
        node.stop().await;
    }
    let limit = Duration::from_millis(10);
    let name = "start to registered and elected, median";
    vec![Target::times(name, median(&mut times), limit, &times)]
}

async fn connections(cluster: &Cluster) -> Target {
    let (node_link, view_link) = (
        Link::to(cluster.addresses()[0].clone()).await,
        Link::to(cluster.addresses()[0].clone()).await,
    );
    let group = group("connections");
    let node = Node::start(&node_link.options(), &group, "a", 2)
        .healthy()
        .await;
    let view = View::start(&view_link.options(), &group).await;
    view.until_leads("a leads", |id| id == "a").await;
    // Long enough for several renewals.
    sleep(Duration::from_secs(2)).await;
    node.stop().await;
    let (node, view) = (node_link.connections(), view_link.connections());
    Target {
        name: "TCP connections of a process, most".to_owned(),
        figure: node.max(view) as f64,
        unit: "",
        limit: 1.0,
        detail: format!("worker {node}, discovery {view}"),
    }
}

/// etcd is stopped (SIGSTOP); some nodes are stopped at once, others after renewals have failed.
async fn shutdowns(cluster: &mut Cluster) -> Target {
    let etcd = &options(cluster);
    let group = group("shutdown");
    let mut nodes = Vec::new();
    for index in 0..8 {
        nodes.push(
            Node::start(etcd, &group, &format!("n{index}"), 3)
                .healthy()
                .await,
        );
    }
    cluster.pause(0);
    let mut leaving = JoinSet::new();
    for (index, node) in nodes.into_iter().enumerate() {
        leaving.spawn(async move {
            sleep(Duration::from_millis(500) * index as u32).await;
            node.stop().await
        });
    }
    let times = leaving.join_all().await;
    cluster.resume(0);
    let most = times.iter().max().copied().unwrap_or_default();
    let name = "shutdown while etcd is stopped, longest";
    Target::times(name, most, Duration::from_secs(2), &times)
}
