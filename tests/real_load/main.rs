//! Compares the policies under real load, one after the other: worker processes of unequal
//! capacity, the largest of which loses half of its capacity for a while; two balancer processes;
//! and requests with random arrival times, at three quarters of the workers' capacity.
//!
//! Capacity is a number of slots and a service time, so it does not depend on the cores of the
//! machine. The ratio between policies is what counts, not the milliseconds.
//!
//! ```text
//! make real-load
//! ```

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::etcd::Etcd;
use common::{DEADLINE, free_port, group, local};
use tokio::task::JoinSet;

/// The slots of each worker; 20 in all.
const SLOTS: [u32; 4] = [8, 6, 4, 2];
/// The slots of the first worker while its capacity is reduced.
const REDUCED_SLOTS: u32 = 4;
const SERVICE_TIME: Duration = Duration::from_millis(40);
/// The load as a part of the workers' average capacity.
const LOAD: f64 = 0.75;
/// Time for the weights to settle; requests in it are not measured.
const WARM_UP: Duration = Duration::from_secs(5);
/// The first worker has all of its slots for a third of this time, half of them for a third, and
/// all of them again.
const MEASURE: Duration = Duration::from_secs(9);
const POLICIES: [&str; 5] = [
    "round_robin",
    "random",
    "consistent",
    "headroom",
    "adaptive",
];

/// A program that is killed when this is dropped.
struct Program(Child);

impl Program {
    fn start(name: &str, arguments: &[&str]) -> Self {
        let test = std::env::current_exe().unwrap();
        let target = test.parent().and_then(Path::parent).unwrap();
        let child = Command::new(target.join("examples").join(name))
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("example {name}: {error}; build the examples first"));
        Self(child)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[derive(Default)]
struct Figures {
    latencies: Vec<Duration>,
    failed: usize,
}

impl Figures {
    fn quantile(&self, quantile: f64) -> Duration {
        let rank = (self.latencies.len().saturating_sub(1) as f64 * quantile) as usize;
        self.latencies.get(rank).copied().unwrap_or_default()
    }

    fn errors(&self) -> f64 {
        self.failed as f64 / (self.latencies.len() + self.failed).max(1) as f64
    }
}

fn config(etcd: &str, group: &str, policy: &str) -> (PathBuf, String) {
    let listen = format!("{}:{}", local(), free_port());
    let text = format!(
        "version: 1\nthreads: 1\ncluster:\n  etcd: {{ endpoints: ['{etcd}'] }}\n  group: {group}\n  \
         listen: '{listen}'\n  policy: {policy}\n  hash_on: header:x-user\n  load_reports: true\n  \
         headroom: {{ queue_capacity: 20 }}\n"
    );
    let name = format!("{group}-{policy}-{}.yaml", free_port());
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, text).unwrap();
    (file, format!("http://{listen}/"))
}

async fn set_slots(client: &reqwest::Client, worker: &str, count: u32) {
    let answer = client
        .put(format!("{worker}/slots?count={count}"))
        .send()
        .await;
    assert!(answer.unwrap().status().is_success());
}

/// Waits until this many nodes have responded through the proxy.
async fn until_nodes_answer(client: &reqwest::Client, url: &str, count: usize) {
    let start = Instant::now();
    let mut nodes = std::collections::HashSet::new();
    let mut user = 0;
    while nodes.len() < count {
        assert!(
            start.elapsed() < DEADLINE,
            "only {nodes:?} responded at {url}"
        );
        user += 1;
        let request = client.get(url).header("x-user", user);
        match request.send().await {
            Ok(response) => nodes.extend(response.headers().get("x-upstream-node").cloned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// The processes of one run, with the URLs of the workers and of the balancers.
struct Fleet {
    workers: Vec<String>,
    balancers: Vec<String>,
    _programs: Vec<Program>,
}

async fn start_fleet(client: &reqwest::Client, etcd: &str, policy: &str) -> Fleet {
    let group = group("load");
    let mut programs = Vec::new();
    let mut workers = Vec::new();
    let service = SERVICE_TIME.as_millis().to_string();
    for (index, slots) in SLOTS.iter().enumerate() {
        let listen = format!("{}:{}", local(), free_port());
        let (id, slots) = (format!("w{index}"), slots.to_string());
        programs.push(Program::start(
            "worker",
            &[
                "--etcd",
                etcd,
                "--group",
                &group,
                "--id",
                &id,
                "--listen",
                &listen,
                "--slots",
                &slots,
                "--service-ms",
                &service,
            ],
        ));
        workers.push(format!("http://{listen}"));
    }
    let mut balancers = Vec::new();
    for _ in 0..2 {
        let (file, url) = config(etcd, &group, policy);
        programs.push(Program::start(
            "load_balancer",
            &["--conf", file.to_str().unwrap()],
        ));
        until_nodes_answer(client, &url, SLOTS.len()).await;
        balancers.push(url);
    }
    Fleet {
        workers,
        balancers,
        _programs: programs,
    }
}

async fn run(client: &reqwest::Client, etcd: &str, policy: &str) -> Figures {
    let Fleet {
        workers,
        balancers,
        _programs,
    } = start_fleet(client, etcd, policy).await;
    let slots = f64::from(SLOTS.iter().sum::<u32>()) - f64::from(SLOTS[0] - REDUCED_SLOTS) / 3.0;
    let rate = LOAD * slots / SERVICE_TIME.as_secs_f64();
    let start = Instant::now();
    let (reduce_at, restore_at) = (WARM_UP + MEASURE / 3, WARM_UP + MEASURE * 2 / 3);
    let mut requests = JoinSet::new();
    let mut due = Duration::ZERO;
    let mut sent = 0_usize;
    let (mut is_reduced, mut is_restored) = (false, false);
    while due < WARM_UP + MEASURE {
        due += Duration::from_secs_f64(-(1.0 - fastrand::f64()).ln() / rate);
        tokio::time::sleep_until((start + due).into()).await;
        if due > reduce_at && !std::mem::replace(&mut is_reduced, due > reduce_at) {
            set_slots(client, &workers[0], REDUCED_SLOTS).await;
        }
        if due > restore_at && !std::mem::replace(&mut is_restored, due > restore_at) {
            set_slots(client, &workers[0], SLOTS[0]).await;
        }
        let url = balancers[sent % balancers.len()].clone();
        let request = client.get(url).header("x-user", fastrand::u32(..1000));
        let (from, measured) = (start + due, due > WARM_UP);
        sent += 1;
        requests.spawn(async move {
            // The latency counts from the due time, so that a late generator does not make it look
            // short.
            let answer = request.send().await;
            let well = answer.is_ok_and(|answer| answer.status().is_success());
            (measured, well.then(|| from.elapsed()))
        });
    }
    let mut figures = Figures::default();
    for (measured, latency) in requests.join_all().await {
        match latency {
            _ if !measured => {}
            Some(latency) => figures.latencies.push(latency),
            None => figures.failed += 1,
        }
    }
    figures.latencies.sort_unstable();
    figures
}

#[tokio::main]
async fn main() {
    // There is no test harness, so that the table is always printed; a harness's `--list` must
    // still work.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let etcd = Etcd::shared();
    let endpoint = etcd.endpoints()[0].clone();
    let client = Arc::new(
        reqwest::Client::builder()
            .timeout(Duration::from_secs(5))
            .build()
            .unwrap(),
    );
    let mut all = Vec::new();
    for policy in POLICIES {
        all.push((policy, run(&client, &endpoint, policy).await));
    }
    let (_, adaptive) = all.last().unwrap();
    let best = adaptive.quantile(0.99);
    println!("| policy | requests | p50 | p99 | p99 / adaptive | errors |");
    println!("|---|---|---|---|---|---|");
    for (policy, figures) in &all {
        let p99 = figures.quantile(0.99);
        println!(
            "| {policy} | {} | {:.0?} | {:.0?} | {:.2} | {:.2} % |",
            figures.latencies.len() + figures.failed,
            figures.quantile(0.5),
            p99,
            p99.as_secs_f64() / best.as_secs_f64(),
            figures.errors() * 100.0,
        );
    }
    for (policy, figures) in &all {
        if ["round_robin", "random"].contains(policy) {
            let ratio = figures.quantile(0.99).as_secs_f64() / best.as_secs_f64();
            assert!(
                ratio > 1.5,
                "the p99 of {policy} is only {ratio:.2} times that of adaptive"
            );
        }
    }
    assert_eq!(adaptive.errors(), 0.0, "adaptive must not fail requests");
    println!("test result: ok. 1 passed; 0 failed; 0 ignored");
}
