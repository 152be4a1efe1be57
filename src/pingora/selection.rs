//! A selection for Pingora's `LoadBalancer` that follows live weights.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};

use ::pingora::lb::Backend;
use ::pingora::lb::selection::{BackendIter, BackendSelection};
use arc_swap::ArcSwap;

use super::turns::Turns;
use super::weights::{BackendNode, WeightsDependent};
use crate::balance::{Share, Spread};
use crate::sync::lock;

/// The smallest share of a backend that gets anything, so that it is selected when all others are
/// down.
const MIN_SHARE: f64 = 1e-6;

/// Selection by live weights, for a stock Pingora `LoadBalancer`.
///
/// Weights follow metrics, by [`Policy::Adaptive`](crate::balance::Policy::Adaptive) with
/// [`Adaptive::metrics_only`](crate::balance::Adaptive::metrics_only) unless other settings are
/// given. They are read beside the backends, so a change takes effect with the next request, without
/// an update of the load balancer. Picks are spread evenly in proportion to the weights (5, 1, 1
/// gives no run of five), memory per backend is constant whatever the weights, and later choices are
/// weighted too and never repeat an earlier one. The key is ignored.
///
/// A selection is not informed of outcomes and cannot see when a request ends.
/// [`BalancerService`](super::BalancerService) is, and routes around a backend that is busy, slow or
/// failing before its metrics show it. The difference in the simulation of `benches/routing_quality`
/// (p99 latency relative to an oracle's; ten servers, metrics every 5 s):
///
/// | load | with the guard | this selection | gRPC's weighted round robin |
/// |---|---|---|---|
/// | 50 % | 1.03 | 1.32 | 1.42 |
/// | 75 % | 1.08 | 4.41 | 9.60 |
/// | 90 % | 1.14 | 45 | 39 |
/// | 75 %, metrics every 1 s | 1.07 | 1.61 | 1.65 |
///
/// A backend that reports less load than it has, or fails fast, gets too much traffic here: use
/// health checks, and metrics every second.
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
    spread: Spread,
}

/// `None` for a backend that gets nothing.
fn share(backend: &Backend) -> Option<Share> {
    let share = match BackendNode::of(backend) {
        Some(node) => node.share().get(),
        None => backend.weight as f64,
    };
    // A backend in another zone may have a share of almost 0, and is still better than none.
    (share > 0.0).then(|| Share::new(share.max(MIN_SHARE)))
}

impl WeightsDependent for Weighted {
    fn rebuild(&self) {
        let mut shares = lock(&self.shares);
        let current = self.backends.iter().map(share);
        if current.clone().eq(shares.iter().copied()) {
            return;
        }
        *shares = current.collect();
        let taking = shares.iter().enumerate();
        let (positions, taking): (Vec<_>, Vec<_>) = taking
            .filter_map(|(position, share)| Some((position, (*share)?)))
            .unzip();
        self.published.store(Arc::new(Published {
            spread: Spread::new(&taking),
            positions: positions.into(),
        }));
    }
}

impl BackendSelection for MetricsWeighted {
    type Iter = MetricsWeightedIter;
    type Config = ();

    fn build(backends: &BTreeSet<Backend>) -> Self {
        let shared = Arc::new(Weighted {
            backends: backends.iter().cloned().collect(),
            published: ArcSwap::from_pointee(Published::default()),
            turns: Turns::new(),
            shares: Mutex::new(Vec::new()),
        });
        // Registered before the first build, so that no change is missed between the two.
        if let Some(node) = shared.backends.iter().find_map(BackendNode::of) {
            let dependent = Arc::downgrade(&shared);
            node.notify(dependent as Weak<dyn WeightsDependent>);
        }
        shared.rebuild();
        Self { shared }
    }

    fn iter(self: &Arc<Self>, _key: &[u8]) -> Self::Iter {
        MetricsWeightedIter {
            weighted: self.shared.clone(),
            first: None,
            rest: Vec::new(),
        }
    }
}

/// See [`MetricsWeighted`].
pub struct MetricsWeightedIter {
    weighted: Arc<Weighted>,
    first: Option<usize>,
    /// What to try after the first, best last. Computed when it is needed, because most requests do
    /// not need it.
    rest: Vec<usize>,
}

impl BackendIter for MetricsWeightedIter {
    fn next(&mut self) -> Option<&Backend> {
        let backends = &self.weighted.backends;
        let index = match self.first {
            None => {
                let published = self.weighted.published.load();
                if published.positions.is_empty() {
                    return None;
                }
                let turn = self.weighted.turns.next();
                let index = published.positions[published.spread.turn(turn)];
                self.first = Some(index);
                index
            }
            Some(first) => {
                if self.rest.is_empty() {
                    self.rest = shuffled(&self.weighted, first);
                    // So that from here on an empty rest means the end.
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

/// All backends but `first` that take traffic, in an order as if each had been drawn by share from
/// the remaining ones, best last: P. S. Efraimidis and P. G. Spirakis, "Weighted random sampling with
/// a reservoir", Information Processing Letters 97(5), 2006.
fn shuffled(weighted: &Weighted, first: usize) -> Vec<usize> {
    let key = |(index, backend)| {
        let share = share(backend)?;
        let uniform = 1.0 - fastrand::f64(); // above 0
        Some((-uniform.ln() / share.get(), index))
    };
    let others = weighted.backends.iter().enumerate();
    let mut keyed: Vec<(f64, usize)> = others
        .filter(|(index, _)| *index != first)
        .filter_map(key)
        .collect();
    keyed.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    keyed.into_iter().map(|(_, index)| index).collect()
}

#[cfg(test)]
mod tests;
