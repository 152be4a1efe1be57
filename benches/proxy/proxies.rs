//! The Pingora proxies that are compared, each run by `--serve`.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::lb::LoadBalancer;
use pingora::lb::selection::RoundRobin;
use pingora::prelude::*;
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::server::configuration::ServerConf;
use pingora::server::{Server, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora_etcd::Cluster;
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::pingora::BalancerService;
use pingora_etcd::proxy::{self, ClusterProxy};
use tokio::task::JoinSet;

use super::argument;

/// Runs one of the proxies until it is killed.
pub fn serve(kind: &str) {
    let listen = argument("--listen").expect("an address");
    let backends = argument("--backends").expect("addresses");
    let backends: Vec<SocketAddr> = backends
        .split(',')
        .map(|text| text.parse().unwrap())
        .collect();
    let conf = ServerConf {
        threads: 1,
        grace_period_seconds: Some(0),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    match kind {
        "bare" => bare(&mut server, &listen, &backends),
        "cluster proxy" => cluster(&mut server, &listen, backends, true),
        "without the front" => cluster(&mut server, &listen, backends, false),
        other => panic!("{other} is no proxy"),
    }
    let _ = proxy::run(server);
}

/// A Pingora proxy as its documentation shows it.
struct Bare(Arc<LoadBalancer<RoundRobin>>);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        let upstream = self.0.select(b"", 256).expect("a backend");
        Ok(Box::new(HttpPeer::new(upstream, false, String::new())))
    }
}

fn bare(server: &mut Server, listen: &str, backends: &[SocketAddr]) {
    let backends = LoadBalancer::try_from_iter(backends).unwrap();
    let mut proxy = http_proxy_service(&server.configuration, Bare(Arc::new(backends)));
    proxy.add_tcp(listen);
    server.add_service(proxy);
}

/// The backends as members of the group, in the memory of this process.
struct Members(ClusterConfig, Vec<SocketAddr>);

#[async_trait]
impl BackgroundService for Members {
    async fn start(&self, _: ShutdownWatch) {
        let cluster = Cluster::connect(self.0.etcd.clone()).unwrap();
        let mut running = JoinSet::new();
        for (index, address) in self.1.iter().enumerate() {
            let node = cluster
                .node(format!("n{index}"), address.ip(), &self.0.group)
                .port(address.port())
                .try_build()
                .unwrap();
            running.spawn(async move { node.run_until(std::future::pending()).await.unwrap() });
        }
        running.join_all().await;
    }
}

fn cluster(server: &mut Server, listen: &str, backends: Vec<SocketAddr>, has_front: bool) {
    let text = format!(
        "cluster: {{ group: bench, listen: '{listen}', etcd: {{ endpoints: ['memory://bench'] }} }}"
    );
    let config = ClusterConfig::from_yaml(&text, "bench").unwrap();
    server.add_service(background_service(
        "members",
        Members(config.clone(), backends),
    ));
    if has_front {
        ClusterProxy::add_to(server, &config, false).unwrap();
        return;
    }
    let balancer = BalancerService::new(config.discovery().unwrap(), config.balancer().unwrap());
    let balancer = background_service("balancer", balancer);
    let proxy = ClusterProxy::new(balancer.task(), &config);
    let mut proxy = http_proxy_service(&server.configuration, proxy);
    proxy.add_tcp(listen);
    let balancer = server.add_service(balancer);
    server.add_service(proxy).add_dependency(balancer);
}
