//! How close routing comes to the optimum: a discrete-event simulation that runs the crate's own
//! `balance` code, other routers that are in use, and an oracle that sees every queue.
//!
//! ```text
//! make bench-routing SEEDS=5 FIRST=100     # everything
//! cargo bench --bench routing_quality -- --quick          # part of make test
//! cargo bench --bench routing_quality -- --only "64 proxies" --adaptive '{"own_request": 1}'
//! ```
//!
//! A figure is p99 latency divided by the oracle's in the same world: the same arrivals, the same
//! work, the same neighbours. Of several seeds the median counts; with 1,000 servers there is one seed.
//! Writes `target/routing_quality.json` and `.svg`, and fails if a limit is broken. A run depends on its seed alone, so it can be repeated.

mod checks;
mod events;
mod figures;
mod measurements;
mod output;
mod plot;
mod requests;
mod router;
mod routers;
mod runs;
mod scenario;
mod scenarios;
mod server;
mod units;
mod view;
mod world;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use pingora_etcd::balance::Adaptive;
use routers::RouterKind;
use runs::Runs;
use scenarios::Row;
use world::World;

/// The oracle first, the router that has limits second.
const KINDS: [RouterKind; 15] = [
    RouterKind::Oracle,
    RouterKind::Adaptive { candidates: 5 },
    RouterKind::Adaptive { candidates: 3 },
    RouterKind::Headroom,
    RouterKind::DropIn { is_informed: false },
    RouterKind::DropIn { is_informed: true },
    RouterKind::PeakEwma,
    RouterKind::LeastOfTwo,
    RouterKind::LeastOfAll,
    RouterKind::Prequal,
    RouterKind::KnownCapacity,
    RouterKind::GrpcWeighted,
    RouterKind::OneMinusLoad,
    RouterKind::RoundRobin,
    RouterKind::Random,
];

/// With this number of servers one seed is enough: they differ so much from each other that seeds do not.
const MANY_SERVERS: usize = 1_000;

/// How close routing comes to the optimum.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Only some scenarios, and only the routers that have limits.
    #[arg(long)]
    quick: bool,
    /// Only scenarios with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// Only the routers that have limits.
    #[arg(long)]
    ours: bool,
    /// In addition, those with this in their name.
    #[arg(long, default_value = "none")]
    router: String,
    /// Other constants for the adaptive policy, as JSON: '{"metrics_gain": 0.1}'.
    #[arg(long, value_parser = |json: &str| serde_json::from_str::<Adaptive>(json))]
    adaptive: Option<Adaptive>,
    /// Workers write every report, not only those that leave the deadband.
    #[arg(long)]
    every_report: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.every_report {
        let _ = view::EVERY_REPORT.set(());
    }
    if let Some(adaptive) = arguments.adaptive {
        let _ = routers::ADAPTIVE.set(adaptive);
    }
    let start = std::time::Instant::now();
    let rows: Vec<Row> = scenarios::all()
        .into_iter()
        .filter(|row| !arguments.quick || row.quick)
        .filter(|row| row.scenario.name.contains(&arguments.only))
        .collect();
    if rows.is_empty() {
        eprintln!("no scenario has {:?} in its name", arguments.only);
        return ExitCode::FAILURE;
    }
    let all = !(arguments.ours || arguments.quick);
    let named = |kind: &RouterKind| kind.name().contains(&arguments.router);
    let kinds = KINDS
        .into_iter()
        .filter(|kind| all || kind.is_limited() || named(kind));
    let runs = simulate(rows, kinds.collect(), {
        (arguments.first..).take(arguments.seeds as usize).collect()
    });
    println!("{}", output::table(&runs));
    let checks = checks::checks(&runs);
    for check in &checks {
        println!("{check}");
    }
    let broken = checks.iter().filter(|check| !check.holds()).count();
    println!(
        "{} limits, {broken} broken; seeds {} to {}, {:.0} s",
        checks.len(),
        arguments.first,
        arguments.first + arguments.seeds - 1,
        start.elapsed().as_secs_f64(),
    );
    if !arguments.quick
        && let Err(error) = output::write(&runs, &checks)
    {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    if broken > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn simulate(rows: Vec<Row>, kinds: Vec<RouterKind>, seeds: Vec<u64>) -> Runs {
    let mut jobs = Vec::new();
    for (row, described) in rows.iter().enumerate() {
        for (kind, compared) in kinds.iter().enumerate() {
            let is_wanted = described.quick || compared.is_for_many();
            if is_wanted && compared.is_fit_for(&described.scenario) {
                let seeds = match described.scenario.servers {
                    MANY_SERVERS.. => &seeds[..1],
                    _ => &seeds[..],
                };
                jobs.extend(seeds.iter().map(|seed| (row, kind, *seed)));
            }
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
                    // The generator of the stock selection is seeded too.
                    fastrand::seed(seed);
                    let run = World::new(&rows[row].scenario, kinds[kind], seed).run();
                    figures.lock().unwrap().insert(*job, run);
                }
            });
        }
    });
    Runs {
        rows,
        kinds,
        seeds,
        figures: figures.into_inner().unwrap(),
    }
}
