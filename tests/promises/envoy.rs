//! The real Envoy beside the bundled proxy, over the same workers: its client-side weighted round robin
//! computes weights from the reports of this crate's workers.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::programs::{Program, is_installed, optimised};
use super::common::{free_port, group, local};
use super::world::{Setup, scratch, until};

/// Each with its slots, at this time for a request.
const WORKERS: [(&str, u32); 3] = [("w8", 8), ("w4", 4), ("w2", 2)];
const SERVICE_MS: u32 = 40;
/// Requests in flight: less than there are slots.
const CLIENTS: u32 = 9;

/// The configuration of an Envoy that listens here, in front of workers at these ports.
fn configuration(listen: u16, workers: &[u16]) -> Value {
    let address = |port: u16| json!({ "socket_address": { "address": local().to_string(), "port_value": port } });
    let manager = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let policy = "type.googleapis.com/envoy.extensions.load_balancing_policies.\
                  client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin";
    let endpoints: Vec<_> = workers
        .iter()
        .map(|port| json!({ "endpoint": { "address": address(*port) } }))
        .collect();
    json!({ "static_resources": {
        "listeners": [{
            "address": address(listen),
            "filter_chains": [{ "filters": [{
                "name": "http",
                "typed_config": {
                    "@type": manager,
                    "stat_prefix": "http",
                    "route_config": { "virtual_hosts": [{
                        "name": "all",
                        "domains": ["*"],
                        "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "workers" } }],
                    }] },
                    "http_filters": [{ "name": "router", "typed_config": { "@type": router } }],
                },
            }] }],
        }],
        "clusters": [{
            "name": "workers",
            "type": "STATIC",
            "load_assignment": {
                "cluster_name": "workers",
                "endpoints": [{ "lb_endpoints": endpoints }],
            },
            "load_balancing_policy": { "policies": [{ "typed_extension_config": {
                "name": "policy",
                "typed_config": {
                    "@type": policy,
                    "blackout_period": "1s",
                    "weight_update_period": "1s",
                    "weight_expiration_period": "60s",
                },
            } }] },
        }],
    } })
}

/// Sends requests from several clients at once, for a second, and counts which workers served them.
async fn shares(url: &str) -> BTreeMap<String, u32> {
    let client = client();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        let (client, url) = (client.clone(), url.to_owned());
        tasks.spawn(async move {
            let (start, mut counts) = (Instant::now(), BTreeMap::new());
            while start.elapsed() < Duration::from_secs(1) {
                let response = client.get(&url).send().await.unwrap();
                if let Some(node) = response.headers().get("x-served-by") {
                    let node = node.to_str().unwrap().to_owned();
                    *counts.entry(node).or_insert(0) += 1;
                }
            }
            counts
        });
    }
    let mut all = BTreeMap::new();
    while let Some(counts) = tasks.join_next().await {
        for (node, count) in counts.unwrap() {
            *all.entry(node).or_insert(0) += count;
        }
    }
    all
}

/// Waits until each of these workers gets clearly more than the next one.
async fn until_in_order(what: &str, url: &str, order: &[&str]) {
    let mut last = BTreeMap::new();
    until(&format!("{what}: {order:?}"), async || {
        last = shares(url).await;
        println!("{what}: {last:?}");
        let counts: Vec<_> = order.iter().map(|node| last.get(*node).copied()).collect();
        counts.iter().all(Option::is_some)
            && counts
                .windows(2)
                .all(|two| two[0] > two[1].map(|it| it + it / 10))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_follows_the_load_of_our_workers_as_we_do() {
    let envoy = std::env::var("ENVOY").unwrap_or_else(|_| "envoy".to_owned());
    if !is_installed(&envoy) {
        return;
    }
    let (etcd, group) = (Etcd::shared(), group("envoy"));
    let mut ports = Vec::new();
    let _workers = WORKERS.map(|(id, slots)| {
        let port = free_port();
        ports.push(port);
        let listen = format!("{}:{port}", local());
        let mut command = Command::new(optimised("worker"));
        command
            .args([
                "--etcd",
                &etcd.endpoints()[0],
                "--group",
                &group,
                "--id",
                id,
            ])
            .args(["--listen", &listen, "--slots", &slots.to_string()])
            .args(["--service-ms", &SERVICE_MS.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Program::spawn(&mut command)
    });
    let ours = Setup::shared(&group).serving().await;
    ours.until_served_by(&["w2", "w4", "w8"]).await;

    let listen = free_port();
    let file = scratch("envoy.json");
    std::fs::write(&file, configuration(listen, &ports).to_string()).unwrap();
    let log = scratch("envoy.log");
    let mut command = Command::new(envoy);
    command
        .arg("--config-path")
        .arg(&file)
        .arg("--log-path")
        .arg(&log)
        .args(["--concurrency", "1", "--disable-hot-restart"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut envoy = Program::spawn(&mut command);
    let url = format!("http://{}:{listen}/", local());
    until("Envoy serves", async || {
        if !envoy.lives() {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            panic!("Envoy has ended: {said}");
        }
        client()
            .get(&url)
            .send()
            .await
            .is_ok_and(|answer| answer.status() == 200)
    })
    .await;

    until_in_order("Envoy", &url, &["w8", "w4", "w2"]).await;
    until_in_order("ours", &ours.url, &["w8", "w4", "w2"]).await;

    // A neighbour takes most of what the first worker has.
    let fewer = format!("http://{}:{}/slots?count=1", local(), ports[0]);
    let answer = client().put(&fewer).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
    until_in_order("Envoy", &url, &["w4", "w2", "w8"]).await;
    until_in_order("ours", &ours.url, &["w4", "w2", "w8"]).await;
}
