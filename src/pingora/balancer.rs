use std::convert::Infallible;
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
use tokio::sync::watch;
use tracing::error;

use super::discovery::ClusterBackends;
use super::keep::keep;
use super::selection::LiveWeights;
use super::{COALESCE, PACE, READY_TIMEOUT, every_tick, follow, wait_ready};
use crate::balance::{Adaptive, Balancer, BalancerBuilder};
use crate::discovery::ServiceDiscovery;
use crate::error::ClusterError;

/// A Pingora `LoadBalancer` that a change in etcd reaches at once instead of every
/// `update_frequency`, with its health checks, as a background service. Dereferences to the
/// `LoadBalancer`, so `select` and the rest work as before.
///
/// Membership and draining go through Pingora's own discovery and enablement; weights live beside
/// the backends, so that an update of metrics forgets nobody's health.
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
/// upstreams.health_check_frequency = Some(std::time::Duration::from_secs(1));
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
    /// How often health is checked, if a check is set. Default: `None`, once at the start.
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
        let settings = Balancer::builder()
            .adaptive(Adaptive::metrics_only())
            .default_port(default_port);
        Self::with_weights(discovery, LiveWeights::of(&settings))
    }

    /// The same with weights as a balancer with these settings has them; see [`LiveWeights`].
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
        let backends = ClusterBackends::driven(discovery.clone(), weights.clone());
        Self {
            load_balancer: LoadBalancer::from_backends(Backends::new(Box::new(backends))),
            discovery,
            weights,
            health_check_frequency: None,
            parallel_health_check: true,
            ready_timeout: READY_TIMEOUT,
        }
    }

    /// Sets how health is checked. Once only.
    pub fn set_health_check(&mut self, check: Box<dyn HealthCheck + Send + Sync + 'static>) {
        self.load_balancer.set_health_check(check);
    }

    /// The group's view.
    pub fn discovery(&self) -> &ServiceDiscovery {
        &self.discovery
    }

    /// Returns why there will be no more.
    async fn keep_current(
        &self,
        mut ready: Option<ServiceReadyNotifier>,
        updated: &watch::Sender<bool>,
    ) -> &'static str {
        let mut nodes = self.discovery.watch_nodes();
        let mut is_first = true;
        wait_ready(&self.discovery, self.ready_timeout).await;
        loop {
            nodes.mark_unchanged();
            let start = Instant::now();
            let membership_changed = self.weights.refresh(&self.discovery);
            if (membership_changed || is_first) && self.discovery.is_ready() {
                match self.load_balancer.update().await {
                    Ok(()) => drop(updated.send_replace(true)),
                    Err(error) => {
                        error!(group = self.discovery.group_name(), %error, "load balancer not updated");
                    }
                }
            }
            is_first = false;
            // Dropping it signals ready.
            drop(ready.take());
            tokio::time::sleep(COALESCE.max(start.elapsed() * PACE)).await;
            if nodes.changed().await.is_err() {
                return "the discovery is gone";
            }
        }
    }

    async fn check_health(&self, updated: &watch::Sender<bool>) -> Infallible {
        // Before that there is nobody to check. The sender is there for as long as this is.
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

    /// Each part is kept by itself: a health check that panics says nothing about the view.
    async fn run(&self, mut ready: Option<ServiceReadyNotifier>) {
        let updated = &watch::Sender::new(false);
        let group = self.discovery.group_name();
        tokio::join!(
            keep(group, "discovery", || follow(&self.discovery)),
            keep(group, "load balancer", || self
                .keep_current(ready.take(), updated)),
            keep(group, "health checks", || self.check_health(updated)),
            keep(group, "weights", || every_tick(|now| self
                .weights
                .tick(now))),
        );
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

/// A [`Balancer`] kept current by a group, as a background service. Dereferences to the balancer.
///
/// ```
/// use pingora::services::background::background_service;
/// use pingora_etcd::{EtcdOptions, ServiceDiscovery};
/// use pingora_etcd::balance::Balancer;
/// use pingora_etcd::pingora::BalancerService;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let discovery = ServiceDiscovery::builder(vec!["http://10.0.0.1:2379".to_string()], "my-service").try_build()?;
/// let balancer = Balancer::builder().default_port(8080).try_build()?;
/// let service = background_service("balancer", BalancerService::new(discovery, balancer));
/// let balancer = service.task(); // for the proxy: balancer.pick()
/// // let balancer_handle = server.add_service(service);
/// // server.add_service(proxy).add_dependency(balancer_handle);
/// # assert!(balancer.pick().is_none());
/// # Ok(()) }
/// ```
pub struct BalancerService {
    balancer: Balancer,
    discovery: ServiceDiscovery,
    ready_timeout: Duration,
}

impl BalancerService {
    /// Feeds this balancer with the nodes of this group.
    pub fn new(discovery: ServiceDiscovery, balancer: Balancer) -> Self {
        Self {
            balancer,
            discovery,
            ready_timeout: READY_TIMEOUT,
        }
    }

    /// Sets how long readiness waits for the first complete view. Default: 10 s.
    #[must_use]
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// The group's view.
    pub fn discovery(&self) -> &ServiceDiscovery {
        &self.discovery
    }

    /// Applies changes as they come, and publishes what they come to: the first at once, then as
    /// often as leaves nearly all of a core to others.
    async fn feed(&self) -> Infallible {
        let mut changes = self.discovery.changes();
        let mut due = tokio::time::Instant::now();
        let mut is_current = true;
        loop {
            tokio::select! {
                biased;
                // First, so that what is there already is published together.
                change = changes.next() => {
                    self.balancer.apply(&change, Instant::now());
                    is_current = false;
                }
                () = tokio::time::sleep_until(due), if !is_current => {
                    let start = Instant::now();
                    self.balancer.publish(start);
                    is_current = true;
                    due = tokio::time::Instant::now() + COALESCE.max(start.elapsed() * PACE);
                }
            }
        }
    }

    async fn signal_ready(&self, ready: Option<ServiceReadyNotifier>) -> Infallible {
        if let Some(ready) = ready {
            wait_ready(&self.discovery, self.ready_timeout).await;
            // The view may be newer than the table.
            self.balancer.update(self.discovery.nodes().iter());
            ready.notify_ready();
        }
        std::future::pending().await
    }

    async fn run(&self, mut ready: Option<ServiceReadyNotifier>) {
        let group = self.discovery.group_name();
        tokio::join!(
            keep(group, "discovery", || follow(&self.discovery)),
            // It starts with a whole view, whatever it had applied before.
            keep(group, "balancer", || self.feed()),
            keep(group, "weights", || every_tick(|now| self
                .balancer
                .tick(now))),
            keep(group, "readiness", || self.signal_ready(ready.take())),
        );
    }
}

impl Deref for BalancerService {
    type Target = Balancer;

    fn deref(&self) -> &Balancer {
        &self.balancer
    }
}

#[async_trait]
impl BackgroundService for BalancerService {
    async fn start_with_ready_notifier(&self, _: ShutdownWatch, ready: ServiceReadyNotifier) {
        self.run(Some(ready)).await;
    }

    async fn start(&self, _: ShutdownWatch) {
        self.run(None).await;
    }
}
