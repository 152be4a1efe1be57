//! The proxy as a part of a Pingora server.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::proxy::{HttpProxy, http_proxy_service};
use ::pingora::server::Server;
use ::pingora::services::background::background_service;
use ::pingora::services::listening::Service;

use super::front::ClusterProxy;
use super::listener::{RequiredListener, check_address};
use crate::config::ClusterConfig;
use crate::error::ClusterError;
use crate::pingora::{BalancerService, LeaderRoute};

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
    ) -> Result<Arc<BalancerService>, ClusterError> {
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
        let mut proxy: Service<HttpProxy<Self>> = http_proxy_service(&server.configuration, proxy);
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
        Ok(task)
    }
}
