//! Coordination under every fault there is, on the in-memory store, under a paused clock.
//!
//! ```text
//! simulation [--seeds N] [--first S]     runs N seeds from S on, and says how to replay one that fails
//! ```
//!
//! One seed fixes everything: the world, its faults, every delay and every jitter.

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
    /// How many seeds.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// What a seed's log goes to: none, or standard error by RUST_LOG.
    #[arg(long)]
    log: bool,
}

struct Summary {
    seeds: u64,
    simulated: Duration,
    steps: u64,
    terms: u64,
    commits: u64,
    claims: u64,
    failed: Option<(u64, String)>,
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
         {} steps looked at, {} terms, {} fenced writes, {} times a reader named another leader",
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

/// Runs seeds on every core until one fails.
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
                    summary.steps += outcome.looked.steps;
                    summary.terms += outcome.looked.terms;
                    summary.commits += outcome.looked.commits;
                    summary.claims += outcome.looked.claims;
                    if let Some(text) = outcome.violation {
                        // The least one, so that what is printed does not depend on threads.
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
    /// Of this thread's seed: the runtime catches those of tasks.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn catch_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANIC.set(Some(panic.to_string()));
        usual(panic);
    }));
}

/// A panic is a violation too, in whatever task.
fn run_one(seed: u64) -> Outcome {
    PANIC.take();
    let outcome = std::panic::catch_unwind(|| world::run(seed));
    let mut outcome = outcome.unwrap_or_else(|_| Outcome {
        simulated: Duration::ZERO,
        looked: check::Looked::default(),
        violation: None,
    });
    if let Some(panic) = PANIC.take() {
        outcome.violation = Some(panic);
    }
    outcome
}

/// The same seed twice is the same, step by step.
fn is_reproducible(first: u64) -> bool {
    for seed in first..first + 5 {
        let traces = [run_one(seed), run_one(seed)].map(|outcome| {
            let looked = outcome.looked;
            (looked.trace, looked.steps, looked.terms, looked.commits)
        });
        if traces[0] != traces[1] {
            println!("FAILED: seed {seed} is not reproducible: {traces:?}");
            return false;
        }
    }
    true
}
