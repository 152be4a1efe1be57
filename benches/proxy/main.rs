//! What a request costs in the proxy: CPU time and throughput, beside a bare Pingora proxy with static
//! round robin, and nginx and HAProxy where they are installed. All in one run, one thread each, 64
//! connections that are kept.
//!
//! ```text
//! cargo bench --all-features --bench proxy              # about two minutes
//! cargo bench --all-features --bench proxy -- --seconds 1 --rounds 1
//! ```
//!
//! The limits: `cluster proxy` costs at most 1.0 times the bare proxy, and the front at most 3 % of the
//! proxy. Load and backends run in this process, each proxy in one of its own.

mod load;
mod others;
mod proxies;

use std::time::Duration;

use load::{Load, Measured};
use others::Running;

/// The proxies, by name, and how each is started.
const NAMES: [&str; 5] = [
    "bare",
    "cluster proxy",
    "without the front",
    "nginx",
    "haproxy",
];

fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

fn main() {
    if let Some(kind) = argument("--serve") {
        proxies::serve(&kind);
        return;
    }
    // `cargo test --benches` and the CI only check that it starts and that each proxy answers.
    let is_test = std::env::args().any(|argument| argument == "--test");
    let number =
        |name, default| argument(name).map_or(default, |text| text.parse().expect("a number"));
    let seconds = if is_test {
        0.2
    } else {
        number("--seconds", 3.0)
    };
    let rounds = if is_test {
        1
    } else {
        number("--rounds", 5.0) as usize
    };
    let backends = load::backends();
    let running: Vec<Running> = NAMES
        .iter()
        .filter_map(|name| Running::start(name, &backends))
        .collect();
    for load in Load::ALL {
        println!("\n{}", load.name());
        let mut figures: Vec<Vec<Measured>> = running.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds {
            // In turns, each time another one first: the machine changes in between.
            for index in 0..running.len() {
                let at = (index + round) % running.len();
                let measured = load.measure(&running[at], Duration::from_secs_f64(seconds));
                figures[at].push(measured);
            }
        }
        print_table(&running, &figures);
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Ratios are those of one round, of which the median is shown.
fn print_table(running: &[Running], figures: &[Vec<Measured>]) {
    println!(
        "{:20} {:>12} {:>12} {:>10}",
        "", "CPU us", "requests/s", "CPU/bare"
    );
    for (proxy, measured) in running.iter().zip(figures) {
        let cost = median(measured.iter().map(Measured::cost));
        let rate = median(measured.iter().map(Measured::rate));
        let pairs = measured.iter().zip(&figures[0]);
        let ratio = median(pairs.map(|(one, bare)| one.cost() / bare.cost()));
        println!("{:20} {cost:12.1} {rate:12.0} {ratio:10.3}", proxy.name);
    }
    let find = |name| running.iter().position(|proxy| proxy.name == name);
    if let (Some(with), Some(without)) = (find("cluster proxy"), find("without the front")) {
        let pairs = figures[with].iter().zip(&figures[without]);
        let part = median(pairs.map(|(with, without)| with.cost() / without.cost() - 1.0));
        println!("the front: {:+.1} % of CPU", part * 100.0);
    }
}
