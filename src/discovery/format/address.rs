//! Addresses as other registries write them.

use std::net::IpAddr;

use super::kinds::Scheme;

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::discovery) enum Host {
    Ip(IpAddr),
    /// A host name, which has to be resolved.
    Name(String),
}

/// An address of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::discovery) struct Address {
    pub(in crate::discovery) host: Host,
    pub(in crate::discovery) port: Option<u16>,
    /// `None` if it is not known.
    pub(super) scheme: Option<String>,
}

/// The scheme of a URL, and the rest.
pub(super) fn split_scheme(text: &str) -> (Option<String>, &str) {
    let text = text.trim();
    let Some((scheme, rest)) = text.split_once("://") else {
        return (None, text);
    };
    let scheme = scheme.to_ascii_lowercase();
    // Kratos before 2.3.1 said it in this way.
    let is_secure = rest.contains("isSecure=true") && ["grpc", "http"].contains(&&*scheme);
    let scheme = if is_secure {
        format!("{scheme}s")
    } else {
        scheme
    };
    (Some(scheme), rest)
}

/// Reads what follows the scheme. An error is in words.
pub(super) fn host_and_port(
    scheme: Option<&str>,
    rest: &str,
) -> Result<(Host, Option<u16>), String> {
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if scheme.is_none() && end < rest.len() {
        return Err(no_address(rest));
    }
    let (host, port) = split_port(&rest[..end])?;
    let usual = match scheme {
        Some("http") => Some(80),
        Some("https") => Some(443),
        _ => None,
    };
    Ok((host, port.or(usual)))
}

/// Reads a host without a port.
pub(super) fn host(text: &str) -> Result<Host, String> {
    let plain = text.trim();
    let inner = plain
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    if let Ok(ip) = inner.unwrap_or(plain).parse() {
        return Ok(Host::Ip(ip));
    }
    let is_name = plain.len() <= 253
        && plain.contains(|it: char| it.is_ascii_alphabetic())
        && plain.split('.').all(is_label);
    match is_name {
        true => Ok(Host::Name(plain.to_ascii_lowercase())),
        false => Err(no_address(text)),
    }
}

/// A part of a host name. Underscores are not allowed in it, but used.
fn is_label(text: &str) -> bool {
    let is_inside = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=63).contains(&text.len()) && text.bytes().all(is_inside) && !text.starts_with('-')
}

/// Some writers put no brackets around an IPv6 address: what follows the last colon is the port then.
fn split_port(text: &str) -> Result<(Host, Option<u16>), String> {
    if let Some((before, port)) = text.rsplit_once(':')
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(host) = host(before)
    {
        let port = port.parse::<u16>();
        let port = port.map_err(|_| format!("{text:?} has a port out of range"))?;
        return Ok((host, Some(port)));
    }
    Ok((host(text)?, None))
}

/// Without what may be a password before the host.
fn no_address(text: &str) -> String {
    let (_, text) = text.rsplit_once('@').unwrap_or(("", text));
    let short: String = text.chars().take(80).collect();
    format!("{short:?} is neither an IP address nor a host name")
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
