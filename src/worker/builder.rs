//! Builds a node, with a setter for everything that can be set.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::config::NodeConfig;
use super::handle::ClusterNode;
use super::lease_pool::LeasePool;
use crate::error::ClusterError;
use crate::metrics::{Deadband, LoadReporter, MetricsCollector};
use crate::opaque::opaque_debug;
use crate::store::{EtcdOptions, Store};

#[cfg(test)]
mod tests;

/// Builds a [`ClusterNode`].
pub struct ClusterNodeBuilder {
    config: NodeConfig,
}

impl ClusterNode {
    /// A member with this lease TTL in seconds (5 by default) and no metrics. Prefer
    /// [`ClusterNodeBuilder`], which reports a bad argument at once: here [`run`](Self::run) reports
    /// it.
    pub fn new(
        etcd_endpoints: Vec<String>,
        node_id: String,
        node_ip: IpAddr,
        group_name: String,
        ttl: Option<i64>,
    ) -> Self {
        let mut builder = ClusterNodeBuilder::new(etcd_endpoints, node_id, node_ip, group_name);
        if let Some(ttl) = ttl {
            builder = builder.ttl(ttl);
        }
        builder.build()
    }
}

impl ClusterNodeBuilder {
    /// A node of this group, under this id (unique in the group, without a slash), reached at this
    /// IP, to which others must be able to connect: not unspecified (`0.0.0.0`, `::`), multicast,
    /// broadcast, or link-local (IPv6). Id and group have 512 bytes at most each; the key that is
    /// made of the key prefix, the group and the id has 1,024 bytes at most.
    pub fn new(
        etcd: impl Into<EtcdOptions>,
        node_id: impl Into<String>,
        node_ip: IpAddr,
        group_name: impl Into<String>,
    ) -> Self {
        let (etcd, group, id) = (etcd.into(), group_name.into(), node_id.into());
        Self {
            config: NodeConfig::new(etcd, group, id, node_ip),
        }
    }

    /// Time to live of the node's lease, in seconds: how long the node stays listed after a crash.
    /// A leader relies on all of it but 500 ms or a tenth, whichever is more. All members of a group
    /// should have the same TTL. Default: 5. Range: 1 to 86,400; etcd grants at least 2 by default.
    #[must_use]
    pub fn ttl(mut self, seconds: i64) -> Self {
        self.config.ttl = seconds;
        self
    }

    /// Where the node's metrics come from. Default: none. Takes effect with
    /// [`metrics_update_interval`](Self::metrics_update_interval).
    #[must_use]
    pub fn metrics_collector(mut self, collector: impl MetricsCollector + 'static) -> Self {
        self.config.collector = Arc::new(collector);
        self
    }

    /// Who counts the node's requests, and reports its load in responses. Nodes of one process that serve through the
    /// same HTTP layer share one. Default: a new one, which [`ClusterNode::load_reporter`] returns.
    ///
    /// ```
    /// use pingora_etcd::{Cluster, EtcdOptions, metrics::LoadReporter};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let cluster = Cluster::connect(EtcdOptions::memory("one process, two groups"))?;
    /// let reporter = LoadReporter::new(); // for the HTTP layer
    /// let ip = "10.0.0.1".parse()?;
    /// let web = cluster.node("w1", ip, "web").load_reporter(reporter.clone()).try_build()?;
    /// let api = cluster.node("w1", ip, "api").load_reporter(reporter.clone()).try_build()?;
    /// let request = reporter.enter();
    /// assert_eq!(web.load_reporter().in_flight(), 1);
    /// assert_eq!(api.load_reporter().in_flight(), 1);
    /// # drop(request);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn load_reporter(mut self, reporter: LoadReporter) -> Self {
        self.config.reporter = reporter;
        self
    }

    /// How often metrics are collected, in seconds, lengthened by up to a tenth at random so that
    /// nodes that start together do not write together. They are written when they have left the
    /// [`deadband`](Self::deadband), and at least every [`max_age`](Self::max_age), but never more
    /// often than they are collected. Default: 0, never. At most 86,400.
    #[must_use]
    pub fn metrics_update_interval(mut self, seconds: u64) -> Self {
        self.config.metrics_interval = seconds;
        self
    }

    /// How far metrics have to differ from what was written last before they are written again.
    /// Default: [`Deadband::default`].
    #[must_use]
    pub fn deadband(mut self, deadband: Deadband) -> Self {
        self.config.deadband = deadband;
        self
    }

    /// How old written metrics may become, or a tenth less: the first sample after that is written
    /// even if nothing has changed, so that a reader can distinguish an idle node from one whose
    /// collector is stuck. Default: 30 s. Range: 1 s to 86,400 s.
    #[must_use]
    pub fn max_age(mut self, max_age: Duration) -> Self {
        self.config.max_age = max_age;
        self
    }

    /// The node's priority as a leader: a candidate with a higher priority takes over from a leader
    /// with a lower one. Default: 0. Nodes of `photon-etcd-cluster` have no priority: leadership is
    /// not taken from them, and a candidate waits for those that are ahead of it in the queue.
    #[must_use]
    pub fn priority(mut self, priority: u16) -> Self {
        self.config.node.priority = Some(priority);
        self
    }

    /// How long a node with a priority has to be a candidate before it takes over, and how often it
    /// compares priorities after that: so that a node that restarts again and again does not take
    /// leadership each time. Default: 10 s. Range: 100 ms to 86,400 s.
    #[must_use]
    pub fn takeover_after(mut self, after: Duration) -> Self {
        self.config.takeover_after = after;
        self
    }

    /// Shares the connection and the leases of a pool, as the nodes of a `Cluster` do.
    #[must_use]
    pub(crate) fn pool(mut self, pool: Arc<LeasePool>) -> Self {
        self.config.pool = Some(pool);
        self
    }

    /// The port on which the node serves, 1 to 65,535. Default: none is registered, and readers use
    /// a default of their own.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.config.node.port = Some(port);
        self
    }

    /// What tells this life of the process from others, where one process is a node several times in turn.
    #[doc(hidden)]
    #[must_use]
    pub fn run_id(mut self, run: u64) -> Self {
        self.config.run = Some(run);
        self
    }

    /// Where the node runs: 512 bytes at most, without control characters. Default: none.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.config.node.zone = Some(zone.into());
        self
    }

    /// Free labels, each of 512 bytes at most and without control characters. With all of them the
    /// node's entry may have 32,768 bytes and 512 values, half of what readers accept. Default:
    /// none.
    #[must_use]
    pub fn tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.config.node.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// The node's static share of traffic relative to others: 0 for none, or 0.000001 to 1,000,000.
    /// Default: 1.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.config.node.weight = Some(weight);
        self
    }

    /// Uses this store instead of opening one: to share a connection between nodes and
    /// discoveries of one runtime, or for tests. Of the etcd options only the key prefix matters
    /// then.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.config.store = Some(store);
        self
    }

    /// Checks everything and builds the node. Does not connect yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn try_build(self) -> Result<ClusterNode, ClusterError> {
        self.config.validate()?;
        Ok(ClusterNode::from_config(self.config, None))
    }

    /// Builds the node. `run` reports what [`try_build`](Self::try_build) would have refused.
    pub fn build(self) -> ClusterNode {
        let invalid = self.config.validate().err();
        ClusterNode::from_config(self.config, invalid)
    }
}

opaque_debug!(ClusterNodeBuilder);
