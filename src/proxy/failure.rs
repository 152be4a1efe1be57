//! What Pingora's errors say about a request that failed.

use std::time::Duration;

use ::pingora::proxy::Session;
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorSource, ErrorType, RetryType};
use http::StatusCode;
use rustix::io::Errno;

use super::reply::had_little_time;
use super::request_state::RequestState;
use super::retry::{Failure, PingoraRetry};

/// A pooled connection that was closed before a request came says so within this time.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// What is known about a request that failed after a connection was there.
pub(super) fn failure(
    session: &Session,
    context: &RequestState,
    error: &Error,
    client_reused: bool,
) -> Failure {
    let method = &session.req_header().method;
    let is_short = !session.as_ref().retry_buffer_truncated();
    Failure {
        is_idempotent: method.is_idempotent(),
        is_safe: method.is_safe(),
        is_repeatable: is_short,
        is_unanswered: is_unanswered(session),
        is_from_backend: error.esource() == &ErrorSource::Upstream
            && !had_little_time(context, error),
        is_timeout: error.etype() == &ErrorType::ReadTimedout,
        is_unread: client_reused && is_head_unsent(session, context, error)
            || is_unprocessed(error),
        retry: match error.retry {
            RetryType::ReusedOnly if client_reused => PingoraRetry::StaleConnection,
            RetryType::Decided(true) => PingoraRetry::Yes,
            // The backend may have closed the connection just before the head came. Pingora does not say so of a body
            // that could not be written. But if the backend has taken much of the body, it has failed.
            _ if client_reused && is_short && is_unwritten(session, error) => {
                PingoraRetry::StaleConnection
            }
            RetryType::ReusedOnly | RetryType::Decided(false) => PingoraRetry::No,
        },
        retries: context.retries,
        stale_connections: context.stale_connections,
        is_prompt: context.sent.elapsed() < STALE_WITHIN,
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
fn is_head_unsent(session: &Session, context: &RequestState, error: &Error) -> bool {
    !context.has_body_begun && is_unwritten(session, error)
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

/// Whether a connection failed for a reason of this process or machine: no descriptor, no port, no
/// permission, no address of this kind. No backend can do anything about it, but connections to others may be possible.
pub(super) fn is_local(error: &Error) -> bool {
    matches!(
        error.etype(),
        ErrorType::InternalError | ErrorType::SocketError | ErrorType::BindError
    )
}

/// Whether a reason of this process or machine may concern one address only. Without descriptors or memory there is no
/// connection to any.
pub(super) fn may_be_of_address(error: &Error) -> bool {
    let root: &dyn std::error::Error = error.root_cause();
    let mut causes = std::iter::successors(Some(root), |cause| cause.source());
    let number = causes.find_map(|cause| Errno::from_io_error(cause.downcast_ref()?));
    let of_all = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    number.is_some_and(|number| !of_all.contains(&number))
}

/// The error of a try, with what it was tried with. The client gets the reason of what is refused here, and nothing else.
pub(super) fn of_try(error: Box<Error>, peer: &HttpPeer, state: &RequestState) -> Box<Error> {
    if state.take_unanswered() {
        // A read of the client ended because the front keeps the time.
        let reason = format!("while waiting for the response to an upgrade; Peer: {peer}");
        let mut error = Error::explain(ErrorType::ReadTimedout, reason);
        error.as_up();
        return error;
    }
    match error.etype() {
        ErrorType::HTTPStatus(_) => error,
        _ => error.more_context(format!("Peer: {peer}")),
    }
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
