//! `serve`: the bundled load balancer.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pingora::server::Server;
use pingora::server::configuration::Opt;
use pingora::services::background::background_service;
use pingora_etcd::admin;
use pingora_etcd::config::{self, ClusterConfig};
use pingora_etcd::proxy::{self, ClusterProxy, ConfigFile};

use crate::{Result, effective, output};

#[derive(Args)]
pub struct Arguments {
    /// The file.
    #[arg(long, short, env = "PINGORA_ETCD_CONF", value_name = "FILE")]
    conf: PathBuf,
    /// Send writes to the leader of the group, with its fencing token.
    #[arg(long)]
    leader_routing: bool,
    /// Check the file, print every value in it and where it comes from, and end.
    #[arg(long)]
    check: bool,
    /// Take the listening sockets over from the process that has them, without a gap.
    #[arg(long)]
    upgrade: bool,
}

pub fn run(arguments: &Arguments) -> Result {
    let (text, name) = (
        config::read(&arguments.conf)?,
        arguments.conf.display().to_string(),
    );
    let config = ClusterConfig::from_yaml(&text, &name)?;
    let server_conf = config::server_conf(&text, &name)?;
    let options = Opt {
        upgrade: arguments.upgrade,
        test: arguments.check,
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(options, server_conf);
    let located = |error| config::locate(error, &text, &name);
    let parts = ClusterProxy::add_to(&mut server, &config, arguments.leader_routing);
    let parts = parts.map_err(located)?;
    admin::add_to(&mut server, &config, &parts).map_err(located)?;
    if arguments.check {
        output::line(effective::described(&text, &name)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let file = ConfigFile::new(&arguments.conf, text, parts.reloader.clone());
    server.add_service(background_service("configuration", file));
    Ok(proxy::run(server))
}
