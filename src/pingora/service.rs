//! The balancer as a Pingora service.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::pingora::server::ShutdownWatch;
use ::pingora::services::ServiceReadyNotifier;
use ::pingora::services::background::BackgroundService;
use ::pingora::upstreams::peer::HttpPeer;
use async_trait::async_trait;

use super::check::NodeCheck;
use super::checks::{CheckStatus, Checker, Checks};
use super::follow::{READY_TIMEOUT, balancer_span, follow, wait_ready};
use super::learned_file::{LearnedFile, begin_with, keep};
use super::operators::Operators;
use super::peer::http_peer;
use super::restart::restart_forever;
use crate::balance::Balancer;
use crate::balance::pace::every_tick;
use crate::discovery::{Overrides, ServiceDiscovery};
use crate::node::Node;
use crate::opaque::opaque_debug;
use crate::supervise::{caught, in_span};
use crate::sync::lock;

/// How often what is learned is written.
const WRITE_LEARNED_EVERY: Duration = Duration::from_secs(10);

/// A [`Balancer`] that follows a group, as a background service. It dereferences to the balancer.
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
    balancer: Arc<Balancer>,
    checks: Arc<Checks>,
    discovery: ServiceDiscovery,
    ready_timeout: Duration,
    learned_file: Option<LearnedFile>,
    keeps_learned: AtomicBool,
    operators: Operators,
    /// What operators say of the nodes of a group that is not used yet.
    heard: Mutex<Option<Overrides>>,
}

impl BalancerService {
    /// Gives this balancer the nodes of this group.
    pub fn new(discovery: ServiceDiscovery, balancer: Balancer) -> Self {
        Self {
            balancer: Arc::new(balancer),
            checks: Arc::new(Checks::new()),
            discovery,
            ready_timeout: READY_TIMEOUT,
            learned_file: None,
            keeps_learned: AtomicBool::new(true),
            operators: Operators::default(),
            heard: Mutex::default(),
        }
    }

    /// Sets how long readiness waits for the first complete view. Default: 10 s.
    #[must_use]
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// Keeps what is learned of the backends in this file: weights, success rates, the lowest latencies. It is
    /// written every 10 s, with mode 0600, and read at the start, so that a process that is started again
    /// begins with it: [`Balancer::teach`] says how much of it holds. A file that cannot be read or written is
    /// a line in the log, and nothing more. Its directory must exist, and each service needs a file of its own.
    #[must_use]
    pub fn learned_file(self, path: impl Into<PathBuf>) -> Self {
        self.maybe_learned_file(Some(LearnedFile {
            path: path.into(),
            interval: WRITE_LEARNED_EVERY,
        }))
    }

    pub(crate) fn maybe_learned_file(mut self, file: Option<LearnedFile>) -> Self {
        self.learned_file = file;
        self
    }

    /// Also asks the nodes themselves whether they are well, over plain text. One that is not, or that has joined and
    /// has not been asked yet, is not picked while others are well.
    #[must_use]
    pub fn health_check(self, check: NodeCheck) -> Self {
        self.health_check_at(check, http_peer)
    }

    /// The same at peers that this function makes, such as ones with TLS.
    ///
    /// ```
    /// use pingora::upstreams::peer::HttpPeer;
    /// use pingora_etcd::config::HealthCheck;
    /// use pingora_etcd::pingora::{BalancerService, NodeCheck};
    ///
    /// fn checked(balancer: BalancerService) -> Result<BalancerService, pingora_etcd::ClusterError> {
    ///     let check = NodeCheck::new(HealthCheck::default())?;
    ///     Ok(balancer.health_check_at(check, |addr, node| {
    ///         HttpPeer::new(addr, true, format!("{}.backends.example", node.id))
    ///     }))
    /// }
    /// ```
    #[must_use]
    pub fn health_check_at(
        self,
        check: NodeCheck,
        peer: impl Fn(SocketAddr, &Node) -> HttpPeer + Send + Sync + 'static,
    ) -> Self {
        let peer = move |addr, node: &Node| Ok(Box::new(peer(addr, node)));
        let peer = Arc::new(peer);
        self.checks.set(Some(Checker { check, peer }));
        self
    }

    /// Checks in this way from now on, or not at all.
    pub(crate) fn set_checker(&self, checker: Option<Checker>) {
        self.checks.set(checker);
    }

    /// What the health checks say of the node with this id; `None` without checks, or before the first one.
    pub fn check_status(&self, id: &str) -> Option<CheckStatus> {
        self.checks.status(id)
    }

    /// The discovery that this follows.
    pub fn discovery(&self) -> &ServiceDiscovery {
        &self.discovery
    }

    /// The same balancer over another discovery. Only one of the two may run.
    pub(crate) fn over(&self, discovery: ServiceDiscovery, ready_timeout: Duration) -> Self {
        Self {
            balancer: self.balancer.clone(),
            checks: self.checks.clone(),
            discovery,
            ready_timeout,
            learned_file: None,
            keeps_learned: AtomicBool::new(true),
            operators: Operators::default(),
            heard: Mutex::default(),
        }
    }

    /// Keeps the view of the group up to date, hears what operators say of its nodes, and does nothing else.
    pub(crate) async fn follow(&self) {
        let span = balancer_span(&self.discovery);
        let hearing = async {
            let take = |overrides: &Overrides| *lock(&self.heard) = Some(overrides.clone());
            tokio::select! {
                never = self.operators.follow(&self.discovery, take) => match never {},
                // From then on, whoever runs this does.
                () = self.operators.until_heard() => {}
            }
        };
        tokio::join!(
            restart_forever(&span, "discovery", || follow(&self.discovery)),
            hearing,
        );
    }

    /// Takes over the nodes that are followed and what operators say of them. If that is not known, what they have said
    /// before still holds.
    pub(crate) fn begin_with_followed(&self) {
        if let Some(heard) = lock(&self.heard).take() {
            self.balancer.set_overrides(&heard);
        }
        self.catch_up();
    }

    /// Waits for the first complete view, as long as it may take, and for what operators say of its nodes; whether there
    /// is a view.
    pub(crate) async fn is_ready_in_time(&self) -> bool {
        let is_ready = wait_ready(&self.discovery, self.ready_timeout).await;
        self.hear_operators().await;
        is_ready
    }

    /// Waits for what operators say of nodes, if it comes with the view.
    pub(crate) async fn hear_operators(&self) {
        self.operators.hear(&self.discovery).await;
    }

    /// Whether all nodes have been checked that are to be.
    pub(crate) fn has_checked_all(&self) -> bool {
        self.checks.has_checked(&self.discovery.nodes())
    }

    /// Publishes a table of the current view, which may be newer than the last table.
    pub(crate) fn catch_up(&self) {
        self.balancer
            .catch_up(|| self.discovery.nodes(), Instant::now());
    }

    async fn keep_learned(&self) -> Infallible {
        match &self.learned_file {
            Some(file) => {
                let group = self.discovery.group_name();
                keep(file, group, &self.balancer, &self.keeps_learned).await
            }
            None => std::future::pending().await,
        }
    }

    async fn signal_ready(&self, ready: Option<ServiceReadyNotifier>) -> Infallible {
        if let Some(ready) = ready {
            self.is_ready_in_time().await;
            self.catch_up();
            ready.notify_ready();
        }
        std::future::pending().await
    }

    /// Whether what is learned is written: not by a process whose successor serves.
    pub(crate) fn keep_learned_file(&self, is_kept: bool) {
        self.keeps_learned.store(is_kept, Ordering::Relaxed);
    }

    pub(crate) async fn run(&self, mut ready: Option<ServiceReadyNotifier>) {
        let span = balancer_span(&self.discovery);
        if let Some(file) = &self.learned_file {
            // Before there are nodes, and so before there are requests.
            let beginning = begin_with(file, self.discovery.group_name(), &self.balancer);
            // What panics has been logged, and costs no more than what was learned.
            let _ = caught(in_span(&span, beginning)).await;
        }
        tokio::join!(
            restart_forever(&span, "what was learned", || self.keep_learned()),
            restart_forever(&span, "discovery", || follow(&self.discovery)),
            // It starts with a complete view, whatever it had applied before.
            restart_forever(&span, "balancer", || {
                self.balancer.apply_changes(self.discovery.changes())
            }),
            restart_forever(&span, "weights", || every_tick(|now| self
                .balancer
                .tick(now))),
            restart_forever(&span, "overrides", || self.operators.follow(
                &self.discovery,
                |overrides| {
                    self.balancer.set_overrides(overrides);
                    self.balancer.publish(Instant::now());
                }
            )),
            restart_forever(&span, "health checks", || self
                .checks
                .run(&self.balancer, &self.discovery)),
            restart_forever(&span, "readiness", || self.signal_ready(ready.take())),
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

opaque_debug!(BalancerService);
