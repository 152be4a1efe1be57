//! What happens in each phase of a request.

use std::time::{Duration, Instant};

use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::modules::http::HttpModules;
use ::pingora::proxy::{FailToProxy, ProxyHttp, Session};
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorSource, ErrorType, Result};
use async_trait::async_trait;
use bytes::Bytes;
use http::header::TRANSFER_ENCODING;
use http::{HeaderMap, StatusCode};
use tracing::{debug, warn};

use super::access_entry::entry;
use super::client::{peer_of, remove_lookalikes, set_forwarded};
use super::cluster_proxy::ClusterProxy;
use super::context::RequestContext;
use super::failure::{failure, is_local, is_unanswered, retried_status};
use super::grpc::Call;
use super::headers::{set_leader_epoch, set_upstream_node, take_load_report};
use super::hop_by_hop::{ends_with_connection, has_no_body, remove_hop_by_hop};
use super::leader::is_misdirected;
use super::outcome::{Outcome, outcome};
use super::reply::{
    Reply, bad_gateway, is_slow_upload, refused, reply_to, timed_out, unavailable,
    unavailable_reply,
};
use super::requests::is_ending;
use super::retry::{Decision, decide};
use super::trace::{set_traceparent, traceparent};

/// Answers a request for which no backend is needed.
async fn answered(reply: &Reply<'_>, session: &mut Session) -> Result<bool> {
    if let Err(error) = reply.answer(session).await {
        debug!(%error, "the response could not be sent to the client");
    }
    Ok(true)
}

#[async_trait]
impl ProxyHttp for ClusterProxy {
    type CTX = RequestContext;

    fn new_ctx(&self) -> RequestContext {
        RequestContext::new()
    }

    /// No module: the default one compresses, at a cost for each request.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn early_request_filter(
        &self,
        session: &mut Session,
        context: &mut RequestContext,
    ) -> Result<()> {
        self.retry_budget.count_request();
        self.statistics.begins();
        self.limits.begin(session, context);
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        context: &mut RequestContext,
    ) -> Result<bool> {
        if self.via.is_on(session.req_header()) {
            return Err(refused(508, "the request has come back to where it was"));
        }
        self.limits.check_head(session, context)?;
        let reply = self.readiness.reply(session, !self.balancer.is_empty());
        if let Some(reply) = reply {
            return answered(&reply, session).await;
        }
        context.call = Call::of(&session.req_header().headers);
        context.client = peer_of(session)
            .map(|peer| self.trusted.client_of(peer, &session.req_header().headers));
        self.limits.check_upgrade(session)?;
        context.is_upgrade = self.limits.will_be_upgraded(session);
        context.is_for_leader =
            self.leader.is_some() && self.leader_requests.include(session, context.is_upgrade);
        let found = self.enter(session, context).await;
        let Err(reason) = found else {
            context.is_found = true;
            return Ok(false);
        };
        debug!(reason, "a request was not served");
        answered(&unavailable_reply(reason), session).await
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        is_end: bool,
        context: &mut RequestContext,
    ) -> Result<()> {
        self.time_left(context)?;
        self.limits.check_body(body.as_ref(), is_end, context)
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        context: &mut RequestContext,
    ) -> Result<Box<HttpPeer>> {
        let left = self.time_left(context)?;
        // It is sent from its start.
        context.body_bytes = 0;
        context.has_body_begun = false;
        loop {
            if !std::mem::take(&mut context.is_found) {
                let found = self.find_backend(session, context).await;
                found.map_err(unavailable)?;
            }
            let (Some(addr), Some(node)) = (context.addr(), context.node()) else {
                return Err(unavailable("no backend is registered"));
            };
            context.tries += 1;
            let is_short = context.is_short;
            let peer = self
                .peers
                .peer(addr, &node, context.is_upgrade, is_short, left);
            let reason = match peer {
                Ok(peer) => return Ok(peer),
                Err(reason) => reason,
            };
            debug!(node = node.id, reason, "a node cannot be spoken to");
            // The next one, of those that have not been tried.
            let Some(upstream) = context.upstream.take() else {
                return Err(bad_gateway(reason));
            };
            self.blame(upstream);
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        remove_lookalikes(request);
        set_forwarded(&self.trusted, session, request, self.sends_forwarded)?;
        if self.traceparent {
            set_traceparent(request)?;
        }
        if self.access_log.is_some() {
            context.traceparent = traceparent(request).map(str::to_owned);
        }
        self.via.add_to(request)?;
        set_leader_epoch(request, context.leader.as_ref())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        let status = response.status;
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(());
        }
        if let Some(addr) = context.addr() {
            self.picker
                .overload
                .answered(addr, status, &response.headers);
        }
        if let Some(leader) = &context.leader
            && is_misdirected(response, leader.epoch)
            && !context.is_misdirected
            && !session.as_ref().retry_buffer_truncated()
        {
            context.is_misdirected = true;
            self.statistics.backend_ends(leader.addr, None);
            context.failed_epoch = Some(leader.epoch);
            context.leader = None;
            context.is_retried_for_status = true;
            return Err(retried_status(status));
        }
        if self.retry_on_status.contains(&status.as_u16())
            && context.tried.len() < self.balancer.len()
            && session.req_header().method.is_safe()
            && !session.as_ref().retry_buffer_truncated()
            && self.may_send_again(context)
        {
            context.is_retried_for_status = true;
            return Err(retried_status(status));
        }
        if let Some(call) = &mut context.call {
            call.take_head(&response.headers);
        }
        let now = Instant::now();
        context.answered = Some(now.saturating_duration_since(context.sent));
        if self.load_reports {
            take_load_report(response, context.upstream.as_ref(), now);
        }
        if let Some(seconds) = remove_hop_by_hop(response)
            && let Some(addr) = context.addr()
        {
            self.peers.closes_after(addr, seconds);
        }
        Ok(())
    }

    fn upstream_response_body_filter(
        &self,
        _: &mut Session,
        _: &mut Option<Bytes>,
        _: bool,
        context: &mut RequestContext,
    ) -> Result<Option<Duration>> {
        self.time_left(context).map(|_| None)
    }

    fn upstream_response_trailer_filter(
        &self,
        _: &mut Session,
        trailers: &mut HeaderMap,
        context: &mut RequestContext,
    ) -> Result<()> {
        if let Some(call) = &mut context.call {
            call.take_status(trailers);
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        context: &mut RequestContext,
    ) -> Result<()> {
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            context.becomes_tunnel();
        }
        if ends_with_connection(session.req_header().version, response) {
            response.remove_header(&TRANSFER_ENCODING);
            session.set_keepalive(None);
        }
        if has_no_body(&session.req_header().method, response) {
            context.answer_ends();
        }
        if is_ending(session) {
            session.set_keepalive(None);
        }
        self.picker.set_cookie(session, response, context)?;
        let method = &session.req_header().method;
        let leader = context.leader.as_ref();
        self.leader_requests.answer(method, response, leader)?;
        match context.node() {
            Some(node) => set_upstream_node(response, &node),
            None => Ok(()),
        }
    }

    fn response_body_filter(
        &self,
        _: &mut Session,
        _: &mut Option<Bytes>,
        is_end: bool,
        context: &mut RequestContext,
    ) -> Result<Option<Duration>> {
        if is_end {
            context.answer_ends();
        }
        Ok(None)
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
        let upstream = context.upstream.take();
        if is_local(&error) {
            warn!(%error, "this process cannot connect to any backend");
            return refused(503, "this proxy cannot make a connection");
        }
        if let Some(upstream) = upstream
            && self.time_left(context).is_ok()
        {
            self.blame(upstream);
        }
        if let Some(leader) = context.leader.take() {
            self.statistics.backend_ends(leader.addr, None);
            context.failed_epoch = Some(leader.epoch);
            error.set_retry(context.started.elapsed() < self.leader_requests.wait);
        } else {
            // Nothing was sent, so no backend gets more than there are requests: without the budget.
            error.set_retry(self.may_try_again(context));
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
        context.answered = None;
        if std::mem::take(&mut context.is_retried_for_status) {
            if let Some(upstream) = context.upstream.take() {
                self.blame(upstream);
            }
            error.set_retry(true);
            return error;
        }
        if is_slow_upload(context, &error) || self.time_left(context).is_err() {
            // The backend waited for the client, or others have used the time of the request.
            context.upstream = None;
            context.is_blameless = true;
        }
        let failure = failure(session, context, &error, client_reused);
        let decision = decide(&failure, self.retries);
        let is_retried = match decision {
            Decision::RetryAnywhere => {
                context.stale_connections += 1;
                context.tried.pop();
                true
            }
            Decision::RetryElsewhere if self.may_send_again(context) => {
                if let Some(upstream) = context.upstream.take()
                    && failure.is_from_backend
                {
                    self.blame(upstream);
                }
                true
            }
            // `logging` reports the failure.
            Decision::RetryElsewhere | Decision::GiveUp => false,
            Decision::GiveUpWithoutBlame => {
                context.upstream = None;
                context.is_blameless = true;
                false
            }
        };
        error.set_retry(is_retried);
        error
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        context: &mut RequestContext,
    ) -> FailToProxy {
        let reply =
            timed_out(context, error).or_else(|| reply_to(error, context.failed_epoch.is_some()));
        if is_unanswered(session)
            && let Some(reply) = &reply
            && let Err(error) = reply.send(session).await
        {
            debug!(%error, code = reply.code, "the error response could not be sent to the client");
        }
        FailToProxy {
            error_code: reply.map_or(0, |reply| reply.code),
            can_reuse_downstream: false,
        }
    }

    /// What clients do wrong, and what the proxy refuses by itself, are no errors of this process.
    fn suppress_error_log(&self, _: &Session, context: &RequestContext, error: &Error) -> bool {
        let is_refused = matches!(error.etype(), ErrorType::HTTPStatus(_));
        let is_of_client = error.esource() == &ErrorSource::Downstream;
        if is_refused || is_of_client || is_slow_upload(context, error) {
            debug!(%error, "a request was not served");
            return true;
        }
        false
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        context: &mut RequestContext,
    ) {
        context.end();
        context.leader_load = None;
        context.place = None;
        let status = session.response_written().map(|response| response.status);
        let verdict = context
            .call
            .and_then(|call| call.verdict(context.started.elapsed()));
        let outcome = outcome(error.map(Error::esource), status, verdict);
        if let Some(log) = &self.access_log
            && log.takes(status.map(|status| status.as_u16()))
        {
            log.write(entry(session, context, error, &outcome));
        }
        let status = status.map(|status| status.as_u16());
        self.statistics
            .ends(status, context.tries, context.started.elapsed());
        if let Some(addr) = context.addr() {
            self.count_backend(addr, &outcome, context);
        }
        if let Some(upstream) = context.upstream.take() {
            match outcome {
                Outcome::Succeeded => upstream.succeeded(context.latency()),
                Outcome::Answered => upstream.answered(),
                Outcome::Failed => upstream.failed(),
                Outcome::Unknown => drop(upstream),
            }
        }
        // Now there is room at the backend.
        self.picker.overload.freed();
    }
}
