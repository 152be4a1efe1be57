//! What a node is built from, and the checks that its readers would make.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::lease_pool::LeasePool;
use crate::error::ClusterError;
use crate::keys;
use crate::metrics::{Deadband, LoadReporter, MetricsCollector, NoopMetricsCollector};
use crate::node::Node;
use crate::store::{EtcdOptions, Store};
use crate::validate::{self, Bounds};

/// The TTL of a lease in seconds, unless it is set.
pub(crate) const DEFAULT_TTL: i64 = 5;
const MAX_TTL: i64 = 86_400;
const MAX_METRICS_INTERVAL: u64 = 86_400;
const MAX_AGE: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(86_400);
const TAKEOVER_AFTER: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(86_400);

/// What a node is built from.
pub(super) struct NodeConfig {
    pub(super) etcd: EtcdOptions,
    /// Used instead of a store that is opened with these options.
    pub(super) store: Option<Arc<dyn Store>>,
    /// Shares its connection and its leases, for a node of a `Cluster`.
    pub(super) pool: Option<Arc<LeasePool>>,
    pub(super) group: String,
    /// What the node's entry says before there are metrics.
    pub(super) node: Node,
    /// Of the lease, in seconds.
    pub(super) ttl: i64,
    pub(super) collector: Arc<dyn MetricsCollector>,
    /// Counts the requests of the process.
    pub(super) reporter: LoadReporter,
    /// In seconds; 0 means that metrics are not published.
    pub(super) metrics_interval: u64,
    pub(super) deadband: Deadband,
    pub(super) max_age: Duration,
    pub(super) takeover_after: Duration,
    /// What tells this life of the process from others, if that outlives a run of the node.
    pub(super) run: Option<u64>,
}

impl NodeConfig {
    pub(super) fn new(etcd: EtcdOptions, group: String, id: String, ip: IpAddr) -> Self {
        let mut node = Node::new(id, ip);
        // Written also when it is 0: a node without a priority makes way for nobody.
        node.priority = Some(0);
        Self {
            etcd,
            store: None,
            pool: None,
            group,
            node,
            ttl: DEFAULT_TTL,
            collector: Arc::new(NoopMetricsCollector::new()),
            reporter: LoadReporter::new(),
            metrics_interval: 0,
            deadband: Deadband::default(),
            max_age: Duration::from_secs(30),
            takeover_after: Duration::from_secs(10),
            run: None,
        }
    }

    pub(super) fn priority(&self) -> u16 {
        self.node.priority.unwrap_or(0)
    }

    /// Checks everything, so that what the node writes is what every reader accepts.
    pub(super) fn validate(&self) -> Result<(), ClusterError> {
        self.validate_store()?;
        self.validate_names()?;
        check_ttl(self.ttl)?;
        in_range(
            "max_age",
            MAX_AGE.contains(&self.max_age),
            format_args!("{:?}", self.max_age),
            "1 s to 86,400 s",
        )?;
        in_range(
            "takeover_after",
            TAKEOVER_AFTER.contains(&self.takeover_after),
            format_args!("{:?}", self.takeover_after),
            "100 ms to 86,400 s",
        )?;
        self.deadband.validate()?;
        in_range(
            "metrics_update_interval",
            self.metrics_interval <= MAX_METRICS_INTERVAL,
            format_args!("{} s", self.metrics_interval),
            "0 (never) to 86,400 s",
        )?;
        in_range(
            "port",
            self.node.port != Some(0),
            format_args!("0"),
            "1 to 65,535",
        )?;
        self.node.weight.map_or(Ok(()), validate::check_weight)?;
        self.validate_size()
    }

    fn validate_store(&self) -> Result<(), ClusterError> {
        let Some(pool) = &self.pool else {
            return match self.store {
                None => self.etcd.validate(),
                Some(_) => self.etcd.check_key_prefix(),
            };
        };
        if self.store.is_some() {
            let reason = "cannot be set for a node of a Cluster, which has its own";
            return Err(ClusterError::config("store", reason));
        }
        if self.ttl != pool.ttl() {
            let (own, shared) = (self.ttl, pool.ttl());
            let reason = format!("{own} s is not that of the Cluster, which is {shared} s");
            return Err(ClusterError::config("ttl", reason));
        }
        Ok(())
    }

    fn validate_names(&self) -> Result<(), ClusterError> {
        let Node {
            id, ip, zone, tags, ..
        } = &self.node;
        keys::check_node_id(id)?;
        keys::check_group(&self.group)?;
        keys::check_keys(&self.etcd.prefix(), &self.group, id)?;
        validate::address(*ip).map_err(|reason| ClusterError::config("node_ip", reason))?;
        if let Some(zone) = zone {
            validate::name(zone).map_err(|reason| ClusterError::config("zone", reason))?;
        }
        for tag in tags {
            validate::name(tag)
                .map_err(|reason| ClusterError::config("tags", format!("one of them {reason}")))?;
        }
        Ok(())
    }

    /// Whether the entry leaves enough room for metrics. Names are short, so only the tags can be
    /// too much.
    fn validate_size(&self) -> Result<(), ClusterError> {
        let json = self.node.clone().at_its_longest().to_json();
        Bounds::without_metadata().check(&json).map_err(|excess| {
            let count = self.node.tags.len();
            let reason = format!(
                "{count} are too much for the node's entry: {excess}, because half of what readers \
                 accept is reserved for metrics"
            );
            ClusterError::config("tags", reason)
        })
    }
}

/// Checks the TTL of a lease, in seconds.
pub(crate) fn check_ttl(ttl: i64) -> Result<(), ClusterError> {
    let is_ok = (1..=MAX_TTL).contains(&ttl);
    in_range("ttl", is_ok, format_args!("{ttl} s"), "1 s to 86,400 s")
}

fn in_range(
    field: &str,
    is_ok: bool,
    given: std::fmt::Arguments<'_>,
    range: &str,
) -> Result<(), ClusterError> {
    if is_ok {
        return Ok(());
    }
    Err(ClusterError::config(
        field,
        format!("{given} is out of range, {range}"),
    ))
}
