//! Addresses as other registries write them.

use std::net::{IpAddr, Ipv6Addr};

use super::kinds::Scheme;

/// An address of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// `None` if it does not name one.
    pub(super) scheme: Option<String>,
    pub(super) ip: IpAddr,
    pub(super) port: Option<u16>,
}

/// Reads `host:port` or a URL. An error is in words.
pub(super) fn parse(text: &str) -> Result<Address, String> {
    let text = text.trim();
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (Some(scheme.to_ascii_lowercase()), rest),
        None => (None, text),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, more) = rest.split_at(end);
    if scheme.is_none() && end < rest.len() {
        return Err(format!("{text:?} is no address"));
    }
    // Kratos before 2.3.1 said it in this way.
    let is_secure = more.contains("isSecure=true");
    let scheme = scheme.map(|scheme| match &*scheme {
        "grpc" | "http" if is_secure => format!("{scheme}s"),
        _ => scheme,
    });
    let (ip, port) = host_and_port(authority)?;
    let usual = match scheme.as_deref() {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    };
    Ok(Address {
        scheme,
        ip,
        port: port.or(usual),
    })
}

/// Reads a host without a port.
pub(super) fn host(text: &str) -> Result<IpAddr, String> {
    let plain = text.trim();
    let inner = plain
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let parsed = inner.unwrap_or(plain).parse::<IpAddr>();
    parsed.map_err(|_| no_address(text))
}

/// Some writers put no brackets around an IPv6 address: what follows the last colon is the port then.
fn host_and_port(text: &str) -> Result<(IpAddr, Option<u16>), String> {
    if let Some((before, port)) = text.rsplit_once(':')
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(ip) = host(before)
    {
        let is_bare = !text.starts_with('[') && before.contains(':');
        // `::1` is an address, and `:` before a port is none.
        if is_bare && before.ends_with(':') && text.parse::<Ipv6Addr>().is_ok() {
            return Ok((host(text)?, None));
        }
        let port = port.parse::<u16>();
        let port = port.map_err(|_| format!("{text:?} has a port out of range"))?;
        return Ok((ip, Some(port)));
    }
    Ok((host(text)?, None))
}

fn no_address(text: &str) -> String {
    let short: String = text.chars().take(80).collect();
    format!("{short:?} is no IP address; host names are not resolved")
}

impl Scheme {
    /// The word in an entry.
    pub(super) fn word(self) -> Option<&'static str> {
        match self {
            Self::Any => None,
            Self::Http => Some("http"),
            Self::Https => Some("https"),
            Self::Grpc => Some("grpc"),
            Self::Grpcs => Some("grpcs"),
        }
    }
}

/// How a backend with this scheme is spoken to, as `metadata_keys::PROTOCOL` has it; `None` for others.
pub(super) fn protocol(scheme: &str) -> Option<&'static str> {
    match scheme {
        "http" => Some("http1"),
        "https" => Some("https"),
        "grpc" => Some("h2c"),
        "grpcs" => Some("h2"),
        _ => None,
    }
}
