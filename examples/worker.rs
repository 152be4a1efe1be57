//! A small HTTP server that registers in a group.
//!
//! ```text
//! cargo run --example worker -- --etcd http://127.0.0.1:2379 --group workers --id w1 --listen 127.0.0.1:9001
//!
//! curl -i 127.0.0.1:9001/                                       # w1, x-served-by: w1
//! curl -X PUT '127.0.0.1:9001/load?cpu=95&memory=40&queue=12'   # report this load, and be as slow
//! curl -X POST 127.0.0.1:9001/stop                              # leave gracefully
//! curl -X POST 127.0.0.1:9001/crash                             # exit at once
//! ```
//!
//! SIGTERM and Ctrl-C leave gracefully too: the worker says that it drains, so that balancers send
//! it nothing new, finishes what it has, for as long as `--grace` allows, and leaves. A second one
//! ends it at once, as a crash would.
//!
//! With `--priority 1` it takes leadership over from workers without one.
//!
//! With `--slots 4 --service-ms 20` it works on four requests at a time, for 20 ms each on average,
//! and reports how much of that is in use; `PUT /slots?count=2` leaves it two of them, as if a
//! neighbour had taken the others.

#[path = "support/log.rs"]
mod log;
mod support;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use pingora_etcd::Cluster;
use support::{Ended, WorkerOptions, run_worker};

/// A small HTTP server that registers in a group.
#[derive(Parser)]
struct Arguments {
    /// etcd's endpoints.
    #[arg(long, value_delimiter = ',', default_value = "http://127.0.0.1:2379")]
    etcd: Vec<String>,
    /// The group to register in.
    #[arg(long, default_value = "workers")]
    group: String,
    /// Its id, unique in the group.
    #[arg(long)]
    id: String,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:9001")]
    listen: SocketAddr,
    /// The IP that others reach it at, if it is not the one it listens on.
    #[arg(long)]
    advertise: Option<IpAddr>,
    /// Where it runs.
    #[arg(long)]
    zone: Option<String>,
    /// Works on so many requests at a time; its reported load is what they use then.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: Option<u32>,
    /// How long a request takes on average, with --slots.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    service_ms: u64,
    /// Seconds after a crash until it is missed.
    #[arg(long, default_value_t = 5)]
    ttl: i64,
    /// As a leader: a worker with a higher one takes over.
    #[arg(long, default_value_t = 0)]
    priority: u16,
    /// Seconds to wait for requests in flight when told to stop.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    grace: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    log::init();
    let arguments = Arguments::parse();
    let cluster = Cluster::builder(arguments.etcd).ttl(arguments.ttl);
    let cluster = match cluster.try_build() {
        Ok(cluster) => cluster,
        Err(error) => {
            eprintln!("worker: {error}");
            return ExitCode::FAILURE;
        }
    };
    let options = WorkerOptions {
        cluster,
        group: arguments.group,
        id: arguments.id,
        listen: arguments.listen,
        advertise: arguments.advertise,
        zone: arguments.zone,
        priority: arguments.priority,
        grace: Duration::from_secs(arguments.grace),
        slots: arguments
            .slots
            .map(|slots| (slots, Duration::from_millis(arguments.service_ms))),
    };
    // What comes after the first signal is a second one.
    let (told, mut again) = tokio::sync::oneshot::channel();
    let first = async move {
        signal().await;
        let _ = told.send(());
    };
    let impatient = async {
        // Without a first signal there is no second one.
        if (&mut again).await.is_err() {
            std::future::pending::<()>().await;
        }
        signal().await;
    };
    let ended = tokio::select! {
        ended = run_worker(options, first) => ended,
        () = impatient => {
            eprintln!("worker: ended at once; its lease will run out");
            return ExitCode::FAILURE;
        }
    };
    match ended {
        Ok(Ended::Left) => ExitCode::SUCCESS,
        // At once: no destructor, no flushing, as a crash would.
        Ok(Ended::Crashed) => std::process::abort(),
        Err(error) => {
            eprintln!("worker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn signal() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    let terminate = async {
        match terminate {
            Ok(mut terminate) => drop(terminate.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = terminate => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
