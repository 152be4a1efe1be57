//! What the end of a request says about its backend. Pure.

use ::pingora::ErrorSource;
use http::StatusCode;

use super::grpc::Verdict;

/// What the end of a request says about its backend.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
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
        (None, Some(status)) if status.is_server_error() => Outcome::Failed,
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
