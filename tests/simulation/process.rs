//! The simulated processes: what runs in them, and how they are paused, crash, and start again.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pingora_etcd::pingora::LeaderRoute;
use pingora_etcd::store::{Fault, MemoryStore, Store, Txn};
use pingora_etcd::{
    Change, Cluster, ClusterNode, ClusterNodeBuilder, EtcdOptions, MetricsCollector, Node,
    NodeMetadata, ServiceDiscovery, discovery::Changes, metadata_keys,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::check::{Checker, work};
use super::net::{Client, Delivered, Net, Presence, SkewedClock};

/// A process on its own machine, with its own network and clock, which can be paused.
#[derive(Debug)]
pub struct Process {
    pub name: String,
    pub net: Arc<Net>,
    pub clock: Arc<SkewedClock>,
    paused: Mutex<Option<Vec<Waker>>>,
}

impl Process {
    pub fn new(name: String, rate: f64) -> Arc<Self> {
        Arc::new(Self {
            name,
            net: Net::new(),
            clock: Arc::new(SkewedClock::new(rate)),
            paused: Mutex::new(None),
        })
    }

    /// From now on, none of its tasks runs.
    pub fn pause(&self) {
        self.paused.lock().unwrap().get_or_insert_default();
    }

    pub fn resume(&self) {
        for waker in self.paused.lock().unwrap().take().into_iter().flatten() {
            waker.wake();
        }
    }

    pub fn is_paused(&self) -> bool {
        self.paused.lock().unwrap().is_some()
    }
}

/// A task of a process: it does not run while the process is paused, and is followed by a check
/// after each step.
struct Task<F> {
    process: Arc<Process>,
    checker: Arc<Checker>,
    inner: Pin<Box<F>>,
}

impl<F: Future> Future for Task<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if let Some(wakers) = &mut *self.process.paused.lock().unwrap() {
            wakers.push(context.waker().clone());
            return Poll::Pending;
        }
        let result = self.inner.as_mut().poll(context);
        self.checker.step();
        result
    }
}

pub fn spawn<T: Send + 'static>(
    process: &Arc<Process>,
    checker: &Arc<Checker>,
    task: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    tokio::spawn(Task {
        process: process.clone(),
        checker: checker.clone(),
        inner: Box::pin(task),
    })
}

/// What all members and readers of a world share.
#[derive(Clone)]
pub struct Common {
    pub store: MemoryStore,
    pub checker: Arc<Checker>,
    /// The TTL of every lease, in seconds.
    pub ttl: i64,
    pub extra_ttl: Duration,
    /// The number of outages of the store that have not ended.
    outages: Arc<AtomicUsize>,
    /// How many nodes were started, because each incarnation of a node has another address.
    incarnations: Arc<AtomicU32>,
}

impl Common {
    pub fn new(ttl: i64, extra_ttl: Duration) -> Self {
        let store = MemoryStore::new();
        Self {
            checker: Checker::new(&store),
            store,
            ttl,
            extra_ttl,
            outages: Arc::default(),
            incarnations: Arc::default(),
        }
    }

    /// Takes the store down for everybody, for this long; then calls `comes_back`.
    pub fn outage(
        &self,
        lasts: Duration,
        comes_back: impl FnOnce(&Self) + Send + 'static,
    ) -> JoinHandle<()> {
        self.outages.fetch_add(1, Ordering::Relaxed);
        self.store.set_fault(Some(Fault::Refuse));
        let common = self.clone();
        tokio::spawn(async move {
            sleep(lasts).await;
            comes_back(&common);
            if common.outages.fetch_sub(1, Ordering::Relaxed) == 1 {
                common.store.set_fault(None);
            }
        })
    }

    /// Ends all outages.
    pub fn end_outages(&self) {
        self.outages.store(0, Ordering::Relaxed);
        self.store.set_fault(None);
    }

    fn new_address(&self) -> IpAddr {
        let incarnation = self.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        IpAddr::V4(Ipv4Addr::from_bits(
            Ipv4Addr::new(10, 0, 0, 0).to_bits() + incarnation,
        ))
    }

    pub fn client(&self, process: &Arc<Process>) -> Client {
        Client::new(&self.store, process, &self.checker, self.extra_ttl)
    }

    pub fn cluster(&self, process: &Arc<Process>) -> Sharing {
        let client = self.client(process);
        let cluster = Cluster::builder(EtcdOptions::memory("simulation"))
            .store(Arc::new(client.clone()))
            .ttl(self.ttl)
            .try_build()
            .expect("a valid cluster");
        Sharing { cluster, client }
    }
}

/// A cluster, and the client that it uses.
#[derive(Clone)]
pub struct Sharing {
    pub cluster: Cluster,
    client: Client,
}

/// A load with small fluctuations and occasional jumps.
struct FluctuatingLoad(Mutex<f64>);

impl MetricsCollector for FluctuatingLoad {
    fn collect(&self) -> NodeMetadata {
        let mut load = self.0.lock().unwrap();
        if fastrand::u8(..) < 8 {
            *load = 100.0 * fastrand::f64();
        }
        serde_json::json!({ metadata_keys::CPU_USAGE_PERCENT: *load + fastrand::f64() })
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// A node that runs in a process.
pub struct Member {
    pub process: Arc<Process>,
    pub node: ClusterNode,
    pub group: &'static str,
    pub id: String,
    pub priority: u16,
    pub is_sharing: bool,
    /// Whether it has been told to drain.
    pub drains: Arc<AtomicBool>,
    _presence: Presence,
    stop: oneshot::Sender<()>,
    running: JoinHandle<()>,
    working: JoinHandle<()>,
}

impl Member {
    pub fn start(
        common: &Common,
        process: &Arc<Process>,
        sharing: Option<&Sharing>,
        group: &'static str,
        id: &str,
        priority: u16,
        metrics: bool,
    ) -> Self {
        let ip = common.new_address();
        let own = || common.client(process);
        let client = Arc::new(sharing.map_or_else(own, |sharing| sharing.client.clone()));
        let presence = client.enter(group);
        let builder = match sharing {
            Some(sharing) => sharing.cluster.node(id, ip, group),
            None => ClusterNodeBuilder::new(EtcdOptions::memory("simulation"), id, ip, group)
                .store(client.clone())
                .ttl(common.ttl),
        };
        let builder = builder
            .port(8080)
            .priority(priority)
            .takeover_after(Duration::from_secs(2));
        let builder = if metrics {
            builder
                .metrics_collector(FluctuatingLoad(Mutex::new(50.0)))
                .metrics_update_interval(1)
        } else {
            builder
        };
        let node = builder.try_build().expect("a valid node");
        let name = format!("{id} on {}", process.name);
        common.checker.add(&node, &process.clock, name);
        let (stop, stopped) = oneshot::channel();
        let run = node.clone();
        let running = spawn(process, &common.checker, async move {
            let ended = run
                .run_until(async {
                    let _ = stopped.await;
                })
                .await;
            ended.expect("a run that was started once");
        });
        let work = write_as_leader(node.clone(), client, group);
        let working = spawn(process, &common.checker, work);
        Self {
            process: process.clone(),
            node,
            group,
            id: id.to_owned(),
            priority,
            is_sharing: sharing.is_some(),
            drains: Arc::default(),
            _presence: presence,
            stop,
            running,
            working,
        }
    }

    /// Ends the node as a crash does: nothing is cleaned up.
    pub fn crash(self) {
        self.running.abort();
        self.working.abort();
    }

    /// Asks the node to leave; returns its task, to wait for.
    pub fn stop(self) -> JoinHandle<()> {
        self.working.abort();
        drop(self.stop);
        self.running
    }
}

/// The leader's work: fenced writes, which must never come from two terms at once.
async fn write_as_leader(leader: ClusterNode, client: Arc<Client>, group: &'static str) {
    loop {
        sleep(Duration::from_millis(fastrand::u64(200..1500))).await;
        if let Some(term) = leader.leadership() {
            let token = term.epoch.to_string().into_bytes();
            let write = Txn::new().when(term.guard()).put(work(group), token, None);
            let _ = client.txn(write).await;
        }
    }
}

/// The state that results from folding the changes of a discovery.
#[derive(Debug, Default)]
pub struct Folded {
    pub nodes: BTreeMap<String, i64>,
    pub leader: Option<(String, i64)>,
}

/// A discovery that runs in a process, with a task that folds its changes and one that sends
/// requests to the leader.
pub struct Reader {
    pub process: Arc<Process>,
    pub discovery: ServiceDiscovery,
    pub group: &'static str,
    pub folded: Arc<Mutex<Folded>>,
    checker: Arc<Checker>,
    delivered: Delivered,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
    folding: JoinHandle<()>,
    routing: JoinHandle<()>,
}

impl Reader {
    pub fn start(
        common: &Common,
        process: &Arc<Process>,
        sharing: Option<&Sharing>,
        group: &'static str,
    ) -> Self {
        let own = || common.client(process);
        let client = sharing.map_or_else(own, |sharing| sharing.client.clone());
        let delivered = client.delivered.clone();
        let builder = match sharing {
            Some(sharing) => sharing.cluster.discovery(group),
            None => ServiceDiscovery::builder(EtcdOptions::memory("simulation"), group)
                .store(Arc::new(client)),
        };
        let discovery = builder.try_build().expect("a valid discovery");
        let checker = &common.checker;
        checker.add_reader(&discovery, &delivered, group, &process.name);
        let (stop, stopped) = oneshot::channel();
        let run = discovery.clone();
        let running = spawn(process, &common.checker, async move {
            let ended = run
                .run_until(async {
                    let _ = stopped.await;
                })
                .await;
            ended.expect("a run that was started once");
        });
        let folded = Arc::<Mutex<Folded>>::default();
        let fold = fold_changes(
            discovery.changes(),
            folded.clone(),
            group,
            common.checker.clone(),
            process.name.clone(),
        );
        let folding = spawn(process, &common.checker, fold);
        let send = send_to_leader(
            LeaderRoute::new(discovery.clone(), 0),
            delivered.clone(),
            group,
            common.checker.clone(),
            process.name.clone(),
        );
        let routing = spawn(process, &common.checker, send);
        Self {
            process: process.clone(),
            discovery,
            group,
            folded,
            checker: common.checker.clone(),
            delivered,
            routing,
            stop: Some(stop),
            running,
            folding,
        }
    }

    pub fn crash(self) {
        self.checker.forget_reader(&self.delivered, self.group);
        self.running.abort();
        self.folding.abort();
        self.routing.abort();
    }

    pub fn stop(mut self) -> JoinHandle<()> {
        self.folding.abort();
        self.routing.abort();
        drop(self.stop.take());
        self.running
    }
}

/// Folds the changes of a discovery, and checks the leaders and the ids that they report.
async fn fold_changes(
    mut changes: Changes,
    fold: Arc<Mutex<Folded>>,
    group: &'static str,
    checker: Arc<Checker>,
    place: String,
) {
    loop {
        let change = changes.next().await;
        if let Change::Leader(Some(leader)) = &change {
            checker.check_change(group, leader, &place);
        }
        let mut folded = fold.lock().unwrap();
        folded.apply(change);
        if let Some(stranger) = folded.nodes.keys().find(|id| !is_of(id, group)) {
            checker.violation(format!("{stranger} is shown in group {group}"));
        }
    }
}

/// Sends requests to the current leader.
async fn send_to_leader(
    route: LeaderRoute,
    delivered: Delivered,
    group: &'static str,
    checker: Arc<Checker>,
    place: String,
) {
    let mut known = None;
    loop {
        let limit = Duration::from_secs(10);
        if let Some(to) = route.wait_for_other_than(known, limit).await {
            checker.check_route(group, &delivered, &to, &place);
            known = Some(to.epoch);
        }
    }
}

/// The id of each node begins with its group.
fn is_of(id: &str, group: &str) -> bool {
    id.split(':').next() == Some(group)
}

impl Folded {
    fn apply(&mut self, change: Change) {
        let mut insert = |node: &Node| self.nodes.insert(node.id.clone(), node.incarnation());
        match change {
            Change::Reset(nodes) => {
                self.nodes = nodes
                    .iter()
                    .map(|node| (node.id.clone(), node.incarnation()))
                    .collect();
            }
            Change::Joined(node) => drop(insert(&node)),
            Change::Updated { new, .. } => drop(insert(&new)),
            Change::Left(node) => drop(self.nodes.remove(&node.id)),
            Change::Leader(leader) => {
                self.leader = leader.map(|leader| (leader.node.id.clone(), leader.epoch));
            }
            _ => {}
        }
    }
}
