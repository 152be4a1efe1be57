//! What clients and the log learn of requests that were not served.

use std::fmt;
use std::time::{Duration, Instant};

use ::pingora::proxy::Session;
use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::{Error, ErrorSource, ErrorType};
use tracing::{debug, error};

use super::cluster_proxy::ClusterProxy;
use super::context::RequestContext;
use super::failed_try::is_unanswered;
use super::reply::{is_slow_upload, reply_to, timed_out};
use super::request_state::RequestState;
use super::requests::is_ending;
use crate::pingora::shorten_error;

/// A reset drops what has not left yet of a response: how long that may take where its client reads.
const HANDED_OVER_WITHIN: Duration = Duration::from_millis(10);

/// Whether it is known that the backend has read nothing: its connection was over before anything could be sent.
pub(super) fn is_unread(state: &RequestState, error: &Error) -> bool {
    let is_over = matches!(
        error.etype(),
        ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed
    );
    state.is_unsent() && is_over && error.esource() == &ErrorSource::Upstream
}

/// Whether its connection to the backend has ended a read or a write, because the time for it was over.
fn is_late(error: &Error, state: &RequestState) -> bool {
    let is_unanswered = state.exchange.as_ref().is_some_and(|it| it.is_unanswered());
    is_unanswered
        && matches!(error.etype(), ErrorType::ReadError | ErrorType::WriteError)
        && error.esource() == &ErrorSource::Upstream
}

/// The error of a try, with what it was tried with. The client gets the reason of what is refused here, and nothing else.
pub(super) fn of_try(mut error: Box<Error>, peer: &HttpPeer, state: &RequestState) -> Box<Error> {
    shorten_error(&mut error);
    if state.take_unanswered() || is_late(&error, state) {
        // A read ended because the front, or the connection to the backend, keeps the time.
        let reason = format!("while waiting for the backend; {}", Named(peer, state));
        let kind = match error.etype() {
            // It has not taken what there is of the request, so that the client may not be able to go on.
            ErrorType::WriteError => ErrorType::WriteTimedout,
            _ => ErrorType::ReadTimedout,
        };
        let mut error = Error::explain(kind, reason);
        error.as_up();
        return error;
    }
    match error.etype() {
        ErrorType::HTTPStatus(_) => error,
        _ => error.more_context(Named(peer, state).to_string()),
    }
}

/// A peer, in an error.
struct Named<'a>(&'a HttpPeer, &'a RequestState);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(peer, state) = self;
        // Pingora knows nothing of a connection that is secure by itself.
        let is_secure = state.exchange.as_ref().is_some_and(|it| it.is_secure());
        let over = if is_secure { ", over TLS" } else { "" };
        write!(f, "Peer: {peer}{over}")
    }
}

/// Sends the error response to a request that failed, if it has none: its status, and 0 if nobody is there to get one.
pub(super) async fn answer_failure(
    session: &mut Session,
    error: &Error,
    context: &mut RequestContext,
) -> u16 {
    let state = &mut context.state;
    let reply = timed_out(state, error).or_else(|| reply_to(error, state.failed_epoch.is_some()));
    let Some(reply) = reply else { return 0 };
    if is_unanswered(session) {
        let route = context.route.as_deref();
        // A request that is refused for what it is may be a trap for whoever reads the next one.
        let is_of_backend = matches!(reply.code, 500 | 502..=504);
        let keeps = is_of_backend && state.can_keep_connection() && !is_ending(session);
        let sent = match keeps {
            true => reply.answer(session, route).await,
            false => reply.send(session, route).await,
        };
        state.is_refused = sent.is_ok();
        state.keeps_connection = keeps && sent.is_ok();
        if let Err(error) = sent {
            debug!(%error, code = reply.code, "the error response could not be sent to the client");
        }
    } else if session.is_http2() && error.esource() != &ErrorSource::Downstream && reply.code != 504
    {
        // Otherwise the stream would end with CANCEL, which clients take for their own word. That is right where the time is
        // over, which may be theirs.
        tokio::time::sleep(HANDED_OVER_WITHIN).await;
        session.as_downstream_mut().shutdown().await;
    }
    reply.code
}

impl ClusterProxy {
    /// What clients do wrong, and what the proxy refuses by itself, are no errors of this process. Of the others a line
    /// for each would say the same again and again, thousands of times a second, while all backends are away.
    pub(super) fn tell_failure(&self, session: &Session, context: &RequestContext, error: &Error) {
        let is_refused = matches!(error.etype(), ErrorType::HTTPStatus(_));
        let is_of_client = error.esource() == &ErrorSource::Downstream;
        if is_refused || is_of_client || is_slow_upload(&context.state, error) {
            debug!(%error, "a request was not served");
            return;
        }
        // What went wrong here is not hidden by what a group cannot do.
        let of_backend = error.esource() == &ErrorSource::Upstream;
        let group = context.group.as_ref().filter(|_| of_backend);
        let limit = group.map_or(&self.failures, |group| &group.failures);
        match limit.take(Instant::now()) {
            Some(left_out) => {
                let request = session.as_ref().request_summary();
                let (group, tries) = (context.group_name(), context.state.tries);
                error!(%error, group, request, tries, left_out, "a request was not served");
            }
            None => debug!(%error, "a request was not served"),
        }
    }
}
