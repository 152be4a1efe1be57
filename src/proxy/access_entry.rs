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

/// The status of a call of gRPC, of its backend or of this proxy.
pub(super) fn call_status(session: &Session, context: &RequestContext) -> Option<u16> {
    let of_head = || Call::status_of(&session.response_written()?.headers);
    context.state.call.and_then(Call::status).or_else(of_head)
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
    entry.group = context.group_name().map(str::to_owned);
    entry.route = context.route_name().map(str::to_owned);
    entry.tries = state.tries;
    let unserved = state.unserved.map(|reason| reason.as_str().to_owned());
    entry.error = unserved.or(entry.error);
    entry.outcome = outcome;
    entry.latency = state.answered;
    entry.grpc_status = call_status(session, context);
    // Without a backend, what the client has sent.
    entry.traceparent = state.traceparent.clone().or(entry.traceparent);
    entry
}
