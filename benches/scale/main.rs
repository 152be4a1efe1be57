//! What a group of 100 to 100,000 nodes costs: memory, loading, and each change to it.
//!
//! ```text
//! cargo bench --bench scale
//! ```
//!
//! Every size runs in a process of its own, so that one's memory is not another's. The store is a
//! stand-in that gives away prepared entries and events: what is measured is this crate.

mod feed;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::services::background::BackgroundService;
use pingora_etcd::balance::Balancer;
use pingora_etcd::pingora::BalancerService;
use pingora_etcd::{EtcdOptions, ServiceDiscovery};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use feed::Feed;

const SIZES: [usize; 4] = [100, 1_000, 10_000, 100_000];
/// Changes that each figure is the mean of.
const CHANGES: usize = 20_000;
/// How fast they come where the balancer follows: 10,000 nodes that report every 5 s.
const RATE: u32 = 500;
const PACED: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` only wants to know that it starts.
    if arguments.iter().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    let own = arguments.iter().position(|argument| argument == "--nodes");
    if let Some(count) = own.and_then(|at| arguments.get(at + 1)?.parse().ok()) {
        println!("{}", measure(count).line());
        return ExitCode::SUCCESS;
    }
    run_all()
}

/// What one process found out.
struct Figures {
    nodes: usize,
    load: Duration,
    /// In bytes: of discovery, and of the balancer beside it.
    discovery: i64,
    balancer: i64,
    /// CPU time of one change.
    apply: Duration,
    with_balancer: Duration,
}

impl Figures {
    fn line(&self) -> String {
        format!(
            "{} {} {} {} {} {}",
            self.nodes,
            self.load.as_nanos(),
            self.discovery,
            self.balancer,
            self.apply.as_nanos(),
            self.with_balancer.as_nanos()
        )
    }

    fn parse(line: &str) -> Option<Self> {
        let mut numbers = line.split(' ').map(|number| number.parse::<i64>().ok());
        let mut next = || numbers.next().flatten();
        let nanos = |number: i64| Duration::from_nanos(number.unsigned_abs());
        Some(Self {
            nodes: usize::try_from(next()?).ok()?,
            load: nanos(next()?),
            discovery: next()?,
            balancer: next()?,
            apply: nanos(next()?),
            with_balancer: nanos(next()?),
        })
    }
}

fn run_all() -> ExitCode {
    println!(
        "{:>9} {:>10} {:>12} {:>12} {:>10} {:>12} {:>16}",
        "nodes", "load", "discovery", "+ balancer", "per node", "per change", "with balancer"
    );
    let mut figures = Vec::new();
    for size in SIZES {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--nodes", &size.to_string()])
            .output()
            .expect("this program starts");
        let text = String::from_utf8_lossy(&child.stdout);
        let Some(found) = text.lines().last().and_then(Figures::parse) else {
            eprintln!("{size} nodes: {}", String::from_utf8_lossy(&child.stderr));
            return ExitCode::FAILURE;
        };
        let mib = |bytes: i64| bytes as f64 / f64::from(1 << 20);
        println!(
            "{:>9} {:>10.1?} {:>8.2} MiB {:>8.2} MiB {:>8} B {:>12.2?} {:>16.2?}",
            found.nodes,
            found.load,
            mib(found.discovery),
            mib(found.balancer),
            (found.discovery + found.balancer) / found.nodes as i64,
            found.apply,
            found.with_balancer
        );
        figures.push(found);
    }
    ExitCode::SUCCESS
}

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Bytes of this process in memory.
fn resident() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0_i64) * 4096
}

#[tokio::main(flavor = "current_thread")]
async fn measure(nodes: usize) -> Figures {
    let feed = Feed::new(nodes);
    let discovery = ServiceDiscovery::builder(EtcdOptions::memory("scale"), "g")
        .store(Arc::new(feed.clone()))
        .try_build()
        .expect("a discovery");
    let before = resident();
    let start = Instant::now();
    let running = discovery.clone();
    let task = tokio::spawn(async move { running.run(None).await });
    discovery.wait_ready().await;
    let load = start.elapsed();
    let loaded = resident();
    while !feed.is_watched() {
        tokio::task::yield_now().await;
    }

    let events = feed.changes(CHANGES);
    let start = cpu();
    feed.tell(events).await;
    let apply = (cpu() - start) / CHANGES as u32;
    task.abort();
    let _ = task.await;

    let start_balancer = resident();
    let balancer = Balancer::builder().try_build().expect("a balancer");
    let service = Arc::new(BalancerService::new(discovery, balancer));
    let (_shutdown, down) = watch::channel(false);
    let running = service.clone();
    tokio::spawn(async move { running.start(down).await });
    while service.len() < nodes || !feed.is_watched() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let with_balancer = resident();

    let count = RATE * PACED.as_secs() as u32;
    let idle = cpu();
    tokio::time::sleep(PACED).await;
    let idle = cpu() - idle;
    let events = feed.changes(count as usize);
    let start = cpu();
    for event in events {
        feed.tell(vec![event]).await;
        tokio::time::sleep(Duration::from_secs(1) / RATE).await;
    }
    let busy = cpu() - start;
    Figures {
        nodes,
        load,
        discovery: loaded - before,
        balancer: with_balancer - start_balancer,
        apply,
        with_balancer: busy.saturating_sub(idle) / count,
    }
}
