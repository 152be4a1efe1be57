use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::proxy::{FailToProxy, HttpProxy, ProxyHttp, Session, http_proxy_service};
use ::pingora::server::Server;
use ::pingora::services::background::background_service;
use ::pingora::services::listening::Service;
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorSource, ErrorType, Result, RetryType};
use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use tracing::{debug, trace};

use super::listening::{self, Listening};
use crate::balance::{PickOptions, Upstream};
use crate::config::{ClusterConfig, HashOn};
use crate::error::ClusterError;
use crate::load_report::{BINARY_HEADER, LOAD_REPORT_HEADER};
use crate::node::Node;
use crate::pingora::{BalancerService, LeaderRoute, LeaderUpstream, http_peer};
use crate::store::Revision;

/// On every proxied response: the id of the node that answered.
const UPSTREAM_NODE: HeaderName = HeaderName::from_static("x-upstream-node");
/// On requests to the leader: the fencing token of its term.
const LEADER_EPOCH: HeaderName = HeaderName::from_static("x-leader-epoch");

/// How long to wait for another leader before one that could not be reached is tried again.
const LEADER_RETRY: Duration = Duration::from_millis(200);

/// How many pooled connections of a request may turn out closed before that counts as a failure of
/// the backend.
const MOST_STALE: usize = 8;

/// The bundled load balancer: a complete HTTP proxy over a [`BalancerService`].
///
/// Picks a backend for each request, tries another one while nothing has reached the client,
/// answers 503 with the reason in plain text when there is none, and names the node in
/// `x-upstream-node`. With [`leader_route`](Self::leader_route), writes go to the leader.
///
/// [`add_to`](Self::add_to) puts it into a Pingora server, as the example `load_balancer` does
/// with a YAML file. Take it apart, or wrap it, when you need more.
pub struct ClusterProxy {
    balancer: Arc<BalancerService>,
    leader: Option<LeaderRoute>,
    leader_wait: Duration,
    hash_on: HashOn,
    retries: usize,
    connect_timeout: Duration,
    read_timeout: Duration,
    load_reports: bool,
}

impl ClusterProxy {
    /// A proxy as `config` describes it, over a balancer that is part of the same server.
    pub fn new(balancer: Arc<BalancerService>, config: &ClusterConfig) -> Self {
        Self {
            balancer,
            leader: None,
            leader_wait: Duration::from_millis(config.leader_wait_ms),
            hash_on: config.hash_on.clone(),
            retries: config.retries,
            connect_timeout: Duration::from_millis(config.upstream_connect_timeout_ms),
            read_timeout: Duration::from_millis(config.upstream_read_timeout_ms),
            load_reports: config.load_reports,
        }
    }

    /// Sends writes (`POST`, `PUT`, `PATCH`, `DELETE`) to the leader, with its fencing token in
    /// `x-leader-epoch`. Without a leader a write waits, and then gets 503 with `retry-after`.
    ///
    /// Writes are not counted as in flight: where the leader also answers reads, the pick does not
    /// see how busy it is with writes, other than by its metrics.
    #[must_use]
    pub fn leader_route(mut self, leader: LeaderRoute) -> Self {
        self.leader = Some(leader);
        self
    }

    /// Adds a balancer and a proxy that waits for it to a Pingora server; `writes_to_leader` as
    /// [`leader_route`](Self::leader_route). Connects to nothing and listens to nothing before
    /// the server runs, but looks whether it could listen, unless the server is to take sockets over
    /// or only to be tested.
    ///
    /// Without its listener the process is of no use: should the address be taken by then, or the
    /// listener end without being told to, it ends with status 1 and an error in the log, so
    /// that whoever supervises it sees that. The balancer's parts are started again instead.
    ///
    /// # Errors
    ///
    /// When `config` makes no sense, or its address cannot be listened on.
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
        if !options.is_some_and(|options| options.upgrade || options.test) {
            let free = listening::can_listen(&config.listen);
            free.map_err(|reason| ClusterError::config("cluster.listen", reason))?;
        }
        let balancer = server.add_service(balancer);
        let proxy = Listening::new(proxy, &config.listen, takes_over);
        server.add_service(proxy).add_dependency(balancer);
        Ok(task)
    }

    fn peer(&self, addr: SocketAddr, node: &Node) -> Box<HttpPeer> {
        let mut peer = http_peer(addr, node);
        peer.options.connection_timeout = Some(self.connect_timeout);
        peer.options.total_connection_timeout = Some(self.connect_timeout);
        peer.options.read_timeout = Some(self.read_timeout);
        peer.options.write_timeout = Some(self.read_timeout);
        Box::new(peer)
    }

    fn hash_key<'s>(&self, session: &'s Session) -> Cow<'s, [u8]> {
        match &self.hash_on {
            HashOn::ClientIp => match session.client_addr().and_then(|addr| addr.as_inet()) {
                Some(addr) => Cow::Owned(addr.ip().to_string().into_bytes()),
                None => Cow::Borrowed(&[]),
            },
            HashOn::Uri => {
                let uri = session.req_header().uri.path_and_query();
                Cow::Borrowed(uri.map_or(&[], |uri| uri.as_str().as_bytes()))
            }
            HashOn::Header(name) => {
                let value = session.get_header(name);
                Cow::Borrowed(value.map_or(&[], HeaderValue::as_bytes))
            }
        }
    }

    fn pick(&self, session: &Session, context: &mut RequestContext) -> Result<Box<HttpPeer>> {
        // The one that failed is not busy with this request any more.
        context.upstream = None;
        let key = self.hash_key(session);
        let now = Instant::now();
        context.sent = now;
        context.answered = None;
        let options = PickOptions {
            key: &key,
            exclude: &context.tried,
            now: Some(now),
        };
        let Some(upstream) = self.balancer.pick_with(options) else {
            return Err(unavailable(if context.tried.is_empty() {
                "no backend is registered"
            } else {
                "every backend has been tried"
            }));
        };
        context.tried.push(upstream.addr());
        let peer = self.peer(upstream.addr(), &upstream.node());
        context.upstream = Some(upstream);
        Ok(peer)
    }

    async fn peer_of_leader(
        &self,
        leader: &LeaderRoute,
        context: &mut RequestContext,
    ) -> Result<Box<HttpPeer>> {
        let left = self.leader_wait.saturating_sub(context.started.elapsed());
        // One that could not be reached may have crashed: its successor has another term. Or it
        // may be there again in a moment.
        let patience = match context.failed_epoch {
            Some(_) => left.min(LEADER_RETRY),
            None => left,
        };
        let other = leader
            .wait_for_other_than(context.failed_epoch, patience)
            .await;
        let Some(found) = other.or_else(|| leader.leader()) else {
            let left = self.leader_wait.saturating_sub(context.started.elapsed());
            return match leader.wait(left).await {
                Some(found) => Ok(self.lead(found, context)),
                None => Err(unavailable("there is no leader")),
            };
        };
        Ok(self.lead(found, context))
    }

    fn lead(&self, found: LeaderUpstream, context: &mut RequestContext) -> Box<HttpPeer> {
        let peer = self.peer(found.addr, &found.node);
        context.leader = Some(found);
        peer
    }
}

/// What [`ClusterProxy`] remembers of a request.
pub struct RequestContext {
    started: Instant,
    /// When the backend at work was picked: what was tried before is not its fault.
    sent: Instant,
    /// How long that backend took to answer. Not to the end of the answer, which depends on how
    /// fast the client reads.
    answered: Option<Duration>,
    /// Dropped with the context, so a request that is simply dropped is counted out too.
    upstream: Option<Upstream>,
    tried: Vec<SocketAddr>,
    retries: usize,
    /// Pooled connections that turned out closed.
    stale: usize,
    leader: Option<LeaderUpstream>,
    failed_epoch: Option<Revision>,
}

impl RequestContext {
    fn node(&self) -> Option<Arc<Node>> {
        match (&self.leader, &self.upstream) {
            (Some(leader), _) => Some(leader.node.clone()),
            (None, Some(upstream)) => Some(upstream.node()),
            (None, None) => None,
        }
    }
}

/// 503, with this in plain text.
fn unavailable(reason: &'static str) -> Box<Error> {
    Error::explain(ErrorType::HTTPStatus(503), reason)
}

#[async_trait]
impl ProxyHttp for ClusterProxy {
    type CTX = RequestContext;

    fn new_ctx(&self) -> RequestContext {
        let now = Instant::now();
        RequestContext {
            started: now,
            sent: now,
            answered: None,
            upstream: None,
            tried: Vec::new(),
            retries: 0,
            stale: 0,
            leader: None,
            failed_epoch: None,
        }
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        context: &mut RequestContext,
    ) -> Result<Box<HttpPeer>> {
        match &self.leader {
            Some(leader) if LeaderRoute::is_write(&session.req_header().method) => {
                self.peer_of_leader(leader, context).await
            }
            _ => self.pick(session, context),
        }
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        // What a client claims about the term must not look like what we say.
        request.remove_header(&LEADER_EPOCH);
        if let Some(leader) = &context.leader {
            request.insert_header(LEADER_EPOCH, leader.epoch.to_string())?;
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        let now = Instant::now();
        context.answered = Some(now.saturating_duration_since(context.sent));
        if !self.load_reports {
            return Ok(());
        }
        response.remove_header(BINARY_HEADER);
        if let Some(report) = response.remove_header(LOAD_REPORT_HEADER)
            && let Some(upstream) = &context.upstream
            && let Err(error) = upstream.report_header(report.as_bytes(), now)
        {
            trace!(node = upstream.node().id, %error, "load report refused");
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        if let Some(node) = context.node()
            && let Ok(id) = HeaderValue::from_bytes(node.id.as_bytes())
        {
            response.insert_header(UPSTREAM_NODE, id)?;
        }
        Ok(())
    }

    /// Nothing has been sent: another backend may be tried, whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        peer: &HttpPeer,
        context: &mut RequestContext,
        mut error: Box<Error>,
    ) -> Box<Error> {
        debug!(%peer, %error, "cannot connect to the backend");
        if let Some(upstream) = context.upstream.take() {
            upstream.failed();
        }
        if let Some(leader) = context.leader.take() {
            context.failed_epoch = Some(leader.epoch);
            error.set_retry(context.started.elapsed() < self.leader_wait);
        } else if context.retries < self.retries {
            context.retries += 1;
            error.set_retry(true);
        }
        error
    }

    /// Something may have been sent. Pingora's own rules first, which retry a request on a reused
    /// connection that turned out closed; beyond them, a method without side effects is tried on
    /// another backend as long as nothing has reached the client.
    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        context: &mut RequestContext,
        client_reused: bool,
    ) -> Box<Error> {
        let mut error = error.more_context(format!("Peer: {peer}"));
        let stale = client_reused && matches!(error.retry, RetryType::ReusedOnly);
        let method = &session.req_header().method;
        let repeatable = !session.as_ref().retry_buffer_truncated();
        if method.is_idempotent() && repeatable {
            error.retry.decide_reuse(client_reused);
        } else {
            error.set_retry(false);
        }
        if error.retry() && stale && context.stale < MOST_STALE {
            // An idle connection that was closed says nothing about the backend, which may be the
            // only one: it may be tried again, and that counts as no retry.
            context.stale += 1;
            context.tried.pop();
            return error;
        }
        if stale && !error.retry() {
            // Nor does it where the request must not be sent again.
            context.upstream = None;
        }
        let unanswered = session.response_written().is_none();
        let safe = method.is_safe() && repeatable && unanswered;
        let lost = safe && error.esource() == &ErrorSource::Upstream;
        let retry = (error.retry() || lost) && context.retries < self.retries;
        error.set_retry(retry);
        if retry {
            context.retries += 1;
            // Without another try, `logging` tells.
            if let Some(upstream) = context.upstream.take()
                && error.esource() == &ErrorSource::Upstream
            {
                upstream.failed();
            }
        }
        error
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        context: &mut RequestContext,
    ) -> FailToProxy {
        let (code, reason) = match (error.etype(), error.esource()) {
            (etype, _) if context.failed_epoch.is_some() && is_connect_error(etype) => {
                (503, "the leader cannot be reached")
            }
            (ErrorType::HTTPStatus(code), _) => {
                let reason = error.context.as_ref().map(|reason| reason.as_str());
                (*code, reason.unwrap_or("the request cannot be proxied"))
            }
            (ErrorType::ConnectTimedout | ErrorType::ReadTimedout, ErrorSource::Upstream) => {
                (504, "the backend did not answer in time")
            }
            (_, ErrorSource::Upstream) => (502, "the backend failed"),
            (
                ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed,
                ErrorSource::Downstream,
            ) => (0, ""), // nobody is there to be told
            (_, ErrorSource::Downstream) => (400, "bad request"),
            (_, ErrorSource::Internal | ErrorSource::Unset) => (500, "internal error"),
        };
        if code > 0
            && let Err(error) = answer(session, code, reason).await
        {
            debug!(%error, code, "the client could not be told");
        }
        FailToProxy {
            error_code: code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        context: &mut RequestContext,
    ) {
        let Some(upstream) = context.upstream.take() else {
            return;
        };
        let status = session.response_written().map(|response| response.status);
        match (error.map(Error::esource), status) {
            // However long such a connection was silent in the end.
            (_, Some(StatusCode::SWITCHING_PROTOCOLS)) => {
                upstream.succeeded(context.answered.unwrap_or_else(|| context.sent.elapsed()));
            }
            (Some(ErrorSource::Upstream), _) => upstream.failed(),
            // The client's doing, or ours: says nothing about the backend.
            (Some(_), _) | (None, None) => {}
            (None, Some(status)) if status.is_server_error() => upstream.failed(),
            (None, Some(_)) => {
                upstream.succeeded(context.answered.unwrap_or_else(|| context.sent.elapsed()));
            }
        }
    }
}

fn is_connect_error(etype: &ErrorType) -> bool {
    matches!(
        etype,
        ErrorType::ConnectTimedout
            | ErrorType::ConnectRefused
            | ErrorType::ConnectNoRoute
            | ErrorType::ConnectError
            | ErrorType::SocketError
    )
}

async fn answer(session: &mut Session, code: u16, reason: &str) -> Result<()> {
    let body = Bytes::from(format!("{reason}\n"));
    let mut response = ResponseHeader::build(code, Some(4))?;
    response.insert_header(CONTENT_TYPE, "text/plain; charset=utf-8")?;
    response.insert_header(CONTENT_LENGTH, body.len())?;
    if code == 503 {
        response.insert_header(RETRY_AFTER, "1")?;
    }
    session.write_error_response(response, body).await
}
