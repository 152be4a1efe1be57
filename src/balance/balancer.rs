//! The balancer: takes over what changes, publishes tables, and picks from them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

#[cfg(feature = "pingora")]
use super::endpoint::{Endpoint, Holder};
use super::fleet::Fleet;
use super::learned::Learned;
use super::pick::PickOptions;
use super::policy::{ActivePolicy, RoutingPolicy};
use super::scale::WeigherSettings;
use super::table::{Slot, Table};
use super::upstream::Upstream;
use super::weigher::{Settled, Weigher};
use crate::node::Node;
use crate::sync::lock;
use crate::view::{Change, NodeOverride};

/// How often [`Balancer::tick`] is to be called.
pub const TICK: Duration = Duration::from_secs(1);

/// Chooses backends. Share it in an `Arc`; every call takes `&self`.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Instant;
/// use pingora_etcd::{Change, Node, Nodes, balance::Balancer};
///
/// let balancer = Balancer::builder().default_port(8080).try_build()?;
/// assert!(balancer.pick().is_none());
///
/// let nodes = ["10.0.0.1", "10.0.0.2"].map(|ip| Arc::new(Node::new(ip, ip.parse().unwrap())));
/// let view = Arc::new(Nodes::from_iter(nodes));
/// balancer.apply(&Change::Reset(view), Instant::now());
/// balancer.publish(Instant::now());
///
/// let upstream = balancer.pick().unwrap(); // keep it as long as the request runs
/// assert_eq!(upstream.addr().port(), 8080);
/// assert_eq!(upstream.in_flight(), 1);
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
#[derive(Debug)]
pub struct Balancer {
    published: ArcSwap<Published>,
    fleet: Arc<Fleet>,
    weighing: Mutex<Weighing>,
    default_port: AtomicU16,
}

/// What picks read.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) table: Table,
    policy: Arc<ActivePolicy>,
}

/// What makes tables.
#[derive(Debug)]
struct Weighing {
    weigher: Weigher,
    policy: Arc<ActivePolicy>,
}

impl Balancer {
    pub(super) fn new(policy: ActivePolicy, weigher: Weigher, default_port: u16) -> Self {
        let policy = Arc::new(policy);
        Self {
            default_port: default_port.into(),
            published: ArcSwap::from_pointee(Published {
                table: Table::default(),
                policy: policy.clone(),
            }),
            fleet: weigher.fleet().clone(),
            weighing: Mutex::new(Weighing { weigher, policy }),
        }
    }

    /// Works by other settings from now on, with what is known of the nodes.
    pub(super) fn change(&self, mut policy: ActivePolicy, settings: WeigherSettings, now: Instant) {
        let mut weighing = self.weighing();
        policy.continue_from(&weighing.policy);
        weighing.policy = Arc::new(policy);
        self.default_port
            .store(settings.default_port, Ordering::Relaxed);
        weighing.weigher.change(settings, now);
        self.settle(&mut weighing, now, true);
    }

    /// Takes over a change of the group; takes effect with the next [`publish`](Self::publish).
    /// Requests in flight continue to be counted.
    ///
    /// The cost of a single change does not depend on the number of nodes; that of
    /// [`Change::Reset`], which replaces everything that is known by a complete view, is
    /// proportional to it.
    ///
    /// A node that has left ([`Change::Left`]) is avoided from now on by the policies that look at outcomes
    /// (`adaptive`, `headroom`, `consistent`). If it returns, it starts slowly, and, within ten minutes, with the
    /// weight that was learned before. But if its process is the same one ([`Node::run`]) and has only lost its
    /// lease, everything that was learned about it still holds for two minutes.
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
        let weigher = &mut self.weighing().weigher;
        match change {
            Change::Reset(nodes) => weigher.reset(nodes.iter(), now),
            Change::Joined(node) | Change::Updated { new: node, .. } => weigher.insert(node, now),
            Change::Left(node) => weigher.remove(&node.id, now),
            Change::Leader(_) => {}
        }
    }

    /// Publishes the table that follows from the changes so far. Draining nodes, and those with a
    /// static weight of 0, are not in the table. Costs time and memory in proportion to the number
    /// of nodes, off the request path. Where changes come often, publish several of them together
    /// (`pingora::BalancerService` uses at most 2 % of a core for it, and waits at least 20 ms from
    /// one table to the next).
    ///
    /// With 256 nodes or more, if all that has changed is what some of them report, the cost depends on their
    /// number only. Picks compare backends by their new weights at once, and draw them by these from the next
    /// table on: after a [`tick`](Self::tick), or when the weights of all together have moved by 2 %.
    pub fn publish(&self, now: Instant) {
        let mut weighing = self.weighing();
        self.settle(&mut weighing, now, true);
    }

    /// Lets weights follow what has changed, and publishes them, if that is wanted. Returns whether more has changed
    /// than the weights of some backends that have reported.
    fn settle(&self, weighing: &mut Weighing, now: Instant, publishes: bool) -> bool {
        let settled = weighing.weigher.settle(&weighing.policy, now);
        if publishes {
            match &settled {
                Settled::All => self.publish_table(weighing),
                Settled::Only(some) => {
                    let published = self.published.load();
                    for endpoint in some {
                        published.table.adjust(endpoint);
                    }
                }
            }
        }
        matches!(settled, Settled::All)
    }

    /// Replaces everything that is known by these nodes, and computes their weights. For those who read weights
    /// and do not pick, nothing has to be published.
    #[cfg(feature = "pingora")]
    pub(crate) fn replace<'a>(
        &self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
        publishes: bool,
    ) {
        let mut weighing = self.weighing();
        weighing.weigher.reset(nodes, now);
        self.settle(&mut weighing, now, publishes);
    }

    /// Replaces everything by a view that is taken while nobody else changes anything, so that it is not older than what
    /// has been applied.
    #[cfg(feature = "pingora")]
    pub(crate) fn catch_up(&self, view: impl FnOnce() -> Arc<crate::view::Nodes>, now: Instant) {
        let mut weighing = self.weighing();
        weighing.weigher.reset(view().iter(), now);
        self.settle(&mut weighing, now, true);
    }

    /// [`publish`](Self::publish) for those who read weights and, maybe, do not pick.
    #[cfg(feature = "pingora")]
    pub(crate) fn publish_weights(&self, now: Instant, publishes: bool) -> bool {
        let mut weighing = self.weighing();
        self.settle(&mut weighing, now, publishes)
    }

    /// [`tick`](Self::tick) for those who read weights and, maybe, do not pick. Returns whether there was anything to do.
    pub(crate) fn tick_weights(&self, now: Instant, publishes: bool) -> bool {
        let mut weighing = self.weighing();
        let Weighing { weigher, policy } = &mut *weighing;
        let has_changed = weigher.tick(policy, now);
        if publishes && (has_changed || self.published.load().table.is_used_up()) {
            self.publish_table(&weighing);
        }
        has_changed
    }

    /// Another number after each change of anything else than loads.
    #[cfg(feature = "pingora")]
    pub(crate) fn version(&self) -> u64 {
        self.weighing().weigher.version()
    }

    /// One backend for each address, including those that cannot be picked.
    #[cfg(feature = "pingora")]
    pub(crate) fn holders(&self) -> Vec<Holder> {
        self.weighing().weigher.holders()
    }

    /// Lets weights follow what requests have found out (latencies, failures, reports in responses)
    /// and time. To be called every [`TICK`] with the current time, as `pingora::BalancerService`
    /// does. Costs as much as a table; but where nothing has happened since the last ticks, and nothing is
    /// about to change, it costs nothing, and under the policies that metrics play no part in, nothing is
    /// published while nothing has changed.
    pub fn tick(&self, now: Instant) {
        self.tick_weights(now, true);
    }

    #[cfg(test)]
    pub(in crate::balance) fn is_any_on_trial(&self) -> bool {
        self.fleet.some_on_trial()
    }

    #[cfg(test)]
    pub(in crate::balance) fn usual_refusing(&self) -> f32 {
        self.fleet.usual_refusing()
    }

    fn publish_table(&self, weighing: &Weighing) {
        let Weighing { weigher, policy } = weighing;
        let active = weigher.active_endpoints();
        self.fleet.set_ejecting(policy.heeds_outcomes());
        let is_static = policy.is_static();
        let last = self.published.load();
        let is_same = Arc::ptr_eq(&last.policy, policy);
        if is_static && is_same && last.table.is_built_from(active.clone()) {
            return;
        }
        let mut table = Table::new(active.cloned().collect());
        table.earlier_turns = last.table.turns_so_far();
        let shares = table.shares();
        policy.index(&mut table, &shares);
        if is_static {
            table.built_from = shares.into();
        }
        let is_any_on_trial = !(table.ejected.is_empty() && table.new.is_empty());
        self.fleet.set_on_trial(is_any_on_trial);
        // Under the weigher's lock, so that of two tables the later one is published last.
        let policy = policy.clone();
        self.published.store(Arc::new(Published { table, policy }));
    }

    fn weighing(&self) -> MutexGuard<'_, Weighing> {
        lock(&self.weighing)
    }

    /// Picks a backend for a request; `None` if there is none.
    pub fn pick(&self) -> Option<Upstream> {
        self.pick_with(PickOptions::default())
    }

    /// Picks a backend with a key, around backends that have been tried, or with a time and
    /// randomness of the caller's; `None` if there is none. Waits for no lock and allocates nothing.
    pub fn pick_with(&self, options: PickOptions<'_>) -> Option<Upstream> {
        let published = self.published.load();
        let Published { table, policy } = &**published;
        if table.slots.is_empty() {
            return None;
        }
        // The thread's generator is used once a pick; what follows from it stays in registers.
        let seed = options.random.unwrap_or_else(|| fastrand::u64(..));
        let mut random = fastrand::Rng::with_seed(seed);
        let picked = policy.pick(table, &self.fleet, &options, &mut random)?;
        let state = table.slots[picked.index].endpoint.enter();
        Some(Upstream::new(state, picked.in_flight, picked.is_probe))
    }

    /// Where the next request is to go, but for these backends, for a caller that may follow it, and then
    /// [begins](Self::begin) the request. `None` if the policy does not choose by requests in flight.
    #[cfg(feature = "pingora")]
    pub(crate) fn propose(&self, exclude: &[SocketAddr]) -> Option<SocketAddr> {
        let published = self.published.load();
        let Published { table, policy } = &**published;
        if table.slots.is_empty() || !policy.compares_requests() {
            return None;
        }
        let mut random = fastrand::Rng::with_seed(fastrand::u64(..));
        let options = PickOptions {
            exclude,
            ..PickOptions::default()
        };
        let picked = policy.pick(table, &self.fleet, &options, &mut random)?;
        let state = table.slots[picked.index].endpoint.state();
        if picked.is_probe {
            state.offer_probe();
        }
        Some(state.addr())
    }

    /// Begins a request to a backend, whoever has chosen it.
    #[cfg(feature = "pingora")]
    pub(crate) fn begin(&self, endpoint: &Endpoint) -> Upstream {
        let state = endpoint.enter();
        let is_probe = state.take_offered_probe();
        let in_flight = self.published.load().policy.count();
        Upstream::new(state, in_flight, is_probe)
    }

    /// The backend at this address, whatever the policy would pick, if it is one that can be picked;
    /// for requests that have to go to a certain node. The first call after a table was published
    /// costs time in proportion to the number of nodes.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Instant;
    /// use pingora_etcd::{Change, Node, balance::Balancer};
    ///
    /// let balancer = Balancer::builder().try_build()?;
    /// let node = Node::new("a", "10.0.0.1".parse().unwrap());
    /// let addr = node.addr(80);
    /// balancer.apply(&Change::Joined(Arc::new(node)), Instant::now());
    /// balancer.publish(Instant::now());
    /// let upstream = balancer.upstream_at(addr).unwrap();
    /// assert_eq!(upstream.in_flight(), 1);
    /// assert!(balancer.upstream_at("10.0.0.2:80".parse().unwrap()).is_none());
    /// # Ok::<(), pingora_etcd::ClusterError>(())
    /// ```
    pub fn upstream_at(&self, addr: SocketAddr) -> Option<Upstream> {
        let published = self.published.load();
        let slot = published.table.at(addr)?;
        Some(Upstream::new(
            slot.endpoint.enter(),
            published.policy.count(),
            false,
        ))
    }

    /// Whether the backend at this address can be picked and is not known to fail.
    #[cfg_attr(not(feature = "pingora"), allow(dead_code))]
    pub(crate) fn works_at(&self, addr: SocketAddr) -> bool {
        let published = self.published.load();
        let slot = published.table.at(addr);
        slot.is_some_and(|slot| slot.acceptance >= 0.5 && !slot.endpoint.is_ejected())
    }

    /// How many backends can be picked.
    pub fn len(&self) -> usize {
        self.published.load().table.slots.len()
    }

    /// Whether there is a backend that can be picked beside these.
    #[cfg_attr(not(feature = "pingora"), allow(dead_code))]
    pub(crate) fn has_other_than(&self, tried: &[SocketAddr]) -> bool {
        let published = self.published.load();
        let is_tried = published.table.exclusion(tried);
        (0..published.table.slots.len()).any(|index| !is_tried(index))
    }

    /// How many of them are not ejected; all, if all are.
    #[cfg_attr(not(feature = "pingora"), allow(dead_code))]
    pub(crate) fn working(&self) -> usize {
        self.published.load().table.live
    }

    /// Where requests for a node are sent, whether it can be picked or not.
    pub fn address_of(&self, node: &Node) -> SocketAddr {
        node.addr(self.default_port.load(Ordering::Relaxed))
    }

    /// Takes over what operators say of nodes, by id: all of it, so that what is missing holds no more. It holds over
    /// what a node says of itself, for the same process: by its [`run`](Node::run), or, without one, by its lease. Takes effect with the next
    /// [`publish`](Self::publish).
    pub fn set_overrides(&self, overrides: &HashMap<String, NodeOverride>) {
        self.weighing().weigher.set_overrides(overrides);
    }

    /// What an operator says of a node, if it holds.
    pub fn override_of(&self, id: &str) -> Option<NodeOverride> {
        self.weighing().weigher.override_of(id)
    }

    /// Says whether there are health checks, by the part of checked nodes from which on those that are well are
    /// used alone, 0 to 1; with fewer, all are used. `None` for no checks, which is how a balancer begins.
    /// Takes effect with the next [`publish`](Self::publish).
    pub fn set_checks(&self, panic_threshold: Option<f64>) {
        self.weighing().weigher.set_checks(panic_threshold);
    }

    /// Takes over what a health check has found out about a node. Returns whether it is new; `None` if this
    /// process is not a node of the last view. Takes effect with the next [`publish`](Self::publish). While there
    /// are checks, a node that has not been found well is not used, unless no other one is well.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Instant;
    /// use pingora_etcd::{Change, Node, balance::Balancer};
    ///
    /// let balancer = Balancer::builder().try_build()?;
    /// balancer.set_checks(Some(0.5));
    /// let nodes = ["10.0.0.1", "10.0.0.2"].map(|ip| Node::new(ip, ip.parse().unwrap()));
    /// for node in &nodes {
    ///     balancer.apply(&Change::Joined(Arc::new(node.clone())), Instant::now());
    /// }
    /// balancer.set_checked(&nodes[0], true);
    /// balancer.set_checked(&nodes[1], false);
    /// balancer.publish(Instant::now());
    /// assert_eq!(balancer.len(), 1);
    /// # Ok::<(), pingora_etcd::ClusterError>(())
    /// ```
    pub fn set_checked(&self, node: &Node, is_well: bool) -> Option<bool> {
        self.weighing().weigher.set_checked(node, is_well)
    }

    /// Whether health checks find so few nodes well that all are used.
    pub fn is_panicking(&self) -> bool {
        self.weighing().weigher.is_panicking()
    }

    /// Whether there is no backend to pick.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every backend that can be picked, with its weight and its requests in flight: for status
    /// pages and tests.
    pub fn backends(&self) -> Vec<BackendStatus> {
        let status = |Slot { endpoint, .. }: &Slot| BackendStatus {
            node: endpoint.node(),
            addr: endpoint.addr(),
            weight: endpoint.weight().get(),
            share: match endpoint.is_outside() {
                true => 0.0,
                false => endpoint.subset_share(),
            },
            success: f64::from(endpoint.success()).max(0.0),
            in_flight: endpoint.in_flight(),
            is_ejected: endpoint.is_ejected(),
            is_outside: endpoint.is_outside(),
        };
        self.published
            .load()
            .table
            .slots
            .iter()
            .map(status)
            .collect()
    }

    /// How many requests of this process the nodes that are in no table are working on, by id: those that are drained,
    /// found down, or not used for another reason, and have not finished. Costs time in proportion to the number of nodes.
    pub fn unused_in_flight(&self) -> Vec<(Arc<Node>, u32)> {
        self.weighing().weigher.unused_in_flight()
    }

    /// What was learned of the backends that have had requests of this process. Costs time in proportion to the
    /// number of nodes.
    pub fn learned(&self, now: Instant) -> Learned {
        self.weighing().weigher.learned(now)
    }

    /// Begins with what another balancer, or a former process, had [learned](Self::learned) `passed` ago: of
    /// the nodes that are here, or come within two minutes, and are of the same processes. What requests have
    /// shown here already counts more. It takes effect at once.
    ///
    /// It fades with its age, with the half-life `stale_half_life_ms` of [`Adaptive`](super::Adaptive), and
    /// what is older than ten minutes is left out. Nothing of it goes beyond what the settings allow, at most
    /// half of the backends begin as ejected, and all of it is corrected by what requests and reports show;
    /// so it does little harm where it is wrong.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use pingora_etcd::balance::{Balancer, Learned};
    ///
    /// let (old, new) = (Balancer::builder().try_build()?, Balancer::builder().try_build()?);
    /// let learned = serde_json::to_string(&old.learned(Instant::now()))?;
    /// let learned: Learned = serde_json::from_str(&learned)?;
    /// new.teach(&learned, Duration::from_secs(3), Instant::now());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn teach(&self, learned: &Learned, passed: Duration, now: Instant) {
        let mut weighing = self.weighing();
        weighing.weigher.teach(learned, passed, now);
        self.settle(&mut weighing, now, true);
    }

    /// How many metrics have been refused since the start because they were not a number, not
    /// finite, negative, or too great for a count. The last valid value of the metric stayed in use.
    pub fn refused_metrics(&self) -> u64 {
        self.weighing().weigher.refused()
    }

    #[cfg(test)]
    pub(super) fn table(&self) -> Arc<Published> {
        self.published.load_full()
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
    /// How much work it is given relative to the others; reduced where it is in another zone.
    pub weight: f64,
    /// Its relative chance of being drawn: its weight, reduced while it fails.
    pub share: f64,
    /// Its recent success rate, 0 to 1.
    pub success: f64,
    /// How many requests of this process it is working on.
    pub in_flight: u32,
    /// It fails, and gets nothing but a few probes until it works again.
    pub is_ejected: bool,
    /// This process is one of many, and uses others ([`Adaptive::subset_in_flight`](super::Adaptive::subset_in_flight)):
    /// it gets what has to go to it, and what the others cannot take.
    pub is_outside: bool,
}
