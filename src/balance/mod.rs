//! Picking a backend for a request. No I/O, no Pingora.
//!
//! A [`Balancer`] is fed with nodes, turns what they report into weights, and publishes a table.
//! [`pick`](Balancer::pick) reads that table without a lock and without allocating, and answers
//! with an [`Upstream`], which counts the request as in flight until it is dropped.
//!
//! The pick of the weighted policy draws three backends by weight and takes the one with the
//! fewest requests in flight for its weight. Weights steer what a proxy cannot see, its own
//! in-flight counts what the weights are too slow for.

mod pick;
mod table;
mod weigher;
mod weight;

use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use serde::Deserialize;

use crate::error::ClusterError;
use crate::node::Node;
use table::Table;
pub(crate) use weigher::Weigher;

pub use pick::{PickOptions, Upstream};
#[cfg(feature = "pingora")]
pub(crate) use {table::Spread, weigher::Member};

pub(crate) use weight::is_base_weight;
pub use weight::{Headroom, Load};

/// How a backend is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Policy {
    /// One after the other. Where static weights differ, in proportion to them and evenly spread.
    /// Metrics play no part.
    RoundRobin,
    /// At random, in proportion to static weights. Metrics play no part.
    Random,
    /// By a hash of the request's key, so that a key stays with its backend while others come and
    /// go; shares are in proportion to static weights. Metrics play no part.
    Consistent,
    /// By [`Headroom`] weights and requests in flight.
    #[default]
    Headroom,
}

/// Builds a [`Balancer`].
#[derive(Debug, Clone)]
pub struct BalancerBuilder {
    policy: Policy,
    headroom: Headroom,
    default_port: u16,
    candidates: usize,
}

impl Default for BalancerBuilder {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            headroom: Headroom::default(),
            default_port: 80,
            candidates: 3,
        }
    }
}

impl BalancerBuilder {
    /// How a backend is chosen. Default: [`Policy::Headroom`].
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// The coefficients of [`Policy::Headroom`].
    #[must_use]
    pub fn headroom(mut self, headroom: Headroom) -> Self {
        self.headroom = headroom;
        self
    }

    /// The port of nodes that registered none. Default: 80. At least 1.
    #[must_use]
    pub fn default_port(mut self, port: u16) -> Self {
        self.default_port = port;
        self
    }

    /// How many backends [`Policy::Headroom`] draws to choose from. Default: 3. Range: 1 to 8;
    /// with 1 the weights alone decide.
    #[must_use]
    pub fn candidates(mut self, candidates: usize) -> Self {
        self.candidates = candidates;
        self
    }

    /// Checks everything and builds the balancer, with no backends yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn try_build(self) -> Result<Balancer, ClusterError> {
        self.headroom.validate("headroom")?;
        if self.default_port == 0 {
            return Err(ClusterError::config(
                "default_port",
                "0 is out of range, 1 to 65535",
            ));
        }
        if !(1..=pick::MAX_CANDIDATES).contains(&self.candidates) {
            return Err(ClusterError::config(
                "candidates",
                format!(
                    "{} is out of range, 1 to {}",
                    self.candidates,
                    pick::MAX_CANDIDATES
                ),
            ));
        }
        let weigher = Weigher::new(self.policy, self.headroom, self.default_port);
        Ok(Balancer {
            config: self,
            table: ArcSwap::from_pointee(Table::default()),
            weigher: Mutex::new(weigher),
            turn: AtomicUsize::new(0),
        })
    }
}

/// Chooses backends. Share it in an `Arc`; every call takes `&self`.
///
/// ```
/// use std::sync::Arc;
/// use pingora_etcd::{Node, balance::Balancer};
///
/// let balancer = Balancer::builder().default_port(8080).try_build()?;
/// assert!(balancer.pick().is_none());
///
/// let nodes = ["10.0.0.1", "10.0.0.2"].map(|ip| Arc::new(Node::new(ip, ip.parse().unwrap())));
/// balancer.update(&nodes);
///
/// let upstream = balancer.pick().unwrap(); // keep it as long as the request runs
/// assert_eq!(upstream.addr().port(), 8080);
/// assert_eq!(upstream.in_flight(), 1);
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
#[derive(Debug)]
pub struct Balancer {
    config: BalancerBuilder,
    table: ArcSwap<Table>,
    weigher: Mutex<Weigher>,
    turn: AtomicUsize,
}

impl Balancer {
    /// A builder with every default.
    pub fn builder() -> BalancerBuilder {
        BalancerBuilder::default()
    }

    /// Takes over the nodes of a group and what they report, and publishes the table that follows
    /// from it. Requests in flight keep being counted across updates. Draining nodes are not in
    /// the table. Costs time and memory in proportion to the number of nodes, off the request
    /// path.
    pub fn update<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>) {
        let mut weigher = self.weigher();
        let mut members = weigher.weigh(nodes);
        members.retain(|member| member.is_serving());
        let with_ring = self.config.policy == Policy::Consistent;
        let table = Table::new(members, with_ring);
        // Under the lock, so that of two updates the later one is published last.
        self.table.store(Arc::new(table));
    }

    fn weigher(&self) -> MutexGuard<'_, Weigher> {
        self.weigher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many backends can be picked.
    pub fn len(&self) -> usize {
        self.table.load().slots.len()
    }

    /// Whether there is no backend to pick.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every backend that can be picked, with its weight and its requests in flight: for status
    /// pages and tests.
    pub fn backends(&self) -> Vec<BackendStatus> {
        let table = self.table.load();
        let status = |slot: &table::Slot| BackendStatus {
            node: slot.member.node(),
            addr: slot.member.addr(),
            weight: slot.member.weight(),
            in_flight: slot.member.in_flight(),
        };
        table.slots.iter().map(status).collect()
    }

    /// How many metrics have been refused since the start because they were no number, not
    /// finite, or out of range. The last good one of that node stayed in use each time.
    pub fn refused_metrics(&self) -> u64 {
        self.weigher().refused()
    }
}

/// A backend as [`Balancer::backends`] shows it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BackendStatus {
    /// The node.
    pub node: Arc<Node>,
    /// Where requests are sent.
    pub addr: SocketAddr,
    /// Its share of traffic relative to the other backends'.
    pub weight: f64,
    /// Requests of this process that it is working on.
    pub in_flight: u32,
}
