//! A small proxy whose backends come from a source of one's own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use pingora::prelude::{HttpPeer, Result, Server};
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, background_service};
use pingora::{Error, ErrorType};
use pingora_etcd::balance::{Balancer, Upstream};
use pingora_etcd::{Node, Source};

/// Listens here, and sends requests to the nodes of the source, for ever.
pub fn serve(
    listen: &str,
    source: impl Source + Sync + 'static,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let balancer = Arc::new(Balancer::builder().try_build()?);
    let mut server = Server::new(None)?;
    server.bootstrap();
    let fed = Fed {
        balancer: balancer.clone(),
        source: Mutex::new(Some(source)),
    };
    server.add_service(background_service("nodes", fed));
    let mut proxy = http_proxy_service(&server.configuration, Proxy { balancer });
    proxy.add_tcp(listen);
    server.add_service(proxy);
    server.run_forever()
}

/// The nodes in a JSON list, as `config/node.schema.json` describes them: `[{"id": "a", "ip": "10.0.0.1", "port": 80}]`.
pub fn nodes(json: &[u8]) -> std::result::Result<Vec<Node>, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// Gives the balancer its nodes.
struct Fed<S> {
    balancer: Arc<Balancer>,
    source: Mutex<Option<S>>,
}

#[async_trait]
impl<S: Source + Sync + 'static> BackgroundService for Fed<S> {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let source = self
            .source
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(source) = source else { return };
        tokio::select! {
            never = self.balancer.follow(source) => match never {},
            _ = shutdown.changed() => {}
        }
    }
}

struct Proxy {
    balancer: Arc<Balancer>,
}

/// The backend of a request, and when it was sent there.
type Sent = Option<(Upstream, Instant)>;

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Sent;

    fn new_ctx(&self) -> Sent {
        None
    }

    async fn upstream_peer(&self, _: &mut Session, sent: &mut Sent) -> Result<Box<HttpPeer>> {
        let upstream = self.balancer.pick();
        let upstream = upstream.ok_or_else(|| Error::new(ErrorType::HTTPStatus(503)))?;
        let peer = HttpPeer::new(upstream.addr(), false, String::new());
        *sent = Some((upstream, Instant::now()));
        Ok(Box::new(peer))
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, sent: &mut Sent) {
        let Some((upstream, since)) = sent.take() else {
            return;
        };
        let status = session.response_written().map(|response| response.status);
        // A client that went away says nothing of the backend.
        match (error, status) {
            (None, Some(status)) if !status.is_server_error() => {
                upstream.succeeded(since.elapsed());
            }
            (None, Some(_)) => upstream.failed(),
            (Some(error), _) if *error.esource() == pingora::ErrorSource::Upstream => {
                upstream.failed();
            }
            _ => drop(upstream),
        }
    }
}
