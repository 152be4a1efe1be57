//! The state of one request, whatever group serves it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::{Error, ErrorSource, ErrorType, Result};
use http::StatusCode;
use tokio::sync::OwnedSemaphorePermit;

use super::connections::{Exchange, Silence, Waits};
use super::failed_try::{MAX_STALE_CONNECTIONS, Sent};
use super::front::{Connection, OpenStream, Phase};
use super::grpc::Call;
use super::outcome::{Outcome, outcome};
use super::peers::BackendTimes;
use super::shutdown::Hold;
use super::spans::Span;
use super::unserved::Unserved;
use crate::balance::Upstream;
use crate::ids::Revision;
use crate::node::Node;
use crate::pingora::LeaderUpstream;

/// Who finds a backend at once does that in less.
const NOTICEABLE: Duration = Duration::from_millis(10);

/// How long a backend has to be silent to be blamed when the time is over that a client allows.
const LEAST_OF_CLIENTS: Duration = Duration::from_millis(500);

/// What is kept about a request.
pub(super) struct RequestState {
    pub(super) started: Instant,
    /// How long the request may take in all; `None` for any time.
    pub(super) timeout: Option<Duration>,
    /// Instead of the group's times.
    pub(super) times: BackendTimes,
    /// How long the current backend may be silent.
    pub(super) silence: Silence,
    /// How often it may be tried on another backend.
    pub(super) most_retries: usize,
    /// The client's connection, if its listener has a front and it has one request at a time: over
    /// HTTP/2 it has no phases.
    pub(super) connection: Option<Arc<Connection>>,
    /// The request on its connection, if that is one of HTTP/2 and its listener has a front.
    pub(super) stream: Option<OpenStream>,
    /// The current try on its connection, if that is none of Pingora's.
    pub(super) exchange: Option<Arc<Exchange>>,
    /// Whatever becomes of the request, its backend is not to blame.
    pub(super) is_blameless: bool,
    /// The process waits for the request; where there are phases, the connection keeps this.
    pub(super) in_flight: Option<Hold>,
    /// The request's place among those in flight.
    pub(super) place: Option<OwnedSemaphorePermit>,
    /// The backend or leader for the first try has been found.
    pub(super) is_found: bool,
    pub(super) is_for_leader: bool,
    /// It will become a tunnel, if the backend agrees.
    pub(super) is_upgrade: bool,
    /// The leader is busy with this request; nothing is said of its outcome.
    pub(super) leader_load: Option<Upstream>,
    /// The front keeps the time of a silent backend, of this try.
    pub(super) is_timed_by_front: bool,
    /// When a node has said that it does not lead.
    pub(super) misdirected: Option<Instant>,
    /// The field that the backend got, for the access log.
    pub(super) traceparent: Option<String>,
    /// If the request has one.
    pub(super) span: Option<Span>,
    /// If the request is a call of gRPC.
    pub(super) call: Option<Call>,
    /// The client, behind trusted proxies; `None` for a Unix socket.
    pub(super) client: Option<IpAddr>,
    /// How much of the request's body has been received.
    pub(super) body_bytes: u64,
    /// Whether the current try has gone beyond the head of the request.
    pub(super) has_body_begun: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub(super) is_expecting: bool,
    /// Whether the request has been received completely.
    pub(super) is_complete: bool,
    /// Whether it is so short that a backend cannot be late in reading it.
    pub(super) is_short: bool,
    /// None of its fields is of the client's connection.
    pub(super) is_plain: bool,
    /// Whether the connection has become a tunnel.
    pub(super) is_tunnel: bool,
    /// Why no backend was found for it before the first try.
    pub(super) unserved: Option<Unserved>,
    /// The client has got an error response of this proxy.
    pub(super) is_refused: bool,
    /// The response was complete before the request.
    pub(super) is_answered_early: bool,
    /// It says that the client's connection goes on.
    pub(super) keeps_connection: bool,
    /// When the current backend could begin: when it was picked, because earlier tries are not its
    /// fault, or when it had the whole request, because a slow upload is not either.
    pub(super) sent: Instant,
    /// When the last part of the body came, while it is not complete.
    pub(super) last_part: Option<Instant>,
    /// How long the current backend took to answer. Not until the end of the response, which depends
    /// on how fast the client reads.
    pub(super) answered: Option<Duration>,
    /// Dropped with the context, so that a request which is simply dropped stops counting as in
    /// flight.
    pub(super) upstream: Option<Upstream>,
    pub(super) tried: Vec<SocketAddr>,
    /// How many requests the current backend had answered before, if the client sets the time.
    pub(super) answers_before: u64,
    pub(super) retries: usize,
    /// How often it has been sent, or a connection for it was tried.
    pub(super) tries: usize,
    /// The response of a backend is not passed on, because of its status.
    pub(super) is_retried_for_status: bool,
    /// How many pooled connections turned out to be closed.
    pub(super) stale_connections: usize,
    pub(super) leader: Option<LeaderUpstream>,
    /// The term of a leader that could not be reached.
    pub(super) failed_epoch: Option<Revision>,
}

impl RequestState {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            timeout: None,
            times: BackendTimes::default(),
            silence: Silence::default(),
            most_retries: 0,
            connection: None,
            stream: None,
            exchange: None,
            is_blameless: false,
            in_flight: None,
            place: None,
            is_found: false,
            is_for_leader: false,
            is_upgrade: false,
            leader_load: None,
            is_timed_by_front: false,
            misdirected: None,
            traceparent: None,
            span: None,
            call: None,
            client: None,
            body_bytes: 0,
            has_body_begun: false,
            is_expecting: false,
            is_complete: true,
            is_short: false,
            is_plain: false,
            is_tunnel: false,
            unserved: None,
            is_refused: false,
            is_answered_early: false,
            keeps_connection: false,
            sent: now,
            last_part: None,
            answered: None,
            upstream: None,
            tried: Vec::new(),
            answers_before: 0,
            retries: 0,
            tries: 0,
            is_retried_for_status: false,
            stale_connections: 0,
            leader: None,
            failed_epoch: None,
        }
    }

    /// The node that the request was sent to.
    pub(super) fn node(&self) -> Option<Arc<Node>> {
        match (&self.leader, &self.upstream) {
            (Some(leader), _) => Some(leader.node.clone()),
            (None, Some(upstream)) => Some(upstream.node()),
            (None, None) => None,
        }
    }

    /// The address that the request was sent to.
    pub(super) fn addr(&self) -> Option<SocketAddr> {
        match (&self.leader, &self.upstream) {
            (Some(leader), _) => Some(leader.addr),
            (None, Some(upstream)) => Some(upstream.addr()),
            (None, None) => None,
        }
    }

    /// A backend for the next try has been found.
    pub(super) fn begins_try(&mut self, now: Instant) {
        self.sent = now;
        self.answered = None;
    }

    /// What is known of its tries.
    pub(super) fn sent_so_far(&self) -> Sent {
        Sent {
            at: self.sent,
            has_body_begun: self.has_body_begun,
            retries: self.retries,
            stale_connections: self.stale_connections,
        }
    }

    /// Whether the connection of this try has served others before, which Pingora knows of its own only.
    pub(super) fn is_reused(&self, by_pingora: bool) -> bool {
        by_pingora || self.exchange.as_ref().is_some_and(|it| it.is_reused())
    }

    /// Whether it is known that nothing of this try has been sent.
    pub(super) fn is_unsent(&self) -> bool {
        self.exchange.as_ref().is_some_and(|it| it.is_unsent())
    }

    /// Whether one more connection that others have used may turn out to be over; if so, that counts.
    pub(super) fn has_stale_left(&mut self) -> bool {
        let has = self.stale_connections < MAX_STALE_CONNECTIONS;
        self.stale_connections += usize::from(has);
        has
    }

    /// Whether it took some time until its first backend was found.
    pub(super) fn has_waited(&self) -> bool {
        self.sent.saturating_duration_since(self.started) > NOTICEABLE
    }

    /// Whether this try finds out if a backend that failed works again.
    pub(super) fn is_probe(&self) -> bool {
        self.upstream.as_ref().is_some_and(Upstream::is_probe)
    }

    /// The connection is a tunnel from now on.
    pub(super) fn becomes_tunnel(&mut self) {
        self.is_tunnel = true;
        for upstream in self.upstream.iter_mut().chain(&mut self.leader_load) {
            upstream.becomes_tunnel();
        }
        if let Some(connection) = &self.connection {
            connection.expect_answer(None);
            connection.enter(Phase::Tunnel);
        }
    }

    /// The request has been received completely.
    pub(super) fn completes(&mut self) {
        self.is_complete = true;
        self.awaits_answer();
        if let Some(exchange) = &self.exchange {
            exchange.request_completes();
        }
        if let Some(connection) = &self.connection {
            connection.enter(Phase::Answer);
        }
    }

    /// The request has as much time as it may take in all, which the front keeps where a client has one request at a time.
    pub(super) fn limit_time(&self) {
        if let Some(connection) = &self.connection {
            let left = |timeout: Duration| timeout.saturating_sub(self.started.elapsed());
            connection.expect_end(self.timeout.map(left));
        }
    }

    /// The connection, if the front keeps the time of a silent backend. Pingora has one time, also for a silent tunnel, and
    /// over HTTP/2 counts it from the head of the request on.
    fn timed_by_front(&self) -> Option<&Connection> {
        self.connection
            .as_deref()
            .filter(|_| self.is_timed_by_front)
    }

    /// For the next try.
    pub(super) fn front_keeps_time(&mut self, keeps: bool) {
        let kept = std::mem::replace(&mut self.is_timed_by_front, keeps);
        if let Some(connection) = self.connection.as_deref().filter(|_| kept && !keeps) {
            connection.expect_answer(None);
        }
    }

    /// From now on the backend is waited for.
    pub(super) fn awaits_answer(&self) {
        if let Some(connection) = self.timed_by_front() {
            connection.expect_answer(Some(self.silence_now()));
        }
    }

    /// The head of the final response is there.
    pub(super) fn answer_begins(&mut self, now: Instant) {
        // A backend that answers while the request goes on has waited for its client.
        let since = self.last_part.filter(|_| !self.is_complete);
        let since = since.unwrap_or(self.sent).max(self.sent);
        self.answered = Some(now.saturating_duration_since(since));
        if let Some(exchange) = &self.exchange {
            exchange.answer_begins();
        }
        if let Some(connection) = self.timed_by_front() {
            connection.expect_answer(Some(self.silence.read));
        }
    }

    /// The backend has sent something.
    pub(super) fn answer_goes_on(&self) {
        if let Some(connection) = self.timed_by_front() {
            connection.answer_goes_on();
        }
    }

    /// Whether a backend was silent for too long, since this was last asked.
    pub(super) fn take_unanswered(&self) -> bool {
        let connection = self.connection.as_deref();
        connection.is_some_and(Connection::take_unanswered)
    }

    /// The response is complete. The rest of the request, if there is one, has no more use, and this much time.
    pub(super) fn answer_ends(&mut self, drain: Duration) {
        if self.is_tunnel {
            return;
        }
        if let Some(exchange) = &self.exchange {
            exchange.completes();
        }
        if self.is_complete {
            return;
        }
        self.is_answered_early = true;
        if let Some(connection) = &self.connection {
            connection.enter(Phase::Drain);
        } else if let Some(stream) = &self.stream {
            stream.drains(drain);
        }
    }

    /// What its end says about its last backend. A client that goes, or is too slow, after it has its response changes
    /// nothing.
    pub(super) fn outcome(&self, error: Option<&Error>, status: Option<StatusCode>) -> Outcome {
        if self.is_blameless {
            return Outcome::Unknown;
        }
        let verdict = |call: Call| call.verdict(self.started.elapsed());
        let source = error.map(Error::esource);
        let is_after =
            |source: &&ErrorSource| self.is_answered_early && *source == &ErrorSource::Downstream;
        let source = source.filter(|source| !is_after(source));
        outcome(source, status, self.call.and_then(verdict))
    }

    /// Whether this request of HTTP/2 has its response, and is not complete.
    pub(super) fn is_draining(&self) -> bool {
        self.stream.as_ref().is_some_and(OpenStream::is_draining)
    }

    /// The request is over.
    pub(super) fn end(&self) {
        if let Some(connection) = &self.connection
            && !self.is_tunnel
        {
            connection.enter(match self.is_complete {
                true => Phase::Idle,
                false => Phase::Drain,
            });
        }
    }

    /// How long the request may still take; `None` if it may take any time.
    pub(super) fn time_left(&self) -> Result<Option<Duration>> {
        let of_call = self.call.and_then(Call::timeout);
        let Some(timeout) = self.timeout.into_iter().chain(of_call).min() else {
            return Ok(None);
        };
        let left = timeout.saturating_sub(self.started.elapsed());
        if left.is_zero() && !self.is_tunnel {
            let reason = "the request took too long";
            return Err(Error::explain(ErrorType::HTTPStatus(504), reason));
        }
        Ok(Some(left))
    }

    /// How long this try may wait; for the rest of its body as long as this, if it is given.
    pub(super) fn waits(&self, client_body: Option<Duration>) -> Waits {
        let end = self.timeout.and_then(|it| self.started.checked_add(it));
        Waits {
            // A tunnel may be silent for longer.
            silence: (!self.is_upgrade).then_some(self.silence),
            client_body,
            end_by: end
                .filter(|_| !self.is_upgrade)
                .map(tokio::time::Instant::from_std),
        }
    }

    /// How long a backend may be silent for the sake of the request; `None` for any time. A client that allows next to
    /// nothing ends the request itself: Pingora uses no connection of HTTP/2 any more on which this time was over.
    pub(super) fn silence_left(&self) -> Option<Duration> {
        let of_client = self.call.and_then(Call::timeout);
        if self.timeout.is_none() && of_client.is_none() {
            return None;
        }
        let elapsed = self.started.elapsed();
        let ours = self.timeout.map(|timeout| timeout.saturating_sub(elapsed));
        let of_client =
            of_client.map(|timeout| timeout.saturating_sub(elapsed).max(LEAST_OF_CLIENTS));
        ours.into_iter().chain(of_client).min()
    }

    /// Whether the current backend has kept silent for so long that it is to blame, although the time of the request is
    /// over: for at least half of that time. A client that sets it itself has to allow some, because with very little
    /// it could have any backend left out.
    pub(super) fn is_overdue(&self) -> bool {
        let (ours, of_client) = self.times();
        let least = match of_client < ours {
            true => LEAST_OF_CLIENTS,
            false => Duration::ZERO,
        };
        let enough = (ours.min(of_client) / 2).max(least);
        self.answered.is_none() && self.sent.elapsed() >= enough
    }

    /// Whether the client has set the time that the request has.
    pub(super) fn has_time_of_client(&self) -> bool {
        let (ours, of_client) = self.times();
        of_client < ours
    }

    /// How long its backend may be silent now.
    pub(super) fn silence_now(&self) -> Duration {
        match self.answered {
            None => self.silence.response,
            Some(_) => self.silence.read,
        }
    }

    /// The time that the request may take by the configuration, and by its client.
    fn times(&self) -> (Duration, Duration) {
        let of_client = self.call.and_then(Call::timeout);
        let or_any = |time: Option<Duration>| time.unwrap_or(Duration::MAX);
        (or_any(self.timeout), or_any(of_client))
    }

    /// Whether the request may be tried once more.
    pub(super) fn may_try(&self) -> bool {
        self.retries < self.most_retries && self.time_left().is_ok()
    }

    /// Whether the request may be tried once more; if so, that counts.
    pub(super) fn may_try_again(&mut self) -> bool {
        let may = self.may_try();
        self.retries += usize::from(may);
        may
    }

    /// The latency of the backend: until it answered, or until now.
    pub(super) fn latency(&self) -> Duration {
        self.answered.unwrap_or_else(|| self.sent.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;
    use http::{HeaderMap, HeaderValue};

    use super::*;

    #[test]
    fn a_silence_that_is_long_beside_the_time_of_the_request_is_a_fault() {
        for (ours, of_client, silent, expected) in [
            (Some(400), None, 250, true),
            (Some(4_000), None, 1_500, false),
            (Some(60_000), None, 29_000, false),
            (Some(60_000), None, 31_000, true),
            // What a client allows has to be something.
            (None, Some("400m"), 250, false),
            (None, Some("600m"), 100, false),
            (None, Some("600m"), 550, true),
            (None, Some("10S"), 6_000, true),
            (None, Some("10S"), 4_000, false),
            (Some(60_000), Some("10S"), 6_000, true),
            (Some(400), Some("10S"), 250, true),
        ] {
            let mut state = RequestState::new();
            state.timeout = ours.map(Duration::from_millis);
            state.call = of_client.and_then(|timeout| {
                Call::of(&HeaderMap::from_iter([
                    (CONTENT_TYPE, HeaderValue::from_static("application/grpc")),
                    (
                        http::HeaderName::from_static("grpc-timeout"),
                        HeaderValue::from_static(timeout),
                    ),
                ]))
            });
            let ago = Instant::now().checked_sub(Duration::from_millis(silent));
            state.sent = ago.unwrap();
            assert_eq!(
                state.is_overdue(),
                expected,
                "{ours:?} {of_client:?} {silent}"
            );
            // It has begun to answer.
            state.answered = Some(Duration::ZERO);
            assert!(!state.is_overdue());
        }
    }
}
