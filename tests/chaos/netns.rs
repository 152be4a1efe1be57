//! Runs a worker process in its own network namespace and drops all its packets. This needs root
//! and `ip`; without them the fault is skipped, and the report says so.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::common::etcd::Process;
use super::common::link::Link;
use super::faults::{EXPIRY_LIMIT, Found};
use super::fleet::TTL;
use super::traffic::example;
use super::world::World;

const ID: &str = "netns";
const PORT: u16 = 8080;

/// A network namespace and the pair of interfaces that connects it. A shell removes both when this
/// process ends, for whatever reason, because its standard input is closed then.
struct Namespace {
    name: String,
    outer: String,
    outer_ip: Ipv4Addr,
    inner_ip: Ipv4Addr,
    remover: Option<Child>,
}

impl Namespace {
    fn create() -> Result<Self, String> {
        let id = std::process::id();
        // 198.18.0.0/15 is reserved for benchmarks and not routed anywhere.
        let [_, _, high, low] = id.to_be_bytes();
        let net = |host: u8| Ipv4Addr::new(198, 18, high, (low & 0xfc) + host);
        let mut namespace = Self {
            name: format!("chaos{id}"),
            outer: format!("ch{id}o"),
            outer_ip: net(1),
            inner_ip: net(2),
            remover: None,
        };
        let (name, outer, inner) = (
            namespace.name.clone(),
            namespace.outer.clone(),
            format!("ch{id}i"),
        );
        let script = r#"trap : INT TERM; read -r _
            ip route del blackhole "$3"; ip link del "$2"; ip netns del "$1""#;
        let remover = Command::new("sh")
            .args(["-c", script, "sh", &name, &outer])
            .arg(namespace.inner_ip.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        namespace.remover = Some(remover.map_err(|error| format!("sh: {error}"))?);
        let address = |ip: Ipv4Addr| format!("{ip}/30");
        let (outside, inside) = (address(namespace.outer_ip), address(namespace.inner_ip));
        ip(&["netns", "add", &name])?;
        ip(&[
            "link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", &name,
        ])?;
        ip(&["addr", "add", &outside, "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        ip(&["-n", &name, "addr", "add", &inside, "dev", &inner])?;
        ip(&["-n", &name, "link", "set", &inner, "up"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        // While the interface is down, packets to the worker must not take another route.
        let inner_ip = namespace.inner_ip.to_string();
        ip(&["route", "add", "blackhole", &inner_ip, "metric", "9999"])?;
        ip(&["route", "add", &inner_ip, "dev", &outer, "metric", "1"])?;
        Ok(namespace)
    }

    /// From here on, every packet in either direction is lost.
    fn cut(&self) -> Result<(), String> {
        ip(&["link", "set", &self.outer, "down"])
    }

    fn mend(&self) -> Result<(), String> {
        ip(&["link", "set", &self.outer, "up"])?;
        // The kernel removed the route when the interface went down.
        let inner_ip = self.inner_ip.to_string();
        ip(&[
            "route",
            "replace",
            &inner_ip,
            "dev",
            &self.outer,
            "metric",
            "1",
        ])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(mut remover) = self.remover.take() {
            drop(remover.stdin.take());
            let _ = remover.wait();
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output();
    let line = arguments.join(" ");
    let output = output.map_err(|error| format!("ip {line}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {line}: {}", reason.trim()))
}

pub async fn drop_packets(world: &mut World, found: &mut Found) {
    let namespace = match Namespace::create() {
        Ok(namespace) => namespace,
        Err(reason) => {
            println!("network namespaces: not available, skipped ({reason})");
            found.skipped = Some(reason);
            return;
        }
    };
    let mut links = Vec::new();
    for member in world.cluster.addresses() {
        links.push(Link::at(namespace.outer_ip.into(), member).await);
    }
    let endpoints = links
        .iter()
        .map(|link| format!("http://{}", link.address()));
    let endpoints: Vec<_> = endpoints.collect();
    let files = format!("{}-netns", world.fleet.group);
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", &namespace.name])
        .arg(example("worker"))
        .args(["--etcd", &endpoints.join(",")])
        .args(["--group", &world.fleet.group, "--id", ID])
        .args(["--listen", &format!("{}:{PORT}", namespace.inner_ip)])
        .args(["--ttl", &TTL.to_string()]);
    let worker = Process::spawn(
        &command,
        &Path::new(env!("CARGO_TARGET_TMPDIR")).join(files),
    );
    world.fleet.others.insert(ID.to_owned(), PORT);
    let result = async {
        let well = world.heal().await;
        well.map_err(|problems| format!("with a worker in a namespace: {problems:?}"))?;
        let lasts = world.longer_than_ttl();
        let start = Instant::now();
        namespace.cut()?;
        world.fleet.until_gone(ID, EXPIRY_LIMIT).await?;
        found.gone_after = Some(start.elapsed());
        sleep(lasts.saturating_sub(start.elapsed())).await;
        namespace.mend()?;
        let well = world.heal().await;
        let healed = well.map_err(|problems| format!("after packets pass again: {problems:?}"))?;
        found.healed_after = Some(healed.after);
        Ok::<_, String>(())
    };
    let result = result.await;
    found.check(result);
    world.fleet.others.remove(ID);
    worker.signal("TERM");
    let left = world
        .fleet
        .until_gone(ID, Duration::from_secs(TTL + 10))
        .await;
    found.check(left.map(drop));
    worker.end(false);
}
