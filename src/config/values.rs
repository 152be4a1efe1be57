//! Values of fields that have a form of their own.

use serde::Deserialize;

/// A port, or a range of them: `8080` or `9000-9100`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(
    untagged,
    expecting = "a port such as 8080 or a range such as 9000-9100 is expected"
)]
#[non_exhaustive]
pub enum Port {
    /// One port.
    One(u64),
    /// One port or a range, as text.
    Text(String),
}

impl From<&Port> for String {
    fn from(port: &Port) -> Self {
        match port {
            Port::One(port) => port.to_string(),
            Port::Text(text) => text.clone(),
        }
    }
}

/// What is hashed of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
#[non_exhaustive]
pub enum HashOn {
    /// `client_ip`: the address that the request came from.
    #[default]
    ClientIp,
    /// `uri`: path and query.
    Uri,
    /// `header:NAME`: the first value of a request header; the client's address if the request has none.
    Header(http::HeaderName),
    /// `cookie:NAME`: the value of a cookie; the client's address if the request has none.
    Cookie(String),
    /// `query:NAME`: the value of a parameter of the query, as it is written there; the client's address if there is
    /// none.
    Query(String),
}

impl TryFrom<String> for HashOn {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (kind, name) = text.split_once(':').unwrap_or((&text, ""));
        match (kind, name) {
            ("client_ip", "") => Ok(Self::ClientIp),
            ("uri", "") => Ok(Self::Uri),
            ("header", name) => name
                .parse()
                .map(Self::Header)
                .map_err(|_| format!("hash_on: {name:?} is not the name of a header")),
            ("cookie", name) if is_token(name) => Ok(Self::Cookie(name.to_owned())),
            ("cookie", name) => Err(format!("hash_on: {name:?} is not the name of a cookie")),
            ("query", name) if !name.is_empty() => Ok(Self::Query(name.to_owned())),
            _ => Err(format!(
                "hash_on: {text:?} is none of client_ip, uri, header:NAME, cookie:NAME, query:NAME"
            )),
        }
    }
}

/// Whether a text is a token (RFC 9110, section 5.6.2), as names of cookies are.
pub(crate) fn is_token(text: &str) -> bool {
    // Names of fields are tokens.
    http::HeaderName::from_bytes(text.as_bytes()).is_ok()
}

/// What happens to requests that want to go on in another protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Upgrade {
    /// WebSocket is passed on; others get 501.
    #[default]
    Websocket,
    /// All are passed on, as they are.
    Any,
    /// All get 501.
    None,
}
/// How a client came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scheme {
    /// Without TLS.
    Http,
    /// Over TLS.
    Https,
}
