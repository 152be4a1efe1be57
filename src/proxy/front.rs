//! The proxy: what happens in each phase of a request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::proxy::{FailToProxy, ProxyHttp, Session};
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorSource, Result, RetryType};
use async_trait::async_trait;
use tracing::debug;

use super::context::RequestContext;
use super::headers::{set_leader_epoch, set_upstream_node, take_load_report};
use super::leader::find_leader;
use super::outcome::{Outcome, outcome};
use super::peers::Timeouts;
use super::pick::pick;
use super::reply::reply_to;
use super::retry::{Decision, Failure, PingoraRetry, decide};
use crate::config::{ClusterConfig, HashOn};
use crate::pingora::{BalancerService, LeaderRoute};

/// The bundled load balancer: a complete HTTP proxy over a [`BalancerService`].
///
/// Picks a backend for each request, tries another one while nothing has reached the client,
/// answers 503 with the reason in plain text if there is none, and names the node in
/// `x-upstream-node`. With [`leader_route`](Self::leader_route), writes go to the leader.
///
/// [`add_to`](Self::add_to) puts it into a Pingora server, as the example `load_balancer` does
/// with a YAML file. Take it apart, or wrap it, when you need more.
pub struct ClusterProxy {
    balancer: Arc<BalancerService>,
    leader: Option<LeaderRoute>,
    leader_wait: Duration,
    hash_on: HashOn,
    max_retries: usize,
    timeouts: Timeouts,
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
            max_retries: config.retries,
            timeouts: Timeouts {
                connect: Duration::from_millis(config.upstream_connect_timeout_ms),
                read: Duration::from_millis(config.upstream_read_timeout_ms),
            },
            load_reports: config.load_reports,
        }
    }

    /// Sends writes (`POST`, `PUT`, `PATCH`, `DELETE`) to the leader, with its fencing token in
    /// `x-leader-epoch`. Without a leader a write waits, and then gets 503 with `retry-after`.
    ///
    /// Writes are not counted as in flight: where the leader also answers reads, the pick sees how
    /// busy it is with writes by its metrics only.
    #[must_use]
    pub fn leader_route(mut self, leader: LeaderRoute) -> Self {
        self.leader = Some(leader);
        self
    }
}

#[async_trait]
impl ProxyHttp for ClusterProxy {
    type CTX = RequestContext;

    fn new_ctx(&self) -> RequestContext {
        RequestContext::new()
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        context: &mut RequestContext,
    ) -> Result<Box<HttpPeer>> {
        if let Some(route) = &self.leader
            && LeaderRoute::is_write(&session.req_header().method)
        {
            let leader = find_leader(route, self.leader_wait, context).await?;
            let peer = self.timeouts.peer(leader.addr, &leader.node);
            context.leader = Some(leader);
            return Ok(peer);
        }
        let upstream = pick(&self.balancer, &self.hash_on, session, context)?;
        Ok(self.timeouts.peer(upstream.addr(), &upstream.node()))
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        set_leader_epoch(request, context.leader.as_ref())
    }

    async fn upstream_response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        let now = Instant::now();
        context.answered = Some(now.saturating_duration_since(context.sent));
        if self.load_reports {
            take_load_report(response, context.upstream.as_ref(), now);
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        match context.node() {
            Some(node) => set_upstream_node(response, &node),
            None => Ok(()),
        }
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
        } else if context.retries < self.max_retries {
            context.retries += 1;
            error.set_retry(true);
        }
        error
    }

    /// Something may have been sent. Pingora's own rules decide first, which repeat a request on a
    /// pooled connection that turned out to be closed. Beyond them, a method without side effects is
    /// tried on another backend as long as nothing has reached the client.
    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        context: &mut RequestContext,
        client_reused: bool,
    ) -> Box<Error> {
        let mut error = error.more_context(format!("Peer: {peer}"));
        let method = &session.req_header().method;
        let failure = Failure {
            is_idempotent: method.is_idempotent(),
            is_safe: method.is_safe(),
            is_repeatable: !session.as_ref().retry_buffer_truncated(),
            is_unanswered: session.response_written().is_none(),
            is_from_backend: error.esource() == &ErrorSource::Upstream,
            retry: match error.retry {
                RetryType::ReusedOnly if client_reused => PingoraRetry::StaleConnection,
                RetryType::Decided(true) => PingoraRetry::Yes,
                RetryType::ReusedOnly | RetryType::Decided(false) => PingoraRetry::No,
            },
            retries: context.retries,
            stale_connections: context.stale_connections,
        };
        let decision = decide(&failure, self.max_retries);
        match decision {
            Decision::RetryAnywhere => {
                context.stale_connections += 1;
                context.tried.pop();
            }
            Decision::RetryElsewhere => {
                context.retries += 1;
                if let Some(upstream) = context.upstream.take()
                    && failure.is_from_backend
                {
                    upstream.failed();
                }
            }
            // `logging` reports the failure.
            Decision::GiveUp => {}
            Decision::GiveUpWithoutBlame => context.upstream = None,
        }
        error.set_retry(matches!(
            decision,
            Decision::RetryAnywhere | Decision::RetryElsewhere
        ));
        error
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        context: &mut RequestContext,
    ) -> FailToProxy {
        let reply = reply_to(error, context.failed_epoch.is_some());
        if let Some(reply) = &reply
            && let Err(error) = reply.send(session).await
        {
            debug!(%error, code = reply.code, "the error response could not be sent to the client");
        }
        FailToProxy {
            error_code: reply.map_or(0, |reply| reply.code),
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
        match outcome(error.map(Error::esource), status) {
            Outcome::Succeeded => upstream.succeeded(context.latency()),
            Outcome::Failed => upstream.failed(),
            Outcome::Unknown => {}
        }
    }
}
