//! The tries of a request at the backends of a group, and what comes of each.

use std::time::{Duration, Instant};

use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorType, Result};
use http::header::CONNECTION;
use http::{HeaderMap, StatusCode, Version};
use tracing::{debug, warn};

use super::client::TrustedProxies;
use super::failed::is_unread;
use super::failed_try::{is_ended_by_backend, is_local, may_be_of_address, retried_status};
use super::group::GroupProxy;
use super::grpc::Call;
use super::headers::{change_response_fields, set_upstream_node};
use super::hop_by_hop::{check_head, name_length_once, remove_framing, remove_hop_by_hop};
use super::outcome::Outcome;
use super::peers::Asked;
use super::reply::{bad_gateway, had_little_time, refused, unavailable};
use super::request_state::RequestState;
use super::rest::{check_presence, is_at_hand};
use super::retry::{Decision, FailedTry, RetryRules};
use super::unserved::Unserved;
use crate::balance::Upstream;
use crate::node::Node;
use crate::pingora::shorten_error;

/// A request for a tunnel passes by so many backends that cannot pass it on. They are looked for once; more have joined.
const MOST_SKIPPED: usize = 16;

/// A status that there is none of counts as one from 500 on (RFC 9110, section 15).
fn is_failure(status: StatusCode) -> bool {
    status.as_u16() >= 500 || status == StatusCode::TOO_MANY_REQUESTS
}

impl GroupProxy {
    /// The backend for the next try.
    pub(super) async fn next_peer(
        &self,
        session: &mut Session,
        state: &mut RequestState,
    ) -> Result<Box<HttpPeer>> {
        state.time_left()?;
        state.front_keeps_time(false);
        // It is sent from its start.
        state.body_bytes = 0;
        state.has_body_begun = false;
        state.is_blameless = false;
        let mut skipped = 0;
        loop {
            if !std::mem::take(&mut state.is_found) {
                let found = self.find_backend(session, state).await;
                found.map_err(|reason| {
                    self.statistics.unserved(reason);
                    unavailable(reason.as_str())
                })?;
                // It may have waited.
                check_presence(session, state).await?;
            }
            // What it has waited for a place or a leader counts.
            let left = state.time_left()?;
            let (Some(addr), Some(node)) = (state.addr(), state.node()) else {
                return Err(unavailable(Unserved::NoBackend.as_str()));
            };
            if state.is_upgrade && !self.peers.passes_upgrades(&node) {
                // Others may speak HTTP/1.
                skipped += 1;
                let is_leader = state.upstream.take().is_none();
                self.picker.overload.freed();
                let is_any_able = self.exclude_http_2(state);
                let is_last = !is_any_able || self.is_last_try(state);
                if is_leader || is_last || skipped == MOST_SKIPPED {
                    return Err(match state.tries {
                        0 => refused(501, "no tunnel goes through a backend of HTTP/2"),
                        _ => bad_gateway("no other backend can pass on a tunnel"),
                    });
                }
                continue;
            }
            state.tries += 1;
            state.answers_before = match state.call.and_then(Call::timeout) {
                Some(_) => self.statistics.backend(addr).answered.count(),
                None => 0,
            };
            let asked = self.asked_of(&node, session, state, left).await;
            let reason = match self.peers.peer(addr, &node, asked) {
                Ok(peer) => {
                    state.silence = self.peers.silence(&asked);
                    return Ok(peer);
                }
                Err(reason) => reason,
            };
            debug!(node = node.id, reason, "a node cannot be spoken to");
            // The next one, of those that have not been tried.
            let Some(upstream) = state.upstream.take() else {
                return Err(bad_gateway(reason));
            };
            self.blame(upstream, Upstream::failed);
        }
    }

    /// What a request asks of its peer, which is this node.
    async fn asked_of(
        &self,
        node: &Node,
        session: &mut Session,
        state: &mut RequestState,
        left: Option<Duration>,
    ) -> Asked {
        let is_open = !state.is_complete
            && !self.peers.passes_upgrades(node)
            && !is_at_hand(session, state).await;
        let asked = Asked {
            is_upgrade: state.is_upgrade,
            is_short: state.is_short,
            is_plain: state.is_plain,
            is_open,
            left,
            left_to_answer: state.silence_left(),
            times: state.times,
        };
        let silence = self.peers.silence(&asked);
        let has_one_time = silence.response == silence.read;
        state.front_keeps_time(state.is_upgrade || is_open || !has_one_time);
        asked
    }

    /// Takes notice of a response. An error means that it is not passed on.
    pub(super) fn take_response(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        state: &mut RequestState,
    ) -> Result<()> {
        state.answer_goes_on();
        check_head(response, state.is_upgrade)?;
        let status = response.status;
        let node = state.node();
        let name = |headers: &mut HeaderMap| {
            if let Some(node) = &node {
                set_upstream_node(headers, node);
            }
        };
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            // Any number of them may come.
            state.time_left()?;
            state.is_expecting &= status != StatusCode::CONTINUE;
            response.set_version(Version::HTTP_11);
            change_response_fields(response, |headers| {
                remove_hop_by_hop(status, headers);
                remove_framing(headers);
                // Pingora sets it in final responses only.
                headers.remove(CONNECTION);
                name(headers);
            });
            return Ok(());
        }
        if let Some(addr) = state.addr() {
            let overload = &self.picker.overload;
            let refuses_most = |now| self.statistics.refuses_most(addr, state.client, now);
            overload.answered(addr, status, &response.headers, refuses_most);
        }
        if self.is_sent_again(session, response, state) {
            state.is_retried_for_status = true;
            return Err(retried_status(status));
        }
        if let Some(call) = &mut state.call {
            call.take_head(&response.headers);
        }
        let is_failure = is_failure(status) || state.call.is_some_and(Call::has_failed);
        if !is_failure && let Some(upstream) = &mut state.upstream {
            upstream.begins_to_answer();
        }
        let now = Instant::now();
        state.answer_begins(now);
        let closes_after = change_response_fields(response, |headers| {
            if let Some(reports) = &self.load_reports {
                for name in reports.take(headers, state.upstream.as_ref(), now) {
                    headers.remove(name);
                }
            }
            let closes_after = remove_hop_by_hop(status, headers);
            match status {
                StatusCode::NO_CONTENT => remove_framing(headers),
                _ => name_length_once(headers),
            }
            name(headers);
            closes_after
        });
        if let Some(seconds) = closes_after
            && let Some(addr) = state.addr()
        {
            self.peers.closes_after(addr, seconds);
        }
        Ok(())
    }

    /// Takes notice of the trailers of a response.
    pub(super) fn take_trailers(&self, trailers: &mut HeaderMap, state: &RequestState) {
        if let Some(reports) = &self.load_reports {
            for name in reports.take(trailers, state.upstream.as_ref(), Instant::now()) {
                trailers.remove(name);
            }
        }
    }

    fn is_sent_again(
        &self,
        session: &mut Session,
        response: &ResponseHeader,
        state: &mut RequestState,
    ) -> bool {
        if session.as_ref().retry_buffer_truncated() {
            return false;
        }
        let is_safe = session.req_header().method.is_safe();
        if self.is_asked_in_vain(response, is_safe, state) {
            return true;
        }
        let status = response.status;
        (self.retry_on_status.contains(&status.as_u16()) || state.is_probe() && is_failure(status))
            && !self.is_last_try(state)
            && is_safe
            && self.may_send_elsewhere(state)
    }

    /// Whether the request may be sent to another backend; if so, that counts. The client of a probe
    /// is served by another one in any case: there are few of them.
    fn may_send_elsewhere(&self, state: &mut RequestState) -> bool {
        match state.is_probe() {
            true => state.may_try_again(),
            false => self.may_send_again(state),
        }
    }

    /// Adds what tells the client who serves it next: the cookie, and until when its reads go to the leader.
    pub(super) fn tell_client(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        state: &RequestState,
        trusted: &TrustedProxies,
    ) -> Result<()> {
        // That of this hop. Over HTTP/2 there is none in the message.
        response.set_version(Version::HTTP_11);
        let message = (session, &mut *response);
        self.picker
            .set_cookie(&self.balancer, message, state, trusted)?;
        let method = &session.req_header().method;
        let leader = state.leader.as_ref();
        self.leader_requests().answer(method, response, leader)
    }

    /// No connection could be made, so nothing has been sent.
    pub(super) fn after_no_connection(
        &self,
        mut error: Box<Error>,
        state: &mut RequestState,
    ) -> Box<Error> {
        shorten_error(&mut error);
        if is_ended_by_backend(&error) && state.leader.is_none() && state.has_stale_left() {
            // A connection that others use as well; nothing has been sent.
            state.upstream = None;
            state.tried.pop();
            error.set_retry(state.time_left().is_ok());
            return error;
        }
        let is_at_fault = state.time_left().is_ok() || self.is_at_fault(state);
        let upstream = state.upstream.take();
        if is_local(&error) {
            return self.after_local_failure(error, upstream, state);
        }
        if let Some(upstream) = upstream
            && is_at_fault
        {
            self.blame(upstream, Upstream::unreachable);
        }
        if let Some(leader) = state.leader.take() {
            self.statistics.backend_ends(leader.addr, None);
            state.failed_epoch = Some(leader.epoch);
            error.set_retry(state.started.elapsed() < self.leader_requests().wait);
        } else {
            // Nothing was sent, so no backend gets more than there are requests: without the budget.
            error.set_retry(state.may_try_again());
        }
        error
    }

    /// The reason is here, which may concern one address only, as where this machine has no IPv6: others are tried. If
    /// another one was connected to a short while ago, it is for the address.
    fn after_local_failure(
        &self,
        mut error: Box<Error>,
        upstream: Option<Upstream>,
        state: &mut RequestState,
    ) -> Box<Error> {
        if let Some(left_out) = self.failures.take(Instant::now()) {
            let node = state.node();
            let node = upstream.as_ref().map(Upstream::node).or(node);
            let node = node.as_ref().map(|node| &node.id);
            warn!(node, %error, left_out, "this process cannot make a connection");
        }
        if let Some(upstream) = upstream
            && may_be_of_address(&error, upstream.addr())
            && self.connected.was_another(upstream.addr(), Instant::now())
        {
            self.blame(upstream, Upstream::unreachable);
        }
        let is_for_leader = state.leader.take().is_some();
        if is_for_leader || self.is_last_try(state) || !state.may_try_again() {
            return refused(503, "this proxy cannot make a connection");
        }
        error.set_retry(true);
        error
    }

    /// Whether there is no other backend to try.
    fn is_last_try(&self, state: &RequestState) -> bool {
        !self.balancer.has_other_than(&state.tried)
    }

    /// Looks at the backends of HTTP/2 no more; `false` if there are no others.
    fn exclude_http_2(&self, state: &mut RequestState) -> bool {
        let nodes = self.balancer.discovery().nodes();
        let passes = |node: &Node| self.peers.passes_upgrades(node);
        // Most groups have backends of one kind.
        if !nodes.iter().any(|node| passes(node)) {
            return false;
        }
        let of_http_2 = nodes.iter().filter(|node| !passes(node));
        let addrs = of_http_2.map(|node| self.balancer.address_of(node));
        state.tried.extend(addrs);
        true
    }

    /// Whether the current backend is to blame though the time of the request is over. Where a client has set that time, only
    /// if it has answered fewer others meanwhile than it has not answered yet: not every request is as fast as its client
    /// likes.
    fn is_at_fault(&self, state: &RequestState) -> bool {
        let answers = || {
            let addr = state.addr();
            addr.map(|addr| self.statistics.backend(addr).answered.count())
        };
        let waiting = || state.upstream.as_ref().map_or(0, Upstream::in_flight);
        let answers_others =
            || answers().is_some_and(|it| it > state.answers_before + u64::from(waiting()));
        state.is_overdue() && !(state.has_time_of_client() && answers_others())
    }

    /// A try has failed after something may have been sent.
    pub(super) fn after_failure(
        &self,
        session: &mut Session,
        mut error: Box<Error>,
        state: &mut RequestState,
        client_reused: bool,
    ) -> Box<Error> {
        if std::mem::take(&mut state.is_retried_for_status) {
            if let Some(upstream) = state.upstream.take() {
                self.blame(
                    upstream,
                    match error.etype() {
                        ErrorType::HTTPStatus(429) => Upstream::overloaded,
                        _ => Upstream::failed,
                    },
                );
            }
            error.set_retry(true);
            return error;
        }
        // The backend waited for the client, or others have used the time of the request.
        state.is_blameless |= had_little_time(state, &error)
            || state.time_left().is_err() && !(state.is_complete && self.is_at_fault(state));
        let is_reused = state.is_reused(client_reused);
        let mut failed = FailedTry::of(session, &error, is_reused, &state.sent_so_far());
        failed.is_from_backend &= !had_little_time(state, &error);
        failed.is_unread |= is_reused && is_unread(state, &error);
        // That a probe is late is no surprise.
        let on_timeout = self.retries.on_timeout || state.is_probe();
        let rules = RetryRules::new(state.most_retries).on_timeout(on_timeout);
        let is_retried = match rules.decide(&failed) {
            Decision::RetryAnywhere => {
                state.stale_connections += 1;
                state.tried.pop();
                true
            }
            // Where nobody else is left, the client learns what has failed.
            Decision::RetryElsewhere
                if !self.is_last_try(state) && self.may_send_elsewhere(state) =>
            {
                if let Some(upstream) = state.upstream.take()
                    && failed.is_from_backend
                {
                    self.blame(upstream, Upstream::failed);
                }
                if let Some(leader) = state.leader.take() {
                    // After a pause, or at the next one.
                    self.statistics.backend_ends(leader.addr, None);
                    state.failed_epoch = Some(leader.epoch);
                }
                true
            }
            // The failure is reported at the end.
            Decision::RetryElsewhere | Decision::GiveUp => false,
            Decision::GiveUpWithoutBlame => {
                state.is_blameless = true;
                false
            }
        };
        error.set_retry(is_retried);
        error
    }

    /// The request is over, with this status for the client, and this one of gRPC.
    pub(super) fn end(
        &self,
        (status, of_call): (Option<u16>, Option<u16>),
        outcome: Outcome,
        state: &mut RequestState,
    ) {
        let now = Instant::now();
        let duration = now.saturating_duration_since(state.started);
        self.statistics.ends(status, state.tries, duration);
        if let Some(of_call) = of_call {
            self.statistics.call_ends(of_call);
        }
        if let Some(addr) = state.addr() {
            self.count_backend(addr, outcome, state, now);
        }
        if let Some(upstream) = state.upstream.take() {
            let since_sent = now.saturating_duration_since(state.sent);
            outcome.tell_both(upstream, state.latency(), since_sent);
        }
        state.leader = None;
        // Now there is room at the backend.
        self.picker.overload.freed();
    }
}
