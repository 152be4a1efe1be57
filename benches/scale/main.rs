//! What a group of 100 to 100,000 nodes costs: memory, loading, and each change to it.
//!
//! ```text
//! cargo bench --bench scale              # the table, and whether its limits hold
//! ETCD_BIN=/path/to/etcd cargo bench --bench scale -- --fleets  # what fleets of balancers cost etcd
//! ```
//!
//! Every size runs in a process of its own, so that one's memory is not another's. The store is a
//! stand-in that gives away prepared entries and events: what is measured is this crate.

#[path = "../../tests/common/mod.rs"]
mod common;
mod feed;
mod fleets;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_etcd::balance::Balancer;
use pingora_etcd::{Change, EtcdOptions, ServiceDiscovery};
use rustix::time::{ClockId, clock_gettime};

use feed::Feed;

const SIZES: [usize; 4] = [100, 1_000, 10_000, 100_000];
/// Changes that each figure is the mean of.
const CHANGES: usize = 20_000;
/// Tables that each figure is the mean of.
const TABLES: u32 = 20;

/// At 10,000 nodes: CPU time of one change, and bytes in all.
const MOST_CPU: Duration = Duration::from_micros(10);
const MOST_BYTES: i64 = 13 << 20;
/// At 100,000 nodes: times what a change costs at 10,000.
const MOST_GROWTH: f64 = 2.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let given = |name: &str| arguments.iter().position(|argument| argument == name);
    // `cargo test --benches` only wants to know that it starts.
    if given("--test").is_some() {
        return ExitCode::SUCCESS;
    }
    if given("--fleets").is_some() {
        fleets::print();
        return ExitCode::SUCCESS;
    }
    if let Some(count) = given("--nodes").and_then(|at| arguments.get(at + 1)?.parse().ok()) {
        println!("{}", measure(count).line());
        return ExitCode::SUCCESS;
    }
    run_all()
}

/// What one process found out.
#[derive(Clone, Copy)]
struct Figures {
    nodes: usize,
    load: Duration,
    /// In bytes: of the discovery, and of a balancer beside it.
    discovery: i64,
    balancer: i64,
    /// CPU time of applying and publishing one change, each by itself.
    publish: Duration,
    /// The same where a burst is published together.
    coalesced: Duration,
    /// CPU time of one change in the balancer.
    balance: Duration,
    /// CPU time of a table.
    table: Duration,
}

impl Figures {
    const COUNT: usize = 8;

    fn line(&self) -> String {
        let nanos = |duration: Duration| duration.as_nanos() as i64;
        let numbers: [i64; Self::COUNT] = [
            self.nodes as i64,
            nanos(self.load),
            self.discovery,
            self.balancer,
            nanos(self.publish),
            nanos(self.coalesced),
            nanos(self.balance),
            nanos(self.table),
        ];
        numbers.map(|number| number.to_string()).join(" ")
    }

    fn parse(line: &str) -> Option<Self> {
        let numbers: Vec<i64> = line
            .split(' ')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        let [
            nodes,
            load,
            discovery,
            balancer,
            publish,
            coalesced,
            balance,
            table,
        ] = <[i64; Self::COUNT]>::try_from(numbers).ok()?;
        let nanos = |number: i64| Duration::from_nanos(number.unsigned_abs());
        Some(Self {
            nodes: usize::try_from(nodes).ok()?,
            load: nanos(load),
            discovery,
            balancer,
            publish: nanos(publish),
            coalesced: nanos(coalesced),
            balance: nanos(balance),
            table: nanos(table),
        })
    }
}

fn run_all() -> ExitCode {
    println!("CPU time, but for the load; memory that the process grows by\n");
    println!(
        "{:>9} {:>10} {:>13} {:>13} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "nodes",
        "load",
        "discovery",
        "+ balancer",
        "per node",
        "a change",
        "in a burst",
        "balancer",
        "table"
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
            "{:>9} {:>10.1?} {:>9.2} MiB {:>9.2} MiB {:>8} B {:>10.2?} {:>10.2?} {:>10.2?} {:>10.1?}",
            found.nodes,
            found.load,
            mib(found.discovery),
            mib(found.balancer),
            (found.discovery + found.balancer) / found.nodes as i64,
            found.publish,
            found.coalesced,
            found.balance,
            found.table
        );
        figures.push(found);
    }
    let growth = |from: usize, to: usize, value: fn(&Figures) -> f64| {
        let of = |size| {
            figures
                .iter()
                .find(|figures| figures.nodes == size)
                .map(value)
        };
        of(to)
            .zip(of(from))
            .map_or(f64::NAN, |(to, from)| to / from)
    };
    let cpu = |figures: &Figures| figures.publish.as_secs_f64();
    let memory = |figures: &Figures| (figures.discovery + figures.balancer) as f64;
    println!("\nten times the nodes, times the cost of a change, and times the memory:");
    for pair in SIZES.windows(2) {
        println!(
            "{:>9} to {:>7} {:>6.2} {:>6.2}",
            pair[0],
            pair[1],
            growth(pair[0], pair[1], cpu),
            growth(pair[0], pair[1], memory)
        );
    }
    let Some(middle) = figures.iter().find(|figures| figures.nodes == 10_000) else {
        return ExitCode::FAILURE;
    };
    let bytes = middle.discovery + middle.balancer;
    let growth = growth(10_000, 100_000, cpu);
    println!();
    let mut broken = 0;
    for (what, holds) in [
        (
            format!(
                "a change at 10,000 nodes: {:.1?}, at most {MOST_CPU:?}",
                middle.publish
            ),
            middle.publish <= MOST_CPU,
        ),
        (
            format!("at 100,000 nodes: {growth:.2} times that, at most {MOST_GROWTH}"),
            growth <= MOST_GROWTH,
        ),
        (
            format!("10,000 nodes: {bytes} bytes, at most {MOST_BYTES}"),
            bytes <= MOST_BYTES,
        ),
    ] {
        println!("{} {what}", if holds { "holds " } else { "BROKEN" });
        broken += u32::from(!holds);
    }
    if broken == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
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

/// Runs a discovery over the feed until this is dropped.
struct Following {
    discovery: ServiceDiscovery,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    async fn start(feed: &Feed, publish_interval: Duration) -> Self {
        let discovery = ServiceDiscovery::builder(EtcdOptions::memory("scale"), "g")
            .store(Arc::new(feed.clone()))
            .publish_interval(publish_interval)
            .try_build()
            .expect("a discovery");
        let running = discovery.clone();
        let task = tokio::spawn(async move {
            running.run(None).await.expect("it runs");
        });
        discovery.wait_ready().await;
        Self { discovery, task }
    }

    async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

async fn until_watched(feed: &Feed) {
    while !feed.is_watched() {
        tokio::task::yield_now().await;
    }
}

#[tokio::main(flavor = "current_thread")]
async fn measure(nodes: usize) -> Figures {
    let feed = Feed::new(nodes);
    let before = resident();
    let start = Instant::now();
    // Publishes each change by itself.
    let following = Following::start(&feed, Duration::ZERO).await;
    let load = start.elapsed();
    let discovery = resident() - before;
    until_watched(&feed).await;

    // Fed as a background service does it, with no more memory than a service has.
    let before = resident();
    let balancer = Balancer::builder().try_build().expect("a balancer");
    let now = Instant::now();
    let nodes_now = following.discovery.nodes();
    balancer.apply(&Change::Reset(nodes_now), now);
    balancer.publish(now);
    let with_balancer = resident() - before;
    assert_eq!(balancer.len(), nodes);

    let mut changes = following.discovery.changes();
    // Its first: the state of now.
    for _ in 0..2 {
        changes.next().await;
    }
    let events = feed.changes(CHANGES);
    let mut publish = Duration::ZERO;
    let mut balance = Duration::ZERO;
    // A few at a time, because whoever is a thousand behind is given everything anew.
    for events in events.chunks(500) {
        let start = cpu();
        feed.tell(events.to_vec()).await;
        publish += cpu() - start;
        let start = cpu();
        for _ in events {
            balancer.apply(&changes.next().await, now);
        }
        balance += cpu() - start;
    }
    let start = cpu();
    for _ in 0..TABLES {
        balancer.publish(Instant::now());
    }
    let table = (cpu() - start) / TABLES;
    drop(changes);
    following.stop().await;

    let following = Following::start(&feed, Duration::from_millis(20)).await;
    until_watched(&feed).await;
    let events = feed.changes(CHANGES);
    let start = cpu();
    feed.tell(events).await;
    let coalesced = cpu() - start;
    following.stop().await;

    let count = CHANGES as u32;
    Figures {
        nodes,
        load,
        discovery,
        balancer: with_balancer,
        publish: publish / count,
        coalesced: coalesced / count,
        balance: balance / count,
        table,
    }
}
