//! Pingora's `LoadBalancer`, updated by changes in etcd.

use std::convert::Infallible;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::lb::health_check::HealthCheck;
use ::pingora::lb::selection::{BackendIter, BackendSelection};
use ::pingora::lb::{Backends, LoadBalancer};
use ::pingora::server::ShutdownWatch;
use ::pingora::services::ServiceReadyNotifier;
use ::pingora::services::background::BackgroundService;
use async_trait::async_trait;
use tokio::sync::{Notify, watch};
use tracing::error;

use super::backends::ClusterBackends;
use super::follow::{READY_TIMEOUT, balancer_span, follow, wait_ready};
use super::operators::Operators;
use super::restart::restart_forever;
use super::weights::LiveWeights;
use crate::balance::pace::{every_tick, pause_after};
use crate::balance::{BalancerBuilder, TICK};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;

/// How many changes are published together at most.
const MOST_TOGETHER: usize = 10_000;
/// How often health is checked by default.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// A Pingora `LoadBalancer` that a change in etcd reaches at once instead of every
/// `update_frequency`, with its health checks, as a background service. It dereferences to the
/// `LoadBalancer`, so `select` and the other methods work as before.
///
/// Membership and draining go through Pingora's own discovery and enablement. Weights are kept beside
/// the backends, so that an update of metrics does not reset the health of a backend. A selection of
/// Pingora's own sees the registered weights: [`BackendNode`](super::BackendNode).
///
/// ```
/// use pingora::lb::health_check::TcpHealthCheck;
/// use pingora::services::background::background_service;
/// use pingora_etcd::{EtcdOptions, ServiceDiscovery};
/// use pingora_etcd::pingora::{LiveLoadBalancer, MetricsWeighted};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let discovery = ServiceDiscovery::builder(vec!["http://10.0.0.1:2379".to_string()], "my-service").try_build()?;
/// let mut upstreams = LiveLoadBalancer::<MetricsWeighted>::new(discovery, 8080);
/// upstreams.set_health_check(TcpHealthCheck::new());
/// upstreams.health_check_frequency = Some(std::time::Duration::from_secs(5));
///
/// let service = background_service("cluster", upstreams);
/// let upstreams = service.task(); // for the proxy: upstreams.select(b"", 16)
/// // server.add_service(service);
/// # assert!(upstreams.select(b"", 16).is_none());
/// # Ok(()) }
/// ```
pub struct LiveLoadBalancer<S>
where
    S: BackendSelection,
{
    load_balancer: LoadBalancer<S>,
    discovery: ServiceDiscovery,
    weights: Arc<LiveWeights>,
    /// What operators say of nodes has changed.
    said: Notify,
    operators: Operators,
    /// How often health is checked, if a check is set; `None` for once at the start, after which a backend that failed
    /// stays out, and one that fails or joins later is never checked. Default: 1 s.
    pub health_check_frequency: Option<Duration>,
    /// Whether all backends are checked at the same time. Default: `true`.
    pub parallel_health_check: bool,
    /// How long readiness waits for the first complete view. Default: 10 s.
    pub ready_timeout: Duration,
}

impl<S> LiveLoadBalancer<S>
where
    S: BackendSelection + 'static,
    S::Iter: BackendIter,
{
    /// A load balancer over the nodes of a group; `default_port` is for nodes that registered
    /// none.
    pub fn new(discovery: ServiceDiscovery, default_port: u16) -> Self {
        Self::with_weights(discovery, LiveWeights::by_metrics(default_port))
    }

    /// The same with weights as a balancer with these settings has them; see
    /// [`LiveWeights`](super::LiveWeights). [`new`](Self::new) uses
    /// [`Adaptive::metrics_only`](crate::balance::Adaptive::metrics_only), which is better as long as nobody tells of
    /// outcomes: set it here, too.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field.
    pub fn weighted(
        discovery: ServiceDiscovery,
        settings: &BalancerBuilder,
    ) -> Result<Self, ClusterError> {
        let weights = LiveWeights::try_new(settings)?;
        Ok(Self::with_weights(discovery, weights))
    }

    fn with_weights(discovery: ServiceDiscovery, weights: Arc<LiveWeights>) -> Self {
        let backends = ClusterBackends::in_service(discovery.clone(), weights.clone());
        Self {
            load_balancer: LoadBalancer::from_backends(Backends::new(Box::new(backends))),
            discovery,
            weights,
            said: Notify::new(),
            operators: Operators::default(),
            health_check_frequency: Some(CHECK_EVERY),
            parallel_health_check: true,
            ready_timeout: READY_TIMEOUT,
        }
    }

    /// Sets how health is checked.
    ///
    /// # Panics
    ///
    /// In Pingora, if a check has been set before.
    pub fn set_health_check(&mut self, check: Box<dyn HealthCheck + Send + Sync + 'static>) {
        self.load_balancer.set_health_check(check);
    }

    /// The discovery that this follows.
    pub fn discovery(&self) -> &ServiceDiscovery {
        &self.discovery
    }

    /// The weights of the nodes, for those who tell of requests by the address they went to:
    /// [`LiveWeights::begin_at`].
    pub fn weights(&self) -> &Arc<LiveWeights> {
        &self.weights
    }

    /// Keeps weights and membership up to date.
    async fn keep_up_to_date(
        &self,
        mut ready: Option<ServiceReadyNotifier>,
        updated: &watch::Sender<bool>,
    ) -> Infallible {
        let mut changes = self.discovery.changes();
        let mut is_due = true;
        wait_ready(&self.discovery, self.ready_timeout).await;
        self.operators.hear(&self.discovery).await;
        loop {
            // Before the changes are taken, among which the first view is then.
            let is_ready = self.discovery.is_ready();
            // All changes that are there already are published together.
            for _ in 0..MOST_TOGETHER {
                tokio::select! {
                    biased;
                    change = changes.next() => self.weights.apply(&change, Instant::now()),
                    () = std::future::ready(()) => break,
                }
            }
            let start = Instant::now();
            is_due |= self.weights.publish(start);
            if is_due && is_ready {
                match self.load_balancer.update().await {
                    Ok(()) => {
                        is_due = false;
                        updated.send_replace(true);
                    }
                    // It stays due.
                    Err(error) => error!(%error, "the load balancer could not be updated"),
                }
            }
            // Dropping it signals ready.
            drop(ready.take());
            // Nobody else takes changes meanwhile.
            tokio::time::sleep(pause_after(start.elapsed()).min(TICK)).await;
            tokio::select! {
                biased;
                // First, because changes may come without a pause.
                () = self.said.notified() => is_due = true,
                // The first view may have been taken a moment before the discovery said that it is there.
                () = self.discovery.wait_ready(), if is_due && !is_ready => {}
                change = changes.next() => self.weights.apply(&change, Instant::now()),
            }
        }
    }

    async fn check_health(&self, updated: &watch::Sender<bool>) -> Infallible {
        // Before the first update there is nothing to check. The sender outlives this.
        let _ = updated.subscribe().wait_for(|updated| *updated).await;
        loop {
            let backends = self.load_balancer.backends();
            backends.run_health_check(self.parallel_health_check).await;
            match self.health_check_frequency {
                Some(every) => tokio::time::sleep(every).await,
                None => return std::future::pending().await,
            }
        }
    }

    /// Each part is restarted by itself: a health check that panics does not affect the view.
    async fn run(&self, mut ready: Option<ServiceReadyNotifier>) {
        let updated = &watch::Sender::new(false);
        let span = balancer_span(&self.discovery);
        tokio::join!(
            restart_forever(&span, "discovery", || follow(&self.discovery)),
            restart_forever(&span, "load balancer", || {
                self.keep_up_to_date(ready.take(), updated)
            }),
            restart_forever(&span, "health checks", || self.check_health(updated)),
            restart_forever(&span, "weights", || every_tick(|now| self
                .weights
                .tick(now))),
            restart_forever(&span, "overrides", || self.operators.follow(
                &self.discovery,
                |overrides| {
                    if self.weights.set_overrides(overrides) {
                        self.said.notify_one();
                    }
                }
            )),
        );
    }
}

impl<S: BackendSelection> fmt::Debug for LiveLoadBalancer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveLoadBalancer").finish_non_exhaustive()
    }
}

impl<S: BackendSelection> Deref for LiveLoadBalancer<S> {
    type Target = LoadBalancer<S>;

    fn deref(&self) -> &LoadBalancer<S> {
        &self.load_balancer
    }
}

#[async_trait]
impl<S> BackgroundService for LiveLoadBalancer<S>
where
    S: BackendSelection + Send + Sync + 'static,
    S::Iter: BackendIter,
{
    async fn start_with_ready_notifier(&self, _: ShutdownWatch, ready: ServiceReadyNotifier) {
        self.run(Some(ready)).await;
    }

    async fn start(&self, _: ShutdownWatch) {
        self.run(None).await;
    }
}
