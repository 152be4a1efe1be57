//! Tests real Pingora servers, both in this process and as example programs.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

mod bundled;
mod drop_in;
mod learning;
mod outage;
mod programs;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::configuration::ServerConf;
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch};
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::{
    ClusterNode, ClusterNodeBuilder, EtcdOptions, MetricsCollector, NodeMetadata, metadata_keys,
};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use common::load::{Load, client, load, until_it_answers};
use common::{free_port, local};

/// The TTL of most backends, in seconds: a machine that is busy with other tests does not end their leases.
const TTL: i64 = 10;

/// A Pingora server on its own thread, stopped when this is dropped.
struct RunningServer {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct WhenStopped(watch::Receiver<bool>);

#[async_trait]
impl ShutdownSignalWatch for WhenStopped {
    async fn recv(&self) -> ShutdownSignal {
        let _ = self.0.clone().wait_for(|stop| *stop).await;
        ShutdownSignal::FastShutdown
    }
}

impl RunningServer {
    fn start(build: impl FnOnce(&mut Server)) -> Self {
        let conf = ServerConf {
            threads: 2,
            ..ServerConf::default()
        };
        let mut server = Server::new_with_opt_and_conf(None, conf);
        build(&mut server);
        server.bootstrap();
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            server.run(RunArgs {
                shutdown_signal: Box::new(WhenStopped(stopped)),
            });
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reports the CPU usage that was set.
#[derive(Clone, Default)]
struct Cpu(Arc<AtomicU32>);

impl Cpu {
    fn set(&self, percent: u32) {
        self.0.store(percent, Ordering::SeqCst);
    }
}

impl MetricsCollector for Cpu {
    fn collect(&self) -> NodeMetadata {
        let percent = self.0.load(Ordering::SeqCst);
        serde_json::json!({ metadata_keys::CPU_USAGE_PERCENT: percent })
    }
}

/// An HTTP server that counts its requests, and the node that registers it.
struct Backend {
    id: String,
    port: u16,
    node: ClusterNode,
    cpu: Cpu,
    requests: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    tasks: JoinSet<()>,
    /// The runtime of the HTTP server: shutting it down breaks every connection immediately.
    server: Option<tokio::runtime::Runtime>,
    /// Reserves the port of a backend that does not listen.
    _held: Option<tokio::net::TcpSocket>,
}

impl Backend {
    async fn start(etcd: &EtcdOptions, group: &str, id: &str) -> Self {
        Self::start_with(etcd, group, id, |builder| builder).await
    }

    async fn start_with(
        etcd: &EtcdOptions,
        group: &str,
        id: &str,
        configure: impl FnOnce(ClusterNodeBuilder) -> ClusterNodeBuilder,
    ) -> Self {
        let server = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = {
            let _server = server.enter();
            let listener = std::net::TcpListener::bind((local(), 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            tokio::net::TcpListener::from_std(listener).unwrap()
        };
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicU64::new(0));
        let counter = requests.clone();
        let name = id.to_owned();
        let app = axum::Router::new().fallback(move |headers: axum::http::HeaderMap| async move {
            counter.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
            let epoch = headers.get("x-leader-epoch").cloned();
            let epoch = epoch.unwrap_or(axum::http::HeaderValue::from_static("none"));
            ([("x-epoch-seen", epoch)], name)
        });
        let mut backend = Self::register(etcd, group, id, port, configure);
        backend.requests = requests;
        server.spawn(async move { axum::serve(listener, app).await });
        backend.server = Some(server);
        backend
    }

    /// Registers a node without a server: its port refuses connections.
    fn dead(etcd: &EtcdOptions, group: &str, id: &str) -> Self {
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.bind((std::net::Ipv4Addr::LOCALHOST, 0).into())
            .unwrap();
        let port = held.local_addr().unwrap().port();
        let mut backend = Self::register(etcd, group, id, port, |builder| builder);
        backend._held = Some(held);
        backend
    }

    /// Registers a node without starting a server.
    fn register(
        etcd: &EtcdOptions,
        group: &str,
        id: &str,
        port: u16,
        configure: impl FnOnce(ClusterNodeBuilder) -> ClusterNodeBuilder,
    ) -> Self {
        let cpu = Cpu::default();
        let builder = ClusterNodeBuilder::new(etcd.clone(), id, local(), group)
            .ttl(TTL)
            .port(port)
            .metrics_collector(cpu.clone())
            .metrics_update_interval(1);
        let node = configure(builder).try_build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let mut tasks = JoinSet::new();
        let running = node.clone();
        tasks.spawn(async move {
            let until = async { drop(stopped.await) };
            running.run_until(until).await.unwrap();
        });
        Self {
            id: id.to_owned(),
            port,
            node,
            cpu,
            requests: Arc::default(),
            stop: Some(stop),
            tasks,
            server: None,
            _held: None,
        }
    }

    /// How many requests were received since the last call.
    fn take_requests(&self) -> u64 {
        self.requests.swap(0, Ordering::Relaxed)
    }

    /// Ends the backend like a killed process: connections break immediately, and nothing is
    /// cleaned up. Returns when the port refuses connections.
    async fn crash(mut self) {
        self.tasks.abort_all();
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
        let address = (local(), self.port);
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Leaves the group, but keeps serving.
    fn leave(&mut self) {
        drop(self.stop.take());
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
    }
}

fn cluster_config(etcd: &EtcdOptions, group: &str, more: &str) -> ClusterConfig {
    let endpoints = etcd.endpoints.join("','");
    let listen = format!("{}:{}", local(), free_port());
    let yaml = format!(
        "cluster:\n  etcd: {{ endpoints: ['{endpoints}'] }}\n  group: {group}\n  listen: '{listen}'\n{more}"
    );
    ClusterConfig::from_yaml(&yaml, "test").unwrap()
}
