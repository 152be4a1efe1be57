//! Tests what happens when a task panics that maintains a view, a table, a lease or the listener:
//! the task is restarted, the handle reports the end, or the process exits.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora::lb::discovery::ServiceDiscovery as _;
use pingora::lb::health_check::HealthCheck;
use pingora::lb::selection::RoundRobin;
use pingora::lb::{Backend, Backends, LoadBalancer};
use pingora::services::background::BackgroundService;
use pingora_etcd::balance::Balancer;
use pingora_etcd::pingora::{BalancerService, ClusterBackends, LiveLoadBalancer};
use pingora_etcd::store::{
    Entry, Lease, LeaseId, LeaseKeeper, Listing, MemoryStore, Revision, Selector, Store, Txn,
    WatchEvent, WatchRange, Watcher,
};
use pingora_etcd::{
    ClusterError, ClusterNode, ClusterNodeBuilder, HealthStatus, ServiceDiscovery,
    discovery::DiscoveryStatus,
};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::programs::optimised;
use super::common::{eventually, free_port, group, local, subscribe};
use super::world::{Setup, entry, put, until};

/// A store that panics at its next use after [`break_now`](Self::break_now).
#[derive(Debug, Clone, Default)]
struct PanickingStore {
    inner: MemoryStore,
    panics: Arc<AtomicBool>,
}

impl PanickingStore {
    fn break_now(&self) {
        self.panics.store(true, Ordering::SeqCst);
    }

    fn check(&self) {
        assert!(
            !self.panics.swap(false, Ordering::SeqCst),
            "panic on purpose"
        );
    }

    async fn put(&self, group: &str, id: &str) {
        // Two nodes at the same address would be a single backend.
        let port = 9000 + u16::from(*id.as_bytes().last().unwrap());
        let entry = entry(id, Some(port), json!({})).to_string();
        let put = Txn::new().put(format!("registry/{group}/{id}"), entry.into_bytes(), None);
        self.inner.txn(put).await.unwrap();
    }

    fn discovery(&self, group: &str) -> ServiceDiscovery {
        let builder = ServiceDiscovery::builder(Vec::<String>::new(), group);
        let builder = builder.store(Arc::new(self.clone()));
        builder.try_build().unwrap()
    }

    fn node(&self, group: &str) -> ClusterNode {
        let builder = ClusterNodeBuilder::new(Vec::<String>::new(), "n1", local(), group);
        builder.store(Arc::new(self.clone())).try_build().unwrap()
    }
}

#[async_trait]
impl Store for PanickingStore {
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError> {
        self.check();
        self.inner.grant(ttl).await
    }

    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper> {
        let inner = self.inner.keeper(lease);
        Box::new(PanickingKeeper(self.clone(), inner))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError> {
        self.inner.revoke(lease).await
    }

    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError> {
        self.inner.keys_of(lease).await
    }

    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError> {
        self.check();
        self.inner.txn(txn).await
    }

    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError> {
        self.check();
        self.inner.list(keys, at).await
    }

    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError> {
        self.check();
        let inner = self.inner.watch(ranges).await?;
        Ok(Box::new(PanickingWatcher(self.clone(), inner)))
    }
}

struct PanickingKeeper(PanickingStore, Box<dyn LeaseKeeper>);

#[async_trait]
impl LeaseKeeper for PanickingKeeper {
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError> {
        self.0.check();
        self.1.renew(within).await
    }
}

struct PanickingWatcher(PanickingStore, Box<dyn Watcher>);

#[async_trait]
impl Watcher for PanickingWatcher {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError> {
        let events = self.1.next().await;
        self.0.check();
        events
    }

    fn position(&self) -> &[WatchRange] {
        self.1.position()
    }
}

fn start(service: &Arc<impl BackgroundService + Send + Sync + 'static>) -> JoinSet<()> {
    let (service, never) = (service.clone(), watch::channel(false).1);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { service.start(never).await });
    tasks
}

/// Checks that an adapter survives a panic in its discovery's task, caused by the next event and by
/// the next list.
async fn survives(
    store: &PanickingStore,
    discovery: &ServiceDiscovery,
    mut nodes: impl AsyncFnMut() -> usize,
) {
    let group = discovery.group_name();
    let mut status = discovery.watch_status();
    for (put, id) in ["n1", "n2", "n3"].into_iter().enumerate() {
        if put > 0 {
            status.mark_unchanged();
            store.break_now();
        }
        store.put(group, id).await;
        if put > 0 {
            let ended = status.wait_for(|status| matches!(status, DiscoveryStatus::Ended { .. }));
            drop(ended.await.unwrap());
        }
        until(id, async || nodes().await == put + 1).await;
        assert_eq!(discovery.status(), DiscoveryStatus::Live);
    }
}

#[tokio::test]
async fn a_balancer_whose_discovery_panics_says_so_and_goes_on() {
    let store = PanickingStore::default();
    let discovery = store.discovery(&group("deaths"));
    let balancer = Balancer::builder().try_build().unwrap();
    let service = Arc::new(BalancerService::new(discovery.clone(), balancer));
    let _running = start(&service);
    survives(&store, &discovery, async || service.len()).await;
}

#[tokio::test]
async fn a_live_load_balancer_whose_discovery_panics_goes_on() {
    let store = PanickingStore::default();
    let discovery = store.discovery(&group("deaths"));
    let service = Arc::new(LiveLoadBalancer::<RoundRobin>::new(discovery.clone(), 80));
    let _running = start(&service);
    let count = async || service.backends().get_backend().len();
    survives(&store, &discovery, count).await;
}

#[tokio::test]
async fn a_stock_load_balancer_whose_discovery_panics_goes_on() {
    let store = PanickingStore::default();
    let discovery = store.discovery(&group("deaths"));
    let backends = ClusterBackends::new(discovery.clone(), 80);
    survives(&store, &discovery, async || {
        let (found, _) = backends.discover().await.unwrap();
        found.len()
    })
    .await;
    let stock = Backends::new(Box::new(backends));
    let stock = LoadBalancer::<RoundRobin>::from_backends(stock);
    stock.update().await.unwrap();
    assert_eq!(stock.backends().get_backend().len(), 3);
}

/// A subscriber of the user's that panics, as one does that reports a full disk with `eprintln!`.
#[derive(Clone, Default)]
struct PanickingLog {
    panics: Arc<AtomicBool>,
    panicked: Arc<AtomicU32>,
}

impl PanickingLog {
    fn panic_on_purpose(&self) {
        if self.panics.load(Ordering::SeqCst) {
            self.panicked.fetch_add(1, Ordering::SeqCst);
            panic!("panic on purpose");
        }
    }
}

impl tracing::Subscriber for PanickingLog {
    fn enabled(&self, of: &tracing::Metadata<'_>) -> bool {
        of.target().starts_with("pingora_etcd") && *of.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.panic_on_purpose();
    }

    fn enter(&self, _: &tracing::span::Id) {
        self.panic_on_purpose();
    }

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Everything in this test runs on this thread, which has the panicking subscriber.
#[tokio::test]
async fn a_subscriber_that_panics_for_a_while_ends_nothing() {
    let log = PanickingLog::default();
    let _guard = subscribe(log.clone());
    let store = PanickingStore::default();
    let group = group("deaths");
    let discovery = store.discovery(&group);
    let balancer = Balancer::builder().try_build().unwrap();
    let service = Arc::new(BalancerService::new(discovery.clone(), balancer));
    let _running = start(&service);
    store.put(&group, "n1").await;
    eventually("n1 is known", || service.len() == 1).await;
    log.panics.store(true, Ordering::SeqCst);
    store.break_now();
    store.put(&group, "n2").await;
    // Neither the panic nor the restart can be logged.
    eventually("the subscriber panics, and the discovery with it", || {
        log.panicked.load(Ordering::SeqCst) >= 3 && discovery.status() != DiscoveryStatus::Live
    })
    .await;
    log.panics.store(false, Ordering::SeqCst);
    eventually("n2 is known", || service.len() == 2).await;
    eventually("the discovery is live", || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
}

/// A health check that panics at its second call.
struct Check(Arc<AtomicU32>);

#[async_trait]
impl HealthCheck for Check {
    async fn check(&self, _: &Backend) -> pingora::Result<()> {
        let call = self.0.fetch_add(1, Ordering::SeqCst);
        assert_ne!(call, 1, "panic on purpose");
        Ok(())
    }

    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}

#[tokio::test]
async fn health_checks_that_panic_go_on_and_the_view_too() {
    let store = PanickingStore::default();
    let group = group("deaths");
    let discovery = store.discovery(&group);
    let mut live = LiveLoadBalancer::<RoundRobin>::new(discovery, 80);
    let checks = Arc::new(AtomicU32::new(0));
    live.set_health_check(Box::new(Check(checks.clone())));
    live.health_check_frequency = Some(Duration::from_millis(20));
    live.parallel_health_check = false;
    let live = Arc::new(live);
    let _running = start(&live);
    store.put(&group, "n1").await;
    eventually("the check panics", || checks.load(Ordering::SeqCst) == 2).await;
    store.put(&group, "n2").await;
    eventually("the view is still updated", || {
        live.backends().get_backend().len() == 2
    })
    .await;
    eventually("health checks continue", || {
        checks.load(Ordering::SeqCst) > 10
    })
    .await;
}

/// In a user's own program nothing restarts the run: its task ends, and the handles report that.
#[tokio::test]
async fn a_run_that_panics_is_over_for_its_handles_and_can_be_run_again() {
    let store = PanickingStore::default();
    let group = group("deaths");
    let (node, discovery) = (store.node(&group), store.discovery(&group));
    let mut tasks = JoinSet::new();
    let running = discovery.clone();
    tasks.spawn(async move { running.run_until(std::future::pending()).await });
    eventually("the discovery is live", || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    store.break_now();
    store.put(&group, "other").await;
    assert!(tasks.join_next().await.unwrap().is_err());
    assert!(!discovery.is_running());
    assert!(matches!(discovery.status(), DiscoveryStatus::Ended { .. }));
    let running = discovery.clone();
    tasks.spawn(async move { running.run_until(std::future::pending()).await });
    eventually("the discovery is live again", || {
        discovery.status() == DiscoveryStatus::Live && discovery.nodes().len() == 1
    })
    .await;

    let mut tasks = JoinSet::new();
    for again in [false, true] {
        let running = node.clone();
        tasks.spawn(async move { running.run_until(std::future::pending()).await });
        eventually("the node leads", || node.is_leader()).await;
        if again {
            return;
        }
        // It announces its term by a write of its own, which the panic is not meant for.
        let election = Selector::Prefix(format!("election/{group}/"));
        until("the term is announced", async || {
            let keys = store.inner.list(&election, None).await.unwrap().entries;
            let is_written_again = |key: &Entry| key.mod_revision > key.create_revision;
            keys.iter().any(is_written_again)
        })
        .await;
        // A panic in the task that renews the lease: the task is restarted, and the term continues.
        let term = node.leadership().unwrap().epoch;
        store.break_now();
        eventually("a renewal panics", || !store.panics.load(Ordering::SeqCst)).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(node.leadership().unwrap().epoch, term);
        // A panic in the run itself. A renewal may hit the panic first, so it is repeated.
        while tasks.try_join_next().is_none() {
            store.break_now();
            let _ = node.resign().await;
        }
        assert!(!node.is_leader() && node.leadership().is_none());
        assert_eq!(*node.watch_health().borrow(), HealthStatus::Unknown);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_is_taken_is_an_error_and_an_exit() {
    let taken = std::net::TcpListener::bind((local(), 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for program in ["load_balancer", "leader_routing"] {
        let setup = Setup::shared(&group("taken")).program(program);
        let setup = setup.listen(&address).with("ready_timeout_ms: 60000");
        let mut balancer = setup.start();
        let (status, took) = balancer.program.ended().await;
        assert!(
            !status.success() && took < Duration::from_secs(20),
            "{status} {took:?}"
        );
        let text = balancer.log_text();
        assert!(text.contains(&address) && text.contains("in use"), "{text}");
        assert!(!text.contains("panicked"), "{text}");
    }
}

/// The port is taken while the program waits for etcd.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_is_taken_later_is_an_error_and_an_exit_too() {
    let nowhere = vec![format!("http://{}:{}", local(), free_port())];
    let group = group("later");
    let address = format!("{}:{}", local(), free_port());
    for program in ["load_balancer", "leader_routing"] {
        let setup = Setup::new(nowhere.clone(), &group).program(program);
        let setup = setup.listen(&address).with("ready_timeout_ms: 8000");
        let mut balancer = setup.start();
        // The first line that the program logs once it runs.
        until("the program runs", async || {
            balancer.log_text().contains("cannot")
        })
        .await;
        let taken = std::net::TcpListener::bind(&address).unwrap();
        let (status, took) = balancer.program.ended().await;
        assert_eq!(status.code(), Some(1), "{}", balancer.log_text());
        assert!(took < Duration::from_secs(12), "{took:?}");
        assert!(
            balancer.log_text().contains("the process ends"),
            "{}",
            balancer.log_text()
        );
        drop(taken);
    }
}

/// The old process still holds the port when the new one takes its sockets over, and a
/// configuration can be tested beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_takes_the_sockets_over_listens_on_them() {
    let etcd = Etcd::shared();
    let group = group("upgrade");
    let mut keys = etcd.raw_client().await;
    let backend = super::world::Backend::start("b1").await;
    put(&mut keys, &group, &backend.entry(json!({})), None).await;
    let setup = Setup::shared(&group);
    let mut old = setup.serving().await;
    let tested = Command::new(optimised("load_balancer"))
        .args(["--test", "--conf"])
        .arg(&old.conf)
        .output()
        .unwrap();
    assert!(tested.status.success(), "{tested:?}");
    let new = setup.listen(&old.listen).argument("--upgrade").start();
    // The new process keeps asking for the sockets until the old one hands them over.
    old.program.signal("QUIT");
    let (status, _) = old.program.ended().await;
    assert!(status.success(), "{status}");
    new.until_served_by(&["b1"]).await;
}
