//! A cookie that names the node, so that a client stays with it.

use std::fmt::Write;

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use http::header::{COOKIE, SET_COOKIE};

/// The value of a cookie of a request.
pub(super) fn cookie<'s>(session: &'s Session, name: &str) -> Option<&'s str> {
    let fields = session.req_header().headers.get_all(COOKIE).into_iter();
    let pairs = fields
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(';'));
    let mut pairs = pairs.filter_map(|pair| pair.trim().split_once('='));
    let found = pairs.find(|(key, _)| *key == name);
    found.map(|(_, value)| value.trim_matches('"'))
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

fn id_of(value: &str) -> Option<String> {
    if !value.len().is_multiple_of(2) || !value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(value.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..value.len()).step_by(2).map(byte).collect();
    String::from_utf8(bytes?).ok()
}

/// Sets the cookie, if the client has not shown it. It lives as long as the browser runs, is not for
/// scripts, and only for TLS where the request came over TLS.
pub(super) fn set_cookie(
    session: &Session,
    response: &mut ResponseHeader,
    name: &str,
    id: &str,
) -> Result<()> {
    let value = value(id);
    if cookie(session, name) == Some(&value) {
        return Ok(());
    }
    let is_tls = session
        .digest()
        .is_some_and(|digest| digest.ssl_digest.is_some());
    let secure = if is_tls { "; Secure" } else { "" };
    let text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax{secure}");
    response.append_header(SET_COOKIE, text).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_value_and_back() {
        for id in ["w1", "köln;=\" ", ""] {
            assert_eq!(id_of(&value(id)).as_deref(), Some(id));
        }
        for wrong in ["w1", "777", "ff", "+1", "é0"] {
            assert_eq!(id_of(wrong), None, "{wrong}");
        }
    }
}
