//! The proxy: what it is made of.

use std::sync::Arc;

use ::pingora::server::configuration::ServerConf;
use arc_swap::ArcSwap;

use super::access_log::AccessLog;
use super::connections::Connections;
use super::group::{GroupProxy, backend_tls};
use super::log_limit::LogLimit;
use super::routing::Routing;
use super::spans::Spans;
use super::statistics::RequestStatistics;
use super::via::ViaMark;
use crate::config::{ClusterConfig, DEFAULT_GROUP};
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::pingora::{BalancerService, LeaderRoute};

/// The bundled load balancer: a complete HTTP proxy over a [`BalancerService`].
///
/// Picks a backend for each request, tries another one while nothing has reached the client,
/// answers 503 with the reason in plain text if there is none, and names the node in
/// `x-upstream-node`. With [`leader_route`](Self::leader_route), writes go to the leader.
///
/// [`add_to`](Self::add_to) puts it into a Pingora server, as the example `load_balancer` does
/// with a YAML file. When you need more, wrap it in a `ProxyHttp` of your own that calls its hooks, and ask the
/// [`RequestContext`](super::RequestContext) who served a request; or make a proxy of the same parts:
/// [`HeaderPolicy`](super::HeaderPolicy), [`retry`](super::retry), [`Outcome`](super::Outcome), [`AccessLog`],
/// [`run`](super::run).
pub struct ClusterProxy {
    /// What a reload replaces.
    pub(super) routing: Arc<ArcSwap<Routing>>,
    /// Those to backends; without them, connections are Pingora's.
    pub(super) connections: Option<Connections>,
    pub(super) via: ViaMark,
    pub(super) access_log: Option<Arc<AccessLog>>,
    pub(super) spans: Option<Spans>,
    /// Of requests that no group served.
    pub(super) unserved: Arc<RequestStatistics>,
    /// For lines about requests that failed.
    pub(super) failures: LogLimit,
}

impl ClusterProxy {
    /// A proxy over a balancer that is part of the same server, without a front and without reloads: what of `config` is
    /// about a single request holds (`timeouts` of backends, `retry`, `overload`, `leader`, `backends` with its TLS,
    /// headers, `sticky_cookie`). The rest is what [`add_to`](Self::add_to) makes of it: `groups` and `routes`, `listen` and
    /// `tls`, the limits and times of clients, `health_check` and the file of what was learned, `opentelemetry`,
    /// `access_log` (see [`access_log`](Self::access_log)), certificates to backends that are followed when their files
    /// change, and how connections to backends are kept (see [`keep_connections`](Self::keep_connections)).
    ///
    /// # Errors
    ///
    /// When `config` is invalid, or a certificate to backends cannot be used.
    pub fn try_new(
        balancer: Arc<BalancerService>,
        config: &ClusterConfig,
    ) -> Result<Self, ClusterError> {
        // What it has from another section may have no effect here.
        config.check_section()?;
        let tls = backend_tls(config, DEFAULT_GROUP)?;
        let group = GroupProxy::new(DEFAULT_GROUP, config, balancer, tls, Arc::default());
        let routing = Routing::of_one(config, group);
        Ok(Self::of(Arc::new(ArcSwap::from_pointee(routing))))
    }

    pub(super) fn of(routing: Arc<ArcSwap<Routing>>) -> Self {
        Self {
            routing,
            connections: None,
            via: ViaMark::new(),
            access_log: None,
            spans: None,
            unserved: Arc::default(),
            failures: LogLimit::new(),
        }
    }

    /// What this proxy counts of the requests of its first group, for a page or metrics.
    pub fn statistics(&self) -> Arc<RequestStatistics> {
        self.routing.load().default.statistics.clone()
    }

    /// Writes this access log.
    #[must_use]
    pub fn access_log(mut self, log: Option<AccessLog>) -> Self {
        self.access_log = log.map(Arc::new);
        self
    }

    /// Makes connections to backends that speak HTTP/1, and keeps them in a list, instead of in Pingora's pool, which has a
    /// task for each of them: a short request costs about a twentieth less CPU time, and each time-out holds by itself. There are as many as
    /// `upstream_keepalive_pool_size` of `server` says, for each of its `threads`, and each is kept for
    /// `timeouts.pool_idle_ms`. Nothing changes if `server` says how connections are made (`client_bind_to_ipv4`,
    /// `client_bind_to_ipv6`, `upstream_connect_offload_threadpools`). [`add_to`](Self::add_to) does this by itself.
    #[must_use]
    pub fn keep_connections(mut self, server: &ServerConf) -> Self {
        self.connections = Connections::new(server);
        self
    }

    /// Makes these spans.
    pub(super) fn spans(mut self, spans: Option<Spans>) -> Self {
        self.spans = spans;
        self
    }

    /// Sends writes to the leader, with its fencing token in `x-leader-epoch`: every request but `GET`,
    /// `HEAD`, `OPTIONS` and `TRACE`, and those that become a tunnel. Without a leader a write waits, and
    /// then gets 503 with `retry-after`. A node that answers 421, or refuses with a newer token in
    /// `x-leader-epoch`, does not lead any more: the request is sent once more, to the new leader.
    ///
    /// Writes count as in flight where the leader also answers reads.
    #[must_use]
    pub fn leader_route(self, leader: LeaderRoute) -> Self {
        self.routing.load().default.send_writes_to(leader);
        self
    }
}

opaque_debug!(ClusterProxy);
