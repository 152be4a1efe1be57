//! A group as Pingora's service discovery.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::pingora::lb::Backend;
use ::pingora::lb::discovery::ServiceDiscovery as PingoraDiscovery;
use ::pingora::{Error, ErrorType, Result};
use async_trait::async_trait;
use tokio::task::JoinHandle;

use super::follow::{READY_TIMEOUT, balancer_span, follow, wait_ready};
use super::operators::Operators;
use super::restart::restart_forever;
use super::weights::LiveWeights;
use crate::balance::pace::{every_tick, pause_after};
use crate::balance::{BalancerBuilder, TICK};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::supervise::in_span;
use crate::sync::lock;

/// A group as the discovery of a stock Pingora `LoadBalancer`.
///
/// The first `discover` starts following the group, in the runtime that calls it, and waits for the
/// first complete view for 10 s at most. Membership then reaches the load balancer every
/// `update_frequency`, which has to be set; weights, draining and departures reach
/// [`MetricsWeighted`](super::MetricsWeighted) at once. A selection of Pingora's own sees the registered
/// weights: [`BackendNode`](super::BackendNode).
///
/// Each `discover` sets for every backend whether it is enabled: nodes that drain, that say that they
/// cannot serve, and those with a static weight of 0, are not. That overrides earlier calls of
/// `set_enable`; to take a node out by
/// hand, let it [`drain`](crate::ClusterNode::drain).
///
/// ```
/// use pingora::lb::{Backends, LoadBalancer};
/// use pingora_etcd::{EtcdOptions, ServiceDiscovery};
/// use pingora_etcd::pingora::{ClusterBackends, MetricsWeighted};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let discovery = ServiceDiscovery::builder(vec!["http://10.0.0.1:2379".to_string()], "my-service").try_build()?;
/// let backends = Backends::new(Box::new(ClusterBackends::new(discovery, 8080)));
/// let mut upstreams = LoadBalancer::<MetricsWeighted>::from_backends(backends);
/// upstreams.update_frequency = Some(std::time::Duration::from_millis(500));
/// # Ok(()) }
/// ```
pub struct ClusterBackends {
    discovery: ServiceDiscovery,
    weights: Arc<LiveWeights>,
    ready_timeout: Duration,
    runner: Runner,
    operators: Arc<Operators>,
}

/// What runs the discovery.
enum Runner {
    /// A task that the first `discover` spawns.
    OwnTask(Mutex<Option<Task>>),
    /// A service that contains this.
    Service,
}

/// A task that ends when this is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ClusterBackends {
    /// The nodes of a group as backends; `default_port` is for nodes that registered none.
    pub fn new(discovery: ServiceDiscovery, default_port: u16) -> Self {
        let runner = Runner::OwnTask(Mutex::new(None));
        Self::with_runner(discovery, LiveWeights::by_metrics(default_port), runner)
    }

    /// The same with weights as a balancer with these settings has them; see
    /// [`LiveWeights`](super::LiveWeights).
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field.
    pub fn weighted(
        discovery: ServiceDiscovery,
        settings: &BalancerBuilder,
    ) -> Result<Self, ClusterError> {
        let weights = LiveWeights::try_new(settings)?;
        let runner = Runner::OwnTask(Mutex::new(None));
        Ok(Self::with_runner(discovery, weights, runner))
    }

    /// The same within a service that runs the discovery.
    pub(super) fn in_service(discovery: ServiceDiscovery, weights: Arc<LiveWeights>) -> Self {
        Self::with_runner(discovery, weights, Runner::Service)
    }

    fn with_runner(discovery: ServiceDiscovery, weights: Arc<LiveWeights>, runner: Runner) -> Self {
        Self {
            discovery,
            weights,
            ready_timeout: READY_TIMEOUT,
            runner,
            operators: Arc::default(),
        }
    }

    /// The weights of the nodes, for those who tell of requests by the address they went to:
    /// [`LiveWeights::begin_at`].
    pub fn weights(&self) -> &Arc<LiveWeights> {
        &self.weights
    }

    /// Sets how long the first `discover` waits for a complete view. Default: 10 s.
    #[must_use]
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// Starts following the group, unless that is done already.
    fn ensure_running(&self) {
        let Runner::OwnTask(task) = &self.runner else {
            return;
        };
        let mut task = lock(task);
        if task.as_ref().is_some_and(|task| !task.0.is_finished()) {
            return;
        }
        let (discovery, weights) = (self.discovery.clone(), self.weights.clone());
        let operators = self.operators.clone();
        let span = balancer_span(&discovery);
        let running = async move {
            tokio::join!(
                restart_forever(&span, "discovery", || follow(&discovery)),
                restart_forever(&span, "weights from metrics", || refresh(
                    &discovery, &weights
                )),
                restart_forever(&span, "weights", || every_tick(|now| weights.tick(now))),
                restart_forever(&span, "overrides", || operators.follow(
                    &discovery,
                    |overrides| {
                        weights.set_overrides(overrides);
                    }
                )),
            );
        };
        *task = Some(Task(tokio::spawn(running)));
    }
}

/// Keeps weights up to date. Returns why it cannot go on.
async fn refresh(discovery: &ServiceDiscovery, weights: &LiveWeights) -> &'static str {
    let mut nodes = discovery.watch_nodes();
    while nodes.changed().await.is_ok() {
        let start = Instant::now();
        weights.refresh(discovery);
        tokio::time::sleep(pause_after(start.elapsed()).min(TICK)).await;
    }
    "the discovery was dropped"
}

#[async_trait]
impl PingoraDiscovery for ClusterBackends {
    async fn discover(&self) -> Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        self.ensure_running();
        if !self.discovery.is_ready() {
            let span = balancer_span(&self.discovery);
            let waits = matches!(self.runner, Runner::OwnTask(_));
            let waiting = in_span(&span, wait_ready(&self.discovery, self.ready_timeout));
            if !waits || !waiting.await {
                let group = self.discovery.group_name();
                return Error::e_explain(
                    ErrorType::InternalError,
                    format!("there is no view of group {group:?} yet"),
                );
            }
        }
        // The service refreshes them itself.
        if matches!(self.runner, Runner::OwnTask(_)) {
            self.operators.hear(&self.discovery).await;
            self.weights.refresh(&self.discovery);
        }
        let mut backends = BTreeSet::new();
        let mut enablement = HashMap::new();
        for (backend, serving) in self.weights.backends() {
            // For every backend, true or false: what is left out keeps its old value.
            enablement.insert(hash_key(&backend), serving);
            backends.insert(backend);
        }
        Ok((backends, enablement))
    }
}

/// The key of a backend in Pingora's enablement map, as its documentation defines it.
fn hash_key(backend: &Backend) -> u64 {
    let mut hasher = DefaultHasher::new();
    backend.hash(&mut hasher);
    hasher.finish()
}

opaque_debug!(ClusterBackends);
