//! What a request may be: limits of its head and its body.

use std::time::{Duration, Instant};

use ::pingora::http::RequestHeader;
use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorType, Result};
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};

use super::ends_with_head;
use super::front::{Connection, Phase};
use super::reply::refused;
use super::request_state::RequestState;
use super::shutdown::Shutdown;
use crate::config::{ClusterConfig, Upgrade};

/// The elements of the lists in a field.
fn lists<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    let values = headers.get_all(name).into_iter();
    let texts = values.filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).map(str::trim)
}

/// Leaves in a request what asks for a tunnel, so that Pingora takes it for one exactly where this proxy does. Without
/// `Connection: upgrade` nothing asks for one, nor in HTTP/1.0 (RFC 9110, section 7.8). HTTP/2 and TLS are of this connection only, and
/// everybody may ignore them: a tunnel of HTTP/2 would carry requests that nobody looks at.
pub(super) fn keep_effective_upgrade(request: &mut RequestHeader) -> Result<()> {
    let headers = &request.headers;
    if !headers.contains_key(UPGRADE) {
        return Ok(());
    }
    let is_asked = request.version == Version::HTTP_11
        && lists(headers, &CONNECTION).any(|name| name.eq_ignore_ascii_case("upgrade"));
    let is_of_connection = |protocol: &&str| {
        let name = protocol.split('/').next().unwrap_or_default().trim();
        let of_connection = ["", "h2c", "http", "tls"];
        of_connection.iter().any(|it| name.eq_ignore_ascii_case(it))
    };
    let all = lists(headers, &UPGRADE).filter(|it| is_asked && !is_of_connection(it));
    let kept = all.collect::<Vec<_>>().join(", ");
    match kept.is_empty() {
        true => drop(request.remove_header(&UPGRADE)),
        false => request.insert_header(UPGRADE, kept)?,
    }
    Ok(())
}

/// Whether a field is of this connection only, or may ask for a tunnel: those that Pingora takes out by itself.
fn is_of_connection(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "http2-settings"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// How many fields `Connection` may name: as many as Pingora takes.
const MOST_NAMED: usize = 9;

/// Refuses what Pingora refuses of `Connection`, which it does only after it has connected to a backend: each such request
/// would cost a connection, and its port for a minute.
fn check_connection(headers: &HeaderMap) -> Result<()> {
    const BELIEVED: [&str; 4] = [
        "host",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
    ];
    let values = || {
        headers
            .get_all(CONNECTION)
            .into_iter()
            .map(HeaderValue::as_bytes)
    };
    let is_usual = |value: &[u8]| {
        let usual = [&b"keep-alive"[..], b"close", b"upgrade"];
        usual.iter().any(|it| value.eq_ignore_ascii_case(it))
    };
    if values().all(is_usual) && values().nth(MOST_NAMED).is_none() {
        return Ok(());
    }
    let parts = values().flat_map(|value| value.split(|byte| *byte == b','));
    let names = parts
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty());
    let mut count = 0;
    for name in names {
        count += 1;
        let name = HeaderName::from_bytes(name).ok();
        let is_allowed = name.is_some_and(|name| !BELIEVED.contains(&name.as_str()));
        if !is_allowed || count > MOST_NAMED {
            return Err(refused(400, "the field Connection names what it may not"));
        }
    }
    Ok(())
}

/// Whether the response has to say that the connection ends. Over HTTP/2 it does not say that.
pub(super) fn is_ending(session: &Session) -> bool {
    Shutdown::of_process().is_draining() && !session.is_http2()
}

/// Whether a response that comes before the end of the request ends the connection: with Pingora also an interim one, as
/// with `Expect`.
pub(super) fn ends_before_body(session: &mut Session, is_final: bool) {
    session.set_close_on_response_before_downstream_finish(is_final);
}

/// Answers `Expect` for a backend of HTTP/2, from which no interim response comes.
pub(super) async fn answer_expectation(
    session: &mut Session,
    request: &mut RequestHeader,
    state: &mut RequestState,
) -> Result<()> {
    if state.is_expecting && request.version == Version::HTTP_2 {
        request.remove_header(&EXPECT);
        session.req_header_mut().remove_header(&EXPECT);
        ends_before_body(session, false);
        let written = session.as_mut().write_continue_response().await;
        written.map_err(Error::into_down)?;
        state.is_expecting = false;
    }
    Ok(())
}

/// Refuses what is no target (RFC 9112, section 3.2), which a backend might read in another way than this proxy. Pingora has
/// cut fragments off, and made `%20` of spaces.
fn check_target(request: &RequestHeader) -> Result<()> {
    let target = request.raw_path();
    let is_path = target.first() == Some(&b'/');
    let is_of_server = || target == b"*" && request.method == Method::OPTIONS;
    let has_host = || target.windows(3).any(|part| part == b"://");
    match is_path || is_of_server() || has_host() {
        true => Ok(()),
        false => Err(refused(400, "the target of the request is no path")),
    }
}

/// Refuses other transfer codings than chunks. Pingora takes these off, and the coding within would have no name any more
/// (RFC 9112, section 6.1).
fn check_codings(headers: &HeaderMap) -> Result<()> {
    let codings = headers.get_all(TRANSFER_ENCODING);
    let is_known = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    if !codings.iter().all(is_known) {
        return Err(refused(501, "this transfer coding is not known"));
    }
    match codings.iter().nth(1) {
        None => Ok(()),
        Some(_) => Err(refused(400, "the body has chunks of chunks")),
    }
}

/// Whether this can be the name or address of a host, and its port (RFC 3986, section 3.2).
fn is_host(value: &HeaderValue) -> bool {
    let is_of_host =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
    value.as_bytes().iter().all(is_of_host)
}

/// A request of less than this finds room in the buffer of a socket at once.
const SHORT: usize = 4_096;

/// The limits of a request, and the times that Pingora keeps for HTTP/2 clients.
#[derive(Debug)]
pub(super) struct RequestLimits {
    head_bytes: usize,
    headers: usize,
    body_bytes: u64,
    client_body: Duration,
    client_write: Duration,
    client_drain: Duration,
    upgrade: Upgrade,
    half_closed: bool,
}

impl RequestLimits {
    pub(super) fn new(config: &ClusterConfig) -> Self {
        let clients = &config.clients;
        Self {
            head_bytes: clients.head_bytes,
            headers: clients.headers,
            body_bytes: clients.body_bytes,
            upgrade: clients.upgrade,
            half_closed: clients.half_closed,
            client_body: Duration::from_millis(config.timeouts.client_body_ms),
            client_write: Duration::from_millis(config.timeouts.client_write_ms),
            client_drain: Duration::from_millis(config.timeouts.client_drain_ms),
        }
    }

    /// How long the client may send nothing of a request over HTTP/2, unless it waits to be asked for it. Over HTTP/1 the front
    /// keeps that time.
    pub(super) fn client_body(&self, state: &RequestState) -> Option<Duration> {
        let is_awaited = !state.is_complete && !state.is_expecting;
        (state.connection.is_none() && is_awaited).then_some(self.client_body)
    }

    /// For how long the rest of a request is read that nobody wants.
    pub(super) fn client_drain(&self) -> Duration {
        self.client_drain
    }

    /// A request begins: its head is complete.
    pub(super) fn begin(&self, session: &mut Session, context: &mut RequestState) {
        context.is_complete = session.is_body_empty();
        let expects = session.req_header().headers.get(EXPECT);
        let expects = expects.map(HeaderValue::as_bytes);
        context.is_expecting = !context.is_complete
            && expects.is_some_and(|it| it.eq_ignore_ascii_case(b"100-continue"));
        session.set_pipelining_enabled(true);
        let process = Shutdown::of_process();
        if is_ending(session) {
            session.set_keepalive(None);
        }
        let connection = Connection::of(session).cloned();
        let Some(connection) = connection else {
            context.in_flight = Some(process.request());
            return;
        };
        if session.is_http2() {
            context.in_flight = Some(process.request());
            // A client that gives no room on its stream blocks nothing of the connection, so only
            // Pingora notices.
            session.set_write_timeout(Some(self.client_write));
            let stream = connection.opens();
            if !context.is_complete {
                ends_with_head::watch(session, stream.clone(), self.client_drain);
            }
            context.stream = Some(stream);
            return;
        }
        if self.half_closed {
            session.set_abort_on_close(false);
        }
        // The front keeps the time.
        session.set_read_timeout(None);
        connection.expect_end(None);
        connection.take_unanswered();
        connection.expect_answer(None);
        connection.enter(match context.is_complete {
            true => Phase::Answer,
            false if context.is_expecting => Phase::Expect,
            false => Phase::Body,
        });
        context.connection = Some(connection);
    }

    /// Refuses a request for a tunnel to anywhere, a head that is too large, and a body that says it is.
    pub(super) fn check_head(&self, session: &Session, context: &mut RequestState) -> Result<()> {
        let headers = &session.req_header().headers;
        if session.req_header().method == Method::CONNECT {
            if let Some(connection) = Connection::of(session) {
                connection.statistics().count_bad_request();
            }
            return Err(refused(405, "this proxy makes no tunnels"));
        }
        let count = headers.len();
        // The separators and the end of a line are four bytes.
        let bytes = |name: &str, value: &[u8]| name.len() + value.len() + 4;
        let (mut fields, mut is_plain) = (0, true);
        for (name, value) in headers {
            fields += bytes(name.as_str(), value.as_bytes());
            is_plain &= !is_of_connection(name);
        }
        context.is_plain = is_plain;
        let target = session.req_header().raw_path().len();
        if count > self.headers || fields + target > self.head_bytes {
            if let Some(connection) = Connection::of(session) {
                connection.statistics().count_head_too_large();
            }
            return Err(refused(431, "the head of the request is too large"));
        }
        check_target(session.req_header())?;
        if !is_plain {
            check_connection(headers)?;
            check_codings(headers)?;
        }
        // RFC 9112, section 3.2. Over HTTP/2 the authority stands for it.
        if session.req_header().version == Version::HTTP_11 && !headers.contains_key(HOST) {
            return Err(refused(400, "a request of HTTP/1.1 needs a host"));
        }
        if headers.get(HOST).is_some_and(|host| !is_host(host)) {
            return Err(refused(400, "the host is none"));
        }
        context.is_short = fields + target < SHORT && context.is_complete;
        let length = headers.get(CONTENT_LENGTH);
        let length = length.map(|value| value.to_str().ok()?.parse::<u64>().ok());
        match length {
            Some(Some(length)) => self.check_length(length),
            // A list of equal ones may stand there (RFC 9112, section 6.3), but not every backend reads one.
            Some(None) => Err(refused(400, "the length of the body is no number")),
            None => Ok(()),
        }
    }

    /// Whether a request becomes a tunnel, if the backend agrees. One that wants to go on in a protocol that
    /// is not passed on is refused: in HTTP/1.1 it would look as if the backend refused.
    pub(super) fn is_upgrade(&self, session: &Session) -> Result<bool> {
        let headers = &session.req_header().headers;
        if session.is_http2() || !headers.contains_key(UPGRADE) {
            return Ok(false);
        }
        let is_passed_on = |protocol: &str| match self.upgrade {
            Upgrade::Any => true,
            Upgrade::Websocket => protocol.eq_ignore_ascii_case("websocket"),
            Upgrade::None => false,
        };
        match lists(headers, &UPGRADE).all(is_passed_on) {
            true => Ok(true),
            false => Err(refused(501, "this protocol is not passed on")),
        }
    }

    /// A part of the body has been received.
    pub(super) fn check_body(
        &self,
        body: Option<&Bytes>,
        is_end: bool,
        context: &mut RequestState,
    ) -> Result<()> {
        if context.is_tunnel {
            return Ok(());
        }
        if context.is_draining() && !is_end {
            let reason = "the response was complete before the request";
            return Err(Error::explain(ErrorType::ConnectionClosed, reason));
        }
        context.has_body_begun = true;
        context.is_expecting = false;
        context.body_bytes += body.map_or(0, |body| body.len() as u64);
        self.check_length(context.body_bytes)?;
        if context.is_complete {
            return Ok(());
        }
        let now = Instant::now();
        context.last_part = Some(now);
        if is_end {
            context.completes();
            if context.answered.is_none() {
                context.sent = now;
            }
        }
        Ok(())
    }

    fn check_length(&self, length: u64) -> Result<()> {
        if self.body_bytes > 0 && length > self.body_bytes {
            return Err(refused(413, "the body of the request is too large"));
        }
        Ok(())
    }
}
