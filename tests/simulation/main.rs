//! Simulates coordination under faults of every kind, on the in-memory store and under a paused
//! clock.
//!
//! ```text
//! simulation [--seeds N] [--first S]     runs N seeds starting at S, and prints how to replay a failure
//! ```
//!
//! A seed determines everything: the world, its faults, every delay and every jitter.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

mod check;
mod history;
mod net;
mod process;
mod world;

use std::cell::RefCell;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use world::Outcome;

#[derive(Parser)]
struct Arguments {
    /// The number of seeds.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Writes the log of each seed to standard error, filtered by RUST_LOG.
    #[arg(long)]
    log: bool,
}

/// As many seeds have terms, fenced writes and leader changes, or nothing is simulated any more.
const ENOUGH_SEEDS: u64 = 100;

struct Summary {
    seeds: u64,
    simulated: Duration,
    steps: u64,
    terms: u64,
    commits: u64,
    claims: u64,
    failed: Option<(u64, String)>,
}

impl Summary {
    /// What a run of many seeds has never seen, and so has not checked.
    fn never_seen(&self) -> Option<&'static str> {
        let seen = [
            (self.terms, "term"),
            (self.commits, "fenced write"),
            (self.claims, "leader change seen by a reader"),
        ];
        let (_, what) = seen.into_iter().find(|(count, _)| *count == 0)?;
        (self.seeds >= ENOUGH_SEEDS).then_some(what)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.log {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .without_time()
            .init();
    }
    catch_panics();
    let start = Instant::now();
    let summary = run_all(arguments.first, arguments.seeds);
    let took = start.elapsed();
    println!(
        "simulation: seeds {} to {}, {:.0} seeds per second, {:.1} simulated hours in {:.1} s; \
         {} steps checked, {} terms, {} fenced writes, {} leader changes seen by readers",
        arguments.first,
        arguments.first + summary.seeds - 1,
        summary.seeds as f64 / took.as_secs_f64(),
        summary.simulated.as_secs_f64() / 3600.0,
        took.as_secs_f64(),
        summary.steps,
        summary.terms,
        summary.commits,
        summary.claims,
    );
    if summary.failed.is_none()
        && let Some(what) = summary.never_seen()
    {
        println!("FAILED: {} seeds without any {what}", summary.seeds);
        return ExitCode::FAILURE;
    }
    match summary.failed {
        None if is_reproducible(arguments.first) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
        Some((seed, text)) => {
            println!("FAILED: seed {seed}: {text}");
            println!("replay it with: make simulate SEEDS=1 FIRST={seed}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the seeds on all cores until one fails.
fn run_all(first: u64, count: u64) -> Summary {
    let next = AtomicU64::new(first);
    let summary = Mutex::new(Summary {
        seeds: 0,
        simulated: Duration::ZERO,
        steps: 0,
        terms: 0,
        commits: 0,
        claims: 0,
        failed: None,
    });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let outcome = run_one(seed);
                    let mut summary = summary.lock().unwrap();
                    summary.seeds += 1;
                    summary.simulated += outcome.simulated;
                    summary.steps += outcome.counts.steps;
                    summary.terms += outcome.counts.terms;
                    summary.commits += outcome.counts.commits;
                    summary.claims += outcome.counts.claims;
                    if let Some(text) = outcome.violation {
                        // The smallest failing seed that was seen, so that threads influence the
                        // output little.
                        if summary.failed.as_ref().is_none_or(|failed| seed < failed.0) {
                            summary.failed = Some((seed, text));
                        }
                        next.store(first + count, Ordering::Relaxed);
                        return;
                    }
                }
            });
        }
    });
    summary.into_inner().unwrap()
}

thread_local! {
    /// The message of the last panic on this thread, because the runtime catches the panics of
    /// tasks.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn catch_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANIC.set(Some(panic.to_string()));
        usual(panic);
    }));
}

/// Runs one seed. A panic in any task counts as a violation.
fn run_one(seed: u64) -> Outcome {
    PANIC.take();
    let outcome = std::panic::catch_unwind(|| world::run(seed));
    let mut outcome = outcome.unwrap_or_else(|_| Outcome {
        simulated: Duration::ZERO,
        counts: check::Counts::default(),
        violation: None,
    });
    if let Some(panic) = PANIC.take() {
        outcome.violation = Some(panic);
    }
    outcome
}

/// Whether two runs of a seed are the same, step by step.
fn is_reproducible(first: u64) -> bool {
    for seed in first..first + 5 {
        let traces = [run_one(seed), run_one(seed)].map(|outcome| {
            let counts = outcome.counts;
            (counts.trace, counts.steps, counts.terms, counts.commits)
        });
        if traces[0] != traces[1] {
            println!("FAILED: seed {seed} is not reproducible: {traces:?}");
            return false;
        }
    }
    true
}
