//! The `admin` section.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// Where the page, the JSON and the metrics of the process are shown (feature `admin`). Without a token, nothing can
/// be changed there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Admin {
    /// `address:port` to listen on. Default: `127.0.0.1:6189`.
    pub listen: SocketAddr,
    /// Whether the address may be another one than of this machine only. Everybody who can connect sees
    /// everything. Default: false.
    pub public: bool,
    /// The names by which it may be asked for, beside addresses and `localhost`: a page of others must
    /// not read it under a name of theirs. Default: none.
    pub hosts: BTreeSet<String>,
    /// How many nodes have metrics of their own, the first ones by id. Default: 200. Range: 0 to 10,000.
    pub metrics_nodes: usize,
    /// A file with the token of those who may drain nodes, move leadership, and reload: at least 16 characters,
    /// without spaces. It is read at the start. Whoever can read what is sent can use it, so outside of this machine
    /// put TLS before it. Default: none, nothing can be changed.
    pub token_file: Option<PathBuf>,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 6189)),
            public: false,
            hosts: BTreeSet::new(),
            metrics_nodes: 200,
            token_file: None,
        }
    }
}

/// The fewest characters of a token.
const TOKEN: usize = 16;

impl Admin {
    /// Reads the token, if there is one. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) when the file cannot be read, or is not a token.
    pub fn token(&self, field: &str) -> Result<Option<String>, ClusterError> {
        let Some(file) = &self.token_file else {
            return Ok(None);
        };
        let error = |reason: String| {
            ClusterError::config(
                format!("{field}.token_file"),
                format!("{}: {reason}", file.display()),
            )
        };
        let text = std::fs::read_to_string(file).map_err(|failed| error(failed.to_string()))?;
        let token = text.trim_end_matches(['\r', '\n']);
        if token.len() < TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(error(format!(
                "is no token: at least {TOKEN} visible characters of ASCII, without spaces"
            )));
        }
        Ok(Some(token.to_owned()))
    }

    /// Checks every field. Errors name it as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and what is allowed.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        if !self.listen.ip().is_loopback() && !self.public {
            let listen = self.listen;
            let reason = format!(
                "{listen} can be reached from other machines; say public: true if that is meant"
            );
            return Err(ClusterError::config(format!("{field}.listen"), reason));
        }
        if self.listen.port() == 0 {
            let reason = "has port 0, so nobody would know which one it is";
            return Err(ClusterError::config(format!("{field}.listen"), reason));
        }
        // A port or a space in it would never be equal to the name that is asked for.
        let is_name = |host: &String| {
            let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            !host.is_empty() && host.bytes().all(is_part)
        };
        if let Some(host) = self.hosts.iter().find(|host| !is_name(host)) {
            let reason = format!("{host:?} is not a name; it has no port");
            return Err(ClusterError::config(format!("{field}.hosts"), reason));
        }
        in_range(field, "metrics_nodes", self.metrics_nodes, 0..=10_000)
    }
}
