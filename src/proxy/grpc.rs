//! gRPC: which requests are calls, and what their status says. Pure.

use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};

/// The field that carries the status of a call, in the trailers or in the head of a response.
const STATUS: &str = "grpc-status";

fn is_grpc(fields: &HeaderMap) -> bool {
    let content_type = fields.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = content_type.and_then(|text| text.strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

/// The field that says how long the client waits.
const TIMEOUT: &str = "grpc-timeout";

/// Up to eight digits and a unit.
fn timeout(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// A call of gRPC, and its status as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Call {
    status: Option<u16>,
    /// Whether the response is one of gRPC.
    is_answered: bool,
    /// How long the client waits.
    timeout: Option<Duration>,
}

/// What the status of a call says about its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Succeeded,
    /// The application says no.
    Answered,
    /// The backend is not there or too slow.
    Failed,
    /// The backend has too much to do.
    Overloaded,
}

impl Call {
    /// The call that a request is, by its fields.
    pub(super) fn of(request: &HeaderMap) -> Option<Self> {
        is_grpc(request).then(|| Self {
            status: None,
            is_answered: false,
            timeout: request.get(TIMEOUT).and_then(timeout),
        })
    }

    pub(super) fn status(self) -> Option<u16> {
        self.status
    }

    /// How long the client waits for the end of the call, if it says so.
    pub(super) fn timeout(self) -> Option<Duration> {
        self.timeout
    }

    /// Takes notice of the head of the response: a server that does not speak gRPC has no status, and is
    /// not to blame for that.
    pub(super) fn take_head(&mut self, fields: &HeaderMap) {
        self.is_answered = is_grpc(fields);
        self.take_status(fields);
    }

    /// Takes the status from the head or the trailers of a response.
    pub(super) fn take_status(&mut self, fields: &HeaderMap) {
        self.status = Self::status_of(fields).or(self.status);
    }

    /// The status in the head or the trailers of a response.
    pub(super) fn status_of(fields: &HeaderMap) -> Option<u16> {
        let status = fields.get(STATUS)?.to_str().ok()?;
        // What is no number is as bad as UNKNOWN (2).
        Some(status.parse().unwrap_or(2))
    }

    /// Whether a response says in its head that nobody could answer: DEADLINE_EXCEEDED, UNAVAILABLE.
    pub(super) fn is_unserved(fields: &HeaderMap) -> bool {
        matches!(Self::status_of(fields), Some(4 | 14))
    }

    /// Whether the response is over already, without success.
    pub(super) fn has_failed(self) -> bool {
        self.status.is_some_and(|status| status != 0)
    }

    /// What a complete response says that took this long; `None` if it is none of gRPC. One without a
    /// status was broken off.
    pub(super) fn verdict(self, took: Duration) -> Option<Verdict> {
        let is_late = self.timeout.is_some_and(|timeout| took >= timeout);
        self.is_answered.then_some(match self.status {
            Some(0) => Verdict::Succeeded,
            // DEADLINE_EXCEEDED of the client's own making.
            Some(4) if is_late => Verdict::Answered,
            // RESOURCE_EXHAUSTED.
            Some(8) => Verdict::Overloaded,
            // DEADLINE_EXCEEDED, UNAVAILABLE.
            Some(4 | 14) | None => Verdict::Failed,
            Some(_) => Verdict::Answered,
        })
    }
}

/// The status of a call for a response that this process gives, as gRPC's table for HTTP statuses
/// has it (doc/http-grpc-status-mapping.md), but for what is certain here.
pub(super) fn status_of(code: u16) -> u16 {
    match code {
        // INVALID_ARGUMENT would be the application's; INTERNAL.
        400 => 13,
        // DEADLINE_EXCEEDED.
        408 | 504 => 4,
        // RESOURCE_EXHAUSTED.
        413 | 429 | 431 => 8,
        // UNAVAILABLE.
        502 | 503 => 14,
        // INTERNAL.
        500 | 508 => 13,
        // UNKNOWN.
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_a_client_waits_has_a_unit() {
        let read = |text| timeout(&HeaderValue::from_static(text));
        for (text, milliseconds) in [("1H", 3_600_000), ("2M", 120_000), ("3S", 3_000), ("4m", 4)] {
            assert_eq!(
                read(text),
                Some(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        assert_eq!(read("5u"), Some(Duration::from_micros(5)));
        assert_eq!(read("6n"), Some(Duration::from_nanos(6)));
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn calls_are_known_by_their_content_type() {
        for (content_type, is_call) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; charset=x", true),
            ("application/grpc-web+proto", false),
            ("application/json", false),
        ] {
            let mut fields = HeaderMap::new();
            assert_eq!(Call::of(&fields), None);
            fields.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            assert_eq!(Call::of(&fields).is_some(), is_call, "{content_type}");
        }
    }

    #[test]
    fn the_status_says_whose_fault_it_is() {
        use Verdict::{Answered, Failed, Overloaded, Succeeded};
        for (status, expected) in [
            (None, Failed),
            (Some("0"), Succeeded),
            (Some("5"), Answered),
            (Some("13"), Answered),
            (Some("4"), Failed),
            (Some("8"), Overloaded),
            (Some("14"), Failed),
            (Some("what"), Answered),
        ] {
            let (mut call, mut fields) = (Call::default(), HeaderMap::new());
            if let Some(status) = status {
                fields.insert(STATUS, HeaderValue::from_static(status));
            }
            assert_eq!(call.verdict(Duration::ZERO), None);
            fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            call.take_head(&fields);
            // A status of the head is not lost by trailers without one.
            call.take_status(&HeaderMap::new());
            assert_eq!(call.verdict(Duration::ZERO), Some(expected), "{status:?}");
            call.timeout = Some(Duration::from_secs(1));
            let late = call.verdict(Duration::from_secs(2));
            assert_eq!(late == Some(expected), status != Some("4"), "{status:?}");
        }
    }
}
