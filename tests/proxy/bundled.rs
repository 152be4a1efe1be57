//! Tests the bundled proxy, `ClusterProxy`, on a real etcd: weights, retries, outages of etcd, and
//! routing to the leader.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_etcd::pingora::BalancerService;
use pingora_etcd::proxy::ClusterProxy;
use pingora_etcd::{ClusterNodeBuilder, EtcdOptions};

use super::common::etcd::Etcd;
use super::common::{DEADLINE, eventually, free_port, group, local, within};
use super::{Backend, Load, RunningServer, TTL, client, cluster_config, load, until_it_answers};

pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) balancer: Arc<BalancerService>,
    _server: RunningServer,
}

pub(crate) async fn proxy(etcd: &EtcdOptions, group: &str, leader: bool, more: &str) -> Proxy {
    let config = cluster_config(etcd, group, more);
    let mut balancer = None;
    let server = RunningServer::start(|server| {
        balancer = Some(
            ClusterProxy::add_to(server, &config, leader)
                .unwrap()
                .balancer,
        );
    });
    let url = format!("http://{}/", config.listen);
    until_it_answers(&url).await;
    Proxy {
        url,
        balancer: balancer.unwrap(),
        _server: server,
    }
}

impl Proxy {
    pub(crate) async fn until_it_has(&self, count: usize) {
        eventually("the proxy has the expected backends", || {
            self.balancer.len() == count
        })
        .await;
    }
}

fn shares(backends: &[Backend]) -> Vec<f64> {
    let counts: Vec<_> = backends.iter().map(Backend::take_requests).collect();
    let total: u64 = counts.iter().sum();
    let share = |count| count as f64 / total.max(1) as f64;
    counts.into_iter().map(share).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_spread_by_weight_and_a_metrics_change_shifts_them() {
    let etcd = Etcd::shared();
    let group = group("weights");
    let mut backends = Vec::new();
    for (id, weight) in [("b1", 3.0), ("b2", 2.0), ("b3", 1.0)] {
        let weighted = |builder: pingora_etcd::ClusterNodeBuilder| builder.weight(weight);
        backends.push(Backend::start_with(&etcd.options(), &group, id, weighted).await);
    }
    let proxy = proxy(
        &etcd.options(),
        &group,
        false,
        "  policy: headroom\n  headroom: { cpu: 1 }\n",
    )
    .await;
    proxy.until_it_has(3).await;
    shares(&backends);
    assert_eq!(load(&proxy.url, 3_000, 36).await, Vec::<String>::new());
    let before = shares(&backends);
    for (share, expected) in before.iter().zip([0.5, 0.333, 0.167]) {
        assert!((share - expected).abs() < 0.08, "{before:?}");
    }

    // The first backend reports that it is busy: its share, three times that of the third, becomes
    // the smallest.
    backends[0].cpu.set(95);
    let weight = |id: &str| {
        let backends = proxy.balancer.backends();
        let backend = backends.iter().find(|backend| backend.node.id == id);
        backend.map_or(f64::NAN, |backend| backend.weight)
    };
    eventually("the weight follows the metrics", || weight("b1") < 0.2).await;
    shares(&backends);
    assert_eq!(load(&proxy.url, 3_000, 36).await, Vec::<String>::new());
    let after = shares(&backends);
    assert!(after[0] < 0.1, "{after:?}");
    assert!(after[1] > after[2] && after[2] > after[0], "{after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_weight_of_zero_gets_no_request_whatever_the_policy() {
    let etcd = Etcd::shared();
    let (some, none) = (group("zero-some"), group("zero-none"));
    let weighted = |weight: f64| move |builder: ClusterNodeBuilder| builder.weight(weight);
    let mut backends = Vec::new();
    for (group, id, weight) in [
        (&some, "zero", 0.0),
        (&some, "one", 1.0),
        (&none, "zero", 0.0),
    ] {
        backends.push(Backend::start_with(&etcd.options(), group, id, weighted(weight)).await);
    }
    for policy in [
        "adaptive",
        "headroom",
        "round_robin",
        "random",
        "consistent",
    ] {
        let more = format!("  policy: {policy}\n");
        let proxy = proxy(&etcd.options(), &some, false, &more).await;
        proxy.until_it_has(1).await;
        shares(&backends);
        let failed = load(&proxy.url, 200, 8).await;
        assert_eq!(failed, Vec::<String>::new(), "{policy}");
        assert_eq!(shares(&backends), [0.0, 1.0, 0.0], "{policy}");
    }
    // The same as when all backends drain.
    let proxy = proxy(&etcd.options(), &none, false, "").await;
    let response = client().get(&proxy.url).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(backends[2].take_requests(), 0);
}

/// An unspecified address would make the balancer its own backend.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_cannot_be_a_backend_is_none() {
    let etcd = Etcd::shared();
    let group = group("nowhere");
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    let listen: std::net::SocketAddr = proxy.url[7..proxy.url.len() - 1].parse().unwrap();
    let mut raw = etcd.raw_client().await;
    let entries = [
        ("self", "0.0.0.0", listen.port()),
        ("self-6", "::", listen.port()),
        ("mapped", "::ffff:0.0.0.0", listen.port()),
        ("many", "224.0.0.1", 80),
        ("all", "255.255.255.255", 80),
        ("link", "fe80::1", 80),
        ("no-port", "127.0.0.1", 0),
    ];
    for (id, ip, port) in entries {
        let value = format!(r#"{{"id":"{id}","ip":"{ip}","port":{port}}}"#);
        let key = format!("registry/{group}/{id}");
        raw.put(key, value, None).await.unwrap();
    }
    // Registered last, so that the other entries have been processed when it appears.
    let alive = Backend::start(&etcd.options(), &group, "alive").await;
    eventually("the valid backend is known", || {
        let backends = proxy.balancer.backends();
        backends.iter().any(|backend| backend.node.id == alive.id)
    })
    .await;
    let backends = proxy.balancer.backends();
    assert_eq!(backends.len(), 1, "{backends:?}");
    assert_eq!(load(&proxy.url, 50, 4).await, Vec::<String>::new());
    for (id, _, _) in entries {
        raw.delete(format!("registry/{group}/{id}"), None)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_and_a_leave_under_load_cost_no_get() {
    let etcd = Etcd::shared();
    let group = group("crash");
    let mut backends = Vec::new();
    // Only the lease of the one that crashes is to expire.
    for (id, ttl) in [("b1", 2), ("b2", TTL), ("b3", TTL)] {
        let lasting = |builder: ClusterNodeBuilder| builder.ttl(ttl);
        backends.push(Backend::start_with(&etcd.options(), &group, id, lasting).await);
    }
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    proxy.until_it_has(3).await;
    let load = Load::start(&proxy.url, 24);
    load.goes_on(500).await;
    // Connections break in the middle of requests.
    backends.remove(0).crash().await;
    eventually("the lease of the crashed backend expires", || {
        proxy.balancer.len() == 2
    })
    .await;
    load.goes_on(500).await;
    backends[0].leave();
    eventually("b2 has left", || proxy.balancer.len() == 1).await;
    load.goes_on(500).await;
    assert_eq!(load.stop().await, Vec::<String>::new());
    assert_eq!(proxy.balancer.backends()[0].node.id, backends[1].id);
    eventually("no request stays counted as in flight", || {
        proxy.balancer.backends()[0].in_flight == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_backend_is_503_with_the_reason_and_a_dead_one_is_tried_around() {
    let etcd = Etcd::shared();
    let group = group("none");
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    let response = client().get(&proxy.url).send().await.unwrap();
    assert_eq!(response.status(), 503);
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert!(header("content-type").starts_with("text/plain"));
    assert_eq!(header("retry-after"), "1");
    assert_eq!(response.text().await.unwrap(), "no backend is registered\n");

    // The nodes are registered, but nobody listens: every attempt fails.
    let dead = |id: &str| Backend::dead(&etcd.options(), &group, id);
    let _dead = [dead("d1"), dead("d2")];
    proxy.until_it_has(2).await;
    let response = client().get(&proxy.url).send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(
        response.text().await.unwrap(),
        "every backend has been tried\n"
    );

    // Two dead backends and a working one: two retries always reach it, for a POST as well.
    let alive = Backend::start(&etcd.options(), &group, "alive").await;
    proxy.until_it_has(3).await;
    for _ in 0..30 {
        let response = client().post(&proxy.url).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-upstream-node"], "alive");
    }
    assert_eq!(alive.take_requests(), 30, "each exactly once");
}

/// A server that reads a request and closes the connection without a response; `count` counts these
/// requests.
async fn closes_without_response(count: Arc<std::sync::atomic::AtomicU32>) -> u16 {
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let count = count.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                let read = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await;
                if read.is_ok_and(|read| read > 0) {
                    count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_get_is_repeated_and_a_lost_post_is_not() {
    let etcd = Etcd::shared();
    let group = group("lost");
    let taken = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let port = closes_without_response(taken.clone()).await;
    let heavy = |builder: pingora_etcd::ClusterNodeBuilder| builder.weight(1e6);
    let bad = Backend::register(&etcd.options(), &group, "bad", port, heavy);
    let good = Backend::start(&etcd.options(), &group, "good").await;
    // The first view has both, so that none of them is one that joins and has to be tried first.
    within("it is registered", bad.node.until_registered())
        .await
        .unwrap();
    within("it is registered", good.node.until_registered())
        .await
        .unwrap();
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    proxy.until_it_has(2).await;
    good.take_requests();
    taken.store(0, std::sync::atomic::Ordering::SeqCst);

    let response = client().get(&proxy.url).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-upstream-node"], "good");
    assert_eq!(taken.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert_eq!(good.take_requests(), 1);

    let response = client().post(&proxy.url).body("x").send().await.unwrap();
    assert_eq!(response.status(), 502);
    assert_eq!(response.text().await.unwrap(), "the backend failed\n");
    assert_eq!(taken.load(std::sync::atomic::Ordering::SeqCst), 2);
    assert_eq!(good.take_requests(), 0);
}

/// A server that sends one response per connection and closes the connection at the next request,
/// without announcing it: until then the connection is in the proxy's pool.
async fn closes_after_each_response() -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await;
                // The next request on this connection is read but gets no response.
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_connection_to_the_only_backend_is_no_failure() {
    let etcd = Etcd::shared();
    let group = group("stale");
    let port = closes_after_each_response().await;
    let _only = Backend::register(&etcd.options(), &group, "only", port, |builder| builder);
    for retries in [0, 2] {
        let more = format!("  retries: {retries}\n");
        let proxy = proxy(&etcd.options(), &group, false, &more).await;
        proxy.until_it_has(1).await;
        let client = client();
        for _ in 0..20 {
            let response = client.get(&proxy.url).send().await.unwrap();
            assert_eq!(response.status(), 200, "{:?}", response.text().await);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_the_server_starts_after_a_bounded_wait() {
    let dead = EtcdOptions::new([format!("http://{}:{}", local(), free_port())]);
    let group = group("late");
    let start = Instant::now();
    let proxy = proxy(&dead, &group, false, "  ready_timeout_ms: 1500\n").await;
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(1400),
        "the server must wait for the discovery: {took:?}"
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
    let response = client().get(&proxy.url).send().await.unwrap();
    assert_eq!(response.status(), 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_view_is_served_while_etcd_is_away() {
    let etcd = Etcd::own();
    let group = group("away");
    let short = |builder: ClusterNodeBuilder| builder.ttl(3);
    let backends = [
        Backend::start_with(&etcd.options(), &group, "b1", short).await,
        Backend::start_with(&etcd.options(), &group, "b2", short).await,
    ];
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    proxy.until_it_has(2).await;
    etcd.stop();
    // For longer than the leases last.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        assert_eq!(load(&proxy.url, 50, 4).await, Vec::<String>::new());
    }
    etcd.start();
    eventually("both nodes are registered and one leads", || {
        backends.iter().any(|backend| backend.node.is_leader()) && proxy.balancer.len() == 2
    })
    .await;
    assert_eq!(load(&proxy.url, 100, 4).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_stays_with_its_backend() {
    let etcd = Etcd::shared();
    let group = group("sticky");
    let mut backends = Vec::new();
    for id in ["b1", "b2", "b3"] {
        backends.push(Backend::start(&etcd.options(), &group, id).await);
    }
    let more = "  policy: consistent\n  hash_on: header:x-user\n";
    let proxy = proxy(&etcd.options(), &group, false, more).await;
    proxy.until_it_has(3).await;
    let client = client();
    let mut nodes = std::collections::HashSet::new();
    for user in 0..30 {
        let mut of_user = std::collections::HashSet::new();
        for _ in 0..3 {
            let request = client.get(&proxy.url).header("x-user", user.to_string());
            let response = request.send().await.unwrap();
            of_user.insert(response.headers()["x-upstream-node"].clone());
        }
        assert_eq!(of_user.len(), 1, "{of_user:?}");
        nodes.extend(of_user);
    }
    assert_eq!(nodes.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_go_to_the_leader_with_its_token_and_wait_for_one() {
    let etcd = Etcd::shared();
    let group = group("writes");
    let mut first = Backend::start(&etcd.options(), &group, "b1").await;
    first.node.wait_for_leadership().await;
    // Its lease outlasts the wait of the first proxy below, and then has to expire.
    let short = |builder: ClusterNodeBuilder| builder.ttl(4);
    let second = Backend::start_with(&etcd.options(), &group, "b2", short).await;
    let patient = "  leader_wait_ms: 30000\n";
    let patient = proxy(&etcd.options(), &group, true, patient).await;
    let proxy = proxy(&etcd.options(), &group, true, "").await;
    patient.until_it_has(2).await;
    proxy.until_it_has(2).await;
    let client = client();
    let write_to = |url: &str, method: &'static str| {
        let method = method.parse().unwrap();
        // The proxy must not forward a token that a client made up.
        let request = client
            .request(method, url)
            .header("x-leader-epoch", "999999999");
        async move { request.send().await.unwrap() }
    };
    let write = |method| write_to(&proxy.url, method);
    let epoch = first.node.leadership().unwrap().epoch.to_string();
    for method in ["POST", "PUT", "PATCH", "DELETE"] {
        let response = write(method).await;
        assert_eq!(response.headers()["x-upstream-node"], "b1");
        assert_eq!(response.headers()["x-epoch-seen"], epoch.as_str());
    }
    let mut readers = std::collections::HashSet::new();
    let start = Instant::now();
    while readers.len() < 2 {
        assert!(start.elapsed() < DEADLINE, "reads only go to {readers:?}");
        let response = write("GET").await;
        readers.insert(response.headers()["x-upstream-node"].clone());
        assert_eq!(response.headers()["x-epoch-seen"], "none");
    }

    // The leader leaves: the next write reaches the next leader, with a greater token.
    first.leave();
    let response = write("POST").await;
    assert_eq!(response.status(), 200);
    second.node.wait_for_leadership().await;
    // The new leader may know of its term before the proxy does. Until then the old token goes to the
    // old leader, and never to the new one.
    let start = Instant::now();
    let later = loop {
        assert!(start.elapsed() < DEADLINE, "writes only go to b1");
        let response = write("POST").await;
        let seen = response.headers()["x-epoch-seen"].clone();
        if response.headers()["x-upstream-node"] == "b2" {
            break seen.to_str().unwrap().parse::<i64>().unwrap();
        }
        assert_eq!(seen, epoch.as_str());
    };
    assert!(later > epoch.parse().unwrap());

    // The leader crashes: nobody listens, its lease has not expired yet, and there is no other
    // leader.
    second.crash().await;
    let start = Instant::now();
    let response = write("POST").await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let reason = response.text().await.unwrap();
    let reasons = ["there is no leader\n", "the leader cannot be reached\n"];
    assert!(reasons.contains(&&*reason), "{reason}");
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(1900),
        "the write must wait for a leader: {took:?}"
    );
    assert!(
        took < Duration::from_secs(4),
        "the wait must be bounded: {took:?}"
    );

    // A write that is waiting when a leader appears is forwarded.
    let waiting = tokio::spawn(write_to(&patient.url, "POST"));
    let third = Backend::start(&etcd.options(), &group, "b3").await;
    let response = waiting.await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-upstream-node"], third.id.as_str());
}
