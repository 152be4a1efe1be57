//! Measures what fleets of balancers cost etcd.
//!
//! The number of writes by workers is simulated, for nodes that sample every few seconds, with and
//! without a deadband. The cost of a write and of a watch event is measured on a real etcd, which
//! is found in the same way as for the tests. The table combines both.

use std::path::Path;
use std::time::{Duration, Instant};

use pingora_etcd::{metadata_keys, metrics::Deadband};

use super::common::etcd::Etcd;

/// The sampling interval of the nodes, in seconds.
const SAMPLE_INTERVAL: usize = 5;
/// The age at which an entry is written in any case, in seconds.
const MAX_AGE: usize = 30;
/// The number of simulated nodes, and the simulated seconds.
const NODES: usize = 1_000;
const SECONDS: usize = 1_200;

/// The number of puts in the measurement.
const PUTS: usize = 4_000;
/// The number of watch streams in the measurement, each on its own connection.
const WATCHERS: usize = 50;

/// The numbers of nodes and balancers in the table.
const GROUPS: [usize; 3] = [1_000, 10_000, 100_000];
const BALANCERS: [usize; 3] = [10, 100, 1_000];

pub(crate) fn print() {
    let written = [
        ("every sample", writes(&Deadband::none(), true)),
        ("with the deadband", writes(&Deadband::default(), true)),
        ("with it, quiet nodes", writes(&Deadband::default(), false)),
    ];
    println!(
        "{NODES} nodes that sample every {SAMPLE_INTERVAL} s, {SECONDS} s simulated; writes per second and node:\n"
    );
    println!("{:<24}{:>10}{:>28}", "", "mean", "busiest second / mean");
    for (what, writes) in &written {
        println!("{what:<24}{:>10.4}{:>28.2}", writes.mean, writes.peak);
    }
    let etcd = Etcd::own();
    let Some(pid) = etcd.pid() else {
        println!("\nThe CPU time of etcd can only be read from a local process: set ETCD_BIN.");
        return;
    };
    let costs = Costs::measure(&etcd, pid);
    println!(
        "\nmeasured on one etcd with {WATCHERS} watch streams, events of {} bytes: {:.0} us of CPU per \
         write, {:.1} us per event, {:.0} us per renewal\n",
        costs.bytes,
        costs.write * 1e6,
        costs.event * 1e6,
        costs.renewal * 1e6
    );
    println!(
        "{:>8} {:>9} {:<22} {:>10} {:>11} {:>10} {:>12}",
        "nodes", "balancers", "metrics", "writes/s", "events/s", "MB/s", "etcd, cores"
    );
    // A lease of 5 s is renewed after every third of its TTL.
    let renewals = 3.0 / 5.0;
    for nodes in GROUPS {
        for balancers in BALANCERS {
            let none = Writes {
                mean: 0.0,
                peak: 1.0,
            };
            let ways = written.iter().map(|(what, writes)| (*what, writes));
            for (what, writes) in ways.chain([("in responses (ORCA)", &none)]) {
                let count = nodes as f64;
                let written = count * writes.mean;
                let events = written * balancers as f64;
                let cores =
                    written * costs.write + events * costs.event + count * renewals * costs.renewal;
                println!(
                    "{nodes:>8} {balancers:>9} {what:<22} {written:>10.0} {events:>11.0} {:>10.1} {cores:>12.2}",
                    events * costs.bytes as f64 / 1e6
                );
            }
        }
    }
    println!(
        "\nThe last column includes renewals, {:.1} per second and node. With metrics in responses only joining, leaving and \
         draining are written.",
        renewals
    );
}

struct Writes {
    /// Per second and node.
    mean: f64,
    /// In the busiest second, as a multiple of the mean.
    peak: f64,
}

/// How often nodes write. Their CPU usage fluctuates around a mean: by several points from sample
/// to sample if they are `busy`, otherwise by less than one.
fn writes(deadband: &Deadband, busy: bool) -> Writes {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut a_second = vec![0_u32; SECONDS];
    let noise = if busy { 6.0 } else { 0.5 };
    for _ in 0..NODES {
        let mut time = SAMPLE_INTERVAL as f64 * rng.f64();
        let mean = 20.0 + 60.0 * rng.f64();
        let mut cpu = mean;
        let mut written: Option<(serde_json::Value, f64)> = None;
        while time < SECONDS as f64 {
            // A first-order autoregressive process with a memory of about a minute.
            cpu = mean + 0.92 * (cpu - mean) + noise * (rng.f64() + rng.f64() - 1.0);
            let sample = serde_json::json!({
                metadata_keys::CPU_USAGE_PERCENT: cpu.clamp(0.0, 100.0),
                metadata_keys::MEMORY_USAGE_PERCENT: 50.0 + cpu / 50.0,
                metadata_keys::QUEUE_DEPTH: (cpu / 25.0) as u32,
            });
            let is_due = written.as_ref().is_none_or(|(last, at)| {
                deadband.is_left(last, &sample)
                    || time - at >= MAX_AGE as f64 * (0.9 + 0.1 * rng.f64())
            });
            if is_due {
                a_second[time as usize] += 1;
                written = Some((sample, time));
            }
            // With jitter, like a worker, so that the nodes do not all write at the same time.
            time += SAMPLE_INTERVAL as f64 * (1.0 + 0.1 * rng.f64());
        }
    }
    // Without the beginning, when every node writes.
    let settled = &a_second[2 * MAX_AGE..];
    let mean = settled.iter().sum::<u32>() as f64 / settled.len() as f64;
    let most = settled.iter().max().copied().unwrap_or(0);
    Writes {
        mean: mean / NODES as f64,
        peak: f64::from(most) / mean.max(1e-9),
    }
}

/// The costs of etcd, in seconds of CPU time.
struct Costs {
    write: f64,
    event: f64,
    renewal: f64,
    /// The size of an event in a response.
    bytes: usize,
}

impl Costs {
    #[tokio::main(flavor = "multi_thread", worker_threads = 2)]
    async fn measure(etcd: &Etcd, pid: u32) -> Self {
        let value = |index: usize| {
            format!(
                r#"{{"id":"worker-{index:05}","ip":"10.0.0.1","last_seen":1732450000123,"metadata":{{"cpu_usage_percent":{}.5,"memory_usage_percent":40.25,"memory_available_bytes":8000000000,"queue_depth":3}},"port":8080,"priority":0}}"#,
                index % 100
            )
        };
        let key = |index: usize| format!("registry/fleet/worker-{:05}", index % 1_000);
        // Key, value, revisions, lease, and the framing.
        let bytes = key(0).len() + value(0).len() + 40;
        let put_all = async || {
            let mut client = etcd.raw_client().await;
            for index in 0..PUTS {
                client
                    .put(key(index), value(index), None)
                    .await
                    .expect("etcd serves");
            }
        };
        put_all().await;
        let alone = cpu_of(pid, put_all()).await;

        let mut streams = open_watches(etcd).await;
        let watched = cpu_of(pid, async {
            put_all().await;
            while streams.join_next().await.is_some() {}
        })
        .await;

        let mut client = etcd.raw_client().await;
        let lease = client.lease_grant(60, None).await.expect("a lease").id();
        let (mut keeper, mut replies) = client.lease_keep_alive(lease).await.expect("a keeper");
        let renewals = cpu_of(pid, async {
            for _ in 0..PUTS {
                keeper.keep_alive().await.expect("the renewal is sent");
                replies.message().await.expect("the renewal succeeds");
            }
        })
        .await;
        let each = |total: Duration| total.as_secs_f64() / PUTS as f64;
        Self {
            write: each(alone),
            event: each(watched.saturating_sub(alone)) / WATCHERS as f64,
            renewal: each(renewals),
            bytes,
        }
    }
}

/// Opens the watch streams; each task ends when it has received every put.
async fn open_watches(etcd: &Etcd) -> tokio::task::JoinSet<()> {
    let mut streams = tokio::task::JoinSet::new();
    let mut opened = Vec::new();
    for _ in 0..WATCHERS {
        let mut client = etcd.raw_client().await;
        let (ready, open) = tokio::sync::oneshot::channel();
        opened.push(open);
        streams.spawn(async move {
            let options = etcd_client::WatchOptions::new().with_prefix();
            let watch = client.watch("registry/fleet/", Some(options)).await;
            let mut stream = watch.expect("a watch");
            let _ = ready.send(());
            let mut seen = 0;
            while seen < PUTS {
                let response = stream.message().await.expect("the watch stays open");
                seen += response.map_or(0, |response| response.events().len());
            }
        });
    }
    for open in opened {
        open.await.expect("the watch is created");
    }
    streams
}

/// The CPU time that a process uses during some work.
async fn cpu_of(pid: u32, work: impl Future<Output = ()>) -> Duration {
    let before = used(pid);
    let start = Instant::now();
    work.await;
    let used = used(pid) - before;
    eprintln!("  {used:.2?} of CPU in {:.2?}", start.elapsed());
    used
}

fn used(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    let stat = stat.expect("etcd is running");
    // The fields after the process name, which may contain blanks.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
    // User and system time, in hundredths of a second.
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}
