//! What the end of a request says about its backend. Pure.

use std::time::{Duration, Instant};

use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource};
use http::StatusCode;
use serde::Serialize;

use super::grpc::Verdict;
use crate::balance::Upstream;

/// What the end of a request says about its backend.
///
/// ```
/// use std::time::Duration;
/// use pingora::{Error, prelude::Session};
/// use pingora_etcd::balance::Upstream;
/// use pingora_etcd::proxy::Outcome;
///
/// /// For the end of the hook `logging`; `latency` is the time until the backend answered, from when it had the request.
/// fn end(session: &Session, error: Option<&Error>, upstream: Upstream, latency: Duration) {
///     Outcome::of(session, error).tell(upstream, latency);
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// It did its work.
    Succeeded,
    /// It works, but did not do what it usually does, so its latency says nothing.
    Answered,
    /// It failed the request.
    Failed,
    /// It said that it has too much to do.
    Overloaded,
    /// Nothing: the client or this process ended the request.
    Unknown,
}

impl Outcome {
    /// The outcome of a request, from what the hook [`logging`](::pingora::proxy::ProxyHttp::logging) gets. Of a call of
    /// gRPC only its HTTP status is looked at.
    pub fn of(session: &Session, error: Option<&Error>) -> Self {
        outcome(error.map(Error::esource), final_status(session), None)
    }

    /// Tells the balancer. `latency` is how long the backend took to answer.
    pub fn tell(self, upstream: Upstream, latency: Duration) {
        self.tell_both(upstream, latency, latency);
    }

    /// The same, where an answer without the usual work `took` another time than until it began.
    pub(super) fn tell_both(self, upstream: Upstream, latency: Duration, took: Duration) {
        match self {
            Self::Succeeded => upstream.succeeded(latency),
            Self::Answered => upstream.answered(took, Instant::now()),
            Self::Failed => upstream.failed(),
            Self::Overloaded => upstream.overloaded(),
            Self::Unknown => drop(upstream),
        }
    }

    /// As the access log has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Overloaded => "overloaded",
            Self::Unknown => "unknown",
        }
    }
}

/// The status that the client has got; `None` if it has got none, or an interim one only.
pub(super) fn final_status(session: &Session) -> Option<StatusCode> {
    let status = session.response_written()?.status;
    let is_interim = status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS;
    (!is_interim).then_some(status)
}

/// The outcome of a request that ended with this error, if any, after this status of the response, if
/// any was written; a call of gRPC says more.
pub(super) fn outcome(
    error: Option<&ErrorSource>,
    status: Option<StatusCode>,
    call: Option<Verdict>,
) -> Outcome {
    if let (None, Some(StatusCode::OK), Some(verdict)) = (error, status, call) {
        return match verdict {
            Verdict::Succeeded => Outcome::Succeeded,
            Verdict::Answered => Outcome::Answered,
            Verdict::Failed => Outcome::Failed,
            Verdict::Overloaded => Outcome::Overloaded,
        };
    }
    match (error, status) {
        // However such a connection ended, possibly after a long silence.
        (_, Some(StatusCode::SWITCHING_PROTOCOLS)) => Outcome::Succeeded,
        (Some(ErrorSource::Upstream), _) => Outcome::Failed,
        (Some(_), _) | (None, None) => Outcome::Unknown,
        (None, Some(status)) if status.as_u16() >= 500 => Outcome::Failed,
        // Otherwise a backend that refuses at once would look like the fastest, and get all requests.
        (None, Some(StatusCode::TOO_MANY_REQUESTS)) => Outcome::Overloaded,
        (None, Some(status)) if status.is_client_error() => Outcome::Answered,
        (None, Some(_)) => Outcome::Succeeded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_judged_by_its_own_failures() {
        use ErrorSource::{Downstream, Upstream};
        use Outcome::{Answered, Failed, Overloaded, Succeeded, Unknown};
        for (error, status, expected) in [
            (None, Some(StatusCode::OK), Succeeded),
            (None, Some(StatusCode::NOT_FOUND), Answered),
            (None, Some(StatusCode::TOO_MANY_REQUESTS), Overloaded),
            (None, Some(StatusCode::BAD_GATEWAY), Failed),
            (None, StatusCode::from_u16(777).ok(), Failed),
            (None, None, Unknown),
            (Some(Upstream), None, Failed),
            (Some(Upstream), Some(StatusCode::OK), Failed),
            (Some(Downstream), Some(StatusCode::OK), Unknown),
            (
                Some(Upstream),
                Some(StatusCode::SWITCHING_PROTOCOLS),
                Succeeded,
            ),
        ] {
            assert_eq!(outcome(error.as_ref(), status, None), expected);
        }
        let broken_off = Some(Verdict::Failed);
        assert_eq!(outcome(None, Some(StatusCode::OK), broken_off), Failed);
        assert_eq!(
            outcome(Some(&Downstream), Some(StatusCode::OK), broken_off),
            Unknown
        );
    }
}
