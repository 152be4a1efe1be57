//! `register`: a program in any language as a member of a group.

mod check;
mod child;
mod load;
mod member;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use pingora_etcd::metrics::MetricsCollector;
use pingora_etcd::{Cluster, ClusterNode, NoopMetricsCollector};
use tokio::runtime::Runtime;
use tracing::{info, warn};

use crate::connection::{Connection, Target};
use crate::{Failure, Result};
use check::{Check, Health};
use child::{Child, Signals};
use load::Load;
use member::Member;

/// Starts a command, registers it when its check passes, publishes how loaded it is, takes it out while
/// the check fails, and ends with its exit status.
///
/// The variables with the password for etcd are not passed on to the command.
///
/// On SIGTERM, SIGINT or SIGQUIT the node drains and leaves the group; then the signal is passed on. A
/// second one is passed on at once. SIGHUP, SIGUSR1 and SIGUSR2 are passed on.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    connection: Connection,
    /// The port that the command serves on.
    #[arg(long, short, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// The address that others reach it at. Default: the one that this machine reaches etcd from.
    #[arg(long)]
    ip: Option<IpAddr>,
    /// The id of the node, unique in the group. Default: the name of the machine and the port.
    #[arg(long)]
    id: Option<String>,
    /// The zone that it runs in.
    #[arg(long)]
    zone: Option<String>,
    /// Labels.
    #[arg(long, value_delimiter = ',')]
    tags: Vec<String>,
    /// The static weight: its share of the traffic relative to other nodes.
    #[arg(long)]
    weight: Option<f64>,
    /// The priority as a candidate for leadership.
    #[arg(long, default_value_t = 0)]
    priority: u16,
    /// Seconds after a crash of this program until the registration expires.
    #[arg(long, default_value_t = 10)]
    ttl: i64,
    #[command(flatten)]
    check: check::Options,
    #[command(flatten)]
    load: load::Options,
    /// How long the node drains before it leaves, in seconds, so that requests in flight end.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3600))]
    drain: u64,
    /// How long the command may take to end after the signal, in seconds. Then it is killed.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    grace: u64,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub fn run(arguments: Arguments) -> Result {
    let target = arguments.connection.target()?;
    let cluster = Cluster::builder(target.etcd.clone())
        .ttl(arguments.ttl)
        .try_build()?;
    let sidecar = Sidecar {
        secrets: target.secrets(),
        address: SocketAddr::new(arguments.address(&target)?, arguments.port),
        id: arguments.id()?,
        cluster,
        group: target.group,
        run: fastrand::u64(1..),
        arguments,
    };
    // Wrong options are an error before the command is started.
    sidecar.node(NoopMetricsCollector)?;
    let runtime = Runtime::new()?;
    let status = runtime.block_on(sidecar.run());
    // What is left waits for a store that does not answer.
    runtime.shutdown_background();
    status
}

impl Arguments {
    fn address(&self, target: &Target) -> std::result::Result<IpAddr, Failure> {
        if let Some(ip) = self.ip {
            return Ok(ip);
        }
        let mut loopback = None;
        for endpoint in &target.etcd.endpoints {
            let host = endpoint.rsplit("://").next().unwrap_or(endpoint);
            match own_address(host.trim_end_matches('/')) {
                Some(address) if !address.is_loopback() => return Ok(address),
                // An etcd on this machine says nothing of how others reach it.
                found => loopback = loopback.or(found),
            }
        }
        if let Some(address) = loopback {
            warn!(%address, "this address is registered, which others cannot reach; --ip gives another one");
        }
        loopback.ok_or_else(|| Failure::Error("give the address of this machine by --ip".into()))
    }

    fn id(&self) -> std::io::Result<String> {
        match &self.id {
            Some(id) => Ok(id.clone()),
            None => {
                let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
                Ok(format!("{}-{}", name.trim(), self.port))
            }
        }
    }
}

/// The address that this machine reaches `host:port` from. Nothing is sent.
fn own_address(host: &str) -> Option<IpAddr> {
    let there = host.to_socket_addrs().ok()?.next()?;
    let any: SocketAddr = match there {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(there).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Seconds from one sample of the load to the next. What has not changed much is not written.
const METRICS_INTERVAL: u64 = 2;

struct Sidecar {
    arguments: Arguments,
    cluster: Cluster,
    group: String,
    run: u64,
    id: String,
    address: SocketAddr,
    /// Variables that are for this program only.
    secrets: Vec<String>,
}

impl Sidecar {
    fn node(
        &self,
        load: impl MetricsCollector + 'static,
    ) -> std::result::Result<ClusterNode, Failure> {
        let arguments = &self.arguments;
        let mut node = self
            .cluster
            .node(&self.id, self.address.ip(), &self.group)
            .port(self.address.port())
            .tags(&arguments.tags)
            .priority(arguments.priority)
            .metrics_update_interval(METRICS_INTERVAL)
            // What an operator says of it holds also after its check has failed for a while.
            .run_id(self.run)
            .metrics_collector(load);
        if let Some(zone) = &arguments.zone {
            node = node.zone(zone);
        }
        if let Some(weight) = arguments.weight {
            node = node.weight(weight);
        }
        Ok(node.try_build()?)
    }

    async fn run(&self) -> Result {
        let arguments = &self.arguments;
        let mut signals = Signals::new()?;
        let check = Check::new(&arguments.check, self.address)?;
        let load = Load::new(&arguments.load)?;
        let mut child = Child::start(&arguments.command, &self.secrets)?;
        load.start(child.id());
        let mut health = check.start();
        let mut member = Member::default();
        let ended = loop {
            tokio::select! {
                status = child.ended() => break Some(status?),
                signal = signals.next() => {
                    if Signals::ends(signal) {
                        info!(signal, "the node leaves before the command ends");
                        break self.leave(&mut member, &mut signals, &mut child, signal).await?;
                    }
                    child.signal(signal);
                }
                Some(health) = health.recv() => match health {
                    Health::Good => {
                        info!(address = %self.address, "the command is ready");
                        member.join(self.node(load.collector())?);
                    }
                    Health::Bad(reason) => {
                        warn!(reason, "the node leaves until its check passes again");
                        member.leave(Duration::ZERO);
                    }
                },
                error = member.failed() => warn!(%error, "the node cannot register"),
            }
        };
        // What the command has started may still serve requests.
        member.leave(Duration::ZERO);
        member.hurry();
        let grace = Duration::from_secs(arguments.grace);
        let status = match ended {
            Some(status) => status,
            None => child.ended_within(grace, &mut signals).await?,
        };
        info!(%status, "the command has ended");
        child.end_rest(grace, &mut signals).await;
        member.left().await;
        Ok(child::exit_code(status))
    }

    /// Drains and leaves, and passes the signal on. A second signal, or the end of the command, cuts it
    /// short. Returns the status of the command, if it has ended.
    async fn leave(
        &self,
        member: &mut Member,
        signals: &mut Signals,
        child: &mut Child,
        first: i32,
    ) -> Result<Option<ExitStatus>> {
        member.leave(Duration::from_secs(self.arguments.drain));
        loop {
            tokio::select! {
                () = member.left() => {
                    child.signal(first);
                    return Ok(None);
                }
                signal = signals.next() => {
                    child.signal(signal);
                    if Signals::ends(signal) {
                        return Ok(None);
                    }
                }
                status = child.ended() => return Ok(Some(status?)),
            }
        }
    }
}
