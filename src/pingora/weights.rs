//! Weights beside Pingora's backends, so that a change of metrics never changes a backend's identity.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use ::pingora::lb::Backend;
use tracing::warn;

use super::slot::{Slot, Slots};
use crate::balance::{Adaptive, Balancer, BalancerBuilder, Upstream};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::node::Node;
use crate::sync::lock;
use crate::view::{Change, NodeOverride};

/// The node behind a [`Backend`], in its `ext`.
///
/// What is in `ext` is no part of a backend's identity in Pingora, which is its address and its weight. So
/// everything that changes is behind this handle, and a change of metrics leaves the backend's health and
/// enablement alone.
///
/// [`MetricsWeighted`](super::MetricsWeighted) follows the weights behind this handle. Pingora's own
/// selections know nothing of it; they see [`Backend::weight`]: the weight that the node has registered, or an
/// operator has given it, as a whole number from 1 to 1,000 (a log line names the nodes whose weight is another
/// one), divided by what the weights of all have in common, or had when they last changed more than that. There metrics play no part, and a backend with
/// another weight begins anew in Pingora's health checks.
#[derive(Debug, Clone)]
pub struct BackendNode {
    slot: Arc<Slot>,
    weights: Arc<LiveWeights>,
}

impl BackendNode {
    /// The node of a backend that came from [`ClusterBackends`](super::ClusterBackends).
    pub fn of(backend: &Backend) -> Option<&Self> {
        backend.ext.get()
    }

    /// The node, as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.slot.endpoint().node()
    }

    /// Its share of traffic relative to the other backends, as it is now. 0 for a node that gets
    /// nothing: it has left, drains, says that it cannot serve, or has a static weight of 0; or it fails
    /// (if [outcomes](Self::begin) are given), and gets nothing but probes.
    pub fn weight(&self) -> f64 {
        self.slot.share().get()
    }

    /// Begins a request to this backend: it counts as in flight until the returned guard is dropped, and the
    /// guard takes its outcome. [`MetricsWeighted`](super::MetricsWeighted) selects by what it learns from
    /// that, from the second after the first call on: requests in flight, latencies, and failures, for which
    /// a backend is left out until it works again. So begin every request, or none.
    ///
    /// ```
    /// use std::time::Duration;
    /// use pingora::lb::LoadBalancer;
    /// use pingora_etcd::pingora::{BackendNode, MetricsWeighted};
    ///
    /// # fn f(upstreams: &LoadBalancer<MetricsWeighted>) -> Option<()> {
    /// let backend = upstreams.select(b"", 16)?;
    /// let request = BackendNode::of(&backend)?.begin(); // to be kept in the context of the request
    /// // When the response is there; or `request.failed()`.
    /// request.succeeded(Duration::from_millis(12));
    /// # Some(()) }
    /// ```
    pub fn begin(&self) -> Upstream {
        self.weights.set_informed();
        self.weights.balancer.begin(&self.slot.endpoint())
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    pub(super) fn weights(&self) -> &Arc<LiveWeights> {
        &self.weights
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
    balancer: Balancer,
    /// The settings to work with once outcomes are given.
    if_informed: BalancerBuilder,
    /// A request has begun.
    is_informed: AtomicBool,
    /// The balancer works with requests and their outcomes.
    heeds_requests: AtomicBool,
    /// The version of the balancer that `slots` are of. Held from reading nodes to publishing what follows from them.
    updating: Mutex<Option<u64>>,
    slots: Mutex<Slots>,
    dependents: Mutex<Vec<Weak<dyn WeightsDependent>>>,
}

impl LiveWeights {
    /// Weights as a balancer with these settings has them. Settings that only a pick needs, such as
    /// the number of candidates, have an effect once outcomes are given ([`BackendNode::begin`]). Where they never are,
    /// [`Adaptive::metrics_only`] is better than the default.
    ///
    /// ```
    /// use pingora_etcd::balance::{Balancer, Policy};
    /// use pingora_etcd::pingora::LiveWeights;
    ///
    /// let settings = Balancer::builder().default_port(8080);
    /// assert!(LiveWeights::try_new(&settings).is_ok());
    /// assert!(LiveWeights::try_new(&settings.policy(Policy::Consistent)).is_err());
    /// ```
    ///
    /// # Errors
    ///
    /// As [`BalancerBuilder::try_build`]; and with [`Policy::Consistent`](crate::balance::Policy::Consistent), because no selection
    /// of a stock load balancer hands keys on to it: Pingora's own `Consistent` does that.
    pub fn try_new(settings: &BalancerBuilder) -> Result<Arc<Self>, ClusterError> {
        settings.validate()?;
        if settings.goes_by_keys() {
            let reason = "consistent is not possible here: use Pingora's own selection Consistent";
            return Err(ClusterError::config("policy", reason));
        }
        Ok(Self::from_valid(settings, settings))
    }

    /// The default for a stock load balancer: weights by metrics alone, or, if outcomes are given, as a
    /// balancer has them by default.
    pub(super) fn by_metrics(default_port: u16) -> Arc<Self> {
        let settings = Balancer::builder().default_port(default_port);
        let by_metrics = settings.clone().adaptive(Adaptive::metrics_only());
        Self::from_valid(&by_metrics, &settings)
    }

    /// Weights with settings that are known to be valid.
    fn from_valid(settings: &BalancerBuilder, if_informed: &BalancerBuilder) -> Arc<Self> {
        Arc::new(Self {
            balancer: settings.build_valid(false),
            if_informed: if_informed.clone(),
            is_informed: AtomicBool::new(false),
            heeds_requests: AtomicBool::new(false),
            updating: Mutex::default(),
            slots: Mutex::default(),
            dependents: Mutex::default(),
        })
    }

    /// Replaces the nodes by these, with what they report, and rebuilds the selections in use.
    /// Returns whether addresses have been added or removed, or have started or stopped serving, or have
    /// registered another weight that a selection sees: then Pingora has to discover again. Costs time in
    /// proportion to the number of nodes; [`apply`](Self::apply) does not.
    pub fn update<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>, now: Instant) -> bool {
        self.change(|balancer| {
            balancer.replace(nodes, now, self.heeds_requests());
            true
        })
    }

    /// Takes over a change of the group; takes effect with the next [`publish`](Self::publish). The cost does not
    /// depend on the number of nodes, except for [`Change::Reset`].
    pub fn apply(&self, change: &Change, now: Instant) {
        self.balancer.apply(change, now);
    }

    /// Lets weights follow the changes so far; returns the same as [`update`](Self::update). Where there are
    /// hundreds of nodes, and all that has changed is what some of them report, the cost does not depend on the
    /// number of nodes, and selections follow within a second.
    pub fn publish(&self, now: Instant) -> bool {
        self.change(|balancer| balancer.publish_weights(now, self.heeds_requests()))
    }

    /// The same with the nodes that a discovery has now.
    pub(super) fn refresh(&self, discovery: &ServiceDiscovery) -> bool {
        // Read while nobody else updates, so that of two refreshes the later one has the newer nodes.
        self.change(|balancer| {
            let picks = self.heeds_requests();
            balancer.replace(discovery.nodes().iter(), Instant::now(), picks);
            true
        })
    }

    /// Takes over what operators say of nodes; returns the same as [`update`](Self::update).
    pub(super) fn set_overrides(&self, overrides: &HashMap<String, NodeOverride>) -> bool {
        self.change(|balancer| {
            balancer.set_overrides(overrides);
            balancer.publish_weights(Instant::now(), self.heeds_requests())
        })
    }

    /// `change` says whether selections have to be rebuilt.
    fn change(&self, change: impl FnOnce(&Balancer) -> bool) -> bool {
        let mut slots_version = lock(&self.updating);
        let is_rebuilt = change(&self.balancer);
        // Whatever else has taken notice of a change before, such as a tick.
        let version = Some(self.balancer.version());
        if !is_rebuilt && *slots_version == version {
            return false;
        }
        let (holders, is_followed) = (self.balancer.holders(), self.is_followed());
        // Requests wait for this lock, so that it is held for a short time only.
        let has_changed = lock(&self.slots).update(holders, is_followed);
        *slots_version = version;
        self.rebuild_dependents();
        has_changed
    }

    /// Lets weights follow time; to be called every [`TICK`](crate::balance::TICK).
    pub fn tick(&self, now: Instant) {
        if self.is_informed.load(Ordering::Relaxed) && !self.heeds_requests() {
            self.balancer.change_to_valid(&self.if_informed, now);
            self.heeds_requests.store(true, Ordering::Relaxed);
        }
        if self.balancer.tick_weights(now, self.heeds_requests()) {
            self.rebuild_dependents();
        }
        if !self.is_followed() {
            self.tell_inexact(|node, weight| {
                warn!(
                    node = node.id,
                    registered = node.weight,
                    weight,
                    "Pingora's own selections know whole weights from 1 to 1,000 only; MetricsWeighted knows others"
                );
            });
        }
    }

    /// Tells once of each node that Pingora's own selections see with another weight than it has.
    pub(super) fn tell_inexact(&self, tell: impl FnMut(&Node, usize)) {
        lock(&self.slots).take_inexact(tell);
    }

    fn set_informed(&self) {
        // Almost always it is set, and then nothing is written, which other threads would have to wait for.
        if !self.is_informed.load(Ordering::Relaxed) {
            self.is_informed.store(true, Ordering::Relaxed);
        }
    }

    fn heeds_requests(&self) -> bool {
        self.heeds_requests.load(Ordering::Relaxed)
    }

    /// Begins a request to the backend at this address, for those who know no more of it than that:
    /// see [`BackendNode::begin`], which takes no lock. `None` if there is none.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Instant;
    /// use pingora_etcd::Node;
    /// use pingora_etcd::balance::Balancer;
    /// use pingora_etcd::pingora::LiveWeights;
    ///
    /// let weights = LiveWeights::try_new(&Balancer::builder().default_port(80))?;
    /// let node = Node::new("a", "10.0.0.1".parse().unwrap());
    /// let addr = node.addr(80);
    /// weights.update(&[Arc::new(node)], Instant::now());
    /// weights.begin_at(addr).unwrap().failed();
    /// # Ok::<(), pingora_etcd::ClusterError>(())
    /// ```
    pub fn begin_at(&self, addr: SocketAddr) -> Option<Upstream> {
        let endpoint = lock(&self.slots).at(addr)?.endpoint();
        self.set_informed();
        Some(self.balancer.begin(&endpoint))
    }

    /// Who could serve, but gets nothing because others are there that serve.
    pub(super) fn unused_beside_used(&self) -> HashSet<SocketAddr> {
        lock(&self.slots).unused_beside_used()
    }

    /// Where the next request is to go, by requests and their outcomes; `None` if these are not given.
    pub(super) fn propose(&self, exclude: &[SocketAddr]) -> Option<SocketAddr> {
        self.heeds_requests()
            .then(|| self.balancer.propose(exclude))?
    }

    /// Calls `dependent` after every change of weights, until it is dropped.
    pub(super) fn notify(&self, dependent: Weak<dyn WeightsDependent>) {
        let mut dependents = lock(&self.dependents);
        dependents.retain(|dependent| dependent.strong_count() > 0);
        dependents.push(dependent);
    }

    /// Whether a selection follows the weights here, so that those that Pingora sees do not matter.
    fn is_followed(&self) -> bool {
        let dependents = lock(&self.dependents);
        dependents
            .iter()
            .any(|dependent| dependent.strong_count() > 0)
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

    /// The backends, each with whether it serves. A node that drains, says that it cannot serve, or has a
    /// static weight of 0, does not.
    pub fn backends(self: &Arc<Self>) -> Vec<(Backend, bool)> {
        let slots = lock(&self.slots);
        let backend = |(addr, slot, weight): (SocketAddr, &Arc<Slot>, usize)| {
            let mut ext = http::Extensions::new();
            ext.insert(BackendNode {
                slot: slot.clone(),
                weights: self.clone(),
            });
            let backend = Backend {
                addr: addr.into(),
                weight,
                ext,
            };
            (backend, slot.is_used())
        };
        slots.iter().map(backend).collect()
    }
}
