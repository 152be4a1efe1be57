//! A small HTTP server that registers in a group.
//!
//! ```text
//! cargo run --example worker -- --etcd http://127.0.0.1:2379 --group workers --id w1 --listen 127.0.0.1:9001
//!
//! curl -i 127.0.0.1:9001/                                       # w1, x-served-by: w1
//! curl -X PUT '127.0.0.1:9001/load?cpu=95&memory=40&queue=12'   # report this load, and slow down accordingly
//! curl -X PUT '127.0.0.1:9001/health?degraded=no+cache'          # or failing; nothing: well
//! curl -X POST 127.0.0.1:9001/stop                              # leave gracefully
//! curl -X POST 127.0.0.1:9001/crash                             # exit at once
//! ```
//!
//! SIGTERM, SIGQUIT and Ctrl-C also leave gracefully: the worker drains, so that balancers send it no
//! new requests, finishes the requests in flight within `--grace`, and leaves. A second signal ends it
//! immediately, like a crash. SIGHUP, SIGUSR1 and SIGUSR2 have no effect.
//!
//! With `--priority 1` it takes leadership over from workers with a lower priority.
//!
//! With an etcd that uses TLS and users (build it with `--features tls`):
//!
//! ```text
//! ETCD_PASSWORD=... cargo run --features tls --example worker -- --etcd https://10.0.0.1:2379 \
//!     --etcd-ca ca.pem --etcd-cert w1.pem --etcd-key w1.key --etcd-user w1 --id w1
//! ```
//!
//! With `--slots 4 --service-ms 20` it processes four requests at a time, for 20 ms each on
//! average, and reports how much of that capacity is in use; `PUT /slots?count=2` reduces it to two
//! slots, as if a neighbour had taken the others.
//!
//! Over HTTP/2 without TLS it also answers calls of gRPC, of any method, each with a stream that holds a slot:
//! nine of ten are short, a third of `--service-ms`, the others last seven times as long.

#[path = "../src/bin/pingora-etcd/log.rs"]
mod log;
mod support;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use pingora_etcd::worker::EndSignals;
use pingora_etcd::{
    Cluster, EtcdOptions,
    store::{Credentials, Password, TlsOptions},
};
use support::{Ended, WorkerOptions, run_worker};

/// A small HTTP server that registers in a group.
#[derive(Parser)]
struct Arguments {
    /// The endpoints of etcd.
    #[arg(long, value_delimiter = ',', default_value = "http://127.0.0.1:2379")]
    etcd: Vec<String>,
    /// The CAs that may have signed etcd's certificate. Default: those of the system.
    #[arg(long)]
    etcd_ca: Option<PathBuf>,
    /// The client certificate to present to etcd.
    #[arg(long, requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// The private key of the client certificate.
    #[arg(long, requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// The etcd user. The password is in --etcd-password-file or in the variable ETCD_PASSWORD.
    #[arg(long)]
    etcd_user: Option<String>,
    /// The file that contains the password.
    #[arg(long, requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
    /// The group to register in.
    #[arg(long, default_value = "workers")]
    group: String,
    /// The id of the worker, unique in the group.
    #[arg(long)]
    id: String,
    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1:9001")]
    listen: SocketAddr,
    /// The IP address that others reach it at, if it is not the one it listens on.
    #[arg(long)]
    advertise: Option<IpAddr>,
    /// The zone that it runs in.
    #[arg(long)]
    zone: Option<String>,
    /// The number of requests to process at a time; the reported load is their usage of it.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: Option<u32>,
    /// How long a request takes on average, with --slots.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    service_ms: u64,
    /// Seconds after a crash until the registration expires.
    #[arg(long, default_value_t = 5)]
    ttl: i64,
    /// The priority as a candidate: a worker with a higher one takes leadership over.
    #[arg(long, default_value_t = 0)]
    priority: u16,
    /// Seconds to wait for requests in flight when stopped.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    grace: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    log::init(log::FOR_SERVICES);
    let arguments = Arguments::parse();
    let cluster = Cluster::builder(etcd(&arguments)).ttl(arguments.ttl);
    let cluster = match cluster.try_build() {
        Ok(cluster) => cluster,
        Err(error) => {
            log::print_error(format_args!("worker: {error}"));
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
    let mut signals = match EndSignals::new() {
        Ok(signals) => signals,
        Err(error) => {
            log::print_error(format_args!("worker: signals cannot be handled: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let (told, first) = tokio::sync::oneshot::channel::<()>();
    let first = async { drop(first.await) };
    let second = async {
        signals.next().await;
        let _ = told.send(());
        signals.next().await;
    };
    let ended = tokio::select! {
        ended = run_worker(options, first) => ended,
        () = second => {
            log::print_error("worker: ended at once; its registration remains until its lease expires");
            return ExitCode::FAILURE;
        }
    };
    match ended {
        Ok(Ended::Left) => ExitCode::SUCCESS,
        // Immediately, without destructors and without flushing, like a crash.
        Ok(Ended::Crashed) => std::process::abort(),
        Err(error) => {
            log::print_error(format_args!("worker: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn etcd(arguments: &Arguments) -> EtcdOptions {
    let mut options = EtcdOptions::new(arguments.etcd.iter().cloned());
    let mut tls = TlsOptions::new();
    if let Some(file) = &arguments.etcd_ca {
        tls = tls.ca_file(file);
    }
    if let (Some(cert), Some(key)) = (&arguments.etcd_cert, &arguments.etcd_key) {
        tls = tls.identity(cert, key);
    }
    if tls != TlsOptions::new() {
        options = options.tls(tls);
    }
    if let Some(user) = &arguments.etcd_user {
        // Never as an argument, because those are visible to everybody on the machine.
        let password = match &arguments.etcd_password_file {
            Some(file) => Password::File(file.clone()),
            None => Password::Env("ETCD_PASSWORD".to_owned()),
        };
        options = options.credentials(Credentials::new(user, password));
    }
    options
}
