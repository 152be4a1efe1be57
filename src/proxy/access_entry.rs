//! What the access log says of a request.

use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource};

use super::access_log::AccessLogEntry;
use super::context::RequestContext;
use super::grpc::Call;
use super::outcome::Outcome;

/// Whether a request has failed, whatever its status says: a response has broken off, but for a client that has left, or
/// a call of gRPC was not served.
pub(super) fn has_failed(
    session: &Session,
    error: Option<&Error>,
    outcome: Outcome,
    is_refused: bool,
) -> bool {
    let Some(head) = session.response_written() else {
        return outcome == Outcome::Failed;
    };
    let is_cut = error.is_some_and(|error| error.esource() != &ErrorSource::Downstream)
        && head.status.is_success()
        && !is_refused;
    outcome == Outcome::Failed || is_cut || Call::is_unserved(&head.headers)
}

/// The line of a request that has ended.
pub(super) fn entry(
    session: &Session,
    context: &RequestContext,
    error: Option<&Error>,
    outcome: Outcome,
) -> AccessLogEntry {
    let state = &context.state;
    let mut entry = AccessLogEntry::of(session, state.started, error);
    entry.client = state.client;
    entry.node = state.node().map(|node| node.id.clone());
    entry.upstream = state.addr().map(|addr| addr.to_string());
    entry.tries = state.tries;
    entry.outcome = outcome;
    entry.latency = state.answered;
    let of_head = || Call::status_of(&session.response_written()?.headers);
    entry.grpc_status = state.call.and_then(Call::status).or_else(of_head);
    // Without a backend, what the client has sent.
    entry.traceparent = state.traceparent.clone().or(entry.traceparent);
    entry
}
