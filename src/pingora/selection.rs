//! A selection for Pingora's `LoadBalancer` that follows live weights.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};

use ::pingora::lb::Backend;
use ::pingora::lb::selection::{BackendIter, BackendSelection};
use arc_swap::ArcSwap;

use super::turns::Turns;
use super::weights::{BackendNode, LiveWeights, WeightsDependent};
use crate::balance::{Share, Spread};
use crate::opaque::opaque_debug;
use crate::sync::lock;

/// How many choices of a request are by requests in flight; after that, by share alone. Pingora may refuse many, because
/// backends that are down have nothing in flight.
const MOST_PROPOSALS: usize = 16;
/// The smallest share of a backend that gets anything, so that it is selected when all others are
/// down.
const MIN_SHARE: f64 = 1e-6;

/// Selection by live weights, for a stock Pingora `LoadBalancer`.
///
/// Weights follow metrics, by [`Policy::Adaptive`](crate::balance::Policy::Adaptive) with
/// [`Adaptive::metrics_only`](crate::balance::Adaptive::metrics_only) unless other settings are
/// given. They are read beside the backends, so a change takes effect with the next request, without
/// an update of the load balancer: a node that drains or leaves gets nothing from then on. (Unless all that Pingora knows
/// drain, and it has not discovered yet those that serve instead. In a
/// [`LiveLoadBalancer`](super::LiveLoadBalancer) of 256 nodes or more, what one of them reports takes effect
/// within a second.) Picks are
/// spread evenly in proportion to the weights (5, 1, 1 gives no run of five), memory per backend is
/// constant whatever the weights, and later choices are weighted too and never repeat an earlier one.
/// The key is ignored.
///
/// By itself a selection cannot see when a request ends, and how. [`BackendNode::begin`] tells it: then it
/// chooses as [`BalancerService`](super::BalancerService) does, and routes around a backend that is busy,
/// slow or failing before its metrics show it. The guide's page about routing has both in its table: at 75 % load and more the p99
/// latency without outcomes is several times as long.
///
/// Without outcomes, a backend that reports less load than it has, or fails fast, gets too much traffic:
/// use health checks, and metrics every second.
///
/// Backends that did not come from [`ClusterBackends`](super::ClusterBackends) have the weight that
/// Pingora knows. A weight of 0, or a node's static weight of 0, means no traffic: where all weights
/// are 0, nothing is selected.
pub struct MetricsWeighted {
    shared: Arc<Weighted>,
}

/// The backends of a selection, and what is published of their weights.
#[derive(Debug)]
struct Weighted {
    backends: Box<[Backend]>,
    /// Where the weights come from, if they are those of a group.
    weights: Option<Arc<LiveWeights>>,
    /// Where in `backends` each address is.
    places: HashMap<SocketAddr, usize>,
    published: ArcSwap<Published>,
    turns: Turns,
    /// The shares behind `published`. Locked from reading shares to publishing them, so that what is
    /// published last was read last.
    shares: Mutex<Vec<Option<Share>>>,
}

/// The backends that take traffic.
#[derive(Debug, Default)]
struct Published {
    /// Their positions among all backends.
    positions: Box<[usize]>,
    /// Where nobody takes traffic: those that still can, until Pingora has discovered who takes their place.
    waiting: Box<[usize]>,
    spread: Spread,
}

/// `None` for a backend that gets nothing.
fn share(backend: &Backend) -> Option<Share> {
    let share = match BackendNode::of(backend) {
        Some(node) => node.slot().share().get(),
        None => backend.weight as f64,
    };
    some_share(share)
}

/// The same when others cannot be used, and whether it is ejected.
fn share_at_last(backend: &Backend) -> Option<(Share, bool)> {
    let (share, is_ejected) = match BackendNode::of(backend).map(BackendNode::slot) {
        Some(slot) => (slot.share_at_last().get(), slot.is_ejected()),
        None => (backend.weight as f64, false),
    };
    Some((some_share(share)?, is_ejected))
}

// A backend in another zone may have a share of almost 0, and is still better than none.
fn some_share(share: f64) -> Option<Share> {
    (share > 0.0).then(|| Share::new(share.max(MIN_SHARE)))
}

impl Weighted {
    /// What requests and their outcomes are in favour of, if these are given, beside those that have been tried.
    fn proposed(&self, tried: &[usize]) -> Option<usize> {
        let weights = self.weights.as_ref()?;
        let mut unwanted = Unwanted::default();
        for index in tried {
            unwanted.add(*self.backends[*index].addr.as_inet()?);
        }
        while unwanted.count < unwanted.addrs.len() {
            let addr = weights.propose(unwanted.all())?;
            if let Some(place) = self.places.get(&addr) {
                return Some(*place);
            }
            // Pingora has not discovered it yet.
            unwanted.add(addr);
        }
        None
    }

    /// While all nodes that Pingora knows have ended their service, and it has not discovered those that have begun theirs:
    /// who drains can still serve.
    fn waiting_for_discovery(&self) -> Vec<usize> {
        let Some(weights) = &self.weights else {
            return Vec::new();
        };
        let unused = weights.unused_beside_used();
        let is_there = |backend: &Backend| {
            let addr = backend.addr.as_inet();
            addr.is_some_and(|addr| unused.contains(addr))
        };
        let backends = self.backends.iter().enumerate();
        let there = backends.filter(|(_, backend)| is_there(backend));
        there.map(|(index, _)| index).collect()
    }

    fn next_in_turn(&self) -> Option<usize> {
        let published = self.published.load();
        if published.positions.is_empty() {
            return None;
        }
        let turn = self.turns.next();
        Some(published.positions[published.spread.turn(turn)])
    }
}

/// Addresses that are not to be proposed.
struct Unwanted {
    addrs: [SocketAddr; 2 * MOST_PROPOSALS],
    count: usize,
}

impl Default for Unwanted {
    fn default() -> Self {
        Self {
            addrs: [SocketAddr::from(([0, 0, 0, 0], 0)); 2 * MOST_PROPOSALS],
            count: 0,
        }
    }
}

impl Unwanted {
    fn add(&mut self, addr: SocketAddr) {
        self.addrs[self.count] = addr;
        self.count += 1;
    }

    fn all(&self) -> &[SocketAddr] {
        &self.addrs[..self.count]
    }
}

impl WeightsDependent for Weighted {
    fn rebuild(&self) {
        let mut shares = lock(&self.shares);
        let current = self.backends.iter().map(share);
        // Whoever else is there is not among them.
        let is_same = current.clone().eq(shares.iter().copied());
        if is_same && shares.iter().any(Option::is_some) {
            return;
        }
        *shares = current.collect();
        let taking = shares.iter().enumerate();
        let (positions, taking): (Vec<_>, Vec<_>) = taking
            .filter_map(|(position, share)| Some((position, (*share)?)))
            .unzip();
        let waiting = match positions.is_empty() {
            true => self.waiting_for_discovery(),
            false => Vec::new(),
        };
        self.published.store(Arc::new(Published {
            spread: Spread::new(&taking),
            positions: positions.into(),
            waiting: waiting.into(),
        }));
    }
}

impl BackendSelection for MetricsWeighted {
    type Iter = MetricsWeightedIter;
    type Config = ();

    fn build(backends: &BTreeSet<Backend>) -> Self {
        let all_weights: Vec<_> = backends.iter().map(BackendNode::of).collect();
        let first = all_weights
            .first()
            .copied()
            .flatten()
            .map(BackendNode::weights);
        let is_one = |node: &Option<&BackendNode>| match (node, first) {
            (Some(node), Some(first)) => Arc::ptr_eq(node.weights(), first),
            _ => false,
        };
        let places = backends.iter().enumerate();
        let places = places.filter_map(|(place, backend)| Some((*backend.addr.as_inet()?, place)));
        let shared = Arc::new(Weighted {
            backends: backends.iter().cloned().collect(),
            // Among backends of several kinds, requests to one of them say nothing of the others.
            weights: first.filter(|_| all_weights.iter().all(is_one)).cloned(),
            places: places.collect(),
            published: ArcSwap::from_pointee(Published::default()),
            turns: Turns::new(),
            shares: Mutex::new(Vec::new()),
        });
        // Registered before the first build, so that no change is missed between the two.
        let mut notifying: Vec<&Arc<LiveWeights>> = Vec::new();
        for weights in all_weights.into_iter().flatten().map(BackendNode::weights) {
            if !notifying.iter().any(|other| Arc::ptr_eq(other, weights)) {
                notifying.push(weights);
                let dependent = Arc::downgrade(&shared);
                weights.notify(dependent as Weak<dyn WeightsDependent>);
            }
        }
        shared.rebuild();
        Self { shared }
    }

    fn iter(self: &Arc<Self>, _key: &[u8]) -> Self::Iter {
        MetricsWeightedIter {
            weighted: self.shared.clone(),
            chosen: [0; MOST_PROPOSALS],
            count: 0,
            rest: None,
        }
    }
}

/// See [`MetricsWeighted`].
pub struct MetricsWeightedIter {
    weighted: Arc<Weighted>,
    /// What has been chosen so far.
    chosen: [usize; MOST_PROPOSALS],
    count: usize,
    /// What to try after these, best last. Computed when it is needed, because most requests do not need it.
    rest: Option<Vec<usize>>,
}

impl MetricsWeightedIter {
    /// The next one, while requests and their outcomes say which, or the first one by turn.
    fn choose(&mut self) -> Option<usize> {
        let chosen = &self.chosen[..self.count];
        if self.rest.is_some() || chosen.len() == MOST_PROPOSALS {
            return None;
        }
        let mut next = self.weighted.proposed(chosen);
        if chosen.is_empty() {
            next = next.or_else(|| self.weighted.next_in_turn());
        }
        let next = next.filter(|next| !chosen.contains(next))?;
        self.chosen[self.count] = next;
        self.count += 1;
        Some(next)
    }
}

impl BackendIter for MetricsWeightedIter {
    fn next(&mut self) -> Option<&Backend> {
        let index = self.choose().or_else(|| {
            let chosen = &self.chosen[..self.count];
            let weighted = &self.weighted;
            let rest = self.rest.get_or_insert_with(|| shuffled(weighted, chosen));
            rest.pop()
        })?;
        self.weighted.backends.get(index)
    }
}

/// All backends but those that were chosen before, in an order as if each had been drawn by share from the remaining
/// ones, best last, and those that are ejected first: P. S. Efraimidis and P. G. Spirakis, "Weighted random sampling
/// with a reservoir", Information Processing Letters 97(5), 2006.
fn shuffled(weighted: &Weighted, chosen: &[usize]) -> Vec<usize> {
    let key = |(index, backend)| {
        let (share, is_ejected) = share_at_last(backend)?;
        let uniform = 1.0 - fastrand::f64(); // above 0
        Some((is_ejected, -uniform.ln() / share.get(), index))
    };
    let others = weighted.backends.iter().enumerate();
    let mut keyed: Vec<(bool, f64, usize)> = others
        .filter(|(index, _)| !chosen.contains(index))
        .filter_map(key)
        .collect();
    if keyed.is_empty() && chosen.is_empty() {
        let mut waiting = weighted.published.load().waiting.to_vec();
        fastrand::shuffle(&mut waiting);
        return waiting;
    }
    keyed.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)));
    keyed.into_iter().map(|(_, _, index)| index).collect()
}

opaque_debug!(MetricsWeighted, MetricsWeightedIter);

#[cfg(test)]
mod tests;
