//! The certificates that the proxy uses, as they are shown.

use std::path::PathBuf;
use std::time::SystemTime;

/// A file with certificates that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CertificateFile {
    /// The field of the configuration that names it, such as `cluster.tls.certificates[0].cert_file`.
    pub field: String,
    /// The file.
    pub file: PathBuf,
    /// The names that the certificate is for which ends then; its subject, if it is for none.
    pub names: Vec<String>,
    /// When the first one of its certificates ends; of CAs, the last one.
    pub ends: SystemTime,
}
