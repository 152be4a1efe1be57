//! Weights beside Pingora's backends, so that a change of metrics never changes a backend's identity.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Instant;

use ::pingora::lb::Backend;
use arc_swap::ArcSwap;

use crate::balance::{ActivePolicy, Adaptive, Balancer, BalancerBuilder, Endpoint, Share, Weigher};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::node::Node;
use crate::sync::lock;

/// The node behind a [`Backend`], in its `ext`.
///
/// A backend's identity in Pingora is its address and weight, and what is in `ext` never counts as a
/// change. So the weight of every backend here is 1, and everything that changes is behind this
/// handle: a change of metrics or weights leaves the backend's health and enablement alone. Pingora's
/// own selections see the weight 1 and treat all backends alike, including `Consistent`: for weights
/// use [`MetricsWeighted`](super::MetricsWeighted), or a
/// [`BalancerService`](super::BalancerService) with
/// [`Policy::Consistent`](crate::balance::Policy::Consistent).
#[derive(Debug, Clone)]
pub struct BackendNode {
    slot: Arc<Slot>,
    weights: Arc<LiveWeights>,
}

/// The registration at an address: the same slot for as long as the address is known, whichever node
/// registers there.
type Slot = ArcSwap<Endpoint>;

impl BackendNode {
    /// The node of a backend that came from [`ClusterBackends`](super::ClusterBackends).
    pub fn of(backend: &Backend) -> Option<&Self> {
        backend.ext.get()
    }

    /// The node, as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.slot.load().node()
    }

    /// Its share of traffic relative to the other backends, as it is now. 0 for a node whose static
    /// weight is 0: it is not enabled, and gets nothing.
    pub fn weight(&self) -> f64 {
        self.share().get()
    }

    pub(super) fn share(&self) -> Share {
        self.slot.load().share()
    }

    /// Calls `dependent` after every change of weights, until it is dropped.
    pub(super) fn notify(&self, dependent: Weak<dyn WeightsDependent>) {
        let mut dependents = lock(&self.weights.dependents);
        dependents.retain(|dependent| dependent.strong_count() > 0);
        dependents.push(dependent);
    }
}

/// A selection that has to be rebuilt when weights have changed.
pub(super) trait WeightsDependent: fmt::Debug + Send + Sync {
    /// Reads the weights again.
    fn rebuild(&self);
}

/// The weights of the nodes of a group, and the selections that depend on them:
/// [`ClusterBackends`](super::ClusterBackends) and [`LiveLoadBalancer`](super::LiveLoadBalancer) use
/// it. Use it directly where nodes come from another source, or in a simulation.
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
/// weights.update(&nodes, Instant::now());
/// let backends = weights.backends().into_iter().map(|(backend, _serves)| backend);
/// let selection = Arc::new(MetricsWeighted::build(&backends.collect()));
/// assert!(selection.iter(b"").next().is_some());
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
#[derive(Debug)]
pub struct LiveWeights {
    policy: ActivePolicy,
    state: Mutex<State>,
    dependents: Mutex<Vec<Weak<dyn WeightsDependent>>>,
}

#[derive(Debug)]
struct State {
    weigher: Weigher,
    /// Each with whether it was serving.
    slots: HashMap<SocketAddr, (Arc<Slot>, bool)>,
    /// Slots of addresses that are gone, while some backend still refers to them. An address that
    /// returns before Pingora has discovered again is no change for Pingora, which keeps the backend
    /// it has.
    departed: HashMap<SocketAddr, Weak<Slot>>,
}

impl State {
    /// Returns whether addresses have been added or removed, or have started or stopped serving.
    fn update<'a>(
        &mut self,
        policy: &ActivePolicy,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) -> bool {
        let mut changed = false;
        self.weigher.reset(nodes, now);
        self.weigher.settle(policy, now);
        let mut before = std::mem::take(&mut self.slots);
        for endpoint in self.weigher.endpoints().cloned() {
            let (addr, serving) = (endpoint.addr(), endpoint.is_serving());
            let slot = match before.remove(&addr) {
                Some((slot, was_serving)) => {
                    changed |= was_serving != serving;
                    slot.store(endpoint);
                    slot
                }
                None => {
                    changed = true;
                    match self.departed.remove(&addr).and_then(|slot| slot.upgrade()) {
                        Some(slot) => {
                            slot.store(endpoint);
                            slot
                        }
                        None => Arc::new(Slot::new(endpoint)),
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
    /// Weights as a balancer with these settings has them. Settings that only a pick needs, such as
    /// the number of candidates, have no effect.
    ///
    /// # Errors
    ///
    /// As [`BalancerBuilder::try_build`].
    pub fn try_new(settings: &BalancerBuilder) -> Result<Arc<Self>, ClusterError> {
        settings.validate()?;
        Ok(Self::from_valid(settings))
    }

    /// Weights by metrics alone, the default for a stock load balancer.
    pub(super) fn by_metrics(default_port: u16) -> Arc<Self> {
        let settings = Balancer::builder()
            .adaptive(Adaptive::metrics_only())
            .default_port(default_port);
        Self::from_valid(&settings)
    }

    /// Weights with settings that are known to be valid.
    pub(super) fn from_valid(settings: &BalancerBuilder) -> Arc<Self> {
        Arc::new(Self {
            policy: settings.active_policy(),
            state: Mutex::new(State {
                weigher: settings.weigher(false),
                slots: HashMap::new(),
                departed: HashMap::new(),
            }),
            dependents: Mutex::new(Vec::new()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Replaces the nodes by these, with what they report, and rebuilds the selections in use.
    /// Returns whether addresses have been added or removed, or have started or stopped serving:
    /// then Pingora has to discover again. Costs time in proportion to the number of nodes.
    pub fn update<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>, now: Instant) -> bool {
        let changed = self.state().update(&self.policy, nodes, now);
        self.rebuild_dependents();
        changed
    }

    /// The same with the nodes that a discovery has now.
    pub(super) fn refresh(&self, discovery: &ServiceDiscovery) -> bool {
        let changed = {
            let mut state = self.state();
            // Read under the lock, so that of two refreshes the later one has the newer nodes.
            state.update(&self.policy, discovery.nodes().iter(), Instant::now())
        };
        self.rebuild_dependents();
        changed
    }

    /// Lets weights follow time; to be called every [`TICK`](crate::balance::TICK).
    pub fn tick(&self, now: Instant) {
        self.state().weigher.tick(&self.policy, now);
        self.rebuild_dependents();
    }

    fn rebuild_dependents(&self) {
        lock(&self.dependents).retain(|dependent| match dependent.upgrade() {
            Some(dependent) => {
                dependent.rebuild();
                true
            }
            None => false,
        });
    }

    /// The backends, each with whether it serves. A node that drains, or has a static weight of 0,
    /// does not.
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
