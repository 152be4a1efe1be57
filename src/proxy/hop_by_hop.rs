//! Fields of a response that are about the connection to the backend, not for the client.

use ::pingora::ErrorType::InvalidHTTPHeader;
use ::pingora::http::ResponseHeader;
use ::pingora::{Error, Result};
use http::header::{CONNECTION, CONTENT_LENGTH, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// Fields for the next proxy, but for the one that tells a client what proxies have done (RFC 9209).
const OF_PROXY: &str = "proxy-";
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Removes them (RFC 9110, section 7.6.1). `Connection` and `Transfer-Encoding` are Pingora's, which
/// sets them anew. Returns after how many seconds the backend closes the connection, if it says so.
pub(super) fn remove_hop_by_hop(status: StatusCode, headers: &mut HeaderMap) -> Option<u64> {
    // Looking at the few names that there are costs less than looking for each of these.
    let begins_like_ours = |name: &HeaderName| {
        let first = name.as_str().bytes().next();
        matches!(first, Some(b'k' | b't' | b'p' | b'u'))
    };
    // What the backend could switch to is said on its own connection; with these it is the answer itself.
    let is_upgrade = [
        StatusCode::SWITCHING_PROTOCOLS,
        StatusCode::UPGRADE_REQUIRED,
    ]
    .contains(&status);
    let is_ours = |name: &&HeaderName| {
        begins_like_ours(name)
            && ([KEEP_ALIVE, TRAILER].contains(name)
                || name.as_str().starts_with(OF_PROXY) && *name != PROXY_STATUS
                || *name == UPGRADE && !is_upgrade)
    };
    let (mut may_nominate, mut may_have_ours) = (false, false);
    for (name, value) in &*headers {
        may_nominate |= *name == CONNECTION && !names_no_field(value);
        may_have_ours |= begins_like_ours(name);
    }
    if !may_nominate && !may_have_ours {
        return None;
    }
    let seconds = headers.get(KEEP_ALIVE).and_then(|value| {
        let text = value.to_str().ok()?;
        let parameter = |part: &str| {
            let (name, value) = part.split_once('=')?;
            let is_timeout = name.trim().eq_ignore_ascii_case("timeout");
            is_timeout.then(|| value.trim().parse().ok())?
        };
        text.split(',').find_map(parameter)
    });
    if may_nominate {
        for name in nominated(status, headers) {
            headers.remove(&name);
        }
    }
    while let Some(name) = headers.keys().find(is_ours).cloned() {
        headers.remove(&name);
    }
    seconds
}

/// Removes what says how long a body is, where there is none: a client that goes by it would wait for one.
pub(super) fn remove_framing(headers: &mut HeaderMap) {
    headers.remove(CONTENT_LENGTH);
    headers.remove(TRANSFER_ENCODING);
}

/// Names a length that is given several times, as `5, 5` or in several fields, once (RFC 9110, section 8.6). Pingora
/// has refused those that differ.
pub(super) fn name_length_once(headers: &mut HeaderMap) {
    let mut values = headers.get_all(CONTENT_LENGTH).into_iter();
    let Some(first) = values.next() else { return };
    let is_list = first.as_bytes().contains(&b',');
    if !is_list && values.next().is_none() {
        return;
    }
    let text = first.to_str().unwrap_or_default();
    let once = text.split(',').next().unwrap_or_default().trim();
    if let Ok(once) = HeaderValue::from_str(once) {
        headers.insert(CONTENT_LENGTH, once);
    }
}

/// The most fields that a response may have: over HTTP/1 Pingora has this limit, over HTTP/2 none.
const MOST_FIELDS: usize = 256;

/// Refuses a response that no backend may give: too many fields, and another protocol for a request that asks for none.
pub(super) fn check_head(response: &ResponseHeader, is_upgrade: bool) -> Result<()> {
    let reason = match response.status {
        StatusCode::SWITCHING_PROTOCOLS if !is_upgrade || response.version != Version::HTTP_11 => {
            "the backend has switched the protocol, and nobody has asked for that"
        }
        _ if response.headers.len() > MOST_FIELDS => "the response has too many fields",
        _ => return Ok(()),
    };
    Error::e_explain(InvalidHTTPHeader, reason).map_err(Error::into_up)
}

/// Whether this value of `Connection` is what most backends say.
fn names_no_field(value: &HeaderValue) -> bool {
    let value = value.as_bytes();
    value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
}

/// The fields that `Connection` names, without those that the message needs.
fn nominated(status: StatusCode, headers: &HeaderMap) -> Vec<HeaderName> {
    let is_upgrade = status == StatusCode::SWITCHING_PROTOCOLS;
    let values = headers.get_all(CONNECTION).into_iter();
    let texts = values.map(|value| value.to_str().unwrap_or_default());
    texts
        .flat_map(|text| text.split(','))
        .map(str::trim)
        .filter_map(|name| name.parse::<HeaderName>().ok())
        .filter(|name| ![CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING].contains(name))
        .filter(|name| !(is_upgrade && name == UPGRADE))
        .collect()
}

/// Whether a response to this method consists of a head only.
pub(super) fn has_no_body(method: &Method, response: &ResponseHeader) -> bool {
    let length = response.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let is_empty = length == Some(0);
    let status = response.status;
    is_empty
        || method == Method::HEAD
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// Whether the response to a client of this version has to end with its connection: HTTP/1.0 knows no
/// chunks, so without a length there is no other end.
pub(super) fn ends_with_connection(client: Version, response: &ResponseHeader) -> bool {
    client < Version::HTTP_11
        && !response.headers.contains_key(CONTENT_LENGTH)
        && !matches!(
            response.status,
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removed_from(response: ResponseHeader) -> (HeaderMap, Option<u64>) {
        let mut headers = response.headers.clone();
        let seconds = remove_hop_by_hop(response.status, &mut headers);
        (headers, seconds)
    }

    #[test]
    fn fields_of_the_connection_are_removed_and_those_of_the_message_kept() {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for (name, value) in [
            ("connection", "x-a, close, Keep-Alive, Content-Length"),
            ("connection", "X-B"),
            ("keep-alive", "max=100, Timeout=5"),
            ("proxy-authenticate", "Basic"),
            ("trailer", "x-sum"),
            ("x-a", "1"),
            ("x-b", "1"),
            ("x-c", "1"),
            ("content-length", "0"),
        ] {
            response.append_header(name, value).unwrap();
        }
        let (headers, seconds) = removed_from(response);
        assert_eq!(seconds, Some(5));
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["connection", "content-length", "x-c"]);
    }

    #[test]
    fn a_length_is_named_once() {
        for (given, expected) in [
            (&[][..], &[][..]),
            (&["5"], &["5"]),
            (&["5, 5"], &["5"]),
            (&["5", "5"], &["5"]),
            (&["5,5", "5"], &["5"]),
        ] {
            let mut headers = HeaderMap::new();
            for value in given {
                headers.append(CONTENT_LENGTH, HeaderValue::from_static(value));
            }
            name_length_once(&mut headers);
            let left: Vec<_> = headers.get_all(CONTENT_LENGTH).into_iter().collect();
            assert_eq!(left, expected, "{given:?}");
        }
    }

    #[test]
    fn heads_that_no_backend_may_give_are_its_fault() {
        for (status, version, fields, is_upgrade, is_good) in [
            (200, Version::HTTP_2, 256, false, true),
            (200, Version::HTTP_2, 257, false, false),
            (101, Version::HTTP_11, 2, true, true),
            (101, Version::HTTP_11, 2, false, false),
            (101, Version::HTTP_10, 2, true, false),
        ] {
            let mut response = ResponseHeader::build(status, None).unwrap();
            response.set_version(version);
            for field in 0..fields {
                response.insert_header(format!("x-{field}"), "1").unwrap();
            }
            let checked = check_head(&response, is_upgrade);
            let blamed = checked.map_err(|error| error.esource().clone());
            match is_good {
                true => assert_eq!(blamed, Ok(())),
                false => assert_eq!(blamed, Err(::pingora::ErrorSource::Upstream)),
            }
        }
    }

    #[test]
    fn an_upgrade_keeps_its_field() {
        for (status, connection, is_kept) in [
            (101, "upgrade", true),
            (426, "close", true),
            (200, "upgrade", false),
            (200, "keep-alive", false),
        ] {
            let mut response = ResponseHeader::build(status, None).unwrap();
            response.append_header(CONNECTION, connection).unwrap();
            response.append_header(UPGRADE, "websocket").unwrap();
            let (headers, seconds) = removed_from(response);
            assert_eq!(seconds, None);
            assert_eq!(headers.contains_key(UPGRADE), is_kept, "{status}");
        }
    }
}
