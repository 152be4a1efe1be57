//! What a request costs in the proxy: CPU time and throughput, beside a bare Pingora proxy with static
//! round robin, and nginx, HAProxy and Envoy where they are installed. All in one run, one thread each, 64
//! connections that are kept.
//!
//! ```text
//! make bench-proxy                                      # six minutes, after the build
//! ETCD_BIN=... cargo bench --profile release --all-features --bench proxy -- --seconds 1 --rounds 1
//! ```
//!
//! `installed` is the command `pingora-etcd` with the allocator that `make install` gives it, `cluster proxy` the
//! same parts in this program, with that of the bare proxy. Nothing is checked, because single runs differ by more
//! than a tenth. The aim is that the installed proxy costs at most 0.95 times the bare one and 1.6 times nginx, and
//! the front at most 3 % of the proxy. Load, backends and their registration run in this process, each proxy in one
//! of its own.

#[path = "../../tests/common/mod.rs"]
mod common;
mod load;
mod others;
mod proxies;

use std::time::Duration;

use common::etcd::Etcd;
use load::{Load, Measured};
use others::Running;

/// The proxies, by name, and how each is started.
const NAMES: [&str; 7] = [
    "bare",
    "installed",
    "cluster proxy",
    "without the front",
    "nginx",
    "haproxy",
    "envoy",
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
        number("--seconds", 0.5)
    };
    let rounds = if is_test {
        1
    } else {
        number("--rounds", 21.0) as usize
    };
    let backends = load::backends();
    let etcd = Etcd::own();
    proxies::register(backends.clone(), etcd.options());
    let running: Vec<Running> = NAMES
        .iter()
        .filter_map(|name| Running::start(name, &backends, &etcd.endpoints()[0]))
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
    let find = |name| running.iter().position(|proxy| proxy.name == name);
    let ratio = |index: usize, base: usize| {
        let pairs = figures[index].iter().zip(&figures[base]);
        median(pairs.map(|(one, base)| one.cost() / base.cost()))
    };
    let nginx = find("nginx");
    println!(
        "{:20} {:>12} {:>12} {:>10} {:>10}",
        "", "CPU us", "requests/s", "CPU/bare", "CPU/nginx"
    );
    for (index, (proxy, measured)) in running.iter().zip(figures).enumerate() {
        let cost = median(measured.iter().map(Measured::cost));
        let rate = median(measured.iter().map(Measured::rate));
        let beside_nginx = nginx.map_or("-".to_owned(), |it| format!("{:.3}", ratio(index, it)));
        println!(
            "{:20} {cost:12.1} {rate:12.0} {:10.3} {beside_nginx:>10}",
            proxy.name,
            ratio(index, 0),
        );
    }
    if let (Some(with), Some(without)) = (find("cluster proxy"), find("without the front")) {
        println!(
            "the front: {:+.1} % of CPU",
            (ratio(with, without) - 1.0) * 100.0
        );
    }
}
