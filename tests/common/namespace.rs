//! A network namespace, in which a program can lose all its packets in silence. This needs root and `ip`.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

/// A network namespace and the pair of interfaces that connects it. A shell removes both when this
/// process ends, for whatever reason, because its standard input is closed then.
pub struct Namespace {
    pub name: String,
    outer: String,
    pub outer_ip: Ipv4Addr,
    pub inner_ip: Ipv4Addr,
    remover: Option<Child>,
}

impl Namespace {
    /// The error is why this machine cannot have one.
    pub fn create() -> Result<Self, String> {
        let id = std::process::id();
        // 198.18.0.0/15 is reserved for benchmarks and not routed anywhere.
        let [_, _, high, low] = id.to_be_bytes();
        let net = |host: u8| Ipv4Addr::new(198, 18, high, (low & 0xfc) + host);
        let mut namespace = Self {
            name: format!("test{id}"),
            outer: format!("ns{id}o"),
            outer_ip: net(1),
            inner_ip: net(2),
            remover: None,
        };
        let (name, outer, inner) = (
            namespace.name.clone(),
            namespace.outer.clone(),
            format!("ns{id}i"),
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

    /// A command that runs in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// From here on, every packet in either direction is lost.
    pub fn cut(&self) -> Result<(), String> {
        ip(&["link", "set", &self.outer, "down"])
    }

    /// Packets pass again.
    pub fn mend(&self) -> Result<(), String> {
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
