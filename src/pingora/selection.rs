use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;

use ::pingora::lb::Backend;
use ::pingora::lb::selection::{BackendIter, BackendSelection};
use arc_swap::ArcSwap;

use crate::balance::{BalancerBuilder, Member, Spread, Weigher};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::node::Node;
use crate::sync::lock;

/// The least weight of a backend that is to get anything, so that it is picked when all others are
/// down.
const MIN_WEIGHT: f64 = 1e-6;

/// The node behind a [`Backend`], in its `ext`.
///
/// A backend's identity in Pingora is its address and weight, and what is in `ext` never counts
/// as a change. So the weight of every backend here is 1, and what changes lives behind this
/// handle: an update of metrics or weights leaves the backend's health and enablement alone.
/// Pingora's own selections see that 1, and so treat all alike, `Consistent` too: for weights have
/// [`MetricsWeighted`], or a [`BalancerService`](super::BalancerService) with
/// [`Policy::Consistent`](crate::balance::Policy::Consistent).
#[derive(Debug, Clone)]
pub struct BackendNode {
    slot: Arc<Slot>,
    weights: Arc<LiveWeights>,
}

/// The registration at an address: the same slot for as long as the address is known, whoever
/// registers there.
type Slot = ArcSwap<Member>;

impl BackendNode {
    /// The node of a backend that came from [`ClusterBackends`](super::ClusterBackends).
    pub fn of(backend: &Backend) -> Option<&Self> {
        backend.ext.get()
    }

    /// The node, as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.slot.load().node()
    }

    /// Its share of traffic relative to the other backends', as it is now. 0 for a node whose static
    /// weight is 0: it is not enabled, and gets nothing.
    pub fn weight(&self) -> f64 {
        self.slot.load().share()
    }
}

/// Weights beside the backends, and the selections that have to follow them: what
/// [`ClusterBackends`](super::ClusterBackends) and [`LiveLoadBalancer`](super::LiveLoadBalancer)
/// work with. To be used by itself where nodes come from somewhere else, or in a simulation.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Instant;
/// use pingora::lb::selection::{BackendIter, BackendSelection};
/// use pingora_etcd::Node;
/// use pingora_etcd::balance::Balancer;
/// use pingora_etcd::pingora::{LiveWeights, MetricsWeighted};
///
/// let weights = LiveWeights::try_new(&Balancer::builder().default_port(80))?;
/// let nodes = ["10.0.0.1", "10.0.0.2"].map(|ip| Arc::new(Node::new(ip, ip.parse().unwrap())));
/// weights.update_at(&nodes, Instant::now());
/// let backends = weights.backends().into_iter().map(|(backend, _serves)| backend);
/// let selection = Arc::new(MetricsWeighted::build(&backends.collect()));
/// assert!(selection.iter(b"").next().is_some());
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
#[derive(Debug)]
pub struct LiveWeights {
    state: Mutex<State>,
    selections: Mutex<Vec<Weak<Weighted>>>,
}

#[derive(Debug)]
struct State {
    weigher: Weigher,
    /// With whether it was serving.
    slots: HashMap<SocketAddr, (Arc<Slot>, bool)>,
    /// Slots of addresses that are gone, for as long as some backend still refers to them: an
    /// address that returns before Pingora has looked is no change for Pingora, which keeps the
    /// backend it has.
    departed: HashMap<SocketAddr, Weak<Slot>>,
}

impl State {
    /// Answers whether addresses have come or gone, or started or stopped to drain.
    fn apply<'a>(&mut self, nodes: impl IntoIterator<Item = &'a Arc<Node>>, now: Instant) -> bool {
        let mut changed = false;
        self.weigher.update(nodes, now);
        let mut before = std::mem::take(&mut self.slots);
        for member in self.weigher.current().cloned() {
            let (addr, serving) = (member.addr(), member.is_serving());
            let slot = match before.remove(&addr) {
                Some((slot, was_serving)) => {
                    changed |= was_serving != serving;
                    slot.store(member);
                    slot
                }
                None => {
                    changed = true;
                    match self.departed.remove(&addr).and_then(|slot| slot.upgrade()) {
                        Some(slot) => {
                            slot.store(member);
                            slot
                        }
                        None => Arc::new(Slot::new(member)),
                    }
                }
            };
            self.slots.insert(addr, (slot, serving));
        }
        changed |= !before.is_empty();
        let gone = before
            .into_iter()
            .map(|(addr, (slot, _))| (addr, Arc::downgrade(&slot)));
        self.departed.extend(gone);
        self.departed.retain(|_, slot| slot.strong_count() > 0);
        changed
    }
}

impl LiveWeights {
    /// Weights as a balancer with these settings has them. What only a pick needs, such as the
    /// number of candidates, plays no part.
    ///
    /// # Errors
    ///
    /// As [`BalancerBuilder::try_build`].
    pub fn try_new(settings: &BalancerBuilder) -> Result<Arc<Self>, ClusterError> {
        settings.validate()?;
        Ok(Self::of(settings))
    }

    /// With settings that have been checked.
    pub(super) fn of(settings: &BalancerBuilder) -> Arc<Self> {
        let mut weighing = settings.weighing();
        weighing.sees_requests = false;
        Arc::new(Self {
            state: Mutex::new(State {
                weigher: Weigher::new(weighing),
                slots: HashMap::new(),
                departed: HashMap::new(),
            }),
            selections: Mutex::new(Vec::new()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn selections(&self) -> MutexGuard<'_, Vec<Weak<Weighted>>> {
        lock(&self.selections)
    }

    /// Takes over what the nodes report, and rebuilds the selections in use. Answers whether
    /// addresses have come or gone, or started or stopped to drain: then Pingora has to discover
    /// again. Costs time in proportion to the number of nodes.
    pub fn update_at<'a>(
        &self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) -> bool {
        let changed = self.state().apply(nodes, now);
        self.rebuild_selections();
        changed
    }

    /// The same with the nodes that a discovery has now.
    pub(super) fn refresh(&self, discovery: &ServiceDiscovery) -> bool {
        let changed = {
            let mut state = self.state();
            // Read under the lock, so that of two refreshes the later one has the newer nodes.
            state.apply(discovery.nodes().iter(), Instant::now())
        };
        self.rebuild_selections();
        changed
    }

    /// Lets weights follow time; to be called every [`TICK`](crate::balance::TICK).
    pub fn tick(&self, now: Instant) {
        self.state().weigher.tick(now);
        self.rebuild_selections();
    }

    fn rebuild_selections(&self) {
        self.selections()
            .retain(|selection| match selection.upgrade() {
                Some(selection) => {
                    selection.rebuild();
                    true
                }
                None => false,
            });
    }

    /// The backends, and whether each serves: not one that drains, or has a static weight of 0.
    pub fn backends(self: &Arc<Self>) -> Vec<(Backend, bool)> {
        let state = self.state();
        let backend = |(addr, (slot, serving)): (&SocketAddr, &(Arc<Slot>, bool))| {
            let mut ext = http::Extensions::new();
            ext.insert(BackendNode {
                slot: slot.clone(),
                weights: self.clone(),
            });
            let backend = Backend {
                addr: (*addr).into(),
                weight: 1,
                ext,
            };
            (backend, *serving)
        };
        state.slots.iter().map(backend).collect()
    }
}

/// Selection by live weights, for a stock Pingora `LoadBalancer`.
///
/// Weights follow metrics, by [`Policy::Adaptive`](crate::balance::Policy::Adaptive) with
/// [`Adaptive::metrics_only`](crate::balance::Adaptive::metrics_only) unless it is told otherwise.
/// They are read beside the backends, so a change takes effect with the next request, without an
/// update of the load balancer. Picks are spread evenly in proportion to the weights (5, 1, 1 gives
/// no run of five), memory per backend is constant whatever the weights, and later choices are
/// weighted too and never repeat an earlier one. The key is ignored.
///
/// It hears of no outcome and cannot see when a request ends.
/// [`BalancerService`](super::BalancerService) can, and routes around a backend that is busy, slow
/// or failing before its metrics say so. What that is worth, in the simulation of
/// `benches/routing_quality` (p99 latency relative to an oracle's; ten servers, metrics every 5 s):
///
/// | load | with the guard | this selection | gRPC's weighted round robin |
/// |---|---|---|---|
/// | 50 % | 1.03 | 1.32 | 1.42 |
/// | 75 % | 1.08 | 4.41 | 9.60 |
/// | 90 % | 1.14 | 45 | 39 |
/// | 75 %, metrics every 1 s | 1.07 | 1.61 | 1.65 |
///
/// A backend that reports less load than it has, or fails fast, gets too much here: have health
/// checks, and metrics every second.
///
/// Backends that did not come from [`ClusterBackends`](super::ClusterBackends) have the weight
/// that Pingora knows. A weight of 0, theirs or a node's static one, is no traffic: where all weights
/// are 0, nothing is selected.
pub struct MetricsWeighted {
    weighted: Arc<Weighted>,
}

#[derive(Debug)]
struct Weighted {
    backends: Box<[Backend]>,
    taking: ArcSwap<Taking>,
    turns: Turns,
    /// What is published. Held from reading weights to publishing, so that what is published last
    /// was read last.
    weights: Mutex<Vec<f64>>,
}

/// Those that take traffic.
#[derive(Debug, Default)]
struct Taking {
    /// Where they are among the backends.
    places: Box<[usize]>,
    spread: Spread,
}

impl Weighted {
    /// 0 for one that is to get nothing.
    fn weight(backend: &Backend) -> f64 {
        let weight = match BackendNode::of(backend) {
            Some(node) => node.weight(),
            None => backend.weight as f64,
        };
        if weight > 0.0 {
            // A share of nothing, in a zone that is too far, is still more than no backend at all.
            weight.max(MIN_WEIGHT)
        } else {
            0.0
        }
    }

    fn rebuild(&self) {
        let mut published = lock(&self.weights);
        let weights = self.backends.iter().map(Self::weight);
        if weights.clone().eq(published.iter().copied()) {
            return;
        }
        *published = weights.collect();
        let taking = published.iter().copied().enumerate();
        let (places, weights): (Vec<_>, Vec<_>) =
            taking.filter(|(_, weight)| *weight > 0.0).unzip();
        self.taking.store(Arc::new(Taking {
            spread: Spread::new(&weights),
            places: places.into(),
        }));
    }
}

impl BackendSelection for MetricsWeighted {
    type Iter = MetricsWeightedIter;
    type Config = ();

    fn build(backends: &BTreeSet<Backend>) -> Self {
        let weighted = Arc::new(Weighted {
            backends: backends.iter().cloned().collect(),
            taking: ArcSwap::from_pointee(Taking::default()),
            turns: Turns::new(),
            weights: Mutex::new(Vec::new()),
        });
        // Known to the updater first, so that no change falls between the two.
        if let Some(node) = weighted.backends.iter().find_map(BackendNode::of) {
            let mut selections = node.weights.selections();
            selections.retain(|selection| selection.strong_count() > 0);
            selections.push(Arc::downgrade(&weighted));
        }
        weighted.rebuild();
        Self { weighted }
    }

    fn iter(self: &Arc<Self>, _key: &[u8]) -> Self::Iter {
        MetricsWeightedIter {
            weighted: self.weighted.clone(),
            first: None,
            rest: Vec::new(),
        }
    }
}

/// See [`MetricsWeighted`].
pub struct MetricsWeightedIter {
    weighted: Arc<Weighted>,
    first: Option<usize>,
    /// What to try after the first, best last; put together when it is needed, for most requests
    /// do not need it.
    rest: Vec<usize>,
}

impl BackendIter for MetricsWeightedIter {
    fn next(&mut self) -> Option<&Backend> {
        let backends = &self.weighted.backends;
        let index = match self.first {
            None => {
                let taking = self.weighted.taking.load();
                if taking.places.is_empty() {
                    return None;
                }
                let index = taking.places[taking.spread.turn(self.weighted.turns.next())];
                self.first = Some(index);
                index
            }
            Some(first) => {
                if self.rest.is_empty() {
                    self.rest = shuffled(&self.weighted, first);
                    // So that an empty rest means the end from here on.
                    self.rest.insert(0, first);
                }
                match self.rest.pop() {
                    Some(index) if !self.rest.is_empty() => index,
                    _ => {
                        self.rest.push(first);
                        return None;
                    }
                }
            }
        };
        backends.get(index)
    }
}

/// All but `first` that take traffic, in an order as if each had been drawn by weight from those left, best last:
/// P. S. Efraimidis and P. G. Spirakis, "Weighted random sampling with a reservoir", Information
/// Processing Letters 97(5), 2006.
fn shuffled(weighted: &Weighted, first: usize) -> Vec<usize> {
    let key = |(index, backend)| {
        let weight = Weighted::weight(backend);
        let uniform = 1.0 - fastrand::f64(); // above 0
        (weight > 0.0).then(|| (-uniform.ln() / weight, index))
    };
    let others = weighted.backends.iter().enumerate();
    let mut keyed: Vec<(f64, usize)> = others
        .filter(|(index, _)| *index != first)
        .filter_map(key)
        .collect();
    keyed.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    keyed.into_iter().map(|(_, index)| index).collect()
}

/// Turns that threads take without waiting for each other: each has a counter of its own, as long
/// as there are no more threads than counters.
#[derive(Debug)]
struct Turns([Turn; 16]);

/// Alone on its cache line, and the one that is fetched along.
#[derive(Debug)]
#[repr(align(128))]
struct Turn(AtomicU64);

impl Turns {
    fn new() -> Self {
        // Proxies that start together should not all begin with the same backend.
        Self(std::array::from_fn(|_| {
            Turn(AtomicU64::new(fastrand::u64(..)))
        }))
    }

    fn next(&self) -> u64 {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed);
        }
        let Turn(turn) = &self.0[THREAD.with(|thread| thread % self.0.len())];
        turn.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::{Balancer, Policy};
    use serde_json::json;

    fn headroom() -> BalancerBuilder {
        Balancer::builder().policy(Policy::Headroom)
    }

    fn refresh(weights: &Arc<LiveWeights>, nodes: &[Arc<Node>]) -> bool {
        weights.update_at(nodes, Instant::now())
    }

    fn node(port: u16, cpu: f64) -> Arc<Node> {
        let node = Node::new(format!("n{port}"), "127.0.0.1".parse().unwrap())
            .with_port(port)
            .with_metadata(json!({ "cpu_usage_percent": cpu }));
        Arc::new(node)
    }

    fn selection(weights: &Arc<LiveWeights>) -> Arc<MetricsWeighted> {
        let backends = weights.backends().into_iter().map(|(backend, _)| backend);
        Arc::new(MetricsWeighted::build(&backends.collect()))
    }

    fn first_ports(selection: &Arc<MetricsWeighted>, count: usize) -> Vec<u16> {
        let port = |_| {
            let mut iter = selection.iter(b"");
            iter.next().unwrap().addr.as_inet().unwrap().port()
        };
        (0..count).map(port).collect()
    }

    fn share(ports: &[u16], port: u16) -> f64 {
        ports.iter().filter(|other| **other == port).count() as f64 / ports.len() as f64
    }

    #[test]
    fn a_weight_change_takes_effect_without_a_build() {
        let weights = LiveWeights::of(&headroom());
        assert!(refresh(&weights, &[node(1, 0.0), node(2, 0.0)]));
        let selection = selection(&weights);
        assert!((share(&first_ports(&selection, 1000), 1) - 0.5).abs() < 0.01);
        assert!(
            !refresh(&weights, &[node(1, 100.0), node(2, 0.0)]),
            "no new membership"
        );
        let share = share(&first_ports(&selection, 3000), 1);
        assert!((share - 1.0 / 3.0).abs() < 0.01, "0.5 against 1: {share}");
    }

    #[test]
    fn picks_are_spread_evenly() {
        let weights = LiveWeights::of(&headroom());
        let heavy = Arc::new(Node::clone(&node(1, 0.0)).with_weight(5.0));
        refresh(&weights, &[heavy, node(2, 0.0), node(3, 0.0)]);
        let ports = first_ports(&selection(&weights), 700);
        for port in [2, 3] {
            assert!((share(&ports, port) - 1.0 / 7.0).abs() < 0.01);
        }
        let longest = ports.chunk_by(|a, b| a == b).map(<[u16]>::len).max();
        assert!(
            longest <= Some(4),
            "5,1,1 in blocks gives five: {longest:?}"
        );
    }

    #[test]
    fn nothing_is_published_while_nothing_changes() {
        let weights = LiveWeights::of(&Balancer::builder().policy(Policy::RoundRobin));
        let heavy = |weight| Arc::new(Node::clone(&node(1, 50.0)).with_weight(weight));
        refresh(&weights, &[heavy(3.0), node(2, 50.0)]);
        let selection = selection(&weights);
        let published = || selection.weighted.taking.load_full();
        let before = published();
        weights.tick(Instant::now());
        refresh(&weights, &[heavy(3.0), node(2, 90.0)]);
        assert!(Arc::ptr_eq(&before, &published()));
        refresh(&weights, &[heavy(4.0), node(2, 90.0)]);
        assert!(!Arc::ptr_eq(&before, &published()));
    }

    #[test]
    fn later_choices_never_repeat_and_come_to_an_end() {
        let weights = LiveWeights::of(&headroom());
        let nodes: Vec<_> = (1..=20).map(|port| node(port, f64::from(port))).collect();
        refresh(&weights, &nodes);
        let selection = selection(&weights);
        let mut iter = selection.iter(b"");
        let mut seen = BTreeSet::new();
        while let Some(backend) = iter.next() {
            assert!(seen.insert(backend.addr.clone()), "repeated");
        }
        assert_eq!(seen.len(), 20);
    }

    #[test]
    fn no_backends_and_foreign_backends() {
        let none = Arc::new(MetricsWeighted::build(&BTreeSet::new()));
        assert!(none.iter(b"").next().is_none());
        let zero =
            ["127.0.0.1:1", "127.0.0.1:2"].map(|addr| Backend::new_with_weight(addr, 0).unwrap());
        let selection = Arc::new(MetricsWeighted::build(&zero.into()));
        assert!(selection.iter(b"").next().is_none());
        let some = [("127.0.0.1:1", 0), ("127.0.0.1:2", 2)]
            .map(|(addr, weight)| Backend::new_with_weight(addr, weight).unwrap());
        let selection = Arc::new(MetricsWeighted::build(&some.into()));
        assert_eq!(share(&first_ports(&selection, 100), 2), 1.0);
    }

    #[test]
    fn a_weight_of_zero_is_no_traffic() {
        for policy in [Policy::Adaptive, Policy::Headroom, Policy::RoundRobin] {
            let weights = LiveWeights::of(&Balancer::builder().policy(policy));
            let weighted = |port: u16, weight: f64| {
                Arc::new(Node::clone(&node(port, 50.0)).with_weight(weight))
            };
            let enabled = || {
                let serving = |(backend, serving): &(Backend, bool)| {
                    let port = backend.addr.as_inet().unwrap().port();
                    serving.then_some(port)
                };
                let mut ports: Vec<_> = weights.backends().iter().filter_map(serving).collect();
                ports.sort_unstable();
                ports
            };
            refresh(&weights, &[weighted(1, 1.0), weighted(2, 1.0)]);
            let selection = selection(&weights);
            assert_eq!(enabled(), [1, 2]);
            assert!(
                refresh(&weights, &[weighted(1, 0.0), weighted(2, 1.0)]),
                "Pingora has to hear of it"
            );
            assert_eq!(enabled(), [2]);
            assert_eq!(share(&first_ports(&selection, 200), 2), 1.0, "{policy:?}");
            let mut iter = selection.iter(b"");
            assert!(iter.next().is_some() && iter.next().is_none());
            refresh(&weights, &[weighted(1, 0.0), weighted(2, 0.0)]);
            assert!(selection.iter(b"").next().is_none(), "{policy:?}");
            assert!(enabled().is_empty());
            refresh(&weights, &[weighted(1, 1.0), weighted(2, 0.0)]);
            assert_eq!(share(&first_ports(&selection, 200), 1), 1.0, "{policy:?}");
        }
    }

    #[test]
    fn of_two_registrations_at_one_address_the_newer_counts() {
        let weights = LiveWeights::of(&headroom());
        let mut old = Node::clone(&node(1, 0.0));
        old.last_seen = 1;
        let mut new = Node::clone(&node(1, 0.0));
        new.id = "new".to_owned();
        new.last_seen = 2;
        refresh(&weights, &[Arc::new(new), Arc::new(old)]);
        let backends = weights.backends();
        assert_eq!(backends.len(), 1);
        let node = BackendNode::of(&backends[0].0).unwrap().node();
        assert_eq!(node.id, "new");
    }
}
