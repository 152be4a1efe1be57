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
//! To an etcd with TLS and users (build it with `--features tls`):
//!
//! ```text
//! ETCD_PASSWORD=... cargo run --features tls --example worker -- --etcd https://10.0.0.1:2379 \
//!     --etcd-ca ca.pem --etcd-cert w1.pem --etcd-key w1.key --etcd-user w1 --id w1
//! ```
//!
//! With `--slots 4 --service-ms 20` it works on four requests at a time, for 20 ms each on average,
//! and reports how much of that is in use; `PUT /slots?count=2` leaves it two of them, as if a
//! neighbour had taken the others.

#[path = "support/log.rs"]
mod log;
mod support;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use pingora_etcd::{
    Cluster, EtcdOptions,
    store::{Credentials, Password, TlsOptions},
};
use support::{Ended, WorkerOptions, run_worker};

/// A small HTTP server that registers in a group.
#[derive(Parser)]
struct Arguments {
    /// etcd's endpoints.
    #[arg(long, value_delimiter = ',', default_value = "http://127.0.0.1:2379")]
    etcd: Vec<String>,
    /// The CAs that may have signed etcd's certificate. Without it: the system's.
    #[arg(long)]
    etcd_ca: Option<PathBuf>,
    /// The certificate to show to etcd.
    #[arg(long, requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// etcd's user. Its password is in --etcd-password-file, or in the variable ETCD_PASSWORD.
    #[arg(long)]
    etcd_user: Option<String>,
    /// The file that the password is in.
    #[arg(long, requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
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
    let cluster = Cluster::builder(etcd(&arguments)).ttl(arguments.ttl);
    let cluster = match cluster.try_build() {
        Ok(cluster) => cluster,
        Err(error) => {
            log::complain(format_args!("worker: {error}"));
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
            log::complain("worker: ended at once; its lease will run out");
            return ExitCode::FAILURE;
        }
    };
    match ended {
        Ok(Ended::Left) => ExitCode::SUCCESS,
        // At once: no destructor, no flushing, as a crash would.
        Ok(Ended::Crashed) => std::process::abort(),
        Err(error) => {
            log::complain(format_args!("worker: {error}"));
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
        // Never an argument, which everybody on the machine can see.
        let password = match &arguments.etcd_password_file {
            Some(file) => Password::File(file.clone()),
            None => Password::Env("ETCD_PASSWORD".to_owned()),
        };
        options = options.credentials(Credentials::new(user, password));
    }
    options
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
