//! What the servers have reported, as all proxies see it.

use std::sync::{Arc, OnceLock};

use pingora_etcd::Node;
use pingora_etcd::metrics::Deadband;

use crate::scenario::Scenario;
use crate::units::Seconds;

/// Set if the command line switches the deadband of workers off.
pub static EVERY_REPORT: OnceLock<()> = OnceLock::new();

/// After this time a worker writes its metrics again, whatever they are.
const MAX_AGE: Seconds = 28.5;

/// What the servers have reported, as all proxies see it.
pub struct View {
    nodes: Vec<Arc<Node>>,
    pub present: Vec<bool>,
    zones: bool,
    /// The last reports: CPU, queue and requests per second.
    pub reports: Vec<Option<(f64, f64, f64)>>,
    deadband: Deadband,
    /// When the metrics of each node were last written.
    written: Vec<Option<Seconds>>,
}

impl View {
    pub fn new(scenario: &Scenario) -> Self {
        let zones = scenario.zones.is_some();
        let node = |index: usize| {
            let ip = address_of(index).ip();
            let mut node = Node::new(format!("n{index:04}"), ip).with_port(80);
            if zones {
                node = node.with_zone(format!("z{}", index % 2));
            }
            Arc::new(node)
        };
        Self {
            nodes: (0..scenario.servers).map(node).collect(),
            present: vec![true; scenario.servers],
            zones,
            reports: vec![None; scenario.servers],
            deadband: match EVERY_REPORT.get() {
                Some(()) => Deadband::none(),
                None => Deadband::default(),
            },
            written: vec![None; scenario.servers],
        }
    }

    pub fn zone(&self, server: usize) -> usize {
        if self.zones { server % 2 } else { 0 }
    }

    pub fn zone_of_proxy(&self, _: usize) -> usize {
        0
    }

    pub fn leave(&mut self, server: usize) {
        self.present[server] = false;
    }

    pub fn join(&mut self, server: usize) {
        self.present[server] = true;
    }

    pub fn has_reported(&self, server: usize) -> bool {
        self.reports[server].is_some()
    }

    pub fn report(&mut self, server: usize, now: Seconds, cpu: f64, queue: f64, qps: f64) {
        self.reports[server] = Some((cpu, queue, qps));
        let metadata = serde_json::json!({
            "cpu_usage_percent": (cpu * 1000.0).round() / 10.0,
            "queue_depth": queue,
        });
        // A worker does not write what stays within the deadband.
        let fresh = self.written[server].is_some_and(|at| now - at < MAX_AGE);
        if fresh
            && !self
                .deadband
                .is_left(&self.nodes[server].metadata, &metadata)
        {
            return;
        }
        self.written[server] = Some(now);
        let mut node = Node::clone(&self.nodes[server]).with_metadata(metadata);
        node.last_seen = (now * 1e3) as i64 + 1;
        self.nodes[server] = Arc::new(node);
    }

    /// Writes the same metrics again, with a new time.
    pub fn repeat(&mut self, server: usize, now: Seconds) {
        let mut node = Node::clone(&self.nodes[server]);
        node.last_seen = (now * 1e3) as i64 + 1;
        self.nodes[server] = Arc::new(node);
    }

    /// The nodes that are present.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        let all = self.nodes.iter().zip(&self.present);
        all.filter(|(_, present)| **present).map(|(node, _)| node)
    }

    /// The positions of the nodes that are present.
    pub fn available(&self) -> Vec<usize> {
        (0..self.present.len())
            .filter(|index| self.present[*index])
            .collect()
    }
}

/// The address of a server.
pub fn address_of(server: usize) -> std::net::SocketAddr {
    let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + server as u32);
    (ip, 80).into()
}

/// The server behind an address of [`View`].
pub fn server_at(addr: std::net::SocketAddr) -> usize {
    match addr.ip() {
        std::net::IpAddr::V4(ip) => (ip.to_bits() - 0x0a00_0001) as usize,
        std::net::IpAddr::V6(_) => unreachable!("all addresses are of version 4"),
    }
}
