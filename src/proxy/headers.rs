//! The headers that the proxy adds and removes.

use ::pingora::Result;
use ::pingora::http::{RequestHeader, ResponseHeader};
use http::header::COOKIE;
use http::request::Parts as RequestParts;
use http::response::Parts as ResponseParts;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::node::Node;
use crate::pingora::LeaderUpstream;

/// On every proxied response: the id of the node that answered.
const UPSTREAM_NODE: HeaderName = HeaderName::from_static("x-upstream-node");
/// On requests to the leader: the fencing token of its term.
pub(super) const LEADER_EPOCH: HeaderName = HeaderName::from_static("x-leader-epoch");

/// The most fields that the proxy and Pingora usually add to a request, and to a response. More room than
/// that has its cost: the map of a response with eight fields would have to grow for more than four others.
const ADDED: usize = 8;
const ADDED_TO_RESPONSE: usize = 3;

/// Forgets how a client has written the names of fields: from here on they are in lower case, as over HTTP/2. Pingora
/// would keep each name twice, and copy both for each try and each hook, which costs more than all that is done here.
pub(super) fn forget_case(request: &mut RequestHeader) {
    if request.has_case() && is_target_in_parts(request) {
        let empty = http::Request::new(()).into_parts().0;
        let parts = RequestParts::from(std::mem::replace(request, empty.into()));
        *request = parts.into();
    }
}

/// Clients of HTTP/2 may send each cookie as a field of its own, which older versions do not know (RFC 9113,
/// section 8.2.3).
pub(super) fn join_cookies(request: &mut RequestHeader) -> Result<()> {
    let fields = || request.headers.get_all(COOKIE).into_iter();
    if fields().nth(1).is_none() {
        return Ok(());
    }
    let fields: Vec<_> = fields().map(HeaderValue::as_bytes).collect();
    let joined = fields.join(&b"; "[..]);
    request.insert_header(COOKIE, joined)
}

/// Whether the target is in the parts of the request: that of a request to a proxy is not, and none that is no UTF-8.
fn is_target_in_parts(request: &RequestHeader) -> bool {
    let in_parts = request.uri.path_and_query();
    in_parts.is_some_and(|path| path.as_str().as_bytes() == request.raw_path())
}

/// Changes the fields of a response, and forgets how their names were written.
pub(super) fn change_response_fields<T>(
    response: &mut ResponseHeader,
    change: impl FnOnce(&mut HeaderMap) -> T,
) -> T {
    let usual = response.status.canonical_reason();
    let reason = response.get_reason_phrase();
    let reason = reason
        .filter(|reason| Some(*reason) != usual)
        .map(str::to_owned);
    let empty = http::Response::new(()).into_parts().0;
    let mut parts = ResponseParts::from(std::mem::replace(response, empty.into()));
    parts.headers.reserve(ADDED_TO_RESPONSE);
    let changed = change(&mut parts.headers);
    *response = parts.into();
    if reason.is_some() {
        // It has been in a response already.
        let _ = response.set_reason_phrase(reason.as_deref());
    }
    changed
}

/// Changes the fields of a request for a backend, and forgets how their names were written.
pub(super) fn change_fields(
    request: &mut RequestHeader,
    change: impl FnOnce(&mut HeaderMap) -> Result<()>,
) -> Result<()> {
    let is_lost = request.uri.authority().is_none() && !is_target_in_parts(request);
    let raw = is_lost.then(|| request.raw_path().to_vec());
    let ends_stream = request.send_end_stream();
    let empty = http::Request::new(()).into_parts().0;
    let mut parts = RequestParts::from(std::mem::replace(request, empty.into()));
    parts.headers.reserve(ADDED);
    let changed = change(&mut parts.headers);
    *request = parts.into();
    if let Some(raw) = raw {
        request.set_raw_path(&raw)?;
    }
    request.set_send_end_stream(ends_stream.unwrap_or(true));
    changed
}

/// Adds the fencing token to a request for the leader.
pub(super) fn set_leader_epoch(headers: &mut HeaderMap, leader: Option<&LeaderUpstream>) {
    // A client must not be able to send a token of its own.
    match leader {
        Some(leader) => headers.insert(LEADER_EPOCH, HeaderValue::from(leader.epoch)),
        None => headers.remove(LEADER_EPOCH),
    };
}

/// Names the node that answered.
pub(super) fn set_upstream_node(headers: &mut HeaderMap, node: &Node) {
    if let Ok(id) = HeaderValue::from_bytes(node.id.as_bytes()) {
        headers.insert(UPSTREAM_NODE, id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_how_names_are_written_is_forgotten() {
        for target in ["/a?b=1", "http://a.test/b", "*", "/\u{fc}"] {
            let mut request = RequestHeader::build("GET", target.as_bytes(), None).unwrap();
            request.insert_header("X-Some-Name", "Value").unwrap();
            request.append_header("X-Some-Name", "Other").unwrap();
            let before = request.clone();
            forget_case(&mut request);
            change_fields(&mut request, |headers| {
                headers.insert("added", HeaderValue::from_static("1"));
                Ok(())
            })
            .unwrap();
            let mut wire = Vec::new();
            request.header_to_h1_wire(&mut wire);
            let wire = String::from_utf8(wire).unwrap();
            let expected = "x-some-name: Value\r\nx-some-name: Other\r\nadded: 1\r\n";
            assert_eq!(wire, expected);
            assert_eq!(request.raw_path(), before.raw_path());
            assert_eq!(request.uri, before.uri);
            assert_eq!(request.method, before.method);
            assert_eq!(request.version, before.version);
        }
    }

    #[test]
    fn cookies_are_in_one_field() {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        join_cookies(&mut request).unwrap();
        assert!(!request.headers.contains_key(COOKIE));
        for (cookie, expected) in [("a=1", "a=1"), ("b=ö", "a=1; b=ö"), ("c", "a=1; b=ö; c")] {
            request.append_header(COOKIE, cookie.as_bytes()).unwrap();
            join_cookies(&mut request).unwrap();
            let fields: Vec<_> = request.headers.get_all(COOKIE).into_iter().collect();
            assert_eq!(fields, [expected.as_bytes()]);
        }
    }

    #[test]
    fn the_reason_of_a_response_is_kept() {
        for (status, reason) in [(200, "OK"), (200, "Fine"), (299, "Odd"), (404, "")] {
            let mut response = ResponseHeader::build(status, None).unwrap();
            response.insert_header("X-Name", "1").unwrap();
            response.set_reason_phrase(Some(reason)).unwrap();
            change_response_fields(&mut response, |_| ());
            assert!(!response.has_case());
            assert_eq!(response.get_reason_phrase(), Some(reason));
            assert_eq!(response.status, status);
            assert_eq!(response.headers["x-name"], "1");
        }
    }
}
