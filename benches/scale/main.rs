//! Measures what a group of 100 to 100,000 nodes costs: memory, loading, and each change.
//!
//! ```text
//! cargo bench --bench scale              # the table, and whether its limits hold
//! ETCD_BIN=/path/to/etcd cargo bench --bench scale -- --fleets  # what fleets of balancers cost etcd
//! ```
//!
//! Every size runs in its own process, so that the measurements of memory do not affect each other.
//! The store is a stand-in that serves prepared entries and events, so that only this crate is
//! measured.

#[path = "../../tests/common/mod.rs"]
mod common;
mod feed;
mod fleets;

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::services::background::BackgroundService;
use pingora_etcd::balance::{Balancer, TICK};
use pingora_etcd::discovery::Changes;
use pingora_etcd::pingora::{LiveLoadBalancer, MetricsWeighted};
use pingora_etcd::{Change, EtcdOptions, Node, ServiceDiscovery};
use rustix::time::{ClockId, clock_gettime};

use feed::Feed;

const SIZES: [usize; 4] = [100, 1_000, 10_000, 100_000];
/// The number of changes over which each figure is averaged.
const CHANGES: usize = 20_000;
/// The number of tables over which each figure is averaged.
const TABLES: u32 = 20;
/// The number of reports that are published one by one.
const REPORTS: u32 = 500;
/// The number of changes that a `LiveLoadBalancer` is given one by one.
const LIVE_CHANGES: u32 = 100;
/// It works on each of them by itself: the shortest time between two updates is 20 ms.
const LIVE_PAUSE: Duration = Duration::from_millis(30);

/// Limits at 10,000 nodes: CPU time of a change, and bytes in total.
const MOST_CPU: Duration = Duration::from_micros(10);
const MOST_CPU_REPORT: Duration = Duration::from_micros(20);
const MOST_CPU_IDLE: Duration = Duration::from_micros(1);
const MOST_CPU_LIVE: Duration = Duration::from_millis(1);
const MOST_BYTES: i64 = 15 << 20;
/// The limit at 100,000 nodes: the cost of a change, as a multiple of the cost at 10,000.
const MOST_GROWTH: f64 = 2.0;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let given = |name: &str| arguments.iter().position(|argument| argument == name);
    // `cargo test --benches` only checks that the benchmark starts.
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

/// The results of one process.
#[derive(Clone, Copy)]
struct Figures {
    nodes: usize,
    load: Duration,
    /// In bytes: the discovery, and a balancer in addition.
    discovery: i64,
    balancer: i64,
    /// The CPU time to apply and publish a single change.
    publish: Duration,
    /// The CPU time per change when a burst is published together.
    coalesced: Duration,
    /// The CPU time of a change in the balancer.
    balance: Duration,
    /// The CPU time until picks go by what one node has reported.
    report: Duration,
    /// The CPU time to weigh all nodes and build a table.
    table: Duration,
    /// The CPU time of a tick without anything new.
    idle: Duration,
    /// The CPU time of a change in a `LiveLoadBalancer`, with everything that follows from it.
    live: Duration,
}

impl Figures {
    const COUNT: usize = 11;

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
            nanos(self.report),
            nanos(self.table),
            nanos(self.idle),
            nanos(self.live),
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
            report,
            table,
            idle,
            live,
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
            report: nanos(report),
            table: nanos(table),
            idle: nanos(idle),
            live: nanos(live),
        })
    }
}

fn run_all() -> ExitCode {
    print_titles();
    let mut figures = Vec::new();
    for size in SIZES {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--nodes", &size.to_string()])
            .output()
            .expect("this program starts");
        let text = String::from_utf8_lossy(&child.stdout);
        let Some(result) = text.lines().last().and_then(Figures::parse) else {
            eprintln!("{size} nodes: {}", String::from_utf8_lossy(&child.stderr));
            return ExitCode::FAILURE;
        };
        print_row(&result);
        figures.push(result);
    }
    print_growth(&figures);
    if limits_hold(&figures) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn print_titles() {
    println!(
        "CPU time, except for the load, which is elapsed time; memory is the growth of the process\n"
    );
    println!(
        "{:>9} {:>10} {:>13} {:>13} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "nodes",
        "load",
        "discovery",
        "+ balancer",
        "per node",
        "a change",
        "in a burst",
        "balancer",
        "a report",
        "table",
        "idle tick",
        "live"
    );
}

fn print_row(result: &Figures) {
    let mib = |bytes: i64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{:>9} {:>10.1?} {:>9.2} MiB {:>9.2} MiB {:>8} B {:>10.2?} {:>10.2?} {:>10.2?} {:>10.2?} {:>10.1?} {:>10.2?} {:>10.1?}",
        result.nodes,
        result.load,
        mib(result.discovery),
        mib(result.balancer),
        (result.discovery + result.balancer) / result.nodes as i64,
        result.publish,
        result.coalesced,
        result.balance,
        result.report,
        result.table,
        result.idle,
        result.live
    );
}

/// The ratio of a value between two sizes.
fn growth(figures: &[Figures], from: usize, to: usize, value: fn(&Figures) -> f64) -> f64 {
    let of = |size| {
        figures
            .iter()
            .find(|figures| figures.nodes == size)
            .map(value)
    };
    of(to)
        .zip(of(from))
        .map_or(f64::NAN, |(to, from)| to / from)
}

fn publish_cost(figures: &Figures) -> f64 {
    figures.publish.as_secs_f64()
}

fn print_growth(figures: &[Figures]) {
    let memory = |figures: &Figures| (figures.discovery + figures.balancer) as f64;
    println!("\nten times as many nodes: factor of the cost of a change, and of the memory");
    for pair in SIZES.windows(2) {
        println!(
            "{:>9} to {:>7} {:>6.2} {:>6.2}",
            pair[0],
            pair[1],
            growth(figures, pair[0], pair[1], publish_cost),
            growth(figures, pair[0], pair[1], memory)
        );
    }
}

/// Prints each limit and whether it holds; returns whether all of them do.
fn limits_hold(figures: &[Figures]) -> bool {
    let Some(middle) = figures.iter().find(|figures| figures.nodes == 10_000) else {
        return false;
    };
    let bytes = middle.discovery + middle.balancer;
    let growth = growth(figures, 10_000, 100_000, publish_cost);
    println!();
    let mut broken = 0;
    for (what, holds) in [
        (
            format!(
                "a change at 10,000 nodes: {:.1?}, limit {MOST_CPU:?}",
                middle.publish
            ),
            middle.publish <= MOST_CPU,
        ),
        (
            format!("a change at 100,000 nodes: {growth:.2} times as much, limit {MOST_GROWTH}"),
            growth <= MOST_GROWTH,
        ),
        (
            format!(
                "picks that go by a report, at 10,000 nodes: {:.1?}, limit {MOST_CPU_REPORT:?}",
                middle.report
            ),
            middle.report <= MOST_CPU_REPORT,
        ),
        (
            format!(
                "a tick without anything new, at 10,000 nodes: {:.1?}, limit {MOST_CPU_IDLE:?}",
                middle.idle
            ),
            middle.idle <= MOST_CPU_IDLE,
        ),
        (
            format!(
                "a change in a LiveLoadBalancer of 10,000 nodes: {:.1?}, limit {MOST_CPU_LIVE:?}",
                middle.live
            ),
            middle.live <= MOST_CPU_LIVE,
        ),
        (
            format!("10,000 nodes: {bytes} bytes, limit {MOST_BYTES}"),
            bytes <= MOST_BYTES,
        ),
    ] {
        println!("{} {what}", if holds { "holds " } else { "BROKEN" });
        broken += u32::from(!holds);
    }
    broken == 0
}

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// The resident memory of this process, in bytes.
fn resident() -> i64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0_i64) * 4096
}

fn discovery(feed: &Feed, publish_interval: Duration) -> ServiceDiscovery {
    ServiceDiscovery::builder(EtcdOptions::memory("scale"), "g")
        .store(Arc::new(feed.clone()))
        .publish_interval(publish_interval)
        .try_build()
        .expect("a discovery")
}

/// A discovery over the feed that runs until this is dropped.
struct Following {
    discovery: ServiceDiscovery,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    async fn start(feed: &Feed, publish_interval: Duration) -> Self {
        let discovery = discovery(feed, publish_interval);
        let running = discovery.clone();
        let task = tokio::spawn(async move {
            running.run(None).await.expect("the discovery runs");
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
    // An interval of zero publishes each change by itself.
    let following = Following::start(&feed, Duration::ZERO).await;
    let load = start.elapsed();
    let discovery = resident() - before;
    until_watched(&feed).await;

    // Fed like the background service feeds it, without additional memory.
    let before = resident();
    let balancer = Balancer::builder().try_build().expect("a balancer");
    let now = Instant::now();
    let nodes_now = following.discovery.nodes();
    balancer.apply(&Change::Reset(nodes_now), now);
    balancer.publish(now);
    let with_balancer = resident() - before;
    assert_eq!(balancer.len(), nodes);

    let mut changes = following.discovery.changes();
    // The first two changes are the current state: the nodes and the leader.
    for _ in 0..2 {
        changes.next().await;
    }
    let events = feed.changes(CHANGES);
    let mut publish = Duration::ZERO;
    let mut balance = Duration::ZERO;
    // A few at a time, because a reader that is a thousand changes behind receives the complete
    // state instead.
    for events in events.chunks(500) {
        let start = cpu();
        feed.deliver(events.to_vec()).await;
        publish += cpu() - start;
        let start = cpu();
        for _ in events {
            balancer.apply(&changes.next().await, now);
        }
        balance += cpu() - start;
    }
    let report = report(&feed, &mut changes, &balancer, now).await;
    let idle = idle_tick(&balancer, now);
    let table = tables(&balancer, now);
    drop(changes);
    following.stop().await;

    let following = Following::start(&feed, Duration::from_millis(20)).await;
    until_watched(&feed).await;
    let events = feed.changes(CHANGES);
    let start = cpu();
    feed.deliver(events).await;
    let coalesced = cpu() - start;
    following.stop().await;

    let live = live(&feed).await;

    let count = CHANGES as u32;
    Figures {
        nodes,
        load,
        discovery,
        balancer: with_balancer,
        publish: publish / count,
        coalesced: coalesced / count,
        balance: balance / count,
        report,
        table,
        idle,
        live,
    }
}

/// The CPU time until picks go by what one node has reported.
async fn report(feed: &Feed, changes: &mut Changes, balancer: &Balancer, now: Instant) -> Duration {
    balancer.publish(now);
    feed.deliver(feed.changes(REPORTS as usize)).await;
    let mut spent = Duration::ZERO;
    for _ in 0..REPORTS {
        let change = changes.next().await;
        let start = cpu();
        balancer.apply(&change, now);
        balancer.publish(now);
        spent += cpu() - start;
    }
    spent / REPORTS
}

/// The CPU time of a tick once nothing happens any more.
fn idle_tick(balancer: &Balancer, now: Instant) -> Duration {
    // Later than all reports, so that what follows from them has faded.
    let mut now = now;
    let mut tick = || {
        now += TICK;
        let start = cpu();
        balancer.tick(now);
        cpu() - start
    };
    for _ in 0..1_000 {
        tick();
    }
    let mut ticks: Vec<_> = (0..50).map(|_| tick()).collect();
    ticks.sort_unstable();
    // Once a minute it looks whether there is really nothing to do.
    ticks[ticks.len() / 2]
}

/// The CPU time to weigh all and build a table, which everything but a report leads to.
fn tables(balancer: &Balancer, now: Instant) -> Duration {
    let node = Arc::new(Node::new("another", [192, 0, 2, 1].into()));
    let changes = [Change::Joined(node.clone()), Change::Left(node)];
    let mut spent = Duration::ZERO;
    for at in 0..TABLES {
        balancer.apply(&changes[at as usize % 2], now);
        let start = cpu();
        balancer.publish(now);
        spent += cpu() - start;
    }
    spent / TABLES
}

/// The CPU time of a change in a `LiveLoadBalancer`: in its discovery, its weights and its selection.
async fn live(feed: &Feed) -> Duration {
    let discovery = discovery(feed, Duration::from_millis(20));
    let upstreams = LiveLoadBalancer::<MetricsWeighted>::new(discovery.clone(), 80);
    let upstreams = Arc::new(upstreams);
    let (_stop, shutdown) = tokio::sync::watch::channel(false);
    let running = upstreams.clone();
    let task = tokio::spawn(async move { running.start(shutdown).await });
    discovery.wait_ready().await;
    while upstreams.select(b"", 1).is_none() {
        tokio::time::sleep(LIVE_PAUSE).await;
    }
    until_watched(feed).await;
    let start = cpu();
    for _ in 0..LIVE_CHANGES {
        feed.deliver(feed.changes(1)).await;
        tokio::time::sleep(LIVE_PAUSE).await;
    }
    let spent = cpu() - start;
    task.abort();
    let _ = task.await;
    spent / LIVE_CHANGES
}
