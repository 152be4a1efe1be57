//! The Pingora proxies that are compared, each run by `--serve`.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::lb::LoadBalancer;
use pingora::lb::selection::RoundRobin;
use pingora::prelude::*;
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::services::background::background_service;
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::pingora::BalancerService;
use pingora_etcd::proxy::{self, ClusterProxy};
use pingora_etcd::{Cluster, EtcdOptions};
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use super::argument;

const GROUP: &str = "bench";

/// Runs one of the proxies until it is killed.
pub fn serve(kind: &str) {
    let listen = argument("--listen").expect("an address");
    let text = || configuration(&argument("--etcd").expect("an endpoint"), &listen);
    let conf = ServerConf {
        threads: 1,
        grace_period_seconds: Some(0),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    match kind {
        "bare" => bare(&mut server, &listen),
        "cluster proxy" => cluster(&mut server, &text(), true),
        "without the front" => cluster(&mut server, &text(), false),
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

fn bare(server: &mut Server, listen: &str) {
    let backends = argument("--backends").expect("addresses");
    let backends = LoadBalancer::try_from_iter(backends.split(',')).unwrap();
    let mut proxy = http_proxy_service(&server.configuration, Bare(Arc::new(backends)));
    proxy.add_tcp(listen);
    server.add_service(proxy);
}

/// The file of the proxies of this crate.
pub fn configuration(etcd: &str, listen: &str) -> String {
    format!(
        "version: 1\nthreads: 1\ncluster:\n  etcd: {{ endpoints: ['{etcd}'] }}\n  group: {GROUP}\n  \
         listen: '{listen}'\n"
    )
}

fn cluster(server: &mut Server, text: &str, has_front: bool) {
    let config = ClusterConfig::from_yaml(text, "bench").unwrap();
    if has_front {
        ClusterProxy::add_to(server, &config, false).unwrap();
        return;
    }
    let balancer = BalancerService::new(config.discovery().unwrap(), config.balancer().unwrap());
    let balancer = background_service("balancer", balancer);
    let proxy = ClusterProxy::try_new(balancer.task(), &config).unwrap();
    let proxy = proxy.keep_connections(&server.configuration);
    let mut proxy = http_proxy_service(&server.configuration, proxy);
    proxy.add_tcp(&argument("--listen").expect("an address"));
    let balancer = server.add_service(balancer);
    server.add_service(proxy).add_dependency(balancer);
}

/// Registers the backends for as long as this process runs.
pub fn register(backends: Vec<SocketAddr>, options: EtcdOptions) {
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let cluster = Cluster::connect(options).unwrap();
            let mut running = JoinSet::new();
            for (index, address) in backends.into_iter().enumerate() {
                let node = cluster
                    .node(format!("n{index}"), address.ip(), GROUP)
                    .port(address.port())
                    .try_build()
                    .unwrap();
                running.spawn(async move { node.run_until(std::future::pending()).await.unwrap() });
            }
            running.join_all().await;
        });
    });
}
