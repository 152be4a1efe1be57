use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::ClusterNode;
use super::lease_pool::LeasePool;
use crate::error::ClusterError;
use crate::keys;
use crate::metrics::{Deadband, MetricsCollector, NoopMetricsCollector};
use crate::node::Node;
use crate::store::{EtcdOptions, Store};
use crate::validate::{self, Bounds};

const DEFAULT_TTL: i64 = 5;
const MAX_TTL: i64 = 86_400;
const MAX_INTERVAL: u64 = 86_400;
const MAX_TIME: Duration = Duration::from_secs(86_400);
const DEFAULT_MAX_AGE: Duration = Duration::from_secs(30);
const DEFAULT_TAKEOVER_AFTER: Duration = Duration::from_secs(10);

/// A lease's time to live, in seconds.
pub(crate) fn check_ttl(ttl: i64) -> Result<(), ClusterError> {
    if (1..=MAX_TTL).contains(&ttl) {
        return Ok(());
    }
    let reason = format!("{ttl} s is out of range, 1 s to 86,400 s");
    Err(ClusterError::config("ttl", reason))
}

/// What a node was built from, checked.
pub(super) struct NodeConfig {
    pub(super) etcd: EtcdOptions,
    pub(super) store: Option<Arc<dyn Store>>,
    pub(super) id: String,
    pub(super) ip: IpAddr,
    pub(super) group: String,
    /// In seconds.
    pub(super) ttl: u64,
    pub(super) collector: Arc<dyn MetricsCollector>,
    /// `None`: metrics are not published.
    pub(super) interval: Option<Duration>,
    pub(super) deadband: Deadband,
    pub(super) max_age: Duration,
    pub(super) priority: u16,
    pub(super) takeover_after: Duration,
    /// Shares its connection and its lease.
    pub(super) pool: Option<Arc<LeasePool>>,
    port: Option<u16>,
    zone: Option<String>,
    tags: BTreeSet<String>,
    weight: Option<f64>,
}

impl NodeConfig {
    /// Whether readers take what it says of itself, with room for metrics. Names are short, so
    /// that tags are all that can be too much.
    fn check_entry(&self) -> Result<(), ClusterError> {
        let json = self.node().at_its_longest().to_json();
        let checked = Bounds::without_metadata().check(&json);
        checked.map_err(|excess| {
            let (count, half) = (self.tags.len(), "half of what readers take is for metrics");
            let reason = format!("{count} are too much for the node's entry: {excess}, for {half}");
            ClusterError::config("tags", reason)
        })
    }

    pub(super) fn node(&self) -> Node {
        let mut node = Node::new(&self.id, self.ip);
        node.port = self.port;
        node.zone.clone_from(&self.zone);
        node.tags.clone_from(&self.tags);
        node.weight = self.weight;
        // Also when it is 0: it tells that this node makes way for a higher one.
        node.priority = Some(self.priority);
        node
    }
}

/// Builds a [`ClusterNode`].
pub struct ClusterNodeBuilder {
    etcd: EtcdOptions,
    store: Option<Arc<dyn Store>>,
    id: String,
    ip: IpAddr,
    group: String,
    ttl: i64,
    collector: Arc<dyn MetricsCollector>,
    interval: u64,
    deadband: Deadband,
    max_age: Duration,
    priority: u16,
    takeover_after: Duration,
    pool: Option<Arc<LeasePool>>,
    port: Option<u16>,
    zone: Option<String>,
    tags: BTreeSet<String>,
    weight: Option<f64>,
}

impl ClusterNodeBuilder {
    /// A node of this group, under this id (unique in the group, no slash), reached at this IP,
    /// which must be one that others can connect to: not unspecified (`0.0.0.0`, `::`), multicast,
    /// broadcast, or link-local (IPv6). Id and group have 512 bytes at most, and the key that they
    /// and the key prefix make 1,024.
    pub fn new(
        etcd: impl Into<EtcdOptions>,
        node_id: impl Into<String>,
        node_ip: IpAddr,
        group_name: impl Into<String>,
    ) -> Self {
        Self {
            etcd: etcd.into(),
            store: None,
            id: node_id.into(),
            ip: node_ip,
            group: group_name.into(),
            ttl: DEFAULT_TTL,
            collector: Arc::new(NoopMetricsCollector::new()),
            interval: 0,
            deadband: Deadband::default(),
            max_age: DEFAULT_MAX_AGE,
            priority: 0,
            takeover_after: DEFAULT_TAKEOVER_AFTER,
            pool: None,
            port: None,
            zone: None,
            tags: BTreeSet::new(),
            weight: None,
        }
    }

    /// Time to live of its lease, in seconds: how long after a crash it is still listed. Of it a
    /// leader counts on all but 500 ms or a tenth, whichever is more. Let all members of a group
    /// have the same. Default: 5. Range: 1 to 86,400; etcd grants at least 2 by default.
    #[must_use]
    pub fn ttl(mut self, seconds: i64) -> Self {
        self.ttl = seconds;
        self
    }

    /// Where its metrics come from. Default: none. Takes effect with
    /// [`metrics_update_interval`](Self::metrics_update_interval).
    #[must_use]
    pub fn metrics_collector(mut self, collector: impl MetricsCollector + 'static) -> Self {
        self.collector = Arc::new(collector);
        self
    }

    /// How often metrics are collected, in seconds, lengthened by up to a tenth at random so that
    /// nodes that start together do not write together. They are written when they have moved out
    /// of the [`deadband`](Self::deadband), and at least every [`max_age`](Self::max_age); so this
    /// is also how often they are written at most. Default: 0, never. At most 86,400.
    #[must_use]
    pub fn metrics_update_interval(mut self, seconds: u64) -> Self {
        self.interval = seconds;
        self
    }

    /// How far metrics have to move from what was last written until they are written again.
    /// Default: [`Deadband::default`].
    #[must_use]
    pub fn deadband(mut self, deadband: Deadband) -> Self {
        self.deadband = deadband;
        self
    }

    /// How old written metrics may become, or a tenth less: the first sample after that is written
    /// though nothing has changed, so that a reader can tell an idle node from one whose collector is stuck.
    /// Default: 30 s. Range: 1 s to 86,400 s.
    #[must_use]
    pub fn max_age(mut self, max_age: Duration) -> Self {
        self.max_age = max_age;
        self
    }

    /// Its priority as a leader: a candidate with a higher one takes over from one with a lower
    /// one. Default: 0. Nodes of `photon-etcd-cluster` have none; leadership is not taken from
    /// them, and those that queue ahead of a candidate are waited for.
    #[must_use]
    pub fn priority(mut self, priority: u16) -> Self {
        self.priority = priority;
        self
    }

    /// How long a node with a priority has to have been a candidate before it takes over, and how
    /// often it compares then: so that one that restarts in a loop does not take leadership each
    /// time. Default: 10 s. Range: 100 ms to 86,400 s.
    #[must_use]
    pub fn takeover_after(mut self, after: Duration) -> Self {
        self.takeover_after = after;
        self
    }

    /// Shares the connection and the leases of a pool, as the nodes of a `Cluster` do.
    #[must_use]
    pub(crate) fn pool(mut self, pool: Arc<LeasePool>) -> Self {
        self.pool = Some(pool);
        self
    }

    /// The port it serves on, 1 to 65,535. Default: none registered, readers use their own.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Where it runs: 512 bytes at most, without control characters. Default: none.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Free labels, each of 512 bytes at most and without control characters; with all of them the
    /// node's entry may have 32,768 bytes and 512 values, half of what readers take. Default:
    /// none.
    #[must_use]
    pub fn tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Its static share of traffic relative to others: 0 for none, or 0.000001 to 1,000,000.
    /// Default: 1.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = Some(weight);
        self
    }

    /// Uses this store instead of opening one: to share a connection between nodes and
    /// discoveries of one runtime, or for tests. Of the etcd options only the key prefix then
    /// matters.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self
    }

    /// Checks everything and builds the node. Connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn try_build(self) -> Result<ClusterNode, ClusterError> {
        self.validate()?;
        let config = self.finish();
        config.check_entry()?;
        Ok(ClusterNode::from_config(config, None))
    }

    /// Builds the node; what [`try_build`](Self::try_build) would have refused is reported by
    /// `run`.
    pub fn build(self) -> ClusterNode {
        let invalid = self.validate().err();
        let config = self.finish();
        let invalid = invalid.or_else(|| config.check_entry().err());
        ClusterNode::from_config(config, invalid)
    }

    fn validate(&self) -> Result<(), ClusterError> {
        if let Some(pool) = &self.pool {
            if self.store.is_some() {
                let reason = "is the cluster's, for a node of a Cluster";
                return Err(ClusterError::config("store", reason));
            }
            if self.ttl != pool.ttl() {
                let (own, shared) = (self.ttl, pool.ttl());
                let reason = format!("{own} s is not that of the Cluster, which is {shared} s");
                return Err(ClusterError::config("ttl", reason));
            }
        } else if self.store.is_none() {
            self.etcd.validate()?;
        } else {
            self.etcd.check_key_prefix()?;
        }
        self.validate_entry()?;
        let range = |field: &str, ok: bool, given: String, range: &str| {
            if ok {
                Ok(())
            } else {
                let reason = format!("{given} is out of range, {range}");
                Err(ClusterError::config(field, reason))
            }
        };
        check_ttl(self.ttl)?;
        range(
            "max_age",
            (Duration::from_secs(1)..=MAX_TIME).contains(&self.max_age),
            format!("{:?}", self.max_age),
            "1 s to 86,400 s",
        )?;
        range(
            "takeover_after",
            (Duration::from_millis(100)..=MAX_TIME).contains(&self.takeover_after),
            format!("{:?}", self.takeover_after),
            "100 ms to 86,400 s",
        )?;
        self.deadband.validate()?;
        range(
            "metrics_update_interval",
            self.interval <= MAX_INTERVAL,
            format!("{} s", self.interval),
            "0 (never) to 86,400 s",
        )?;
        range("port", self.port != Some(0), "0".to_owned(), "1 to 65,535")?;
        self.weight.map_or(Ok(()), validate::check_weight)
    }

    /// Each field of the entry: what is written is what every reader takes.
    fn validate_entry(&self) -> Result<(), ClusterError> {
        keys::check_node_id(&self.id)?;
        keys::check_group(&self.group)?;
        keys::check_keys(&self.etcd.prefix(), &self.group, &self.id)?;
        validate::address(self.ip).map_err(|reason| ClusterError::config("node_ip", reason))?;
        let names = self.zone.iter().map(|zone| ("zone", zone));
        for (field, name) in names.chain(self.tags.iter().map(|tag| ("tags", tag))) {
            validate::name(name).map_err(|reason| {
                let of = if field == "tags" { "one of them " } else { "" };
                ClusterError::config(field, format!("{of}{reason}"))
            })?;
        }
        Ok(())
    }

    fn finish(self) -> NodeConfig {
        NodeConfig {
            etcd: self.etcd,
            store: self.store,
            id: self.id,
            ip: self.ip,
            group: self.group,
            ttl: self.ttl.clamp(1, MAX_TTL).unsigned_abs(),
            collector: self.collector,
            interval: (self.interval > 0).then(|| Duration::from_secs(self.interval)),
            deadband: self.deadband,
            max_age: self.max_age,
            priority: self.priority,
            takeover_after: self.takeover_after,
            pool: self.pool,
            port: self.port,
            zone: self.zone,
            tags: self.tags,
            weight: self.weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn builder() -> ClusterNodeBuilder {
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        ClusterNodeBuilder::new(EtcdOptions::memory(""), "n", ip, "g")
    }

    #[test]
    fn what_no_reader_takes_is_refused_by_name_and_limit() {
        let at = |ip: &str, id: &str, group: &str| {
            let etcd = EtcdOptions::memory("").key_prefix("p/");
            ClusterNodeBuilder::new(etcd, id, ip.parse().unwrap(), group)
        };
        let long = "x".repeat(512);
        let labels =
            |count: usize, length: usize| (0..count).map(move |at| format!("{at:0length$}"));
        for (builder, field, limit) in [
            (builder().zone("z".repeat(70_000)), "zone", "512"),
            (builder().zone("a\nb"), "zone", "control"),
            (builder().tags(["x".repeat(513)]), "tags", "512"),
            (builder().tags(["a\tb"]), "tags", "control"),
            (builder().tags(labels(2_000, 1_024)), "tags", "512"),
            (builder().tags(labels(100, 500)), "tags", "32768"),
            (builder().tags(labels(600, 4)), "tags", "512 allowed"),
            (builder().weight(-5.0), "weight", "0 (no traffic)"),
            (builder().weight(f64::NAN), "weight", "1,000,000"),
            (builder().weight(1e9), "weight", "1,000,000"),
            (at("0.0.0.0", "n", "g"), "node_ip", "unspecified"),
            (at("::", "n", "g"), "node_ip", "unspecified"),
            (at("::ffff:0.0.0.0", "n", "g"), "node_ip", "unspecified"),
            (at("224.0.0.1", "n", "g"), "node_ip", "multicast"),
            (at("255.255.255.255", "n", "g"), "node_ip", "broadcast"),
            (at("fe80::1", "n", "g"), "node_ip", "link-local"),
            (at("::1", &long, &long), "node_id", "1024"),
        ] {
            let error = builder.try_build().unwrap_err().to_string();
            let named = error.contains(&format!("invalid {field}: ")) && error.contains(limit);
            assert!(named && error.len() < 400, "{field}: {error}");
        }
        for builder in [
            builder().weight(0.0),
            builder().zone("\"".repeat(512)).tags(labels(60, 500)),
            builder().tags(labels(480, 10)),
            at("::1", &long, &"x".repeat(400)),
        ] {
            builder.try_build().unwrap();
        }
    }

    proptest! {
        #[test]
        fn an_entry_as_it_was_written_is_current(
            weight in 1e-6..1e6f64,
            priority: u16,
            port in proptest::option::of(1..=u16::MAX),
            zone in proptest::option::of("\\PC{0,40}"),
        ) {
            let ip: IpAddr = "::1".parse().unwrap();
            let mut builder = ClusterNodeBuilder::new(EtcdOptions::memory(""), "n", ip, "g")
                .weight(weight)
                .priority(priority);
            builder.port = port;
            builder.zone = zone;
            let node = builder.try_build().unwrap();
            let written = serde_json::to_vec(&node.shared.config.node()).unwrap();
            prop_assert!(node.shared.is_told_by(&written));
            let mut other = node.shared.config.node();
            other.priority = Some(priority ^ 1);
            let other = serde_json::to_vec(&other).unwrap();
            prop_assert!(!node.shared.is_told_by(&other));
        }
    }
}
