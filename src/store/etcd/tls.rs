//! The TLS options of the connection to etcd, and the checks of their files.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::ClusterError;

/// TLS to etcd, for `https://` endpoints and for those without a scheme. Needs the feature `tls`.
///
/// The files are PEM. They are read for every connection, and checked for changes every 3 s while
/// one is open: when they have changed and are valid, a connection with the new ones is made and
/// replaces the old one, without a restart. New files that are invalid, or with which etcd cannot be
/// reached, are logged once, and the old connection stays.
///
/// ```
/// use pingora_etcd::{EtcdOptions, store::TlsOptions};
/// let tls = TlsOptions::new()
///     .ca_file("/etc/etcd/ca.pem")
///     .identity("/etc/etcd/balancer.pem", "/etc/etcd/balancer.key");
/// let options = EtcdOptions::new(["https://10.0.0.1:2379"]).tls(tls);
/// // The files are not there.
/// # #[cfg(feature = "tls")]
/// assert!(options.validate().unwrap_err().to_string().contains("tls.ca_file"));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct TlsOptions {
    /// The certificates of the CAs that may have signed etcd's. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// This client's own certificate and the intermediate ones, for an etcd that requires one
    /// (`--client-cert-auth`). Needs `key_file`. Default: none.
    pub cert_file: Option<PathBuf>,
    /// The private key of `cert_file`. Default: none.
    pub key_file: Option<PathBuf>,
    /// The name that etcd's certificate must be valid for. Default: the host of the endpoint.
    pub server_name: Option<String>,
}

impl TlsOptions {
    /// Every default: the system's CAs, no client certificate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`ca_file`](Self::ca_file).
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(file.into());
        self
    }

    /// Sets [`cert_file`](Self::cert_file) and [`key_file`](Self::key_file).
    #[must_use]
    pub fn identity(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(cert.into());
        self.key_file = Some(key.into());
        self
    }

    /// Sets [`server_name`](Self::server_name).
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Checks that a certificate has a key, and a key a certificate.
    pub(super) fn check_values(&self) -> Result<(), ClusterError> {
        let (field, reason) = match (&self.cert_file, &self.key_file) {
            (Some(_), None) => ("tls.key_file", "is required by tls.cert_file"),
            (None, Some(_)) => ("tls.cert_file", "is required by tls.key_file"),
            _ => return Ok(()),
        };
        Err(ClusterError::config(field, reason))
    }
}

/// Why there is no TLS.
#[cfg(not(feature = "tls"))]
pub(super) const NEEDS_FEATURE: &str = "TLS needs the feature \"tls\" of pingora-etcd";
