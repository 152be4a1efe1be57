//! Policies under real load, one after the other: worker processes of unequal capacity, of which
//! the largest loses half of it for a while, two balancer processes, and requests that come when
//! they come, at three quarters of what the workers can do.
//!
//! Capacity is a number of slots and a service time, so it does not depend on the cores of the
//! machine. The ratio between policies is the figure, not the milliseconds.
//!
//! ```text
//! make real-load
//! ```

#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::etcd::Etcd;
use common::{DEADLINE, free_port, group, local};
use tokio::task::JoinSet;

/// Of the workers; 20 in all.
const SLOTS: [u32; 4] = [8, 6, 4, 2];
/// What is left to the first one for a while.
const LEFT: u32 = 4;
const SERVICE: Duration = Duration::from_millis(40);
/// Of what the workers can do, on average over the run.
const LOAD: f64 = 0.75;
/// For weights to settle. Not measured.
const WARM_UP: Duration = Duration::from_secs(5);
/// The first worker has its slots for a third, loses half of them for a third, and has them again.
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

/// Waits until so many nodes answer through the proxy.
async fn until_nodes_answer(client: &reqwest::Client, url: &str, count: usize) {
    let start = Instant::now();
    let mut nodes = std::collections::HashSet::new();
    let mut user = 0;
    while nodes.len() < count {
        assert!(start.elapsed() < DEADLINE, "only {nodes:?} answer at {url}");
        user += 1;
        let request = client.get(url).header("x-user", user);
        match request.send().await {
            Ok(response) => nodes.extend(response.headers().get("x-upstream-node").cloned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn run(client: &reqwest::Client, etcd: &str, policy: &str) -> Figures {
    let group = group("load");
    let mut programs = Vec::new();
    let mut workers = Vec::new();
    let service = SERVICE.as_millis().to_string();
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
    let slots = f64::from(SLOTS.iter().sum::<u32>()) - f64::from(SLOTS[0] - LEFT) / 3.0;
    let rate = LOAD * slots / SERVICE.as_secs_f64();
    let start = Instant::now();
    let (takes, gives) = (WARM_UP + MEASURE / 3, WARM_UP + MEASURE * 2 / 3);
    let mut requests = JoinSet::new();
    let mut due = Duration::ZERO;
    let mut sent = 0_usize;
    let (mut taken, mut given) = (false, false);
    while due < WARM_UP + MEASURE {
        due += Duration::from_secs_f64(-(1.0 - fastrand::f64()).ln() / rate);
        tokio::time::sleep_until((start + due).into()).await;
        if due > takes && !std::mem::replace(&mut taken, due > takes) {
            set_slots(client, &workers[0], LEFT).await;
        }
        if due > gives && !std::mem::replace(&mut given, due > gives) {
            set_slots(client, &workers[0], SLOTS[0]).await;
        }
        let url = balancers[sent % balancers.len()].clone();
        let request = client.get(url).header("x-user", fastrand::u32(..1000));
        let (from, measured) = (start + due, due > WARM_UP);
        sent += 1;
        requests.spawn(async move {
            // From when it was due: a generator that is late must not make it look fast.
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
    // No harness, so that the table is always shown; but what a harness is asked for by name.
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
            assert!(ratio > 1.5, "{policy} is as good as adaptive: {ratio:.2}");
        }
    }
    assert_eq!(adaptive.errors(), 0.0, "adaptive fails requests");
    println!("test result: ok. 1 passed; 0 failed; 0 ignored");
}
