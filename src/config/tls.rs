//! The `tls` section: TLS to clients.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::ClusterError;

/// TLS to the clients of the bundled proxy, on one of its addresses. TLS 1.2 and 1.3.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ListenerTls {
    /// The certificates. A client gets the first one that is for the name it asks for (SNI), otherwise
    /// the first one. At least one. Read again within seconds when a file changes; files that cannot be
    /// used then change nothing.
    pub certificates: Vec<CertificateFiles>,
    /// PEM, the CAs that may have signed certificates of clients. Read again when it changes. Needed
    /// by `client_certificate`. Default: none.
    #[serde(default)]
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients show a certificate, which backends get in the field `Client-Cert` (RFC 9440).
    /// Default: `none`.
    #[serde(default)]
    pub client_certificate: ClientCertificate,
    /// Whether HTTP/2 is offered. Default: `true`.
    #[serde(default = "default_http2")]
    pub http2: bool,
}

/// A certificate with its chain, and its private key, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CertificateFiles {
    /// The certificate, and those between it and its CA.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Whether clients show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ClientCertificate {
    /// They are not asked for one.
    #[default]
    None,
    /// They may. One that cannot be verified ends the connection.
    Optional,
    /// They must.
    Required,
}

pub(super) fn default_http2() -> bool {
    true
}

impl ListenerTls {
    /// Checks what needs no file. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let error =
            |name: &str, reason: &str| Err(ClusterError::config(format!("{field}.{name}"), reason));
        if cfg!(not(feature = "proxy-tls")) {
            return error(
                "certificates",
                "TLS needs the feature proxy-tls of this crate",
            );
        }
        if self.certificates.is_empty() {
            return error("certificates", "is empty");
        }
        let is_asked = self.client_certificate != ClientCertificate::None;
        match (&self.client_ca_file, is_asked) {
            (None, true) => error("client_ca_file", "is needed by client_certificate"),
            (Some(_), false) => error(
                "client_ca_file",
                "has no effect: set client_certificate to optional or required",
            ),
            _ => Ok(()),
        }
    }
}
