//! An HTTP proxy that sends writes to the leader and reads to any node.
//!
//! ```text
//! cargo run --example leader_routing -- --conf config/leader_routing.yaml
//!
//! curl -i -X POST 127.0.0.1:6190/   # always the leader, with its token in x-leader-epoch
//! curl -i 127.0.0.1:6190/           # any node
//! ```
//!
//! While there is no leader, a write waits up to 2 s and then gets 503 with `retry-after`.

#[path = "../src/bin/pingora-etcd/log.rs"]
mod log;

use std::process::ExitCode;

use clap::Parser;
use pingora::server::Server;
use pingora::server::configuration::Opt;
use pingora::services::background::background_service;
use pingora_etcd::config::{self, ClusterConfig};
use pingora_etcd::proxy::{self, ClusterProxy, ConfigFile};

/// An HTTP proxy that sends writes to the leader and reads to any node.
#[derive(Parser)]
struct Arguments {
    /// The configuration file.
    #[arg(long, short)]
    conf: String,
    /// Take the listening sockets over from a running process.
    #[arg(long, short)]
    upgrade: bool,
}

fn main() -> ExitCode {
    log::init(log::FOR_SERVICES);
    match build(&Arguments::parse()) {
        Ok(server) => proxy::run(server),
        Err(error) => {
            log::print_error(format_args!("leader_routing: {error}"));
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
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(options, server_conf);
    let located = |error| config::locate(error, &text, path);
    let parts = ClusterProxy::add_to(&mut server, &config, true).map_err(located)?;
    #[cfg(feature = "admin")]
    pingora_etcd::admin::add_to(&mut server, &config, &parts).map_err(located)?;
    // Changes of the file are taken over while it runs.
    let file = ConfigFile::new(path, text, parts.reloader);
    server.add_service(background_service("configuration", file));
    Ok(server)
}
