//! What Pingora's errors say about a request that failed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource, ErrorType, RetryType};
use http::StatusCode;
use rustix::io::Errno;

/// How many pooled connections of a request may turn out to be closed before that counts as a
/// failure of the backend. A request that makes each backend end its connection is to cost few of them.
pub(super) const MAX_STALE_CONNECTIONS: usize = 2;

/// A pooled connection that was closed before a request came says so within this time.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// A request that failed after something of it may have been sent. By default nothing is known for certain, and
/// nothing would be sent again.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct FailedTry {
    /// The method may be repeated: `GET`, `PUT`, `DELETE` and the like.
    pub is_idempotent: bool,
    /// The method has no side effects: `GET`, `HEAD` and the like.
    pub is_safe: bool,
    /// The whole request is still there to be sent again. Pingora keeps 64 KiB of a body.
    pub is_repeatable: bool,
    /// Nothing of a response has reached the client.
    pub is_unanswered: bool,
    /// The backend, not the client or this process, is the cause.
    pub is_from_backend: bool,
    /// The backend did not answer, or did not take the request, in time.
    pub is_timeout: bool,
    /// The backend cannot have read anything of the request.
    pub is_unread: bool,
    /// What Pingora would do.
    pub retry: PingoraRetry,
    /// How often this request has been tried on another backend.
    pub retries: usize,
    /// How many pooled connections of this request turned out to be closed.
    pub stale_connections: usize,
    /// It failed so soon that the connection may have been closed before.
    pub is_prompt: bool,
}

/// Whether Pingora would try a request again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PingoraRetry {
    /// It would, in any case.
    Yes,
    /// It would not.
    #[default]
    No,
    /// It would, because the connection was taken from the pool, and turned out to be closed.
    StaleConnection,
}

/// What a proxy keeps about the tries of a request.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Sent {
    /// When the backend of this try could begin.
    pub at: Instant,
    /// Whether something of the body has been received for this try: see
    /// [`request_body_filter`](::pingora::proxy::ProxyHttp::request_body_filter).
    pub has_body_begun: bool,
    /// How often the request has been tried on another backend: [`RetryElsewhere`](super::retry::Decision::RetryElsewhere).
    pub retries: usize,
    /// How many pooled connections turned out to be closed: [`RetryAnywhere`](super::retry::Decision::RetryAnywhere).
    pub stale_connections: usize,
}

impl Sent {
    /// The first try begins now.
    pub fn now() -> Self {
        Self {
            at: Instant::now(),
            has_body_begun: false,
            retries: 0,
            stale_connections: 0,
        }
    }
}

impl FailedTry {
    /// What Pingora knows about a request that failed after a connection was there; for
    /// [`error_while_proxy`](::pingora::proxy::ProxyHttp::error_while_proxy).
    pub fn of(session: &Session, error: &Error, client_reused: bool, sent: &Sent) -> Self {
        let method = &session.req_header().method;
        let is_short = !session.as_ref().retry_buffer_truncated();
        Self {
            is_idempotent: method.is_idempotent(),
            is_safe: method.is_safe(),
            is_repeatable: is_short,
            is_unanswered: is_unanswered(session),
            is_from_backend: error.esource() == &ErrorSource::Upstream,
            is_timeout: matches!(
                error.etype(),
                ErrorType::ReadTimedout | ErrorType::WriteTimedout
            ),
            is_unread: client_reused && is_head_unsent(session, sent, error)
                || is_unprocessed(error),
            retry: match error.retry {
                RetryType::ReusedOnly if client_reused => PingoraRetry::StaleConnection,
                RetryType::Decided(true) => PingoraRetry::Yes,
                // The backend may have closed the connection just before the head came. Pingora does not say so of a
                // body that could not be written. But if the backend has taken much of the body, it has failed.
                _ if client_reused && is_short && is_unwritten(session, error) => {
                    PingoraRetry::StaleConnection
                }
                RetryType::ReusedOnly | RetryType::Decided(false) => PingoraRetry::No,
            },
            retries: sent.retries,
            stale_connections: sent.stale_connections,
            is_prompt: sent.at.elapsed() < STALE_WITHIN,
        }
    }
}

/// Whether nothing of a final response has reached the client. `100 Continue` is none.
pub(super) fn is_unanswered(session: &Session) -> bool {
    session.response_written().is_none_or(|response| {
        let status = response.status;
        status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
    })
}

/// Whether even the head of the request could not be written: the system refuses to write only to a
/// connection that it knows to be gone, so nothing has been sent.
fn is_head_unsent(session: &Session, sent: &Sent, error: &Error) -> bool {
    !sent.has_body_begun && is_unwritten(session, error)
}

/// Whether something could not be written, and no response has begun.
fn is_unwritten(session: &Session, error: &Error) -> bool {
    error.esource() == &ErrorSource::Upstream
        && error.etype() == &ErrorType::WriteError
        && is_unanswered(session)
}

/// Whether the backend says that it has not processed a stream of HTTP/2, as it does when it ends
/// gracefully (RFC 9113, section 8.7).
fn is_unprocessed(error: &Error) -> bool {
    let cause = error.root_cause().downcast_ref::<h2::Error>();
    cause.is_some_and(|cause| {
        let reason = cause.reason();
        let is_refused = reason == Some(h2::Reason::REFUSED_STREAM);
        let is_over = cause.is_go_away() && reason == Some(h2::Reason::NO_ERROR);
        cause.is_remote() && (is_refused || is_over) && error.retry()
    })
}

/// Whether a connection of HTTP/2 was ended by its backend when a request was to go over it. Nothing has been sent, and
/// another connection may be made.
pub(super) fn is_ended_by_backend(error: &Error) -> bool {
    let cause = error.root_cause().downcast_ref::<h2::Error>();
    cause.is_some_and(|cause| cause.is_go_away() && cause.is_remote())
}

/// Whether a connection failed for a reason of this process or machine: no descriptor, no port, no
/// permission, no address of this kind. No backend can do anything about it, but connections to others may be possible.
pub fn is_local(error: &Error) -> bool {
    matches!(
        error.etype(),
        ErrorType::InternalError | ErrorType::SocketError | ErrorType::BindError
    )
}

/// Whether a reason of this process or machine may concern one address only, which is this one. Without descriptors or
/// memory there is no connection to any. If no local port is left, of which each address has its own, that is not the
/// backend's fault either; but for addresses of IPv6 it is also the error where there is no IPv6.
pub(super) fn may_be_of_address(error: &Error, addr: SocketAddr) -> bool {
    let root: &dyn std::error::Error = error.root_cause();
    let mut causes = std::iter::successors(Some(root), |cause| cause.source());
    let number = causes.find_map(|cause| Errno::from_io_error(cause.downcast_ref()?));
    let of_all = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    number.is_some_and(|number| {
        let has_no_port = number == Errno::ADDRNOTAVAIL && addr.is_ipv4();
        !of_all.contains(&number) && !has_no_port
    })
}

/// The error by which a response with this status is not passed on, but tried elsewhere.
pub(super) fn retried_status(status: StatusCode) -> Box<Error> {
    let mut error = Error::explain(
        ErrorType::HTTPStatus(status.as_u16()),
        "the backend answered with an error",
    );
    error.as_up();
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_concerns_one_address_is_held_against_it() {
        let v4: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let v6: SocketAddr = "[2001:db8::1]:80".parse().unwrap();
        for (number, of_v4, of_v6) in [
            (Errno::MFILE, false, false),
            (Errno::NOBUFS, false, false),
            // No local port is left for it, or there is no IPv6.
            (Errno::ADDRNOTAVAIL, false, true),
            (Errno::AFNOSUPPORT, true, true),
            (Errno::ACCESS, true, true),
        ] {
            let cause = std::io::Error::from_raw_os_error(number.raw_os_error());
            let error = Error::because(ErrorType::BindError, "connecting", cause);
            let may = |addr| may_be_of_address(&error, addr);
            assert_eq!((may(v4), may(v6)), (of_v4, of_v6), "{number}");
        }
    }
}
