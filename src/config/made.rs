//! Sections that a program makes instead of reading them from a file: each with what it cannot do without, and its
//! defaults.

use std::path::PathBuf;

use super::opentelemetry::{self, OpenTelemetry};
use super::route::{
    Mirror, Redirect, default_mirror_body, default_percent, default_redirect_status,
};
use super::tls::{CertificateFiles, ClientCertificate, ListenerTls, default_http2};

impl Redirect {
    /// To this address, with status 308.
    pub fn new(to: impl Into<String>) -> Self {
        Self {
            to: to.into(),
            status: default_redirect_status(),
        }
    }
}

impl Mirror {
    /// To this group, with copies of all requests.
    pub fn new(group: impl Into<String>) -> Self {
        Self {
            group: group.into(),
            percent: default_percent(),
            body_bytes: default_mirror_body(),
        }
    }
}

impl OpenTelemetry {
    /// To the collector at this address.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            sample: opentelemetry::default_sample(),
            service_name: opentelemetry::default_service_name(),
        }
    }
}

impl CertificateFiles {
    /// A certificate with its chain, and its key.
    pub fn new(cert_file: impl Into<PathBuf>, key_file: impl Into<PathBuf>) -> Self {
        Self {
            cert_file: cert_file.into(),
            key_file: key_file.into(),
        }
    }
}

impl ListenerTls {
    /// With these certificates; clients need none.
    pub fn new(certificates: impl IntoIterator<Item = CertificateFiles>) -> Self {
        Self {
            certificates: certificates.into_iter().collect(),
            client_ca_file: None,
            client_certificate: ClientCertificate::default(),
            http2: default_http2(),
        }
    }
}
