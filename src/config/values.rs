//! Values of fields that have a form of their own.

use serde::Deserialize;

/// A port, or a range of them: `8080` or `9000-9100`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
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
    /// `header:NAME`: the value of a request header; empty if the request has none.
    Header(http::HeaderName),
}

impl TryFrom<String> for HashOn {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match (text.as_str(), text.strip_prefix("header:")) {
            ("client_ip", _) => Ok(Self::ClientIp),
            ("uri", _) => Ok(Self::Uri),
            (_, Some(name)) => name
                .parse()
                .map(Self::Header)
                .map_err(|_| format!("hash_on: {name:?} is not the name of a header")),
            _ => Err(format!(
                "hash_on: {text:?} is none of client_ip, uri, header:NAME"
            )),
        }
    }
}
