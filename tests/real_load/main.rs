//! Compares balancers under real load: worker processes of unequal capacity to which something happens, several
//! balancer processes in front, and requests with random arrival times, at three quarters of the workers' mean
//! capacity.
//!
//! Capacity is a number of slots and a service time, so it does not depend on the cores of the
//! machine. The ratio between balancers is what counts, not the milliseconds.
//! The work of requests is exponentially distributed; calls of gRPC are streams of two lengths.
//!
//! ```text
//! make real-load       the policies of this crate, one after the other: part of the tests
//! make bench-rivals    beside nginx, HAProxy and Envoy, where they are installed
//! ```

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

mod balancers;
mod fleet;
mod shape;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use balancers::{Kind, POLICIES, WITH_RIVALS};
use clap::Parser;
use common::etcd::Etcd;
use fleet::{Figures, PATIENCE, SERVICE_TIME, quantile, run};
use serde_json::json;
use shape::Shape;

/// The most that the p99 of `adaptive` may be, relative to the best of the others: the median of the repeats, in each shape.
const AGAINST_RIVALS: f64 = 0.8;

/// Compares balancers under real load.
#[derive(Parser)]
struct Arguments {
    /// Beside others than this crate's.
    #[arg(long)]
    rivals: bool,
    /// How often each runs, in turn.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeats: u32,
    /// Only shapes with this in their name.
    #[arg(long, default_value = "")]
    shape: String,
    /// Only balancers with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// Given by cargo, for tests that have a harness.
    #[arg(long, hide = true)]
    list: bool,
    #[arg(hide = true)]
    filters: Vec<String>,
    #[arg(long, hide = true)]
    nocapture: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // There is no test harness, so that the table is always printed; a harness's `--list` must
    // still work.
    if arguments.list {
        return ExitCode::SUCCESS;
    }
    let etcd = Etcd::shared();
    let endpoint = etcd.endpoints()[0].clone();
    let client = reqwest::Client::builder()
        .timeout(PATIENCE)
        .build()
        .unwrap();
    if !arguments.rivals {
        compare_policies(&client, &endpoint).await;
        println!("test result: ok. 1 passed; 0 failed; 0 ignored");
        return ExitCode::SUCCESS;
    }
    let mut kinds = Vec::new();
    for kind in WITH_RIVALS {
        match kind.version() {
            _ if !kind.name().contains(&arguments.only) => {}
            Some(version) => {
                println!("{} {version}", kind.name());
                kinds.push((kind, version));
            }
            None => println!("{}: not installed, so it is left out", kind.name()),
        }
    }
    let shapes = shape::all();
    let shapes = shapes
        .iter()
        .filter(|shape| shape.name.contains(&arguments.shape));
    // Calls over few connections, as programs of gRPC make them.
    let calls = reqwest::Client::builder()
        .timeout(PATIENCE)
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let (mut is_broken, mut measured) = (false, Vec::new());
    for shape in shapes {
        let client = if shape.are_streams { &calls } else { &client };
        let runs = repeat(client, &endpoint, shape, &kinds, arguments.repeats).await;
        is_broken |= !show(shape, &runs);
        measured.push(described(shape, &runs));
    }
    write(&kinds, &measured);
    match is_broken {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// The policies of this crate, once each.
async fn compare_policies(client: &reqwest::Client, etcd: &str) {
    let shape = shape::usual();
    let mut all = Vec::new();
    for kind in POLICIES {
        all.push((kind, run(client, etcd, &shape, kind, 0).await));
    }
    let (_, adaptive) = all.last().unwrap();
    let best = adaptive.quantile(0.99);
    println!("| policy | requests | p50 | p99 | p99 / adaptive | errors |");
    println!("|---|---|---|---|---|---|");
    for (kind, figures) in &all {
        let p99 = figures.quantile(0.99);
        println!(
            "| {} | {} | {:.0?} | {:.0?} | {:.2} | {:.2} % |",
            kind.name(),
            figures.latencies.len(),
            figures.quantile(0.5),
            p99,
            p99.as_secs_f64() / best.as_secs_f64(),
            figures.errors() * 100.0,
        );
    }
    for (kind, figures) in &all {
        if ["round_robin", "random"].contains(&kind.name()) {
            let ratio = figures.quantile(0.99).as_secs_f64() / best.as_secs_f64();
            assert!(
                ratio > 1.5,
                "the p99 of {} is only {ratio:.2} times that of adaptive",
                kind.name()
            );
        }
    }
    assert_eq!(adaptive.failed, 0, "adaptive must not fail requests");
}

type Runs = Vec<(Kind, Vec<Figures>)>;

/// Each balancer in turn, several times.
async fn repeat(
    client: &reqwest::Client,
    etcd: &str,
    shape: &Shape,
    kinds: &[(Kind, String)],
    repeats: u32,
) -> Runs {
    let mut runs: Runs = kinds.iter().map(|(kind, _)| (*kind, Vec::new())).collect();
    for repeat in 0..repeats as usize {
        // Each comes first in turn, so that nobody always runs on a machine that is warm, or is not.
        let count = runs.len().max(1);
        for place in 0..runs.len() {
            let (kind, figures) = &mut runs[(repeat + place) % count];
            figures.push(run(client, etcd, shape, *kind, repeat as u64).await);
        }
    }
    runs
}

/// Lowest, median and highest value.
fn spread(values: impl Iterator<Item = Duration>) -> [Duration; 3] {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    [0.0, 0.5, 1.0].map(|rank| quantile(&values, rank))
}

fn p99(figures: &[Figures]) -> [Duration; 3] {
    spread(figures.iter().map(|one| one.quantile(0.99)))
}

/// The median of the p99 of each phase.
fn phases(figures: &[Figures]) -> Vec<Duration> {
    let count = figures.first().map_or(0, |one| one.phases.len());
    let median = |phase| spread(figures.iter().map(|one| one.phases[phase]))[1];
    (0..count).map(median).collect()
}

/// Prints the table of a shape. Returns whether the limit holds.
fn show(shape: &Shape, runs: &Runs) -> bool {
    let rivals = runs.iter().filter(|(kind, _)| !kind.is_ours());
    let best = rivals.map(|(_, figures)| p99(figures)[1]).min();
    let relative = |duration: Duration| {
        best.map_or("-".to_owned(), |best| {
            format!("{:.2}", duration.as_secs_f64() / best.as_secs_f64())
        })
    };
    println!(
        "\n{}, {} balancers, slots {:?}:\n",
        shape.name, shape.balancers, shape.slots
    );
    println!(
        "| balancer | p50 | p99, median | p99, lowest to highest | p99 / best of others | failed | p99 by phase |"
    );
    println!("|---|---|---|---|---|---|---|");
    // The work of requests is exponentially distributed. No balancer can be faster than that.
    let alone = |rank: f64| match shape.are_streams {
        true => SERVICE_TIME.mul_f64(if rank < 0.9 { 1.0 / 3.0 } else { 7.0 }),
        false => SERVICE_TIME.mul_f64(-(1.0 - rank).ln()),
    };
    println!(
        "| the work alone, without any queue | {:.0?} | {:.0?} | | {} | | |",
        alone(0.5),
        alone(0.99),
        relative(alone(0.99)),
    );
    for (kind, figures) in runs {
        let p50 = spread(figures.iter().map(|one| one.quantile(0.5)))[1];
        let [lowest, median, highest] = p99(figures);
        let failed: usize = figures.iter().map(|one| one.failed).sum();
        let all: usize = figures.iter().map(|one| one.latencies.len()).sum();
        let phases: Vec<_> = phases(figures)
            .iter()
            .map(|it| format!("{it:.0?}"))
            .collect();
        println!(
            "| {} | {p50:.0?} | {median:.0?} | {lowest:.0?} to {highest:.0?} | {} | {:.2} % | {} |",
            kind.name(),
            relative(median),
            failed as f64 / all.max(1) as f64 * 100.0,
            phases.join(", "),
        );
    }
    println!();
    let adaptive = runs
        .iter()
        .find(|(kind, _)| *kind == Kind::Ours("adaptive"));
    let (Some(best), Some((_, adaptive))) = (best, adaptive) else {
        println!("nothing is compared: there is either no rival, or no adaptive among these");
        return false;
    };
    let of_phases = phases(adaptive);
    let costly = of_phases.iter().enumerate().max_by_key(|(_, p99)| **p99);
    if let Some((phase, p99)) = costly {
        let (number, all) = (phase + 1, of_phases.len());
        println!("phase {number} of {all} costs adaptive most: p99 {p99:.0?}");
    }
    let ratio = p99(adaptive)[1].as_secs_f64() / best.as_secs_f64();
    let holds = ratio <= AGAINST_RIVALS;
    let mark = if holds { "ok    " } else { "BROKEN" };
    println!(
        "{mark} {ratio:.2} <= {AGAINST_RIVALS} p99 of adaptive / best of others: {}",
        shape.name
    );
    holds
}

fn described(shape: &Shape, runs: &Runs) -> serde_json::Value {
    let milliseconds = |duration: Duration| (duration.as_secs_f64() * 1e4).round() / 10.0;
    let of_balancer = |(kind, figures): &(Kind, Vec<Figures>)| {
        let each = figures.iter().map(|one| milliseconds(one.quantile(0.99)));
        let about = json!({
            "p99_ms": each.collect::<Vec<_>>(),
            "p99_ms_by_phase": phases(figures).into_iter().map(milliseconds).collect::<Vec<_>>(),
            "failed": figures.iter().map(|one| one.failed).sum::<usize>(),
            "requests": figures.iter().map(|one| one.latencies.len()).sum::<usize>(),
        });
        (kind.name(), about)
    };
    let balancers: BTreeMap<_, _> = runs.iter().map(of_balancer).collect();
    json!({ "shape": shape.name, "balancers": balancers })
}

/// Writes what was measured beside the figures of the benchmarks.
fn write(kinds: &[(Kind, String)], measured: &[serde_json::Value]) {
    let versions: BTreeMap<_, _> = kinds
        .iter()
        .map(|(kind, version)| (kind.name(), version))
        .collect();
    let all = json!({ "versions": versions, "shapes": measured });
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../rivals.json");
    match std::fs::write(&file, format!("{all:#}\n")) {
        Ok(()) => println!("written: {}", file.display()),
        Err(error) => println!("{} cannot be written: {error}", file.display()),
    }
}
