//! The `backends` section.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// How the bundled proxy speaks to backends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Backends {
    /// The protocol. Default: `http1`.
    pub protocol: Protocol,
    /// Whether a node that registered a [`Protocol`] in its metadata, as `protocol`, and the name in
    /// its certificate, as `server_name`, is spoken to in that way. One without TLS is ignored where
    /// [`protocol`](Self::protocol) has TLS, so that nobody can switch it off. Default: `false`.
    pub protocol_of_node: bool,
    /// The name that certificates of backends have to be for, and that is sent as SNI. Required for
    /// `https` and `h2`; before what a node says. Default: none.
    pub server_name: Option<String>,
    /// PEM, the CAs that may have signed certificates of backends. Read again when it changes.
    /// Default: none, those of the system.
    pub ca_file: Option<PathBuf>,
    /// PEM, a client certificate for backends that want one. Read again when it changes. Needs
    /// `key_file`. Default: none.
    pub cert_file: Option<PathBuf>,
    /// PEM, its private key. Default: none.
    pub key_file: Option<PathBuf>,
    /// Requests at one time on one connection of HTTP/2; more connections are made for more.
    /// Default: 100. Range: 1 to 10,000.
    pub streams: usize,
}

/// How a backend is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Protocol {
    /// HTTP/1.1 without TLS.
    #[default]
    Http1,
    /// HTTP/2 without TLS, by prior knowledge. What gRPC servers speak.
    H2c,
    /// HTTP/1.1 over TLS.
    Https,
    /// HTTP/2 over TLS.
    H2,
}

impl Protocol {
    /// Whether this is over TLS.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::H2)
    }

    /// Whether this is HTTP/2.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::H2c | Self::H2)
    }

    /// The protocol of this name, as in the file.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "http1" => Some(Self::Http1),
            "h2c" => Some(Self::H2c),
            "https" => Some(Self::Https),
            "h2" => Some(Self::H2),
            _ => None,
        }
    }
}

/// Whether a certificate can be for this name.
pub(crate) fn is_name(name: &str) -> bool {
    let is_part = |part: &str| {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !part.is_empty() && part.len() <= 63 && part.bytes().all(is_allowed)
    };
    let host = name.strip_suffix('.').unwrap_or(name);
    let is_host = name.len() <= 253 && host.split('.').all(is_part);
    name.parse::<std::net::IpAddr>().is_ok() || (is_host && !is_changed_by_pingora(name))
}

/// Pingora verifies by another name, with hyphens, where the first of three labels or more has underscores.
fn is_changed_by_pingora(name: &str) -> bool {
    let labels = name.split_once('.');
    labels.is_some_and(|(first, rest)| first.contains('_') && rest.contains('.'))
}

impl Default for Backends {
    fn default() -> Self {
        Self {
            protocol: Protocol::Http1,
            protocol_of_node: false,
            server_name: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            streams: 100,
        }
    }
}

impl Backends {
    /// Whether TLS may be needed.
    pub(crate) fn may_use_tls(&self) -> bool {
        self.protocol.is_tls() || self.protocol_of_node
    }

    /// Checks every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let error =
            |name: &str, reason: &str| Err(ClusterError::config(format!("{field}.{name}"), reason));
        let name = self.server_name.as_deref();
        if name.is_some_and(is_changed_by_pingora) {
            return error(
                "server_name",
                "has an underscore before its first dot, for which Pingora puts a hyphen, so certificates could not be verified",
            );
        }
        if name.is_some_and(|name| !is_name(name)) {
            return error(
                "server_name",
                "is neither a host name nor an address, so certificates could not be verified",
            );
        }
        if self.protocol.is_tls() {
            if cfg!(not(feature = "proxy-tls")) {
                return error("protocol", "TLS needs the feature proxy-tls of this crate");
            }
            if name.is_none() {
                return error(
                    "server_name",
                    "is needed for TLS: the name that the certificates of the backends are for",
                );
            }
        }
        if !self.may_use_tls() {
            for (name, is_given) in [
                ("server_name", self.server_name.is_some()),
                ("ca_file", self.ca_file.is_some()),
                ("cert_file", self.cert_file.is_some()),
                ("key_file", self.key_file.is_some()),
            ] {
                if is_given {
                    return error(
                        name,
                        "has no effect without TLS: set protocol to https or h2",
                    );
                }
            }
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return error(
                "key_file",
                "is needed with cert_file, and the other way round",
            );
        }
        in_range(field, "streams", self.streams, 1..=10_000)
    }
}
