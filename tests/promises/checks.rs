//! Tests of health checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic_health::ServingStatus;

use super::common::etcd::Etcd;
use super::common::load::{Load, client};
use super::common::programs::COMMAND;
use super::common::{eventually, free_port, group};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Balancer, Log, Setup, Worker, entry, put, until};

/// A backend whose health can be changed.
struct Checked {
    backend: RawBackend,
    is_well: Arc<AtomicBool>,
}

impl Checked {
    async fn start(is_well: bool) -> Self {
        let is_well = Arc::new(AtomicBool::new(is_well));
        let own = is_well.clone();
        let backend = RawBackend::start(move |request| {
            match request.contains("/healthz") && !own.load(Ordering::Relaxed) {
                true => b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n".to_vec(),
                false => ok(request),
            }
        })
        .await;
        Self { backend, is_well }
    }

    fn set(&self, is_well: bool) {
        self.is_well.store(is_well, Ordering::Relaxed);
    }

    /// How many requests of clients it has got.
    fn served(&self) -> usize {
        let requests = self.backend.requests();
        requests
            .iter()
            .filter(|request| request.starts_with("GET / "))
            .count()
    }
}

/// A balancer with an admin listener.
struct Watched {
    balancer: Balancer,
    admin: String,
    group: String,
}

impl Watched {
    async fn start(name: &str, ports: &[u16], fields: &str) -> Self {
        let (etcd, group) = (Etcd::shared(), group(name));
        let mut keys = etcd.raw_client().await;
        for (index, port) in ports.iter().enumerate() {
            let entry = entry(&format!("n{index}"), Some(*port), json!({}));
            put(&mut keys, &group, &entry, None).await;
        }
        let admin = format!("127.0.0.1:{}", free_port());
        let setup = Setup::shared(&group).program(COMMAND);
        let setup = setup.with(&format!(
            "admin: {{ listen: '{admin}' }}\nretries: 0\n{fields}"
        ));
        let balancer = setup.listening().await;
        Self {
            balancer,
            admin: format!("http://{admin}/api/v1/status"),
            group,
        }
    }

    async fn group_status(&self) -> Option<Value> {
        let text = client()
            .get(&self.admin)
            .send()
            .await
            .ok()?
            .text()
            .await
            .ok()?;
        let status: Value = serde_json::from_str(&text).ok()?;
        Some(status["groups"][0].clone())
    }

    /// The state of a node and the reason for it.
    async fn state(&self, id: &str) -> (String, String) {
        let Some(status) = self.group_status().await else {
            return Default::default();
        };
        let nodes = status["nodes"].as_array().unwrap();
        let node = nodes.iter().find(|node| node["id"] == id);
        let text = |name: &str| {
            node.map_or("", |node| node[name].as_str().unwrap())
                .to_owned()
        };
        (text("state"), text("reason"))
    }

    async fn until_reason(&self, id: &str, expected: &str) -> String {
        let mut state = String::new();
        until(&format!("{id}: {expected}"), async || {
            let (now, reason) = self.state(id).await;
            state = now;
            reason.contains(expected)
        })
        .await;
        state
    }

    async fn until_state(&self, id: &str, expected: &str) -> Duration {
        until(&format!("{id} is {expected}"), async || {
            self.state(id).await.0 == expected
        })
        .await
    }

    /// Waits until a backend gets requests, or until it gets none: a result is in use a moment after it is shown.
    async fn until_used(&self, checked: &Checked, expected: bool) {
        until(&format!("it is used: {expected}"), async || {
            let before = checked.served();
            self.requests().await;
            (checked.served() > before) == expected
        })
        .await;
    }

    /// Sends 40 requests, which are all answered.
    async fn requests(&self) {
        let mut client = Raw::to(&self.balancer).await;
        for _ in 0..40 {
            let response = client.get("").await;
            assert_eq!(status(&response), "200", "{response}");
        }
    }
}

const FAST: &str = "interval_ms: 200, down_interval_ms: 100, timeout_ms: 500";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_checked_before_it_gets_requests_and_left_out_while_it_is_down() {
    let (first, second, third) = (
        Checked::start(true).await,
        Checked::start(false).await,
        Checked::start(false).await,
    );
    let ports = [&first, &second].map(|checked| checked.backend.address.port());
    let fields = format!(
        "policy: round_robin\nhealth_check: {{ path: /healthz, rise: 2, fall: 3, panic_threshold: 0.1, {FAST} }}"
    );
    let watched = Watched::start("checks", &ports, &fields).await;
    watched.until_state("n0", "serving").await;
    watched.until_state("n1", "down").await;
    assert!(watched.state("n1").await.1.contains("status 503"));
    watched.until_used(&second, false).await;

    // Another one joins, and is not well: not one request reaches it.
    let etcd = Etcd::shared();
    let joined = entry("n2", Some(third.backend.address.port()), json!({}));
    let mut keys = etcd.raw_client().await;
    put(&mut keys, &watched.group, &joined, None).await;
    loop {
        watched.requests().await;
        if watched.state("n2").await.0 == "down" {
            break;
        }
    }
    watched.requests().await;
    assert_eq!(third.served(), 0);

    // Both become well, and then one of them is not any more.
    second.set(true);
    third.set(true);
    watched.until_state("n1", "serving").await;
    watched.until_state("n2", "serving").await;
    watched.until_used(&second, true).await;
    watched.until_used(&third, true).await;
    second.set(false);
    let took = watched.until_state("n1", "down").await;
    // Three checks in a row, 180 to 220 ms apart.
    assert!(took > Duration::from_millis(300), "{took:?}");
    watched.until_used(&second, false).await;
    let log = watched.balancer.log_text();
    assert!(
        log.contains("finds the node down") && log.contains("finds the node well"),
        "{log}"
    );
}

/// The script that replaces a process does not wait for anything: it starts the new one, and tells the old one to hand over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_knows_who_is_down_before_it_serves() {
    let (well, down) = (Checked::start(true).await, Checked::start(false).await);
    let (etcd, group) = (Etcd::shared(), group("checks-over"));
    let mut keys = etcd.raw_client().await;
    for (id, checked) in [("n0", &well), ("n1", &down)] {
        let entry = entry(id, Some(checked.backend.address.port()), json!({}));
        put(&mut keys, &group, &entry, None).await;
    }
    let fields = format!(
        "policy: round_robin\nretries: 0\nhealth_check: {{ path: /healthz, panic_threshold: 0.1, {FAST} }}"
    );
    let setup = Setup::shared(&group)
        .with(&fields)
        .server("grace_period_seconds: 20");
    let mut old = setup.listening().await;
    until("one is left out", async || {
        let before = down.served();
        old.gets(10).await;
        down.served() == before
    })
    .await;
    let before = down.served();
    let new = setup.listen(&old.listen).argument("--upgrade").start();
    old.program.signal("QUIT");
    let ended = old.program.ended();
    let load = async {
        for _ in 0..30 {
            assert_eq!(new.gets(10).await.get("n0"), Some(&10));
        }
    };
    let ((status, _), ()) = tokio::join!(ended, load);
    assert!(status.success(), "{status}\n{}", old.log_text());
    assert_eq!(new.gets(20).await.get("n0"), Some(&20));
    assert_eq!(down.served(), before);
}

/// It may be cold: its caches are empty, and its code is not compiled yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_well_again_starts_slowly() {
    let backends = [
        Checked::start(true).await,
        Checked::start(true).await,
        Checked::start(false).await,
    ];
    let ports: Vec<_> = backends
        .iter()
        .map(|it| it.backend.address.port())
        .collect();
    // That one of them is a little slower must not matter.
    let fields = format!(
        "adaptive: {{ slow_start_ms: 20000, slow_start_strain: 10, latency_gain: 0 }}\nhealth_check: {{ path: /healthz, rise: 2, panic_threshold: 0.1, {FAST} }}"
    );
    let watched = Watched::start("warms-up", &ports, &fields).await;
    watched.until_state("n2", "down").await;
    watched.until_used(&backends[2], false).await;
    // The part of the next requests that it gets.
    let part = async || {
        let served = || -> usize { backends.iter().map(Checked::served).sum() };
        let (all, its) = (served(), backends[2].served());
        watched.requests().await;
        (backends[2].served() - its) as f64 / (served() - all) as f64
    };
    backends[2].set(true);
    let start = Instant::now();
    watched.until_state("n2", "serving").await;
    watched.until_used(&backends[2], true).await;
    let first = part().await;
    // A fifth of its third at this age, unless the machine stood still.
    assert!(
        first < 0.2 || start.elapsed() > Duration::from_secs(4),
        "{first}"
    );
    until("it has its whole part", async || part().await > 0.3).await;
    let took = start.elapsed();
    assert!(took > Duration::from_secs(8), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_few_that_are_well_are_not_used_alone() {
    let backends = [
        Checked::start(true).await,
        Checked::start(false).await,
        Checked::start(false).await,
    ];
    let ports: Vec<_> = backends
        .iter()
        .map(|checked| checked.backend.address.port())
        .collect();
    for (threshold, is_panic) in [(0.5, true), (0.2, false)] {
        let fields = format!(
            "policy: round_robin\nhealth_check: {{ path: /healthz, panic_threshold: {threshold}, {FAST} }}"
        );
        let watched = Watched::start("panic", &ports, &fields).await;
        watched.until_state("n1", "down").await;
        watched.until_state("n2", "down").await;
        watched.until_used(&backends[1], is_panic).await;
        let status = watched.group_status().await.unwrap();
        assert_eq!(status["panicking"], json!(is_panic), "{threshold}");
    }
    // The only one is used, whatever its health.
    let fields = format!("health_check: {{ path: /healthz, {FAST} }}");
    let watched = Watched::start("only", &ports[1..2], &fields).await;
    watched.until_state("n0", "down").await;
    watched.requests().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_check_asks_what_it_says() {
    // TCP: a port that nobody listens on, beside one that accepts.
    let open = RawBackend::start(ok).await;
    let fields = format!("health_check: {{ kind: tcp, {FAST} }}");
    let watched = Watched::start("tcp", &[open.address.port(), free_port()], &fields).await;
    watched.until_state("n0", "serving").await;
    watched.until_state("n1", "down").await;

    // HTTP: everything of the request, and of the response.
    for (check, expected) in [
        (
            "path: '/ask?x=1', method: HEAD, host: inner.example, headers: { x-check: '7' }",
            "serving",
        ),
        ("status: [204, 300-399]", "down"),
        ("status: [200], body: '^o[k]\\n$'", "serving"),
        ("body: 'well'", "down"),
    ] {
        let backend = RawBackend::start(|request| match request.starts_with("HEAD") {
            true => b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n".to_vec(),
            false => ok(request),
        })
        .await;
        let fields = format!("health_check: {{ {check}, {FAST} }}");
        let watched = Watched::start("http", &[backend.address.port()], &fields).await;
        watched.until_state("n0", expected).await;
        // Where a check is late, its node is down before it has arrived.
        eventually("a check arrives", || !backend.requests().is_empty()).await;
        let seen = backend.requests().first().unwrap().to_ascii_lowercase();
        if check.contains("HEAD") {
            assert!(seen.starts_with("head /ask?x=1 http/1.1\r\n"), "{seen}");
            assert!(
                seen.contains("host: inner.example\r\n") && seen.contains("x-check: 7\r\n"),
                "{seen}"
            );
        }
    }
    // One that accepts and never answers.
    let silent = RawBackend::start_slow(Duration::from_secs(60)).await;
    let fields = format!("health_check: {{ {FAST} }}");
    let watched = Watched::start("silent", &[silent.address.port()], &fields).await;
    watched.until_state("n0", "down").await;
    assert!(watched.state("n0").await.1.contains("within 500 ms"));

    // gRPC: a real health service, for a service of it.
    let (health, service) = tonic_health::server::health_reporter();
    health
        .set_service_status("orders", ServingStatus::Serving)
        .await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut serving = JoinSet::new();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    serving.spawn(async move {
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(incoming).await.unwrap();
    });
    let fields = format!("health_check: {{ kind: grpc, service: orders, {FAST} }}");
    let watched = Watched::start("grpc-check", &[port], &fields).await;
    watched.until_state("n0", "serving").await;
    health
        .set_service_status("orders", ServingStatus::NotServing)
        .await;
    watched.until_state("n0", "down").await;
    assert!(watched.state("n0").await.1.contains("not serving"));
    health
        .set_service_status("orders", ServingStatus::Serving)
        .await;
    watched.until_state("n0", "serving").await;
    // A service that it does not know.
    let fields = format!("health_check: {{ kind: grpc, service: other, {FAST} }}");
    let watched = Watched::start("grpc-unknown", &[port], &fields).await;
    watched.until_state("n0", "down").await;
    assert!(watched.state("n0").await.1.contains("grpc-status 5"));
}

/// The checks of 1,000 nodes: never more than allowed at one time, and not in waves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checks_of_a_thousand_nodes_are_spread() {
    const NODES: usize = 1_000;
    // All of 127.0.0.0/8 is this machine.
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (now, most, all) = (
        Arc::<AtomicUsize>::default(),
        Arc::<AtomicUsize>::default(),
        Arc::<AtomicUsize>::default(),
    );
    let mut serving = JoinSet::new();
    let counts = (now.clone(), most.clone(), all.clone());
    serving.spawn(async move {
        let mut answering = JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (now, most, all) = counts.clone();
            answering.spawn(async move {
                most.fetch_max(1 + now.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
                all.fetch_add(1, Ordering::Relaxed);
                let _ = stream.read(&mut [0; 1024]).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
                now.fetch_sub(1, Ordering::Relaxed);
                let _ = stream.write_all(&ok("")).await;
            });
            while answering.try_join_next().is_some() {}
        }
    });
    let (etcd, group) = (Etcd::shared(), group("thousand"));
    let mut keys = etcd.raw_client().await;
    for index in 0..NODES {
        let mut entry = entry(&format!("n{index}"), Some(port), json!({}));
        entry["ip"] = json!(format!("127.1.{}.{}", index / 250, 1 + index % 250));
        put(&mut keys, &group, &entry, None).await;
    }
    let fields = "health_check: { interval_ms: 2000, at_once: 20, timeout_ms: 10000 }";
    let balancer = Setup::shared(&group).with(fields).listening().await;
    until("each node has been checked", async || {
        all.load(Ordering::Relaxed) >= NODES
    })
    .await;
    // From then on about 500 a second: eight quarters of a second with 125 each. A wave would fill one or two of
    // them and leave the others empty. A machine that stands still for a moment does that to a few, not to most.
    let start = tokio::time::Instant::now();
    let mut counts = vec![all.load(Ordering::Relaxed)];
    for quarter in 1..25 {
        tokio::time::sleep_until(start + Duration::from_millis(250) * quarter).await;
        counts.push(all.load(Ordering::Relaxed));
    }
    // The first ones are still in the order in which they began.
    let quarters: Vec<_> = counts[8..]
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .collect();
    let usual = quarters.iter().filter(|count| (40..320).contains(*count));
    let (usual, most) = (usual.count(), most.load(Ordering::Relaxed));
    println!(
        "1,000 nodes: at most {most} checks at one time; in quarters of a second: {quarters:?}"
    );
    assert!(most <= 20, "{most}");
    assert!(usual * 4 >= quarters.len() * 3, "{quarters:?}");
    drop(balancer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_that_it_is_degraded_or_failing_and_is_weighed_or_left_out() {
    let watched = Watched::start("own-health", &[], "policy: round_robin").await;
    let etcd = Etcd::shared();
    let endpoint = &etcd.endpoints()[0];
    let [one, two] =
        ["w1", "w2"].map(|id| Worker::start(endpoint, &watched.group, id, &[], Log::File));
    for id in ["w1", "w2"] {
        watched.until_state(id, "serving").await;
    }
    watched.balancer.until_served_by(&["w1", "w2"]).await;
    let says = async |query: &str| {
        let url = format!("{}/health?{query}", one.url);
        let answer = client().put(url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    };
    says("degraded=no+cache").await;
    watched.until_state("w1", "degraded").await;
    assert_eq!(watched.state("w1").await.1, "it says of itself: no cache");
    // A quarter of its weight: one in five.
    until("it gets a fifth", async || {
        watched.balancer.gets(100).await.get("w1") == Some(&20)
    })
    .await;
    says("failing=no+database").await;
    watched.until_state("w1", "down").await;
    assert!(watched.state("w1").await.1.contains("no database"));
    watched.balancer.until_served_by(&["w2"]).await;
    says("").await;
    watched.until_state("w1", "serving").await;
    watched.balancer.until_served_by(&["w1", "w2"]).await;
    drop(two);
}

/// One of three requests fails: its success rate is above one half, but far below that of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_gets_nothing_but_probes_is_shown_as_failing() {
    let (count, fails) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(true)));
    let own = fails.clone();
    let bad = RawBackend::start(move |request| {
        let is_third = count.fetch_add(1, Ordering::Relaxed).is_multiple_of(3);
        match is_third && own.load(Ordering::Relaxed) {
            true => b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n".to_vec(),
            false => ok(request),
        }
    })
    .await;
    let [one, two] = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let ports = [&bad, &one, &two].map(|backend| backend.address.port());
    let watched = Watched::start("ejected", &ports, "").await;
    watched.until_state("n0", "serving").await;
    let load = Load::start(&watched.balancer.url, 4);
    let state = watched.until_reason("n0", "nothing but probes").await;
    assert_eq!(state, "failing");
    fails.store(false, Ordering::Relaxed);
    watched.until_state("n0", "serving").await;
    drop(load);
}
