//! How long a change takes from a put in etcd to a pick that uses it, compared with a raw etcd-client
//! watch that only waits for the event. Both are measured for the same puts. It needs an etcd, which
//! is found as the tests find theirs.
//!
//! ```text
//! ETCD_BIN=/path/to/etcd cargo bench --bench propagation
//! ```

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::WatchOptions;
use pingora_etcd::ServiceDiscovery;
use pingora_etcd::balance::Balancer;
use pingora_etcd::pingora::BalancerService;
use tokio::sync::watch;

use common::etcd::Etcd;

const PUTS: u32 = 200;
/// Between two puts. The first of several changes takes effect at once, the next ones together 20 ms later.
const PAUSE: Duration = Duration::from_millis(60);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` only checks that it starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let etcd = Etcd::shared();
    let group = common::group("propagation");
    let key = format!("registry/{group}/n1");

    let discovery = ServiceDiscovery::builder(etcd.options(), &group)
        .try_build()
        .unwrap();
    let balancer = Balancer::builder().try_build().unwrap();
    let service = Arc::new(BalancerService::new(discovery, balancer));
    let (_shutdown, down) = watch::channel(false);
    let running = service.clone();
    tokio::spawn(async move {
        use pingora::services::background::BackgroundService;
        running.start(down).await;
    });

    let mut raw = etcd.raw_client().await;
    let options = WatchOptions::new();
    let mut stream = raw.watch(key.as_str(), Some(options)).await.unwrap();
    let (seen, mut raw_seen) = watch::channel((0, Instant::now()));
    tokio::spawn(async move {
        let mut count = 0;
        while let Ok(Some(response)) = stream.message().await {
            count += response.events().len();
            if !response.events().is_empty() {
                seen.send_replace((count, Instant::now()));
            }
        }
    });

    let mut writer = etcd.raw_client().await;
    let mut by_watch = Vec::new();
    let mut by_pick = Vec::new();
    for round in 1..=PUTS {
        tokio::time::sleep(PAUSE).await;
        let value = format!(
            r#"{{"id":"n1","ip":"127.0.0.1","last_seen":{round},"metadata":{{"queue_depth":{round}}}}}"#
        );
        let start = Instant::now();
        writer.put(key.as_str(), value, None).await.unwrap();
        let picked = || {
            let upstream = service.pick()?;
            upstream.node().metric("queue_depth")
        };
        while picked() != Some(f64::from(round)) {
            assert!(start.elapsed() < Duration::from_secs(10), "never picked");
            tokio::task::yield_now().await;
        }
        by_pick.push(start.elapsed());
        let (_, at) = *raw_seen
            .wait_for(|(count, _)| *count >= round as usize)
            .await
            .unwrap();
        by_watch.push(at.saturating_duration_since(start));
    }
    println!("from before the put, {PUTS} puts, {PAUSE:?} after one another:\n");
    println!("{:<28}{:>12}{:>12}{:>12}", "", "median", "p90", "p99");
    let watch = row("raw etcd-client watch", by_watch);
    let pick = row("a pick uses it", by_pick);
    println!("{:<28}{:>12.2}", "ratio of medians", pick / watch);
}

fn row(what: &str, mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{what:<28}{:>12.1?}{:>12.1?}{:>12.1?}",
        at(0.5),
        at(0.9),
        at(0.99)
    );
    at(0.5).as_secs_f64()
}
