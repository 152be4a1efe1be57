//! What happens in each phase of a request.

use std::time::{Duration, Instant};

use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::modules::http::HttpModules;
use ::pingora::protocols::Digest;
use ::pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, Result};
use async_trait::async_trait;
use bytes::Bytes;
use http::header::TRANSFER_ENCODING;
use http::{HeaderMap, StatusCode};
use tracing::debug;

use super::access_entry::{call_status, entry, has_failed};
use super::client::peer_of;
use super::cluster_proxy::ClusterProxy;
use super::context::RequestContext;
use super::failed::{answer_failure, of_try};
use super::grpc::Call;
use super::header_policy::tell_backend;
use super::headers::{change_fields, forget_case, join_cookies, set_leader_epoch};
use super::hop_by_hop::{ends_with_connection, has_no_body};
use super::http_1_0::{keep_from_old_clients, name_host};
use super::kept::keep_connection;
use super::outcome::final_status;
use super::reply::{no_group, refused, respond, unavailable_reply};
use super::requests::{answer_expectation, ends_before_body, is_ending, keep_effective_upgrade};
use super::rest::{check_presence, read_rest, take_body_at_hand};
use super::route::Decided;
use super::trace::{set_traceparent, traceparent};

/// A request for which no backend is needed has got its response.
fn answered(sent: Result<()>) -> Result<bool> {
    if let Err(error) = sent {
        debug!(%error, "the response could not be sent to the client");
    }
    Ok(true)
}

#[async_trait]
impl ProxyHttp for ClusterProxy {
    /// Pingora moves it several times, as a part of its future.
    type CTX = Box<RequestContext>;

    fn new_ctx(&self) -> Box<RequestContext> {
        Box::new(RequestContext::new(self.routing.load_full()))
    }

    /// No module: the default one compresses, at a cost for each request.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn early_request_filter(
        &self,
        session: &mut Session,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        forget_case(session.req_header_mut());
        keep_from_old_clients(session);
        if session.is_http2() {
            join_cookies(session.req_header_mut())?;
        }
        keep_effective_upgrade(session.req_header_mut())?;
        let (routing, state) = (&context.routing, &mut context.state);
        routing.begin(session, state)
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        context: &mut Box<RequestContext>,
    ) -> Result<bool> {
        let (routing, state) = (&context.routing, &mut context.state);
        let peer = peer_of(session);
        if let Some(spans) = &self.spans {
            // Whoever can connect to a Unix socket of this machine is trusted.
            let is_trusted = peer.is_none_or(|peer| routing.trusted.contains(peer));
            state.span = spans.begin(session.req_header(), is_trusted);
        }
        // Also for errors.
        context.route = routing.route_of(session).cloned();
        if self.via.is_on(&session.req_header().headers) {
            return Err(refused(508, "the request has come back to where it was"));
        }
        routing.limits.check_head(session, state)?;
        let reply = routing.readiness.reply(session, || routing.is_ready());
        if let Some(reply) = reply {
            return answered(reply.answer(session, None).await);
        }
        state.call = Call::of(&session.req_header().headers);
        state.is_upgrade = routing.limits.is_upgrade(session)?;
        if state.is_upgrade {
            // What comes before the response is for nobody, and the client is not to be left unwatched because of that.
            session.set_pipelining_enabled(false);
            session.set_abort_on_close(true);
        }
        let decided = match &context.route {
            Some(route) => route.decide(session.req_header())?,
            None => Decided::Serve(routing.default.clone()),
        };
        let group = match decided {
            Decided::Serve(group) => group,
            Decided::Answer(head, body) => return answered(respond(session, head, body).await),
        };
        let group = context.group.insert(group);
        group.begin(session, state);
        if let Some(route) = &context.route {
            route.apply_to(state);
        }
        state.limit_time();
        let found = group.enter(session, state).await?;
        let Err(reason) = found else {
            state.is_found = true;
            if state.has_waited() {
                check_presence(session, state).await?;
            }
            return Ok(false);
        };
        take_body_at_hand(session, state).await;
        group.statistics.unserved(reason);
        state.unserved = Some(reason);
        let reply = unavailable_reply(reason.as_str());
        answered(reply.answer(session, context.route.as_deref()).await)
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        is_end: bool,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        // Where trailers follow, Pingora does not say that it is the end.
        let is_end = is_end || body.is_none();
        let (routing, state) = (&context.routing, &mut context.state);
        let within = state.time_left();
        let checked = within.and_then(|_| routing.limits.check_body(body.as_ref(), is_end, state));
        checked.map_err(|mut error| {
            // Otherwise Pingora would go on without the body, if the backend speaks HTTP/2.
            error.as_down();
            error
        })?;
        context.copy_body(body.as_ref(), is_end);
        Ok(())
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        context: &mut Box<RequestContext>,
    ) -> Result<Box<HttpPeer>> {
        let group = context.group.as_ref().ok_or_else(no_group)?;
        let state = &mut context.state;
        let mut peer = group.next_peer(session, state).await?;
        let waits = state.waits(context.routing.limits.client_body(state));
        let request = (!session.is_body_empty(), session.req_header());
        let secure = group.peers.secure(&peer);
        let connections = self.connections.as_ref();
        state.exchange = connections.and_then(|it| it.carry(&mut peer, request, waits, secure));
        Ok(peer)
    }

    async fn connected_to_upstream(
        &self,
        _: &mut Session,
        is_reused: bool,
        _: &HttpPeer,
        _: std::os::unix::io::RawFd,
        _: Option<&Digest>,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        if !context.state.is_reused(is_reused)
            && let Some(group) = &context.group
            && let Some(addr) = context.state.addr()
        {
            group.connected.add(addr, Instant::now());
            group.statistics.connected();
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        let (routing, state) = (&context.routing, &mut context.state);
        answer_expectation(session, request, state).await?;
        state.awaits_answer();
        change_fields(request, |headers| {
            name_host(session, headers, state.addr());
            let said = (&routing.trusted, routing.sends_forwarded, &self.via);
            tell_backend(session, headers, said)?;
            if routing.traceparent {
                // Where there are spans, who has none is out of their sample.
                let is_sampled = self.spans.is_none() && routing.samples_trace();
                set_traceparent(headers, is_sampled)?;
            }
            if let Some(span) = &state.span {
                span.add_to(headers)?;
            }
            if self.access_log.is_some() {
                state.traceparent = traceparent(headers).map(str::to_owned);
            }
            set_leader_epoch(headers, state.leader.as_ref());
            if let Some(reports) = context
                .group
                .as_ref()
                .and_then(|it| it.load_reports.as_ref())
            {
                reports.ask(headers);
            }
            Ok(())
        })?;
        if let Some(route) = &context.route {
            route.change_request(request)?;
            context.begin_copy(request);
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        match &context.group {
            Some(group) => group.take_response(session, response, &mut context.state),
            None => Ok(()),
        }
    }

    fn upstream_response_body_filter(
        &self,
        _: &mut Session,
        _: &mut Option<Bytes>,
        _: bool,
        context: &mut Box<RequestContext>,
    ) -> Result<Option<Duration>> {
        context.state.answer_goes_on();
        context.state.time_left().map(|_| None)
    }

    fn upstream_response_trailer_filter(
        &self,
        _: &mut Session,
        trailers: &mut HeaderMap,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        if let Some(call) = &mut context.state.call {
            call.take_status(trailers);
        }
        if let Some(group) = &context.group {
            group.take_trailers(trailers, &context.state);
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        context: &mut Box<RequestContext>,
    ) -> Result<()> {
        let state = &mut context.state;
        let is_switch = response.status == StatusCode::SWITCHING_PROTOCOLS;
        let is_final = is_switch || !response.status.is_informational();
        ends_before_body(session, is_final);
        if is_switch {
            state.becomes_tunnel();
        } else if !is_final {
            // Of the final one nothing is known.
            return Ok(());
        }
        if ends_with_connection(session.req_header().version, response) {
            response.remove_header(&TRANSFER_ENCODING);
            session.set_keepalive(None);
        }
        if has_no_body(&session.req_header().method, response) {
            state.answer_ends(context.routing.limits.client_drain());
        }
        if is_ending(session) {
            session.set_keepalive(None);
        }
        if let Some(route) = &context.route {
            route.change_response(response)?;
        }
        // After it: what a route sets does not take the place of the cookie that names the node, and of what is said of the leader.
        match &context.group {
            Some(group) => group.tell_client(session, response, state, &context.routing.trusted),
            None => Ok(()),
        }
    }

    fn response_body_filter(
        &self,
        _: &mut Session,
        _: &mut Option<Bytes>,
        is_end: bool,
        context: &mut Box<RequestContext>,
    ) -> Result<Option<Duration>> {
        if is_end {
            let drain = context.routing.limits.client_drain();
            context.state.answer_ends(drain);
        }
        Ok(None)
    }

    async fn response_trailer_filter(
        &self,
        _: &mut Session,
        _: &mut HeaderMap,
        context: &mut Box<RequestContext>,
    ) -> Result<Option<Bytes>> {
        let drain = context.routing.limits.client_drain();
        context.state.answer_ends(drain);
        Ok(None)
    }

    /// Nothing has been sent: another backend may be tried, whatever the method.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        peer: &HttpPeer,
        context: &mut Box<RequestContext>,
        error: Box<Error>,
    ) -> Box<Error> {
        debug!(%peer, %error, "cannot connect to the backend");
        match &context.group {
            Some(group) => group.after_no_connection(error, &mut context.state),
            None => error,
        }
    }

    /// Something may have been sent. Pingora's own rules decide first, which repeat a request on a
    /// pooled connection that turned out to be closed. Beyond them, a method without side effects is
    /// tried on another backend as long as nothing has reached the client.
    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        context: &mut Box<RequestContext>,
        client_reused: bool,
    ) -> Box<Error> {
        let error = of_try(error, peer, &context.state);
        match &context.group {
            Some(group) => group.after_failure(session, error, &mut context.state, client_reused),
            None => error,
        }
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        context: &mut Box<RequestContext>,
    ) -> FailToProxy {
        FailToProxy {
            error_code: answer_failure(session, error, context).await,
            can_reuse_downstream: false,
        }
    }

    fn suppress_error_log(
        &self,
        session: &Session,
        context: &Box<RequestContext>,
        error: &Error,
    ) -> bool {
        self.tell_failure(session, context, error);
        true
    }

    /// A line for each try would be one for each request while a backend is away; the balancer says once
    /// that it fails.
    fn suppress_proxy_warn_log(
        &self,
        _: &Session,
        _: &Box<RequestContext>,
        error: &Error,
        _: ProxyWarnLogContext,
    ) -> bool {
        debug!(%error, "a request is tried again");
        true
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        context: &mut Box<RequestContext>,
    ) {
        let state = &mut context.state;
        state.leader_load = None;
        state.place = None;
        // All that it has asked for has been sent.
        let error = error.filter(|_| state.is_refused || !state.is_draining());
        let status = final_status(session);
        let outcome = state.outcome(error, status);
        let code = status.map(|status| status.as_u16());
        let span = state.span.take();
        let is_refused = state.is_refused;
        let failed = || has_failed(session, error, outcome, is_refused);
        let log = self.access_log.as_ref();
        let log = log.filter(|log| log.takes(code, failed));
        if span.is_some() || log.is_some() {
            let entry = entry(session, context, error, outcome);
            if let Some(span) = span {
                span.end(&entry, context.group_name(), context.route_name());
            }
            if let Some(log) = log {
                log.queue(entry);
            }
        }
        let of_call = context
            .state
            .call
            .and_then(|_| call_status(session, context));
        let state = &mut context.state;
        // Afterwards the process may end.
        state.end();
        match &context.group {
            Some(group) => group.end((code, of_call), outcome, state),
            None => {
                self.unserved.begins();
                self.unserved
                    .ends(code, state.tries, state.started.elapsed());
            }
        }
        // The end of a response that breaks off is not to look like its end.
        if code.is_some() && (error.is_none() || state.is_refused) {
            read_rest(session, state, context.routing.limits.client_drain()).await;
        }
        if state.keeps_connection {
            keep_connection(session, state).await;
        }
    }
}
