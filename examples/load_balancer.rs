//! A complete HTTP load balancer from one YAML file.
//!
//! ```text
//! cargo run --example load_balancer -- --conf config/load_balancer.yaml
//! cargo run --example load_balancer -- --conf config/demo.yaml --demo 3
//! ```
//!
//! With `--demo N`, N workers run in the same process, on 127.0.0.1:9001 and up.

#[path = "../src/bin/pingora-etcd/log.rs"]
mod log;
mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use async_trait::async_trait;
use clap::Parser;
use pingora::server::configuration::Opt;
use pingora::server::{Server, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora_etcd::Cluster;
use pingora_etcd::config::{self, ClusterConfig};
use pingora_etcd::proxy::{self, ClusterProxy, ConfigFile, Shutdown};
use support::{WorkerOptions, run_worker};
use tokio::task::JoinSet;

const FIRST_DEMO_PORT: u16 = 9001;
/// How long they may take for requests in flight, within the grace period of the process.
const DEMO_GRACE: Duration = Duration::from_secs(10);

/// A complete HTTP load balancer from one YAML file.
#[derive(Parser)]
struct Arguments {
    /// The configuration file.
    #[arg(long, short)]
    conf: String,
    /// Also start this many workers in this process, on 127.0.0.1:9001 and up.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=99))]
    demo: u16,
    /// Take the listening sockets over from a running process.
    #[arg(long, short)]
    upgrade: bool,
    /// Check the configuration and exit.
    #[arg(long, short)]
    test: bool,
}

fn main() -> ExitCode {
    log::init(log::FOR_SERVICES);
    let arguments = Arguments::parse();
    match build(&arguments) {
        Ok(server) if !arguments.test => proxy::run(server),
        Ok(_) => {
            log::print(format_args!("{}: ok", arguments.conf));
            ExitCode::SUCCESS
        }
        Err(error) => {
            log::print_error(format_args!("load_balancer: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn build(arguments: &Arguments) -> Result<Server, Box<dyn std::error::Error>> {
    let path = &arguments.conf;
    let text = config::read(path)?;
    let config = ClusterConfig::from_yaml(&text, path)?;
    let server_conf = config::server_conf(&text, path)?;
    let options = Opt {
        upgrade: arguments.upgrade,
        test: arguments.test,
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(options, server_conf);
    let located = |error| config::locate(error, &text, path);
    let parts = ClusterProxy::add_to(&mut server, &config, false).map_err(located)?;
    #[cfg(feature = "admin")]
    pingora_etcd::admin::add_to(&mut server, &config, &parts).map_err(located)?;
    // Changes of the file are taken over while it runs.
    let file = ConfigFile::new(path, text, parts.reloader);
    server.add_service(background_service("configuration", file));
    if arguments.demo > 0 {
        let workers = Workers {
            config: config.clone(),
            count: arguments.demo,
        };
        server.add_service(background_service("demo workers", workers));
    }
    if !arguments.test && arguments.demo > 0 {
        print_suggestions(&config, arguments.demo);
    }
    Ok(server)
}

/// The demo workers in this process.
struct Workers {
    config: ClusterConfig,
    count: u16,
}

#[async_trait]
impl BackgroundService for Workers {
    async fn start(&self, shutdown: ShutdownWatch) {
        // The process does not end before they have left.
        let _hold = Shutdown::of_process().hold();
        let mut workers = JoinSet::new();
        let cluster = match Cluster::connect(self.config.etcd.clone()) {
            Ok(cluster) => cluster,
            Err(error) => exit_with(&error),
        };
        for index in 0..self.count {
            let port = FIRST_DEMO_PORT + index;
            let id = format!("worker-{}", index + 1);
            let options = WorkerOptions {
                cluster: cluster.clone(),
                group: self.config.group.clone(),
                id: id.clone(),
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                advertise: None,
                zone: None,
                priority: 0,
                grace: DEMO_GRACE,
                slots: None,
            };
            let mut shutdown = shutdown.clone();
            workers.spawn(async move {
                let shutdown = async move { drop(shutdown.wait_for(|down| *down).await) };
                match run_worker(options, shutdown).await {
                    Ok(ended) => tracing::info!(id, ?ended, "worker ended"),
                    Err(error) => tracing::error!(id, error, "worker failed"),
                }
            });
        }
        while let Some(ended) = workers.join_next().await {
            if let Err(error) = ended
                && error.is_panic()
            {
                exit_with(&error);
            }
        }
    }
}

/// Ends the process when a worker has panicked or none can start, because the demo would otherwise
/// continue without workers and without an explanation.
fn exit_with(reason: &dyn std::fmt::Display) -> ! {
    log::print_error(format_args!("load_balancer: workers: {reason}"));
    std::process::exit(1);
}

fn print_suggestions(config: &ClusterConfig, count: u16) {
    let listen = &config.listen;
    let page = config.admin.as_ref().map(|admin| {
        let address = format!("http://{}/", admin.listen);
        format!("  {address:69}  # in a browser: the live page\n")
    });
    let (first, last) = (FIRST_DEMO_PORT, FIRST_DEMO_PORT + count - 1);
    log::print(format_args!(
        "\
load balancer on http://{listen}, {count} workers on ports {first} to {last}, group {group}

Try, in another terminal:

{page}  curl -i http://{listen}/                                         # see x-upstream-node
  for i in $(seq 1000); do curl -s http://{listen}/; done | sort | uniq -c
  curl -X PUT 'http://127.0.0.1:{first}/load?cpu=95&memory=40&queue=12'   # load worker-1, count again
  curl -X PUT 'http://127.0.0.1:{first}/load?cpu=0&memory=0&queue=0'
  curl -X POST http://127.0.0.1:{last}/stop                        # it leaves: no request fails
  curl -X POST http://127.0.0.1:{first}/crash                       # requests are retried; it is gone after 5 s

Press Ctrl-C to end.
",
        group = config.group,
        page = page.unwrap_or_default(),
    ));
}
