//! Tests of quiet hours on the running program: one request at a time, which finds all backends idle.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Setup, entry, put};

const SECOND: Duration = Duration::from_secs(1);

/// Registers a backend that reports this CPU usage.
async fn register(etcd: &Etcd, group: &str, index: usize, backend: &RawBackend, cpu: usize) {
    let fields = json!({ "metadata": { "cpu_usage_percent": cpu } });
    let entry = entry(&format!("n{index}"), Some(backend.address.port()), fields);
    put(&mut etcd.raw_client().await, group, &entry, None).await;
}

/// The first of these many backends is loaded by others, and the rest is idle, and not equally so.
async fn shares(count: usize) {
    let (etcd, group) = (Etcd::shared(), group(&format!("quiet-{count}")));
    let mut backends = Vec::new();
    for index in 0..count {
        let backend = RawBackend::start(ok).await;
        let cpu = if index == 0 { 90 } else { 2 + index % 5 };
        register(&etcd, &group, index, &backend, cpu).await;
        backends.push(backend);
    }
    let admin = format!("127.0.0.1:{}", free_port());
    let fields = format!("admin: {{ listen: '{admin}' }}");
    let balancer = Setup::shared(&group).with(&fields).listening().await;
    let mut client = Raw::to(&balancer).await;
    for _ in 0..20 {
        assert_eq!(status(&client.get("").await), "200");
    }
    let before: Vec<_> = backends.iter().map(|it| it.requests().len()).collect();
    // What each should get, by its weight at the time.
    let mut expected = vec![0.0; count];
    for _ in 0..30 {
        for (index, share) in shares_now(&admin).await {
            expected[index] += 10.0 * share;
        }
        for _ in 0..10 {
            assert_eq!(status(&client.get("").await), "200");
            tokio::time::sleep(SECOND / 100).await;
        }
    }
    let counts = backends.iter().zip(before);
    let got = counts.map(|(it, before)| (it.requests().len() - before) as f64);
    let mut both = got.zip(expected);
    // Whoever is loaded gets no more than its share.
    let (of_loaded, its_share) = both.next().unwrap();
    assert!(
        of_loaded <= its_share + 2.5,
        "{count}: {of_loaded} instead of {its_share}"
    );
    let idle: Vec<(f64, f64)> = both.collect();
    let (all, all_shares) = idle
        .iter()
        .fold((0.0, 0.0), |sum, it| (sum.0 + it.0, sum.1 + it.1));
    for (got, share) in &idle {
        let expected = share * all / all_shares;
        // Of few requests, turns cannot be shared out to the part of one.
        let tolerance = (0.15 * expected).max(3.0);
        assert!(
            (got - expected).abs() <= tolerance,
            "{count}: {got} instead of {expected} in {idle:?}"
        );
    }
}

/// The share of each backend, as the admin interface tells it.
async fn shares_now(admin: &str) -> Vec<(usize, f64)> {
    let answer = reqwest::get(format!("http://{admin}/api/v1/status")).await;
    let text = answer.unwrap().text().await.unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let nodes = all["groups"][0]["nodes"].as_array().unwrap();
    let share = |node: &Value| {
        let index = node["id"].as_str()?.trim_start_matches('n').parse().ok()?;
        Some((index, node["share"].as_f64()?))
    };
    nodes.iter().filter_map(share).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_one_after_the_other_are_shared_by_all_that_are_idle() {
    tokio::join!(shares(3), shares(10), shares(100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joins_gets_one_of_the_next_requests_however_few_there_are() {
    let (etcd, group) = (Etcd::shared(), group("quiet-joins"));
    let mut backends = Vec::new();
    for index in 0..3 {
        let backend = RawBackend::start(ok).await;
        register(&etcd, &group, index, &backend, 3).await;
        backends.push(backend);
    }
    let balancer = Setup::shared(&group).listening().await;
    let mut client = Raw::to(&balancer).await;
    for _ in 0..5 {
        assert_eq!(status(&client.get("").await), "200");
        tokio::time::sleep(SECOND).await;
    }
    let joining = RawBackend::start(ok).await;
    register(&etcd, &group, 3, &joining, 3).await;
    let start = Instant::now();
    while joining.requests().is_empty() {
        assert!(start.elapsed() < 3 * SECOND, "it waits for a request");
        tokio::time::sleep(SECOND).await;
        assert_eq!(status(&client.get("").await), "200");
    }
}
