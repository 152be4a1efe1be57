//! A small proxy whose backends come from a source of one's own.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::{HttpPeer, Result, Server};
use pingora::proxy::{ProxyHttp, Session};
use pingora::server::ShutdownWatch;
use pingora::services::background::{BackgroundService, background_service};
use pingora::{Error, ErrorType};
use pingora_etcd::balance::{Balancer, PickOptions, Upstream};
use pingora_etcd::config::Retry;
use pingora_etcd::pingora::{http_peer, shorten_error};
use pingora_etcd::proxy::retry::{Decision, FailedTry, RetryBudget, RetryRules, Sent, is_local};
use pingora_etcd::proxy::{self, FrontConfig, HeaderPolicy, Outcome, Shutdown, TrustedProxies};
use pingora_etcd::{Node, Source};

/// Listens here, and sends requests to the nodes of the source, until a signal ends the process.
pub fn serve(
    listen: &str,
    source: impl Source + Sync + 'static,
) -> std::result::Result<ExitCode, Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let balancer = Arc::new(Balancer::builder().try_build()?);
    let mut server = Server::new(None)?;
    let fed = Fed {
        balancer: balancer.clone(),
        source: Mutex::new(Some(source)),
    };
    server.add_service(background_service("nodes", fed));
    let proxy = Proxy {
        balancer,
        headers: HeaderPolicy::new(TrustedProxies::default()),
        budget: RetryBudget::new(&Retry::default()),
    };
    proxy::add_proxy(&mut server, &FrontConfig::new(listen), proxy)?;
    Ok(proxy::run(server))
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

/// A complete proxy, of parts of the bundled one.
struct Proxy {
    balancer: Arc<Balancer>,
    headers: HeaderPolicy,
    budget: RetryBudget,
}

/// Tries on other backends.
const RULES: RetryRules = RetryRules::new(2);

/// What is kept about a request.
struct Context {
    sent: Sent,
    /// The backend of this try, and those of all.
    upstream: Option<Upstream>,
    tried: Vec<SocketAddr>,
    /// How long the backend took to answer.
    answered: Option<Duration>,
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        self.budget.count_request();
        Context {
            sent: Sent::now(),
            upstream: None,
            tried: Vec::new(),
            answered: None,
        }
    }

    async fn request_filter(&self, session: &mut Session, _: &mut Context) -> Result<bool> {
        match self.headers.has_come_back(session) {
            true => Err(Error::new(ErrorType::HTTPStatus(508))),
            false => Ok(false),
        }
    }

    async fn upstream_peer(&self, _: &mut Session, context: &mut Context) -> Result<Box<HttpPeer>> {
        let picked = self.balancer.pick_with(PickOptions {
            exclude: &context.tried,
            ..PickOptions::default()
        });
        let upstream = picked.ok_or_else(|| Error::new(ErrorType::HTTPStatus(503)))?;
        let mut peer = http_peer(upstream.addr(), &upstream.node());
        peer.options.connection_timeout = Some(Duration::from_millis(1_500));
        peer.options.read_timeout = Some(Duration::from_secs(60));
        // Backends mostly close what is idle after five seconds or more: the pool lets go of it before.
        peer.options.idle_timeout = Some(Duration::from_secs(4));
        context.tried.push(upstream.addr());
        context.upstream = Some(upstream);
        context.answered = None;
        context.sent.at = Instant::now();
        context.sent.has_body_begun = false;
        Ok(Box::new(peer))
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        is_end: bool,
        context: &mut Context,
    ) -> Result<()> {
        context.sent.has_body_begun |= body.is_some();
        if is_end && context.answered.is_none() {
            // A slow upload is the client's.
            context.sent.at = Instant::now();
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        _: &mut Context,
    ) -> Result<()> {
        self.headers.change_request(session, request)
    }

    async fn upstream_response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        self.headers.change_response(response);
        context.answered = Some(context.sent.at.elapsed());
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        _: &mut ResponseHeader,
        _: &mut Context,
    ) -> Result<()> {
        Shutdown::of_process().end_connection(session);
        Ok(())
    }

    /// Nothing has been sent: another backend may be tried, whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        _: &HttpPeer,
        context: &mut Context,
        mut error: Box<Error>,
    ) -> Box<Error> {
        let upstream = context.upstream.take();
        // What fails here is no backend's fault.
        if let Some(upstream) = upstream.filter(|_| !is_local(&error)) {
            upstream.unreachable();
        }
        let has_others = self.balancer.len() > context.tried.len();
        let is_retried = has_others && context.sent.retries < RULES.most;
        context.sent.retries += usize::from(is_retried);
        error.set_retry(is_retried);
        error
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Context,
        client_reused: bool,
    ) -> Box<Error> {
        shorten_error(&mut error);
        let failed = FailedTry::of(session, &error, client_reused, &context.sent);
        let mut error = error.more_context(format!("Peer: {peer}"));
        let is_retried = match RULES.decide(&failed) {
            Decision::RetryAnywhere => {
                context.sent.stale_connections += 1;
                context.tried.pop();
                context.upstream = None;
                true
            }
            Decision::RetryElsewhere
                if self.balancer.len() > context.tried.len()
                    && self.budget.take(Instant::now()) =>
            {
                context.sent.retries += 1;
                if let Some(upstream) = context.upstream.take() {
                    upstream.failed();
                }
                true
            }
            Decision::GiveUpWithoutBlame => {
                context.upstream = None;
                false
            }
            // It is told at the end.
            _ => false,
        };
        error.set_retry(is_retried);
        error
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Context) {
        if let Some(upstream) = context.upstream.take() {
            let latency = context
                .answered
                .unwrap_or_else(|| context.sent.at.elapsed());
            Outcome::of(session, error).tell(upstream, latency);
        }
    }
}
