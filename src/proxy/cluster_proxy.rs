//! The proxy: what it is made of, and what it decides.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::Result;
use ::pingora::proxy::Session;

use super::access_log::AccessLog;
use super::client::TrustedProxies;
use super::context::RequestContext;
use super::grpc::Call;
use super::leader::{LeaderRequests, find_leader};
use super::outcome::Outcome;
use super::peers::Peers;
use super::pick::Picker;
use super::readiness::Readiness;
use super::reply::refused;
use super::requests::RequestLimits;
use super::retry::RetryRules;
use super::retry_budget::RetryBudget;
use super::statistics::RequestStatistics;
use super::tls::BackendTls;
use super::via::ViaMark;
use crate::balance::Upstream;
use crate::config::ClusterConfig;
use crate::pingora::{BalancerService, LeaderRoute};

/// More backends than twice those that there are and these are not counted.
const KEPT_BACKENDS: usize = 100;

/// The bundled load balancer: a complete HTTP proxy over a [`BalancerService`].
///
/// Picks a backend for each request, tries another one while nothing has reached the client,
/// answers 503 with the reason in plain text if there is none, and names the node in
/// `x-upstream-node`. With [`leader_route`](Self::leader_route), writes go to the leader.
///
/// [`add_to`](Self::add_to) puts it into a Pingora server, as the example `load_balancer` does
/// with a YAML file. Take it apart, or wrap it, when you need more.
pub struct ClusterProxy {
    pub(super) balancer: Arc<BalancerService>,
    pub(super) leader: Option<LeaderRoute>,
    pub(super) leader_requests: LeaderRequests,
    pub(super) picker: Picker,
    pub(super) retries: RetryRules,
    pub(super) retry_on_status: Vec<u16>,
    pub(super) retry_budget: RetryBudget,
    pub(super) peers: Peers,
    /// The longest time for a whole request.
    pub(super) request_timeout: Option<Duration>,
    pub(super) limits: RequestLimits,
    pub(super) readiness: Readiness,
    pub(super) trusted: TrustedProxies,
    /// Whether backends get `Forwarded`.
    pub(super) sends_forwarded: bool,
    pub(super) via: ViaMark,
    pub(super) load_reports: bool,
    /// Whether a missing `traceparent` is made.
    pub(super) traceparent: bool,
    pub(super) access_log: Option<AccessLog>,
    pub(super) statistics: Arc<RequestStatistics>,
}

impl ClusterProxy {
    /// A proxy as `config` describes it, over a balancer that is part of the same server.
    pub fn new(balancer: Arc<BalancerService>, config: &ClusterConfig) -> Self {
        Self {
            balancer,
            leader: None,
            leader_requests: LeaderRequests::new(config),
            picker: Picker::new(config),
            retries: RetryRules {
                most: config.retries,
                on_timeout: config.retry.on_timeout,
            },
            retry_on_status: config.retry.on_status.clone(),
            retry_budget: RetryBudget::new(&config.retry),
            peers: peers(config, None),
            request_timeout: match config.timeouts.request_ms {
                0 => None,
                milliseconds => Some(Duration::from_millis(milliseconds)),
            },
            limits: RequestLimits::new(config),
            readiness: Readiness::new(config.clients.ready_path.clone()),
            trusted: TrustedProxies::new(config.clients.trusted_proxies.iter().copied()),
            sends_forwarded: config.clients.forwarded,
            via: ViaMark::new(),
            load_reports: config.load_reports,
            traceparent: config.traceparent,
            access_log: None,
            statistics: Arc::default(),
        }
    }

    /// What this proxy counts, for a page or metrics.
    pub fn statistics(&self) -> Arc<RequestStatistics> {
        self.statistics.clone()
    }

    /// Writes this access log.
    pub(super) fn access_log(mut self, log: AccessLog) -> Self {
        self.access_log = Some(log);
        self
    }

    /// Uses this TLS to backends.
    pub(super) fn backend_tls(mut self, config: &ClusterConfig, tls: BackendTls) -> Self {
        self.peers = peers(config, Some(tls));
        self
    }

    /// Sends writes to the leader, with its fencing token in `x-leader-epoch`: every request but `GET`,
    /// `HEAD`, `OPTIONS` and `TRACE`, and those that become a tunnel. Without a leader a write waits, and
    /// then gets 503 with `retry-after`. A node that answers 421, or refuses with a newer token in
    /// `x-leader-epoch`, does not lead any more: the request is sent once more, to the new leader.
    ///
    /// Writes count as in flight where the leader also answers reads.
    #[must_use]
    pub fn leader_route(mut self, leader: LeaderRoute) -> Self {
        self.leader = Some(leader);
        self
    }

    /// Lets a request in, and finds its backend. A leader is waited for before, because a request that
    /// waits for one is no load.
    pub(super) async fn enter(
        &self,
        session: &Session,
        context: &mut RequestContext,
    ) -> Result<(), &'static str> {
        if context.is_for_leader {
            self.find_backend(session, context).await?;
        }
        context.place = self.picker.overload.enter().await?;
        match context.is_for_leader {
            true => Ok(()),
            false => self.find_backend(session, context).await,
        }
    }

    /// Finds the backend or the leader for a try, and stores it in the context; the error is the reason
    /// why there is none.
    pub(super) async fn find_backend(
        &self,
        session: &Session,
        context: &mut RequestContext,
    ) -> Result<(), &'static str> {
        match &self.leader {
            Some(route) if context.is_for_leader => {
                context.leader_load = None;
                let leader = find_leader(route, self.leader_requests.wait, context).await?;
                context.leader_load = self.balancer.upstream_at(leader.addr);
                context.leader = Some(leader);
                Ok(())
            }
            _ => self.picker.pick(&self.balancer, session, context).await,
        }
    }

    /// A backend has failed in an earlier try.
    pub(super) fn blame(&self, upstream: Upstream) {
        self.statistics.backend_ends(upstream.addr(), None);
        upstream.failed();
    }

    /// Counts what has become of a request at its last backend.
    pub(super) fn count_backend(
        &self,
        addr: SocketAddr,
        outcome: &Outcome,
        context: &RequestContext,
    ) {
        match outcome {
            Outcome::Succeeded | Outcome::Answered => {
                let latency = context.latency();
                self.statistics.backend_ends(addr, Some(latency));
            }
            Outcome::Failed if !context.is_blameless => {
                self.statistics.backend_ends(addr, None);
            }
            Outcome::Failed | Outcome::Unknown => {}
        }
        // Backends that are gone are not kept for ever.
        if self.statistics.backends() > 2 * self.balancer.len() + KEPT_BACKENDS {
            let backends = self.balancer.backends();
            let known = backends.iter().map(|backend| backend.addr).collect();
            self.statistics.retain(&known);
        }
    }

    /// Whether the request may be sent once more; if so, that counts.
    pub(super) fn may_send_again(&self, context: &mut RequestContext) -> bool {
        self.may_try(context)
            && self.retry_budget.take(Instant::now())
            && self.may_try_again(context)
    }

    fn may_try(&self, context: &RequestContext) -> bool {
        context.retries < self.retries.most && self.time_left(context).is_ok()
    }

    /// Whether the request may be tried once more; if so, that counts.
    pub(super) fn may_try_again(&self, context: &mut RequestContext) -> bool {
        let may = self.may_try(context);
        context.retries += usize::from(may);
        may
    }

    /// How long the request may still take; `None` if it may take any time.
    pub(super) fn time_left(&self, context: &RequestContext) -> Result<Option<Duration>> {
        let of_call = context.call.and_then(Call::timeout);
        let Some(timeout) = self.request_timeout.into_iter().chain(of_call).min() else {
            return Ok(None);
        };
        let left = timeout.saturating_sub(context.started.elapsed());
        if left.is_zero() && !context.is_tunnel {
            return Err(refused(504, "the request took too long"));
        }
        Ok(Some(left))
    }
}

fn peers(config: &ClusterConfig, tls: Option<BackendTls>) -> Peers {
    let upgrade = config.clients.upgrade;
    Peers::new(&config.timeouts, &config.backends, upgrade, tls)
}
