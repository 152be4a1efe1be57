//! A cookie that names the node, so that a client stays with it.

use std::fmt::Write;

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use http::HeaderMap;
use http::header::{COOKIE, SET_COOKIE};

/// The value of a cookie of a request.
pub(super) fn cookie<'s>(session: &'s Session, name: &str) -> Option<&'s [u8]> {
    value_of(&session.req_header().headers, name)
}

/// All cookies come in one field, and any of them may have bytes that are no ASCII.
fn value_of<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let fields = headers.get_all(COOKIE).into_iter();
    let mut pairs = fields.flat_map(|field| field.as_bytes().split(|byte| *byte == b';'));
    pairs.find_map(|pair| {
        let pair = pair.trim_ascii();
        let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        let bare = value
            .strip_prefix(b"\"")
            .and_then(|value| value.strip_suffix(b"\""));
        Some(bare.unwrap_or(value))
    })
}

/// A node's id as the value of a cookie, which may not have every character.
fn value(id: &str) -> String {
    let mut text = String::with_capacity(id.len() * 2);
    for byte in id.bytes() {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The node that the cookie of a request names.
pub(super) fn node_of(session: &Session, name: &str) -> Option<String> {
    id_of(cookie(session, name)?)
}

fn id_of(value: &[u8]) -> Option<String> {
    if !value.len().is_multiple_of(2) || !value.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let value = str::from_utf8(value).ok()?;
    let byte = |at: usize| u8::from_str_radix(value.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..value.len()).step_by(2).map(byte).collect();
    String::from_utf8(bytes?).ok()
}

/// Sets the cookie. It lives as long as the browser runs, is not for scripts, and only for TLS if the request came over
/// TLS.
pub(super) fn set_cookie(
    response: &mut ResponseHeader,
    name: &str,
    id: &str,
    is_over_tls: bool,
) -> Result<()> {
    let value = value(id);
    let secure = if is_over_tls { "; Secure" } else { "" };
    let text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax{secure}");
    response.append_header(SET_COOKIE, text).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_value_and_back() {
        for id in ["w1", "köln;=\" ", ""] {
            assert_eq!(id_of(value(id).as_bytes()).as_deref(), Some(id));
        }
        for wrong in ["w1", "777", "ff", "+1", "é0"] {
            assert_eq!(id_of(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn a_cookie_is_found_whatever_the_others_are() {
        let value = |fields: &[&'static str]| {
            let fields = fields.iter().map(|text| {
                let value = http::HeaderValue::from_bytes(text.as_bytes());
                (COOKIE, value.unwrap())
            });
            let headers = HeaderMap::from_iter(fields);
            value_of(&headers, "node").map(|value| String::from_utf8_lossy(value).into_owned())
        };
        for (fields, expected) in [
            (&["city=Köln; node=7731; x=1"][..], Some("7731")),
            (&["a=1", "b=2;node=\"7731\""], Some("7731")),
            (&["nodes=1; xnode=2; node"], None),
            (&["node=; node=2"], Some("")),
            (&["node=\""], Some("\"")),
            (&[], None),
        ] {
            assert_eq!(value(fields).as_deref(), expected, "{fields:?}");
        }
    }
}
