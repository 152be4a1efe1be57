//! Tests the parts that are used with Pingora's own load balancers: `LiveLoadBalancer`,
//! `ClusterBackends` and `MetricsWeighted`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::lb::health_check::TcpHealthCheck;
use pingora::lb::selection::RoundRobin;
use pingora::lb::{Backends, LoadBalancer};
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::services::background::background_service;
use pingora::upstreams::peer::HttpPeer;
use pingora_etcd::balance::{Balancer, BalancerBuilder, Policy};
use pingora_etcd::pingora::{BackendNode, ClusterBackends, LiveLoadBalancer, MetricsWeighted};
use pingora_etcd::{Cluster, Operator, ServiceDiscovery};

use super::common::etcd::Etcd;
use super::common::{DEADLINE, eventually, free_port, group, local, throughout};
use super::{Backend, RunningServer, load, until_it_answers};

fn discovery(etcd: &Etcd, group: &str) -> ServiceDiscovery {
    ServiceDiscovery::builder(etcd.options(), group)
        .try_build()
        .unwrap()
}

/// A policy whose weights follow immediately and only from the metrics.
fn headroom() -> BalancerBuilder {
    Balancer::builder().policy(Policy::Headroom)
}

/// How many times each port is selected.
fn selected(select: impl Fn() -> Option<u16>, times: u32) -> BTreeMap<u16, u32> {
    let mut counts = BTreeMap::new();
    for _ in 0..times {
        if let Some(port) = select() {
            *counts.entry(port).or_default() += 1;
        }
    }
    counts
}

fn port(backend: &pingora::lb::Backend) -> u16 {
    backend.addr.as_inet().unwrap().port()
}

macro_rules! ports {
    ($load_balancer:expr) => {
        || $load_balancer.select(b"", 16).map(|backend| port(&backend))
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_down_backend_stays_down_when_its_weight_changes() {
    let etcd = Etcd::shared();
    let group = group("health");
    let up = Backend::start(&etcd.options(), &group, "up").await;
    let down = Backend::dead(&etcd.options(), &group, "down");
    let mut live =
        LiveLoadBalancer::<MetricsWeighted>::weighted(discovery(&etcd, &group), &headroom())
            .unwrap();
    let mut check = TcpHealthCheck::new();
    // A port that is refused is known at once; the other backend may take its time on a busy machine.
    check.peer_template.options.connection_timeout = Some(DEADLINE);
    // One failed check marks a backend as down, and no later check marks it as up again.
    check.consecutive_failure = 1;
    check.consecutive_success = 1_000_000;
    live.set_health_check(check);
    live.health_check_frequency = Some(Duration::from_millis(50));
    let service = background_service("cluster", live);
    let lb = service.task();
    let _server = RunningServer::start(|server| drop(server.add_service(service)));

    eventually("both backends are known", || {
        lb.backends().get_backend().len() == 2
    })
    .await;
    eventually("the dead backend is marked as down", || {
        !selected(ports!(lb), 50).contains_key(&down.port)
    })
    .await;
    let weight_of = |wanted: u16| {
        let backends = lb.backends().get_backend();
        let backend = backends.iter().find(|backend| port(backend) == wanted)?;
        BackendNode::of(backend).map(BackendNode::weight)
    };
    // New metrics change the weight of the dead backend several times; its health must survive each
    // update.
    for cpu in [90, 10, 70] {
        let before = weight_of(down.port).unwrap();
        down.cpu.set(cpu);
        eventually("the weight changes", || {
            let now = weight_of(down.port);
            assert!(
                !selected(ports!(lb), 20).contains_key(&down.port),
                "a backend that is down was selected"
            );
            now.is_some_and(|now| (now - before).abs() > 0.1)
        })
        .await;
    }
    throughout("the backend stays down", Duration::from_millis(300), || {
        selected(ports!(lb), 20).keys().eq([&up.port])
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_reach_a_live_load_balancer_without_polling() {
    let etcd = Etcd::shared();
    let group = group("live");
    let mut first = Backend::start(&etcd.options(), &group, "b1").await;
    // Any selection algorithm of Pingora can be used.
    let live = LiveLoadBalancer::<RoundRobin>::new(discovery(&etcd, &group), 80);
    let service = background_service("cluster", live);
    let lb = service.task();
    let _server = RunningServer::start(|server| drop(server.add_service(service)));
    eventually("one backend is selected", || {
        selected(ports!(lb), 4).len() == 1
    })
    .await;
    let second = Backend::start(&etcd.options(), &group, "b2").await;
    eventually("two backends are selected", || {
        selected(ports!(lb), 4).len() == 2
    })
    .await;
    let known = lb.backends().get_backend();
    let names: Vec<_> = known
        .iter()
        .map(|backend| BackendNode::of(backend).unwrap().node().id.clone())
        .collect();
    assert_eq!(names.len(), 2);

    // A draining backend is not selected, but still known.
    second.node.drain().await.unwrap();
    let took = eventually("the draining backend is disabled", || {
        !selected(ports!(lb), 8).contains_key(&second.port)
    })
    .await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(lb.backends().get_backend().len(), 2);

    // New metrics of the draining backend do not enable it again.
    let reported = || {
        let nodes = lb.discovery().nodes();
        nodes.get("b2")?.metric("cpu_usage_percent")
    };
    second.cpu.set(55);
    eventually("the metrics change", || reported() == Some(55.0)).await;
    throughout(
        "the draining backend stays disabled",
        Duration::from_millis(300),
        || !selected(ports!(lb), 8).contains_key(&second.port),
    )
    .await;

    first.leave();
    eventually("no backend is selected any more", || {
        selected(ports!(lb), 8).is_empty()
    })
    .await;
    // The backend is disabled when it announces its departure, and removed a moment later.
    eventually("the backend is removed", || {
        lb.backends().get_backend().len() == 1
    })
    .await;
}

/// The proxy of Pingora's documentation, with the discovery and selection of this crate.
struct Stock(Arc<LoadBalancer<MetricsWeighted>>);

#[async_trait]
impl ProxyHttp for Stock {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, (): &mut ()) -> pingora::Result<Box<HttpPeer>> {
        let backend = self
            .0
            .select(b"", 256)
            .ok_or_else(|| pingora::Error::new(pingora::ErrorType::HTTPStatus(503)))?;
        Ok(Box::new(HttpPeer::new(backend, false, String::new())))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stock_load_balancer_with_our_discovery_and_selection() {
    let etcd = Etcd::shared();
    let group = group("stock");
    let heavy = |builder: pingora_etcd::ClusterNodeBuilder| builder.weight(3.0);
    let mut backends = [
        Backend::start_with(&etcd.options(), &group, "b1", heavy).await,
        Backend::start(&etcd.options(), &group, "b2").await,
    ];
    let ours = ClusterBackends::weighted(discovery(&etcd, &group), &headroom()).unwrap();
    let mut lb = LoadBalancer::from_backends(Backends::new(Box::new(ours)));
    lb.update_frequency = Some(Duration::from_secs(1));
    let service = background_service("stock", lb);
    let lb = service.task();
    let listen = format!("{}:{}", local(), free_port());
    let server = RunningServer::start(|server| {
        let mut proxy = http_proxy_service(&server.configuration, Stock(lb.clone()));
        proxy.add_tcp(&listen);
        let service = server.add_service(service);
        server.add_service(proxy).add_dependency(service);
    });
    let url = format!("http://{listen}/");
    until_it_answers(&url).await;
    eventually("both backends are known", || {
        lb.backends().get_backend().len() == 2
    })
    .await;
    // It may take a second until both have reported their metrics; after that the ratio is steady.
    let ports = [backends[0].port, backends[1].port];
    let ratio = || {
        let counts = selected(ports!(lb), 400);
        let [first, second] = ports.map(|port| f64::from(*counts.get(&port).unwrap_or(&0)));
        first / second
    };
    eventually("three to one by weight", || (ratio() - 3.0).abs() < 0.2).await;
    assert_eq!(load(&url, 400, 8).await, Vec::<String>::new());
    // A weight takes effect immediately, without an update of the load balancer.
    backends[0].cpu.set(100);
    eventually("the busy backend has half of its weight", || {
        (ratio() - 1.5).abs() < 0.2
    })
    .await;

    // The node leaves and registers again at the same address, for Pingora possibly between two
    // updates: weights must still follow the metrics.
    let port = backends[0].port;
    backends[0].leave();
    let discovery = discovery(&etcd, &group);
    let watching = discovery.clone();
    tokio::spawn(async move { watching.run(None).await });
    eventually("the node has left", || discovery.nodes().len() == 1).await;
    let again = Backend::register(&etcd.options(), &group, "again", port, heavy);
    again.cpu.set(100);
    eventually("the busy backend has half of its weight again", || {
        (ratio() - 1.5).abs() < 0.2
    })
    .await;
    again.cpu.set(0);
    eventually("the idle backend has its full weight", || {
        (ratio() - 3.0).abs() < 0.2
    })
    .await;
    drop(server);
}

/// Between two updates of Pingora's, which are an hour apart here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_drains_or_leaves_gets_nothing_before_the_next_update() {
    let etcd = Etcd::shared();
    let group = group("between");
    let mut backends = Vec::new();
    for id in ["b1", "b2", "b3"] {
        backends.push(Backend::start(&etcd.options(), &group, id).await);
    }
    let nodes = discovery(&etcd, &group);
    let watching = nodes.clone();
    tokio::spawn(async move { watching.run(None).await });
    eventually("all are registered", || nodes.nodes().len() == 3).await;
    let ours = ClusterBackends::new(discovery(&etcd, &group), 80);
    let mut lb = LoadBalancer::<MetricsWeighted>::from_backends(Backends::new(Box::new(ours)));
    lb.update_frequency = Some(Duration::from_secs(3_600));
    let service = background_service("between", lb);
    let lb = service.task();
    let _server = RunningServer::start(|server| drop(server.add_service(service)));
    let are_selected = |wanted: &[&Backend]| {
        let counts = selected(ports!(lb), 60);
        let wanted: BTreeMap<u16, ()> = wanted.iter().map(|it| (it.port, ())).collect();
        counts.keys().eq(wanted.keys())
    };
    eventually("all are selected", || {
        are_selected(&backends.iter().collect::<Vec<_>>())
    })
    .await;
    backends[0].node.drain().await.unwrap();
    eventually("the one that drains is not", || {
        are_selected(&[&backends[1], &backends[2]])
    })
    .await;
    backends[1].leave();
    eventually("nor the one that leaves", || are_selected(&[&backends[2]])).await;
    assert_eq!(
        lb.backends().get_backend().len(),
        3,
        "Pingora knows nothing of it"
    );
}

/// Registered weights, and what operators say, in a selection of Pingora's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pingoras_round_robin_has_the_registered_weights() {
    let etcd = Etcd::shared();
    let group = group("own-rr");
    let light = Backend::start(&etcd.options(), &group, "light").await;
    let nine = |builder: pingora_etcd::ClusterNodeBuilder| builder.weight(9.0);
    let heavy = Backend::start_with(&etcd.options(), &group, "heavy", nine).await;
    let live = LiveLoadBalancer::<RoundRobin>::new(discovery(&etcd, &group), 80);
    let service = background_service("own-rr", live);
    let lb = service.task();
    let _server = RunningServer::start(|server| drop(server.add_service(service)));
    eventually("one to nine", || {
        let counts = selected(ports!(lb), 100);
        counts.get(&light.port) == Some(&10) && counts.get(&heavy.port) == Some(&90)
    })
    .await;
    // An operator drains it, and it says nothing of that itself.
    let cluster = Cluster::connect(etcd.options()).unwrap();
    let operator = Operator::new(&cluster, &group).unwrap();
    operator.drain("heavy").await.unwrap();
    eventually("what an operator drains is not selected", || {
        selected(ports!(lb), 20).keys().eq([&light.port])
    })
    .await;
    operator.undrain("heavy").await.unwrap();
    eventually("until the operator says otherwise", || {
        selected(ports!(lb), 20).len() == 2
    })
    .await;
}

/// With outcomes, a backend that fails is left out, and tried again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stock_selection_that_is_told_of_outcomes_leaves_out_who_fails() {
    let etcd = Etcd::shared();
    let group = group("told");
    let works = Backend::start(&etcd.options(), &group, "works").await;
    let fails = Backend::dead(&etcd.options(), &group, "fails");
    let live = LiveLoadBalancer::<MetricsWeighted>::new(discovery(&etcd, &group), 80);
    let service = background_service("told", live);
    let lb = service.task();
    let _server = RunningServer::start(|server| drop(server.add_service(service)));
    eventually("both backends are known", || {
        lb.backends().get_backend().len() == 2
    })
    .await;
    let send = |refuses: bool| {
        let backend = lb.select(b"", 16).unwrap();
        let request = BackendNode::of(&backend).unwrap().begin();
        let port = port(&backend);
        match refuses && port == fails.port {
            true => request.unreachable(),
            false => request.succeeded(Duration::from_millis(5)),
        }
        port
    };
    let failed =
        |count: u32, refuses: bool| (0..count).filter(|_| send(refuses) == fails.port).count();
    eventually("next to nothing goes there", || failed(500, true) <= 5).await;
    eventually("it works again, and has its share", || {
        failed(500, false) > 200
    })
    .await;
    drop(works);
}
