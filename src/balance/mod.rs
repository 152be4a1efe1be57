//! Picking a backend for a request. No I/O, no Pingora.
//!
//! A [`Balancer`] is fed with nodes, turns what they report into weights, and publishes a table.
//! [`pick`](Balancer::pick) reads that table without a lock and without allocating, and answers
//! with an [`Upstream`], which counts the request as in flight until it is dropped.
//!
//! The pick of the weighted policies draws a few backends by weight and takes the one with the
//! fewest requests in flight for its weight. Weights steer what a proxy cannot see, its own
//! in-flight counts what the weights are too slow for.
//!
//! Time and randomness can come from outside ([`Balancer::update_at`], [`Balancer::tick`],
//! [`Balancer::pick_by`]), so that a test or a simulator decides both; `benches/routing_quality`
//! is one.

mod adaptive;
mod member;
mod pick;
mod ring;
mod table;
#[cfg(test)]
mod tests;
mod weigher;
mod weight;
mod zone;

use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::Deserialize;

use crate::error::ClusterError;
use crate::node::Node;
use crate::sync::lock;
use crate::view::Change;
use adaptive::in_range;
use member::Signals;
use pick::Choice;
use table::Table;
pub(crate) use weigher::{Weigher, Weighing};
use zone::Place;

pub use adaptive::Adaptive;
pub use pick::{PickOptions, Upstream};
#[cfg(feature = "pingora")]
pub(crate) use {member::Member, table::Spread};

pub use weight::{Headroom, Load};
pub use zone::Zones;

/// How a backend is chosen.
///
/// A node whose static weight is 0 gets nothing, as one that drains, whatever the policy: it is not
/// among the backends. If that is all of them, there is none.
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
    /// go. Metrics play no part.
    ///
    /// Shares of the keys are in proportion to static weights, whatever their unit, but for chance:
    /// by 1 % for ten equal backends, 2 % for 100, 6 % for 1,000. The hashes are cut into 131,072 cells
    /// that have one owner each, so a backend whose share is below that gets one cell or none. Only
    /// keys that go to or come from the backend that joined, left or changed its weight move: the
    /// least that is possible. That takes 512 KiB a balancer and as much once in a process, and some
    /// milliseconds for each such change; nothing while there is none.
    Consistent,
    /// By [`Headroom`] weights and requests in flight.
    Headroom,
    /// By weights that follow metrics, latencies and failures ([`Adaptive`]), and requests in
    /// flight.
    #[default]
    Adaptive,
}

impl Policy {
    /// Whether shares do not follow metrics and outcomes. They may follow zones.
    fn is_static(self) -> bool {
        matches!(self, Self::RoundRobin | Self::Random | Self::Consistent)
    }
}

/// The constants of [`Policy::Consistent`].
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Consistent {
    /// How many requests in flight a backend may have, as a multiple of its fair share of all:
    /// beyond that its keys go to the next owner, so that a hot key does not drown one backend.
    /// Default: 1.25. Range: 1.01 to 1,000.
    pub balance_factor: f64,
    /// How many it may have in any case, so that keys stay where they belong while there is
    /// little to do. Default: 8. Range: 1 to 1,000,000.
    pub slack: usize,
}

impl Default for Consistent {
    fn default() -> Self {
        Self {
            balance_factor: 1.25,
            slack: 8,
        }
    }
}

impl Consistent {
    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        in_range(field, "balance_factor", self.balance_factor, 1.01..=1e3)?;
        in_range(field, "slack", self.slack, 1..=1_000_000)
    }
}

/// How often [`Balancer::tick`] wants to be called.
pub const TICK: Duration = Duration::from_secs(1);

/// How many backends are drawn to choose from, unless it is set.
pub(crate) const DEFAULT_CANDIDATES: usize = 5;

/// Builds a [`Balancer`].
#[derive(Debug, Clone)]
pub struct BalancerBuilder {
    policy: Policy,
    headroom: Headroom,
    adaptive: Adaptive,
    consistent: Consistent,
    zones: Zones,
    place: Place,
    default_port: u16,
    candidates: usize,
}

impl Default for BalancerBuilder {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            headroom: Headroom::default(),
            adaptive: Adaptive::default(),
            consistent: Consistent::default(),
            zones: Zones::default(),
            place: Place::Anywhere,
            default_port: 80,
            candidates: DEFAULT_CANDIDATES,
        }
    }
}

impl BalancerBuilder {
    /// How a backend is chosen. Default: [`Policy::Adaptive`].
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

    /// The constants of [`Policy::Adaptive`].
    #[must_use]
    pub fn adaptive(mut self, adaptive: Adaptive) -> Self {
        self.adaptive = adaptive;
        self
    }

    /// The constants of [`Policy::Consistent`].
    #[must_use]
    pub fn consistent(mut self, consistent: Consistent) -> Self {
        self.consistent = consistent;
        self
    }

    /// The zone that this balancer is in, as nodes register theirs: backends there are preferred.
    /// Default: none, all zones are alike. Not for [`Policy::Consistent`], whose keys stay where
    /// they are.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.place = Place::Zone(zone.into());
        self
    }

    /// The same, for a balancer that runs beside a node of the group: its zone is the one that
    /// this node registered.
    #[must_use]
    pub fn zone_of(mut self, node_id: impl Into<String>) -> Self {
        self.place = Place::Beside(node_id.into());
        self
    }

    /// How much traffic leaves the zone.
    #[must_use]
    pub fn zones(mut self, zones: Zones) -> Self {
        self.zones = zones;
        self
    }

    /// The port of nodes that registered none. Default: 80. At least 1.
    #[must_use]
    pub fn default_port(mut self, port: u16) -> Self {
        self.default_port = port;
        self
    }

    /// How many backends [`Policy::Adaptive`] and [`Policy::Headroom`] draw to choose from.
    /// Default: 5. Range: 1 to 8; with 1 the weights alone decide.
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
        self.validate()?;
        let weigher = Weigher::new(self.weighing());
        Ok(Balancer {
            choice: Choice {
                candidates: self.candidates,
                own: match self.policy {
                    Policy::Adaptive => self.adaptive.own_request as f32,
                    _ => 1.0,
                },
            },
            config: self,
            started: Instant::now(),
            table: ArcSwap::from_pointee(Table::default()),
            signals: weigher.signals().clone(),
            weigher: Mutex::new(weigher),
            turn: AtomicUsize::new(0),
            in_flight: Arc::new(()),
        })
    }

    pub(crate) fn validate(&self) -> Result<(), ClusterError> {
        self.headroom.validate("headroom")?;
        self.adaptive.validate("adaptive")?;
        self.consistent.validate("consistent")?;
        self.zones.validate("zones")?;
        for (field, empty) in [
            ("zone", self.place == Place::Zone(String::new())),
            ("zone_of", self.place == Place::Beside(String::new())),
        ] {
            if empty {
                return Err(ClusterError::config(field, "is empty"));
            }
        }
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
        Ok(())
    }

    pub(crate) fn weighing(&self) -> Weighing {
        Weighing {
            policy: self.policy,
            headroom: self.headroom,
            adaptive: self.adaptive,
            zones: self.zones,
            place: self.place.clone(),
            default_port: self.default_port,
            sees_requests: true,
        }
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
    choice: Choice,
    started: Instant,
    table: ArcSwap<Table>,
    signals: Arc<Signals>,
    weigher: Mutex<Weigher>,
    turn: AtomicUsize,
    /// Each request in flight owns it, for the policy that needs to know how many there are.
    in_flight: Arc<()>,
}

impl Balancer {
    /// A builder with every default.
    pub fn builder() -> BalancerBuilder {
        BalancerBuilder::default()
    }

    /// Takes over the nodes of a group and what they report, and publishes the table that follows
    /// from it. Requests in flight keep being counted across updates. Draining nodes, and those with
    /// a static weight of 0, are not in the table. Costs time and memory in proportion to the number of nodes, off the request
    /// path.
    ///
    /// A node that is in no update any more is out; if it comes back, it starts slowly. But where
    /// its process is the same one ([`Node::run`]), which has only lost its lease, what was learned
    /// of it still holds for two minutes.
    pub fn update<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>) {
        self.update_at(nodes, Instant::now());
    }

    /// The same at a time from outside.
    pub fn update_at<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>, now: Instant) {
        let mut weigher = self.weigher();
        weigher.update(nodes, now);
        self.publish_table(&weigher);
    }

    /// Lets weights follow what requests have found out: latencies, failures, reports in
    /// responses, and time. To be called every [`TICK`], `now`;
    /// `pingora::BalancerService` does. Costs as much as
    /// [`update`](Self::update), but for the policies that metrics play no part in: there nothing is
    /// published as long as nothing has changed.
    pub fn tick(&self, now: Instant) {
        let mut weigher = self.weigher();
        weigher.tick(now);
        self.publish_table(&weigher);
    }

    /// Takes over one change. Costs the same whatever the number of nodes. Takes effect with the
    /// next [`publish`](Self::publish), but for a node that is gone: the policies that look at
    /// outcomes (`adaptive`, `headroom`, `consistent`) do not send anything there from now on.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Instant;
    /// use pingora_etcd::{Change, Node, balance::Balancer};
    ///
    /// let balancer = Balancer::builder().try_build()?;
    /// let node = Arc::new(Node::new("a", "10.0.0.1".parse().unwrap()));
    /// balancer.apply(&Change::Joined(node), Instant::now());
    /// balancer.publish(Instant::now());
    /// assert_eq!(balancer.len(), 1);
    /// # Ok::<(), pingora_etcd::ClusterError>(())
    /// ```
    pub fn apply(&self, change: &Change, now: Instant) {
        let mut weigher = self.weigher();
        match change {
            Change::Reset(nodes) => weigher.update(nodes.iter(), now),
            Change::Joined(node) | Change::Updated { new: node, .. } => weigher.insert(node, now),
            Change::Left(node) => weigher.remove(&node.id, now),
            Change::Leader(_) => {}
        }
    }

    /// Publishes the table that follows from the changes so far. Costs as much as
    /// [`update`](Self::update): where changes come often, let a few of them come together
    /// (`pingora::BalancerService` gives it 2 % of a core's time, and 20 ms at least from one to
    /// the next).
    pub fn publish(&self, now: Instant) {
        let mut weigher = self.weigher();
        weigher.settle(now);
        self.publish_table(&weigher);
    }

    fn publish_table(&self, weigher: &Weigher) {
        let config = &self.config;
        let serving = weigher.serving();
        if config.policy.is_static() && self.table.load().is_of(serving.clone()) {
            return;
        }
        let members = serving.cloned().collect();
        let table = Table::new(members, config.policy, config.candidates, weigher.alike());
        // Under the weigher's lock, so that of two updates the later one is published last.
        self.table.store(Arc::new(table));
    }

    fn weigher(&self) -> MutexGuard<'_, Weigher> {
        lock(&self.weigher)
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
            success: f64::from(slot.member.success()).max(0.0),
            share: slot.member.share(),
        };
        table.slots.iter().map(status).collect()
    }

    /// How many metrics have been refused since the start because they were no number, not
    /// finite, negative, or too great for a count. The last good one of that node stayed in use
    /// each time.
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
    /// How much it can take relative to the others.
    pub weight: f64,
    /// In proportion to what it is drawn: its weight, less where it is in another zone or fails.
    pub share: f64,
    /// Its success rate of late, 0 to 1.
    pub success: f64,
    /// Requests of this process that it is working on.
    pub in_flight: u32,
}
