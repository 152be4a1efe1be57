//! Tests what backends that fail cost the clients of the running program: many that are not there, one
//! that answers with errors, and how fast one is back that works again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::group;
use super::raw::{Raw, RawBackend, ok, register, status};
use super::world::{Balancer, Setup, entry, put, until};

const SECOND: Duration = Duration::from_secs(1);
/// From when on next to no request may fail.
const SETTLED: Duration = Duration::from_secs(5);

/// What clients got.
#[derive(Debug, Default)]
struct Got {
    requests: usize,
    failed: usize,
}

/// Four clients that send requests one after the other for this time.
async fn send(balancer: &Balancer, time: Duration) -> Got {
    let mut clients = JoinSet::new();
    let until = Instant::now() + time;
    for _ in 0..4 {
        let listen = balancer.listen.clone();
        clients.spawn(async move {
            let mut got = Got::default();
            let mut client = None;
            while Instant::now() < until {
                // After an error the balancer ends the connection.
                let mut connected = match client.take() {
                    Some(client) => client,
                    None => Raw(TcpStream::connect(&listen).await.unwrap()),
                };
                let response = connected.get("").await;
                got.requests += 1;
                match status(&response) {
                    "200" => client = Some(connected),
                    _ => got.failed += 1,
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            got
        });
    }
    let all = clients.join_all().await;
    Got {
        requests: all.iter().map(|got| got.requests).sum(),
        failed: all.iter().map(|got| got.failed).sum(),
    }
}

/// Registers nodes at addresses where nobody listens.
async fn register_dead(etcd: &Etcd, group: &str, count: usize, lease: Option<i64>) {
    let mut keys = etcd.raw_client().await;
    for index in 0..count {
        let ip = format!("127.9.{}.{}", index / 200, 1 + index % 200);
        let entry = entry(&format!("dead{index}"), Some(9), json!({ "ip": ip }));
        put(&mut keys, group, &entry, lease).await;
    }
}

/// A few backends work and many are not there, with about 300 requests a second.
async fn few_of_many_work(alive: usize, dead: usize, is_preserved: bool) {
    let etcd = Etcd::shared();
    let group = group(&format!("dead-{dead}-{is_preserved}"));
    let mut backends = Vec::new();
    for _ in 0..alive {
        backends.push(RawBackend::start(ok).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let mut keys = etcd.raw_client().await;
    let lease = match is_preserved {
        true => Some(keys.lease_grant(600, None).await.unwrap().id()),
        false => None,
    };
    register_dead(&etcd, &group, dead, lease).await;
    let balancer = Setup::shared(&group).listening().await;
    if let Some(lease) = lease {
        // They are gone all at once: the balancer takes that for a fault of etcd, and keeps them.
        keys.lease_revoke(lease).await.unwrap();
    }
    send(&balancer, SETTLED).await;
    let got = send(&balancer, 8 * SECOND).await;
    assert!(got.requests > 500, "{got:?}");
    assert!(
        got.failed * 1_000 <= got.requests,
        "{alive} work, {dead} do not: {got:?}\n{}",
        balancer.log_text()
    );
    let log = balancer.log_text();
    let lines = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("a backend fails"), dead, "one line for each:\n{log}");
    // Beside them, one for each request that failed in the first moments.
    assert!(log.lines().count() < 2 * dead + 50, "{log}");
}

async fn each_few_of_many(is_preserved: bool) {
    tokio::join!(
        few_of_many_work(3, 3, is_preserved),
        few_of_many_work(3, 9, is_preserved),
        few_of_many_work(3, 27, is_preserved),
        few_of_many_work(3, 97, is_preserved),
        few_of_many_work(1, 200, is_preserved),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_that_work_serve_all_requests_however_many_refuse() {
    each_few_of_many(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_few_that_work_serve_all_requests_while_self_preservation_keeps_the_others() {
    each_few_of_many(true).await;
}

/// One of four backends answers with errors, then works again.
async fn fails_for_a_while(name: &str, response: &'static str, after: Duration) {
    const WORKS: usize = usize::MAX;
    let (etcd, group) = (Etcd::shared(), group(name));
    let failing = Arc::new(AtomicUsize::new(0));
    let bad = {
        let failing = failing.clone();
        RawBackend::start(move |request| {
            if failing.load(Ordering::SeqCst) == WORKS {
                return ok(request);
            }
            std::thread::sleep(after);
            failing.fetch_add(1, Ordering::SeqCst);
            format!("HTTP/1.1 {response}\r\nContent-Length: 0\r\n\r\n").into_bytes()
        })
        .await
    };
    let mut backends = vec![bad];
    for _ in 0..3 {
        backends.push(RawBackend::start(ok).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    // That one of them is a little slower must not matter.
    let fields = "adaptive: { idle_latency_ms: 10000 }";
    let balancer = Setup::shared(&group).with(fields).listening().await;
    send(&balancer, SETTLED).await;
    let before = failing.load(Ordering::SeqCst);
    let got = send(&balancer, 10 * SECOND).await;
    let tried = failing.load(Ordering::SeqCst) - before;
    assert_eq!(got.failed, 0, "{name}: {got:?}");
    assert!(tried >= 1, "{name}: nobody looks whether it works");
    // 0.3 %, and one more by chance.
    assert!(
        (tried - 1) * 1_000 <= 3 * got.requests,
        "{name}: {tried} of {got:?}"
    );
    failing.store(WORKS, Ordering::SeqCst);
    let start = Instant::now();
    let (mut portions, mut served) = (Vec::new(), backends[0].requests().len());
    until(&format!("{name}: it has its share again"), async || {
        let got = send(&balancer, SECOND / 4).await;
        let now = backends[0].requests().len();
        portions.push((now - served, got.requests));
        served = now;
        // Of the last second.
        let last = portions.iter().rev().take(4);
        let (its, all) = last.fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        portions.len() >= 4 && its as f64 / all as f64 > 0.9 / 4.0
    })
    .await;
    let took = start.elapsed();
    assert!(took <= 11 * SECOND, "{name}: {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_fails_gets_next_to_nothing_and_is_back_within_seconds() {
    tokio::join!(
        fails_for_a_while("fails-fast", "500 Internal Server Error", Duration::ZERO),
        fails_for_a_while("fails-429", "429 Too Many Requests", Duration::ZERO),
        fails_for_a_while(
            "fails-slowly",
            "503 Service Unavailable",
            Duration::from_millis(30)
        ),
    );
}

/// A response whose head is fine cannot be sent again once its body breaks off: that a probe begins well is no success.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_whose_responses_break_off_gets_next_to_nothing() {
    const BROKEN: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\nno chunk\r\n";
    let (etcd, group) = (Etcd::shared(), group("breaks-off"));
    let mut backends = vec![RawBackend::start(|_: &str| BROKEN.to_vec()).await];
    for _ in 0..3 {
        backends.push(RawBackend::start(ok).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let balancer = Setup::shared(&group).listening().await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async || {
        let response = client.get(&balancer.url).send().await.unwrap();
        response.bytes().await.is_ok()
    };
    let mut got = Got::default();
    let start = Instant::now();
    while start.elapsed() < SETTLED + 15 * SECOND {
        let is_whole = get().await;
        if start.elapsed() > SETTLED {
            got.requests += 1;
            got.failed += usize::from(!is_whole);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let log = balancer.log_text();
    let lines = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("a backend fails"), 1, "{got:?}\n{log}");
    assert_eq!(lines("that failed works again"), 0, "{got:?}\n{log}");
    // Each probe is one that is lost, and they are at most 1 % of all.
    assert!(got.failed >= 1, "nobody looks whether it works: {got:?}");
    assert!(got.failed * 80 <= got.requests, "{got:?}");
}

/// As where all need the same database: while nobody is better, nobody is left out, also afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moment_in_which_all_fail_leaves_nobody_out() {
    let (etcd, group) = (Etcd::shared(), group("all-at-once"));
    let fails = Arc::new(AtomicBool::new(false));
    let mut backends = Vec::new();
    for _ in 0..6 {
        let fails = fails.clone();
        let answer = move |request: &str| match fails.load(Ordering::Relaxed) {
            true => b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n".to_vec(),
            false => ok(request),
        };
        backends.push(RawBackend::start(answer).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let balancer = Setup::shared(&group).listening().await;
    send(&balancer, 3 * SECOND).await;
    fails.store(true, Ordering::Relaxed);
    send(&balancer, 3 * SECOND / 2).await;
    fails.store(false, Ordering::Relaxed);
    let before: Vec<_> = backends.iter().map(|it| it.requests().len()).collect();
    // It takes up to a second until that is known.
    let got = send(&balancer, 3 * SECOND).await;
    // Those that were under way when it changed.
    assert!(got.failed <= 4 && got.requests > 300, "{got:?}");
    for (backend, before) in backends.iter().zip(before) {
        let part = backend.requests().len() - before;
        let equal = got.requests / backends.len();
        assert!(
            part * 2 > equal,
            "{part} of {got:?}\n{}",
            balancer.log_text()
        );
    }
}

/// As where a part of what is asked for needs a database that is away: chance makes some of them look worse than others
/// for a moment. One that fails altogether is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_fail_a_part_for_long_only_who_fails_altogether_is_left_out() {
    let (etcd, group) = (Etcd::shared(), group("all-in-part"));
    let mut backends = Vec::new();
    for index in 0..7 {
        let part = if index == 0 { 1.0 } else { 0.3 };
        let answer = move |request: &str| match fastrand::f64() < part {
            true => b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n".to_vec(),
            false => ok(request),
        };
        backends.push(RawBackend::start(answer).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let balancer = Setup::shared(&group).listening().await;
    send(&balancer, SETTLED).await;
    let before: Vec<_> = backends.iter().map(|it| it.requests().len()).collect();
    let got = send(&balancer, 10 * SECOND).await;
    let counts = backends.iter().zip(before);
    let parts: Vec<_> = counts
        .map(|(backend, before)| (backend.requests().len() - before) as f64 / got.requests as f64)
        .collect();
    let case = format!("{parts:?} of {got:?}\n{}", balancer.log_text());
    assert!(got.requests > 1_000, "{case}");
    assert!(parts[0] < 0.03, "{case}");
    for part in &parts[1..] {
        assert!(*part > 0.5 / 6.0, "{case}");
    }
}
