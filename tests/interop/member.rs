//! A member of a group as a process: `member ours|theirs ENDPOINT GROUP ID`.
//!
//! Every few milliseconds it asks its node whether it leads. While it does, each answer is a line:
//! the microseconds since 1970 before and after the question. SIGTERM ends it as its crate ends a node.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;

/// How often the node is asked.
const EVERY: Duration = Duration::from_millis(5);
const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Of the lease, in seconds.
const TTL: i64 = 2;

fn micros() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_micros()
}

/// Runs a node of either crate: their calls are the same.
macro_rules! run {
    ($cluster:ident, $endpoint:expr, $group:expr, $id:expr) => {{
        struct Length(usize);
        impl $cluster::MetricsCollector for Length {
            fn collect(&self) -> $cluster::NodeMetadata {
                serde_json::json!({ "queue_depth": self.0 })
            }
        }
        let node = $cluster::ClusterNodeBuilder::new(vec![$endpoint], $id.clone(), IP, $group)
            .ttl(TTL)
            .metrics_collector(Length($id.len()))
            .metrics_update_interval(1)
            .build();
        let (shutdown, mut down) = broadcast::channel(1);
        let running = node.clone();
        let run = tokio::spawn(async move { running.run(&mut down).await });
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                () = tokio::time::sleep(EVERY) => {}
            }
            let before = micros();
            if node.is_leader() {
                println!("{before} {}", micros());
            }
        }
        let _ = shutdown.send(());
        run.await??;
    }};
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, endpoint, group, id] = arguments.try_into().map_err(|_| "wrong arguments")?;
    match kind.as_str() {
        "ours" => run!(pingora_etcd, endpoint, group, id),
        "theirs" => run!(photon_etcd_cluster, endpoint, group, id),
        other => return Err(format!("{other}: ours or theirs is expected").into()),
    }
    std::io::stdout().flush()?;
    Ok(())
}
