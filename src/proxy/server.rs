//! The proxy as a part of a Pingora server.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::HttpServerApp;
use ::pingora::listeners::{L4BufferSettings, ListenerConfig, TcpSocketOptions};
use ::pingora::protocols::TcpKeepalive;
use ::pingora::proxy::{HttpProxy, http_proxy};
use ::pingora::server::Server;
use ::pingora::server::configuration::ServerConf;
use ::pingora::services::background::background_service;
use ::pingora::services::listening::Service;

use super::access_log::{AccessLog, AccessLogStatistics};
use super::client_settings::{front_settings, h2_options, server_options};
use super::cluster_proxy::ClusterProxy;
use super::daemon::check_daemon;
use super::front::{Front, FrontListener, FrontStatistics, TellRefused};
use super::listener::{Balancers, RequiredListener};
use super::reload::Reloader;
use super::shutdown::{Shutdown, check_address};
use super::spans::Spans;
use super::statistics::RequestStatistics;
use super::tls::Reload;
use crate::config::{self, ClusterConfig, ListenerAt};
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::pingora::{BalancerService, with_system_cas};

/// A client that has vanished without a word, as with a WebSocket behind a cut cable, is found within two minutes. One
/// that reads nothing has the times of the front.
const CLIENTS_ALIVE: TcpKeepalive = TcpKeepalive {
    idle: Duration::from_secs(60),
    interval: Duration::from_secs(20),
    count: 3,
    #[cfg(target_os = "linux")]
    user_timeout: Duration::ZERO,
};

/// What [`ClusterProxy::add_to`] has added to a server, for a status page or metrics.
#[derive(Clone)]
#[non_exhaustive]
pub struct ProxyParts {
    /// The balancer of the group that the section itself describes, as of the start.
    pub balancer: Arc<BalancerService>,
    /// What has happened to client connections.
    pub clients: Arc<FrontStatistics>,
    /// What has become of requests for that group.
    pub requests: Arc<RequestStatistics>,
    /// What has become of requests that no group has served: those that were refused, redirected, or
    /// answered by a route.
    pub unserved: Arc<RequestStatistics>,
    /// What has become of the lines of the access log, if there is one.
    pub access_log: Option<AccessLogStatistics>,
    /// Takes over another configuration, and knows all groups.
    pub reloader: Arc<Reloader>,
}

impl ClusterProxy {
    /// Adds a balancer, and a proxy that waits for it, to a Pingora server; `writes_to_leader` as
    /// [`leader_route`](Self::leader_route). Connects to nothing and listens on nothing before the
    /// server runs, but checks whether its addresses can be listened on, unless the server is to take
    /// over sockets or only to be tested. Run it with [`run`](super::run), which handles signals.
    ///
    /// A server that is to take over sockets listens as soon as it has a view of the group and the
    /// process that has the sockets hands them over, however long both take.
    ///
    /// Without its listeners the process is useless: if an address is taken when the server runs, or
    /// a listener ends without a shutdown request, the process ends with status 1 and an error in
    /// the log, so that its supervisor sees it. The parts of the balancer are started again instead.
    ///
    /// # Errors
    ///
    /// When `config` is invalid, or one of its addresses cannot be listened on.
    pub fn add_to(
        server: &mut Server,
        config: &ClusterConfig,
        writes_to_leader: bool,
    ) -> Result<ProxyParts, ClusterError> {
        let mut config = config.clone();
        config.leader.writes |= writes_to_leader;
        let config = &config;
        config.validate()?;
        config.check_leaders()?;
        let options = server.options.as_ref();
        let is_test = options.is_some_and(|options| options.test);
        check_log(server, config)?;
        check_listeners(server, config.listeners())?;
        let certificates = Reload::default();
        // Health checks and mirrors connect by themselves.
        let reloader = connecting(|| Reloader::new(config, certificates.clone()))??;
        let reloader = background_service("balancer", reloader.writes_to_leader(writes_to_leader));
        let task = reloader.task();
        let proxy = Self::of(task.routing().clone());
        let log = config.access_log.as_ref();
        let log = log.map(|log| AccessLog::new(log, is_test)).transpose()?;
        let access_log = log.as_ref().map(|log| log.statistics().clone());
        let proxy = proxy
            .access_log(log)
            .spans(config.opentelemetry.as_ref().and_then(Spans::new));
        let listeners = FrontListener::all(config.listeners())?;
        for tls in listeners.iter().filter_map(|it| it.tls.as_ref()) {
            certificates.add(&tls.files());
        }
        let routing = task.routing().load_full();
        let parts = ProxyParts {
            balancer: routing.default.balancer.clone(),
            clients: Arc::default(),
            requests: routing.default.statistics.clone(),
            unserved: proxy.unserved.clone(),
            access_log,
            reloader: task.clone(),
        };
        let refused = proxy.access_log.clone().map(tell_refused);
        let mut proxy = made(&server.configuration, proxy)?;
        let (clients, timeouts) = (&config.clients, &config.timeouts);
        proxy.server_options = Some(server_options(clients));
        proxy.h2_options = Some(h2_options(clients, true));
        let front = Front::new(
            proxy,
            front_settings(clients, timeouts, listeners),
            parts.clients.clone(),
            refused,
        );
        task.set_front(front.settings());
        let drain_delay = Duration::from_millis(config.drain_delay_ms);
        Shutdown::of_process().accepts_for(drain_delay);
        server.add_service(background_service("certificates", certificates));
        let balancers = server.add_service(reloader);
        let addresses = config.listeners().map(|it| it.listen.to_owned()).collect();
        let routing = task.routing().clone();
        let balancers_now = Box::new(move || routing.load().balancers());
        let proxy = listening(server, front, addresses, balancers_now);
        server.add_service(proxy).add_dependency(balancers);
        Ok(parts)
    }
}

/// Gives requests that the proxy never sees a line of the log.
pub(super) fn tell_refused(log: Arc<AccessLog>) -> TellRefused {
    Arc::new(move |refused| log.write(refused.into()))
}

fn listener_at(address: &str) -> ListenerConfig {
    let mut options = TcpSocketOptions::default();
    options.tcp_keepalive = Some(CLIENTS_ALIVE);
    // The parsers have buffers of their own, and the front holds what is short: each idle connection
    // would keep 64 KiB.
    ListenerConfig::tcp(address)
        .tcp_socket_options(options)
        .l4_buffer(L4BufferSettings::unbuffered())
}

pub(super) fn made(
    server: &Arc<ServerConf>,
    proxy: ClusterProxy,
) -> Result<HttpProxy<ClusterProxy>, ClusterError> {
    connecting(|| http_proxy(server, proxy.keep_connections(server)))
}

fn connecting<T>(make: impl FnOnce() -> T) -> Result<T, ClusterError> {
    with_system_cas("cluster.backends", make)
}

/// A service that listens at these addresses, without which the process is useless.
pub(super) fn listening<A: HttpServerApp + Send + Sync + 'static>(
    server: &Server,
    front: Front<A>,
    addresses: Vec<String>,
    balancers: Balancers,
) -> RequiredListener<Service<Front<A>>> {
    let mut service = Service::new("proxy".to_owned(), front);
    for address in &addresses {
        service.add_listener(listener_at(address));
        Shutdown::of_process().listeners().add(address);
    }
    let options = server.options.as_ref();
    let takes_over = options.is_some_and(|options| options.upgrade);
    let takes_over_at = takes_over.then(|| server.configuration.upgrade_sock.clone());
    RequiredListener::new(service, addresses, takes_over_at, balancers)
}

fn check_log(server: &Server, config: &ClusterConfig) -> Result<(), ClusterError> {
    let is_standard = |log: &config::AccessLog| log.file == Path::new("-");
    if server.configuration.daemon && config.access_log.as_ref().is_some_and(is_standard) {
        let reason = "\"-\": a daemon has no standard output";
        return Err(ClusterError::config("cluster.access_log.file", reason));
    }
    Ok(())
}

/// Checks whether this server may listen on these addresses, and, unless it is to take over sockets or only to be tested,
/// whether it can.
pub(super) fn check_listeners<'a>(
    server: &Server,
    listeners: impl Iterator<Item = ListenerAt<'a>>,
) -> Result<(), ClusterError> {
    let options = server.options.as_ref();
    let listens_at_once = options.is_none_or(|options| !options.upgrade && !options.test);
    for listener in listeners {
        if Shutdown::of_process().listeners().wants(listener.listen) {
            let reason = format!(
                "{}: another proxy of this server is to listen there",
                listener.listen
            );
            return Err(ClusterError::config(listener.field("listen"), reason));
        }
        if listens_at_once {
            let checked = check_address(listener.listen);
            checked.map_err(|reason| ClusterError::config(listener.field("listen"), reason))?;
        }
        check_user(&server.configuration, &listener)?;
    }
    // Whoever only tests the file may be another user, on another machine.
    match options.is_some_and(|options| options.test) {
        true => Ok(()),
        false => check_daemon(&server.configuration),
    }
}

/// Pingora changes the user before it listens, and goes on without a listener if that user may not.
fn check_user(server: &ServerConf, listener: &ListenerAt<'_>) -> Result<(), ClusterError> {
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
    let address = listener.listen;
    let port = address.rsplit_once(':').map(|(_, port)| port.parse());
    let Some(Ok(port)) = port else {
        return Ok(());
    };
    if (1..first).contains(&port) {
        return Err(ClusterError::config(
            listener.field("listen"),
            format!(
                "{address}: the user {user:?} may not listen on ports below {first}; choose another port, or start as that user with the capability CAP_NET_BIND_SERVICE and without the field user"
            ),
        ));
    }
    Ok(())
}

opaque_debug!(ProxyParts);
