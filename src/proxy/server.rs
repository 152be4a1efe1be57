//! The proxy as a part of a Pingora server.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::HttpServerOptions;
use ::pingora::proxy::{HttpProxy, http_proxy};
use ::pingora::server::Server;
use ::pingora::services::background::background_service;
use ::pingora::services::listening::Service;

use super::cluster_proxy::ClusterProxy;
use super::front::{
    ClientTimeouts, Front, FrontLimits, FrontSettings, FrontStatistics, ProxyHeaderRule,
};
use super::listener::{RequiredListener, check_address};
use crate::config::ClusterConfig;
use crate::error::ClusterError;
use crate::pingora::{BalancerService, LeaderRoute};

/// What [`ClusterProxy::add_to`] has added to a server, for a status page or metrics.
#[non_exhaustive]
pub struct ProxyParts {
    /// The balancer.
    pub balancer: Arc<BalancerService>,
    /// What has happened to client connections.
    pub clients: Arc<FrontStatistics>,
}

impl ClusterProxy {
    /// Adds a balancer, and a proxy that waits for it, to a Pingora server; `writes_to_leader` as
    /// [`leader_route`](Self::leader_route). Connects to nothing and listens on nothing before the
    /// server runs, but checks whether the address can be listened on, unless the server is to take
    /// over sockets or only to be tested.
    ///
    /// Without its listener the process is useless: if the address is taken when the server runs, or
    /// the listener ends without a shutdown request, the process ends with status 1 and an error in
    /// the log, so that its supervisor sees it. The parts of the balancer are started again instead.
    ///
    /// # Errors
    ///
    /// When `config` is invalid, or its address cannot be listened on.
    pub fn add_to(
        server: &mut Server,
        config: &ClusterConfig,
        writes_to_leader: bool,
    ) -> Result<ProxyParts, ClusterError> {
        config.validate()?;
        let discovery = config.discovery()?;
        let balancer = BalancerService::new(discovery.clone(), config.balancer()?)
            .ready_timeout(Duration::from_millis(config.ready_timeout_ms));
        let balancer = background_service("balancer", balancer);
        let task = balancer.task();
        let mut proxy = Self::new(task.clone(), config);
        if writes_to_leader {
            proxy = proxy.leader_route(LeaderRoute::new(discovery, config.default_port));
        }
        let mut proxy: HttpProxy<Self> = http_proxy(&server.configuration, proxy);
        proxy.server_options = Some(server_options(config));
        let statistics = Arc::<FrontStatistics>::default();
        let front = Front::new(proxy, front_settings(config), statistics.clone());
        let mut proxy = Service::new("proxy".to_owned(), front);
        proxy.add_tcp(&config.listen);
        let options = server.options.as_ref();
        let takes_over = options.is_some_and(|options| options.upgrade);
        let is_test = options.is_some_and(|options| options.test);
        if !takes_over && !is_test {
            let checked = check_address(&config.listen);
            checked.map_err(|reason| ClusterError::config("cluster.listen", reason))?;
        }
        let balancer = server.add_service(balancer);
        let proxy = RequiredListener::new(proxy, &config.listen, takes_over);
        server.add_service(proxy).add_dependency(balancer);
        Ok(ProxyParts {
            balancer: task,
            clients: statistics,
        })
    }
}

fn server_options(config: &ClusterConfig) -> HttpServerOptions {
    let mut options = HttpServerOptions::default();
    options.h2c = config.clients.h2c;
    options.h2_idle_timeout = Some(Duration::from_millis(config.timeouts.client_idle_ms));
    options.keepalive_request_limit = match config.clients.requests_per_connection {
        0 => None,
        // Pingora counts those after the first one.
        limit => Some(limit - 1),
    };
    options
}

fn front_settings(config: &ClusterConfig) -> FrontSettings {
    let (timeouts, clients) = (&config.timeouts, &config.clients);
    let milliseconds = Duration::from_millis;
    FrontSettings {
        limits: FrontLimits {
            timeouts: ClientTimeouts {
                client_header: milliseconds(timeouts.client_header_ms),
                client_body: milliseconds(timeouts.client_body_ms),
                client_idle: milliseconds(timeouts.client_idle_ms),
                client_write: milliseconds(timeouts.client_write_ms),
                client_drain: milliseconds(timeouts.client_drain_ms),
                tunnel: milliseconds(timeouts.tunnel_ms),
            },
            head_bytes: clients.head_bytes,
            least_rate: clients.least_rate,
        },
        connections: clients.connections,
        connections_per_client: clients.connections_per_client,
        proxy_header: (!clients.proxy_protocol.is_empty()).then(|| ProxyHeaderRule {
            from: clients.proxy_protocol.clone(),
            within: milliseconds(clients.proxy_protocol_timeout_ms),
        }),
    }
}
