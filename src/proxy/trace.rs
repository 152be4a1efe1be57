//! `traceparent` (W3C Trace Context): passed on, and made where it is missing.

use ::pingora::ErrorType::InternalError;
use ::pingora::http::RequestHeader;
use ::pingora::{OrErr, Result};
use http::{HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Makes sure that a request has a valid field. This process takes part in no trace of its own, so a
/// field that is there is passed on as it is.
pub(super) fn set_traceparent(request: &mut RequestHeader) -> Result<()> {
    let mut given = request.headers.get_all(TRACEPARENT).into_iter().peekable();
    if given.peek().is_none() && !request.headers.contains_key(TRACESTATE) {
        return add_new(request);
    }
    let one = given.next().and_then(|value| value.to_str().ok());
    if one.is_some_and(is_valid) && given.next().is_none() {
        return Ok(());
    }
    // What belongs to no trace is not passed on (section 3.3.1.1).
    request.remove_header(&TRACESTATE);
    add_new(request)
}

fn add_new(request: &mut RequestHeader) -> Result<()> {
    // Not zero, which would be invalid; and not sampled, because nobody here records anything.
    let (trace, parent) = (fastrand::u128(1..), fastrand::u64(1..));
    let value = HeaderValue::from_bytes(&written(trace, parent));
    let value = value.or_err(InternalError, "traceparent")?;
    request.insert_header("traceparent", value)
}

/// Each request has one, so this is not left to formatting.
fn written(trace: u128, parent: u64) -> [u8; 55] {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    let digits = |text: &mut [u8], bytes: &[u8]| {
        for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
            pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
            pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
        }
    };
    digits(&mut text[3..35], &trace.to_be_bytes());
    digits(&mut text[36..52], &parent.to_be_bytes());
    text
}

/// The field of a request.
pub(super) fn traceparent(request: &RequestHeader) -> Option<&str> {
    request.headers.get(TRACEPARENT)?.to_str().ok()
}

fn is_valid(text: &str) -> bool {
    let parts: Vec<_> = text.split('-').collect();
    let [version, trace, parent, flags, rest @ ..] = &parts[..] else {
        return false;
    };
    let is_hex = |text: &str, length| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        text.len() == length && text.bytes().all(is_digit)
    };
    let is_zero = |text: &str| text.bytes().all(|byte| byte == b'0');
    is_hex(version, 2)
        && *version != "ff"
        && is_hex(trace, 32)
        && !is_zero(trace)
        && is_hex(parent, 16)
        && !is_zero(parent)
        && is_hex(flags, 2)
        // Later versions may have more.
        && (rest.is_empty() || *version != "00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_one_is_written_digit_by_digit() {
        let text = written(
            0x0123_4567_89ab_cdef_0011_2233_4455_6677,
            0xfeed_0000_0000_0001,
        );
        let expected = b"00-0123456789abcdef0011223344556677-feed000000000001-00";
        assert_eq!(&text, expected);
    }

    #[test]
    fn a_valid_field_stays_and_any_other_is_replaced() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        for (given, stays) in [
            (good, true),
            (
                "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what",
                true,
            ),
            (
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what",
                false,
            ),
            (
                "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                false,
            ),
            (
                "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                false,
            ),
            (
                "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
                false,
            ),
            (
                "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
                false,
            ),
            ("x", false),
            ("", false),
        ] {
            let mut request = RequestHeader::build("GET", b"/", None).unwrap();
            request.insert_header(TRACEPARENT, given).unwrap();
            request.insert_header(TRACESTATE, "a=1").unwrap();
            set_traceparent(&mut request).unwrap();
            let now = traceparent(&request).unwrap();
            assert_eq!(now == given, stays, "{given}");
            assert!(is_valid(now), "{now}");
            assert_eq!(request.headers.contains_key(TRACESTATE), stays, "{given}");
        }
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        request.append_header(TRACEPARENT, good).unwrap();
        request.append_header(TRACEPARENT, good).unwrap();
        set_traceparent(&mut request).unwrap();
        assert_ne!(traceparent(&request), Some(good));
    }
}
