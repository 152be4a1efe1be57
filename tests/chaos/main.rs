//! Injects real faults into a real etcd, with 30 workers, three discoveries and a balancer process
//! under load, and checks leadership, membership and requests.
//!
//! ```text
//! make chaos                       # ten minutes, in random order
//! make chaos CHAOS_SECONDS=60      # at least each fault once
//! cargo test --all-features --test chaos -- --seed 7 --only "kill two"
//! ```
//!
//! Without arguments each fault is injected once. The test fails when two nodes lead at once, when
//! nodes are lost or left over, when a request fails, when a fencing token decreases, or when the
//! cluster does not recover. Missed targets fail it only with `--seconds` or `--targets`.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

mod etcd_cluster;
mod faults;
mod fleet;
mod measure;
mod netns;
mod report;
mod single;
mod targets;
mod traffic;
mod world;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::stalls::Stalls;
use faults::{Fault, Found, ON_ONE, ON_THREE};
use measure::Monitor;
use report::{Report, Row};
use world::World;

struct Arguments {
    /// How long to inject faults; `None`: each fault once.
    seconds: Option<u64>,
    seed: u64,
    /// Only the faults whose name contains this text.
    only: Option<String>,
    /// `targets`: a missed target fails the run. `only_targets`: no faults are injected.
    targets: bool,
    only_targets: bool,
}

impl Arguments {
    /// Ignores other arguments of a test harness, such as `--nocapture` or a filter.
    fn parse() -> Self {
        let given: Vec<_> = std::env::args().collect();
        let value = |name: &str| {
            let at = given.iter().position(|argument| argument == name)?;
            Some(given.get(at + 1).map_or("", String::as_str))
        };
        let number = |name: &str| {
            value(name).map(|text| {
                text.parse::<u64>()
                    .unwrap_or_else(|_| panic!("{name} takes a number, not {text:?}"))
            })
        };
        let seconds = number("--seconds");
        let has = |name: &str| given.iter().any(|argument| argument == name);
        Self {
            seconds,
            seed: number("--seed").unwrap_or_else(|| fastrand::u64(1..1_000_000)),
            only: value("--only").map(str::to_owned),
            targets: has("--targets") || has("--only-targets") || seconds.is_some(),
            only_targets: has("--only-targets"),
        }
    }

    fn wants(&self, fault: Fault) -> bool {
        let only = self.only.as_deref();
        only.is_none_or(|only| fault.name().contains(only))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    common::log();
    if std::env::var_os("ETCD_IMAGE").is_some_and(|image| !image.is_empty())
        && std::env::var_os("ETCD_BIN").is_none_or(|binary| binary.is_empty())
    {
        println!("chaos: needs an etcd binary; skipped because ETCD_IMAGE is set");
        return ExitCode::SUCCESS;
    }
    let Some(binary) = common::etcd::binary() else {
        println!("chaos: needs an etcd binary: set ETCD_BIN, or put etcd on the PATH");
        return ExitCode::FAILURE;
    };
    let arguments = Arguments::parse();
    let mut faults = ON_THREE.iter().chain(&ON_ONE);
    if !faults.any(|fault| arguments.wants(*fault)) {
        let names: Vec<_> = ON_THREE.iter().chain(&ON_ONE).map(|it| it.name()).collect();
        println!("chaos: --only matches none of {names:?}");
        return ExitCode::FAILURE;
    }
    println!("chaos: etcd {}, seed {}", binary.display(), arguments.seed);
    let report = Report::new();
    if !arguments.only_targets {
        let mut rng = fastrand::Rng::with_seed(arguments.seed);
        // Concurrently, because the two clusters share nothing.
        tokio::join!(
            inject(&ON_THREE, 3, None, &binary, &arguments, rng.fork(), &report),
            inject(
                &ON_ONE,
                1,
                Some(single::QUOTA),
                &binary,
                &arguments,
                rng,
                &report
            ),
        );
        report.print();
    }
    if arguments.only.is_none() {
        println!("\ntargets (etcd of one member, quiet)");
        let long = arguments.seconds.is_some();
        report.targets(targets::measure(&binary, long).await, arguments.targets);
    }
    report.end()
}

/// Injects these faults into an etcd cluster of this size.
async fn inject(
    faults: &[Fault],
    members: usize,
    quota: Option<u64>,
    binary: &Path,
    arguments: &Arguments,
    mut rng: fastrand::Rng,
    report: &Report,
) {
    let long = arguments.seconds.is_some();
    let mut faults = faults.to_vec();
    faults.retain(|fault| arguments.wants(*fault) && (long || fault.is_quick()));
    if faults.is_empty() {
        return;
    }
    let monitor = Arc::new(Monitor::start());
    let start = Instant::now();
    let mut world = World::start(binary, members, quota, &monitor, rng.fork(), long).await;
    if let Err(problems) = world.heal().await {
        report.fail(format!("start with {members} member(s): {problems:?}"));
        return;
    }
    println!(
        "{members} member(s), {} workers: all well after {:.1?}",
        world.fleet.workers.len(),
        start.elapsed()
    );
    monitor.take();
    world.traffic.take();
    let is_over = || match arguments.seconds {
        Some(seconds) => start.elapsed() > Duration::from_secs(seconds),
        None => true,
    };
    let mut first = true;
    while first || !is_over() {
        rng.shuffle(&mut faults);
        if !long {
            // Late effects of this fault in etcd would be attributed to the next fault.
            faults.sort_by_key(|fault| *fault == Fault::StopLeader);
        }
        for fault in &faults {
            if !first && is_over() {
                break;
            }
            if !inject_one(&mut world, *fault, report).await {
                // The cluster did not recover, so the results of further faults would be
                // meaningless.
                return;
            }
        }
        first = false;
    }
}

/// Injects one fault and waits until all is well; returns whether it is.
async fn inject_one(world: &mut World, fault: Fault, report: &Report) -> bool {
    let mut found = Found::default();
    let (stalls, start) = (Stalls::watch(), Instant::now());
    fault.inject(world, &mut found).await;
    let lasted = start.elapsed();
    if let Some(reason) = found.skipped {
        report.skip(fault, reason);
        return true;
    }
    let mut healed = world.heal().await;
    if let (Ok(healed), Some(after)) = (&mut healed, found.healed_after) {
        healed.after = after;
    }
    let well = healed.is_ok();
    found.count_revoked_leases(world).await;
    world.monitor.allow_smaller_tokens(false);
    report.row(Row {
        fault,
        lasted,
        stalled: stalls.so_far(),
        found,
        stats: world.monitor.take(),
        requests: world.traffic.take(),
        healed,
    });
    well
}
