//! What the access log says of a request.

use std::time::SystemTime;

use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource};
use http::header::{HOST, REFERER, USER_AGENT};
use http::{HeaderName, Version};

use super::access_log::Entry;
use super::context::RequestContext;
use super::grpc::Call;
use super::outcome::Outcome;
use super::trace::traceparent;

/// Whether a request has failed, whatever its status says: a response has broken off, but for a client that has left, or
/// a call of gRPC was not served.
pub(super) fn has_failed(
    session: &Session,
    error: Option<&Error>,
    outcome: &Outcome,
    is_refused: bool,
) -> bool {
    let Some(head) = session.response_written() else {
        return *outcome == Outcome::Failed;
    };
    let is_cut = error.is_some_and(|error| error.esource() != &ErrorSource::Downstream)
        && head.status.is_success()
        && !is_refused;
    *outcome == Outcome::Failed || is_cut || Call::is_unserved(&head.headers)
}

/// The line of a request that has ended.
pub(super) fn entry(
    session: &Session,
    context: &RequestContext,
    error: Option<&Error>,
    outcome: &Outcome,
) -> Entry {
    let request = session.req_header();
    let field = |name: &HeaderName| {
        let value = request.headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let state = &context.state;
    let duration = state.started.elapsed();
    Entry {
        time: SystemTime::now() - duration,
        client: state.client,
        method: request.method.as_str().to_owned(),
        target: String::from_utf8_lossy(request.raw_path()).into_owned(),
        host: field(&HOST).or_else(|| Some(request.uri.authority()?.to_string())),
        protocol: match request.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2.0",
            _ => "HTTP/1.1",
        },
        tls: session
            .digest()
            .is_some_and(|digest| digest.ssl_digest.is_some()),
        status: session
            .response_written()
            .map(|response| response.status.as_u16()),
        bytes_received: session.body_bytes_read(),
        bytes_sent: session.body_bytes_sent(),
        node: state.node().map(|node| node.id.clone()),
        upstream: state.addr().map(|addr| addr.to_string()),
        tries: state.tries,
        outcome: match outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Answered => "answered",
            Outcome::Failed => "failed",
            Outcome::Overloaded => "overloaded",
            Outcome::Unknown => "unknown",
        },
        duration,
        latency: state.answered,
        grpc_status: state
            .call
            .and_then(Call::status)
            .or_else(|| Call::status_of(&session.response_written()?.headers)),
        // Without a backend, what the client has sent.
        traceparent: state
            .traceparent
            .clone()
            .or_else(|| traceparent(&request.headers).map(str::to_owned)),
        referer: field(&REFERER),
        user_agent: field(&USER_AGENT),
        error: error.map(ToString::to_string),
    }
}
