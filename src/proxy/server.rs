//! The proxy as a part of a Pingora server.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::HttpServerOptions;
use ::pingora::listeners::{L4BufferSettings, ListenerConfig};
use ::pingora::proxy::{HttpProxy, http_proxy};
use ::pingora::server::Server;
use ::pingora::server::configuration::ServerConf;
use ::pingora::services::background::background_service;
use ::pingora::services::listening::Service;

use super::access_log::AccessLog;
use super::cluster_proxy::ClusterProxy;
use super::front::{
    ClientTimeouts, Front, FrontLimits, FrontSettings, FrontStatistics, ProxyHeaderRule,
};
use super::listener::RequiredListener;
use super::shutdown::{Shutdown, check_address};
use super::statistics::RequestStatistics;
use super::tls::{BackendTls, ClientTls, Reload};
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
    /// What has become of requests.
    pub requests: Arc<RequestStatistics>,
}

impl ClusterProxy {
    /// Adds a balancer, and a proxy that waits for it, to a Pingora server; `writes_to_leader` as
    /// [`leader_route`](Self::leader_route). Connects to nothing and listens on nothing before the
    /// server runs, but checks whether the address can be listened on, unless the server is to take
    /// over sockets or only to be tested. Run it with [`run`](super::run), which handles signals.
    ///
    /// A server that is to take over sockets listens as soon as it has a view of the group and the
    /// process that has the sockets hands them over, however long both take.
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
        let options = server.options.as_ref();
        let takes_over = options.is_some_and(|options| options.upgrade);
        let is_test = options.is_some_and(|options| options.test);
        if !takes_over && !is_test {
            let checked = check_address(&config.listen);
            checked.map_err(|reason| ClusterError::config("cluster.listen", reason))?;
        }
        check_user(&server.configuration, &config.listen)?;
        let discovery = config.discovery()?;
        let balancer = BalancerService::new(discovery.clone(), config.balancer()?)
            .ready_timeout(Duration::from_millis(config.ready_timeout_ms));
        let balancer = background_service("balancer", balancer);
        let task = balancer.task();
        let mut proxy = Self::new(task.clone(), config);
        let mut files = Vec::new();
        // Without the feature, nodes that say that they want TLS cannot be spoken to.
        let has_tls = cfg!(feature = "proxy-tls");
        if config.backends.protocol.is_tls() || has_tls && config.backends.may_use_tls() {
            let tls = BackendTls::new(&config.backends)?;
            files.push(tls.files());
            proxy = proxy.backend_tls(config, tls);
        }
        if let Some(log) = &config.access_log {
            proxy = proxy.access_log(AccessLog::new(log)?);
        }
        let client_tls = config.tls.as_ref().map(ClientTls::new).transpose()?;
        files.extend(client_tls.as_ref().map(ClientTls::files));
        if writes_to_leader {
            proxy = proxy.leader_route(LeaderRoute::new(discovery, config.default_port));
        }
        let requests = proxy.statistics();
        let mut proxy = made(&server.configuration, proxy)?;
        proxy.server_options = Some(server_options(config));
        let statistics = Arc::<FrontStatistics>::default();
        let front = Front::new(
            proxy,
            front_settings(config, client_tls),
            statistics.clone(),
        );
        let mut proxy = Service::new("proxy".to_owned(), front);
        // The parsers have buffers of their own, and the front holds what is short: each idle connection
        // would keep 64 KiB.
        let buffers = L4BufferSettings::unbuffered();
        proxy.add_listener(ListenerConfig::tcp(&*config.listen).l4_buffer(buffers));
        let shutdown = Shutdown::of_process();
        shutdown.listeners().add(&config.listen);
        shutdown.accepts_for(Duration::from_millis(config.drain_delay_ms));
        let takes_over_at = takes_over.then(|| server.configuration.upgrade_sock.clone());
        if !files.is_empty() {
            server.add_service(background_service("certificates", Reload::of(files)));
        }
        let balancer = server.add_service(balancer);
        let proxy = RequiredListener::new(proxy, &config.listen, takes_over_at, task.clone());
        server.add_service(proxy).add_dependency(balancer);
        Ok(ProxyParts {
            balancer: task,
            clients: statistics,
            requests,
        })
    }
}

/// Pingora panics if it cannot use a certificate of the system, which it reads in any case.
pub(super) fn made(
    server: &Arc<ServerConf>,
    proxy: ClusterProxy,
) -> Result<HttpProxy<ClusterProxy>, ClusterError> {
    let make = AssertUnwindSafe(|| http_proxy(server, proxy));
    catch_unwind(make).map_err(|_| {
        let reason = "the CAs of the system (or SSL_CERT_FILE, SSL_CERT_DIR) cannot be used";
        ClusterError::config("cluster.backends", reason)
    })
}

/// Pingora changes the user before it listens, and goes on without a listener if that user may not.
fn check_user(server: &ServerConf, address: &str) -> Result<(), ClusterError> {
    const SETTING: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    let Some(user) = server.user.as_deref().filter(|_| server.daemon) else {
        return Ok(());
    };
    if ["root", "0"].contains(&user) {
        return Ok(());
    }
    let first = std::fs::read_to_string(SETTING).ok();
    let first = first.and_then(|text| text.trim().parse().ok());
    let first: u16 = first.unwrap_or(1024);
    let port = address.rsplit_once(':').map(|(_, port)| port.parse());
    let Some(Ok(port)) = port else {
        return Ok(());
    };
    if (1..first).contains(&port) {
        return Err(ClusterError::config(
            "cluster.listen",
            format!(
                "{address}: the user {user:?} may not listen on ports below {first}; choose another port, or start as that user with the capability CAP_NET_BIND_SERVICE and without the field user"
            ),
        ));
    }
    Ok(())
}

pub(super) fn server_options(config: &ClusterConfig) -> HttpServerOptions {
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

pub(super) fn front_settings(config: &ClusterConfig, tls: Option<ClientTls>) -> FrontSettings {
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
        tls,
    }
}
