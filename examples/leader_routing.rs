//! An HTTP proxy that sends writes to the leader and reads to any node.
//!
//! ```text
//! cargo run --example leader_routing -- --conf config/leader_routing.yaml
//!
//! curl -i -X POST 127.0.0.1:6189/   # always the leader, with its token in x-leader-epoch
//! curl -i 127.0.0.1:6189/           # any node
//! ```
//!
//! While there is no leader, a write waits up to 2 s and then gets 503 with `retry-after`.

use std::process::ExitCode;

use clap::Parser;
use pingora::server::Server;
use pingora_etcd::config::{ClusterConfig, server_conf};
use pingora_etcd::pingora::ClusterProxy;

/// An HTTP proxy that sends writes to the leader and reads to any node.
#[derive(Parser)]
struct Arguments {
    /// The configuration file.
    #[arg(long, short)]
    conf: String,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "warn,pingora_etcd=info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match build(&Arguments::parse().conf) {
        Ok(server) => server.run_forever(),
        Err(error) => {
            eprintln!("leader_routing: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(path: &str) -> Result<Server, Box<dyn std::error::Error>> {
    let config = ClusterConfig::load(path)?;
    let text = std::fs::read_to_string(path)?;
    let mut server = Server::new_with_opt_and_conf(None, server_conf(&text, path)?);
    ClusterProxy::add_to(&mut server, &config, true)?;
    server.bootstrap();
    Ok(server)
}
