//! Where clients connect.

use serde::Deserialize;

use super::tls::ListenerTls;

/// One of `further_listeners`, of which there may be 30: another address that clients connect to, for the same routes and groups.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Listener {
    /// `address:port` to listen on. Takes effect with a restart.
    pub listen: String,
    /// TLS to the clients that connect there. Default: none, plain text.
    #[serde(default)]
    pub tls: Option<ListenerTls>,
}

impl Listener {
    /// This address and port, without TLS.
    pub fn new(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            tls: None,
        }
    }
}
