//! `traceparent` (W3C Trace Context): passed on, and made where it is missing.

use ::pingora::ErrorType::InternalError;
use ::pingora::{OrErr, Result};
use http::header::Entry;
use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Makes sure that a request has a valid field. Where the request has no span here, this process takes part in no
/// trace, so a field that is there is passed on as it is. A new one says whether it is sampled, which backends usually
/// follow.
pub(super) fn set_traceparent(headers: &mut HeaderMap, is_sampled: bool) -> Result<()> {
    if !headers.contains_key(TRACESTATE)
        && let Entry::Vacant(vacant) = headers.entry(TRACEPARENT)
    {
        vacant.insert(value(&new_field(is_sampled))?);
        return Ok(());
    }
    let mut given = headers.get_all(TRACEPARENT).into_iter();
    let one = given.next().and_then(|value| value.to_str().ok());
    if one.is_some_and(is_valid) && given.next().is_none() {
        return Ok(());
    }
    // What belongs to no trace is not passed on (section 3.3.1.1).
    headers.remove(TRACESTATE);
    insert(headers, &new_field(is_sampled))
}

fn new_field(is_sampled: bool) -> [u8; 55] {
    // Not zero, which would be invalid.
    let (trace, parent) = (fastrand::u128(1..), fastrand::u64(1..));
    written(trace, parent, u8::from(is_sampled))
}

fn value(text: &[u8]) -> Result<HeaderValue> {
    HeaderValue::from_bytes(text).or_err(InternalError, "traceparent")
}

/// Replaces what is there.
pub(super) fn insert(headers: &mut HeaderMap, text: &[u8]) -> Result<()> {
    headers.insert(TRACEPARENT, value(text)?);
    Ok(())
}

/// Each request has one, so this is not left to formatting.
pub(super) fn written(trace: u128, parent: u64, flags: u8) -> [u8; 55] {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    let digits = |text: &mut [u8], bytes: &[u8]| {
        for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
            pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
            pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
        }
    };
    digits(&mut text[3..35], &trace.to_be_bytes());
    digits(&mut text[36..52], &parent.to_be_bytes());
    digits(&mut text[53..], &[flags]);
    text
}

/// The field of a request.
pub(super) fn traceparent(headers: &HeaderMap) -> Option<&str> {
    headers.get(TRACEPARENT)?.to_str().ok()
}

/// What a field says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "opentelemetry"), allow(dead_code))]
pub(super) struct TraceParent {
    pub(super) trace: u128,
    pub(super) parent: u64,
    pub(super) flags: u8,
}

/// What the field of a request says, if it has exactly one, and that is valid.
#[cfg(feature = "opentelemetry")]
pub(super) fn trace_parent(headers: &HeaderMap) -> Option<TraceParent> {
    let mut given = headers.get_all(TRACEPARENT).into_iter();
    let one = given.next()?.to_str().ok()?;
    read(one).filter(|_| given.next().is_none())
}

fn is_valid(text: &str) -> bool {
    read(text).is_some()
}

/// Section 3.2 of the recommendation.
fn read(text: &str) -> Option<TraceParent> {
    let mut parts = text.split('-');
    let mut hex = |length| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let part = parts.next()?;
        let is_hex = part.len() == length && part.bytes().all(is_digit);
        u128::from_str_radix(part, 16).ok().filter(|_| is_hex)
    };
    let (version, trace, parent, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may have more.
    let is_valid =
        version != 0xff && trace != 0 && parent != 0 && (parts.next().is_none() || version != 0);
    is_valid.then_some(TraceParent {
        trace,
        parent: u64::try_from(parent).ok()?,
        flags: u8::try_from(flags).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_one_is_written_digit_by_digit() {
        let (trace, parent) = (
            0x0123_4567_89ab_cdef_0011_2233_4455_6677,
            0xfeed_0000_0000_0001,
        );
        let text = written(trace, parent, 1);
        let expected = "00-0123456789abcdef0011223344556677-feed000000000001-01";
        assert_eq!(std::str::from_utf8(&text).unwrap(), expected);
        let flags = 1;
        let given = TraceParent {
            trace,
            parent,
            flags,
        };
        assert_eq!(read(expected), Some(given));
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
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, HeaderValue::from_static(given));
            headers.insert(TRACESTATE, HeaderValue::from_static("a=1"));
            set_traceparent(&mut headers, false).unwrap();
            let now = traceparent(&headers).unwrap();
            assert_eq!(now == given, stays, "{given}");
            assert!(is_valid(now), "{now}");
            assert_eq!(headers.contains_key(TRACESTATE), stays, "{given}");
        }
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, HeaderValue::from_static(good));
        headers.append(TRACEPARENT, HeaderValue::from_static(good));
        set_traceparent(&mut headers, true).unwrap();
        assert_ne!(traceparent(&headers), Some(good));
        for is_sampled in [true, false] {
            let mut headers = HeaderMap::new();
            set_traceparent(&mut headers, is_sampled).unwrap();
            let made = read(traceparent(&headers).unwrap()).unwrap();
            assert_eq!(made.flags, u8::from(is_sampled));
        }
    }
}
