//! The certificate files of a TLS connection: reading them, comparing them, and checking that a TLS
//! client can use them.

use std::path::{Path, PathBuf};

use rustls::client::WantsClientCert;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ConfigBuilder, Error, InconsistentKeys, RootCertStore};

use super::files::read_file;
use super::tls::TlsOptions;
use crate::error::ClusterError;
use crate::pem::{certificates, invalid_file, private_key, provider, trusted_roots};

/// The contents of the files.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TlsFiles {
    pub(super) ca: Option<Vec<u8>>,
    /// Certificate and key.
    pub(super) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl TlsFiles {
    /// A hash of the contents, to notice changes without keeping a key in memory.
    pub(super) fn fingerprint(&self) -> u128 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        let identity = self.identity.as_ref();
        let cert = identity.map(|(cert, _)| cert);
        let key = identity.map(|(_, key)| key);
        for part in [self.ca.as_ref(), cert, key] {
            let part = part.map_or(&[][..], Vec::as_slice);
            hasher.update(&part.len().to_le_bytes());
            hasher.update(part);
        }
        hasher.digest128()
    }
}

/// Whether there is a file that can change.
pub(super) fn has_files(tls: &TlsOptions) -> bool {
    tls.ca_file.is_some() || tls.cert_file.is_some()
}

/// Reads the files without checking their contents. Blocks.
pub(super) fn read(tls: &TlsOptions) -> Result<TlsFiles, ClusterError> {
    let read_if_set = |field, path: &Option<PathBuf>| match path {
        Some(path) => read_file(field, path).map(Some),
        None => Ok(None),
    };
    let ca = read_if_set("tls.ca_file", &tls.ca_file)?;
    let cert = read_if_set("tls.cert_file", &tls.cert_file)?;
    let key = read_if_set("tls.key_file", &tls.key_file)?;
    Ok(TlsFiles {
        ca,
        identity: cert.zip(key),
    })
}

/// Checks the options, and that the files are there and can be used. Blocks.
pub(super) fn validate(tls: &TlsOptions) -> Result<(), ClusterError> {
    tls.check_values()?;
    load(tls).map(drop)
}

/// Reads the files and checks that they can be used. Blocks.
pub(super) fn load(tls: &TlsOptions) -> Result<TlsFiles, ClusterError> {
    let files = read(tls)?;
    check(tls, &files)?;
    Ok(files)
}

/// Checks that these contents can be used. Returns the configuration of a client that uses them;
/// without a CA file it trusts nobody.
pub(super) fn check(tls: &TlsOptions, files: &TlsFiles) -> Result<ClientConfig, ClusterError> {
    let roots = match &files.ca {
        Some(ca) => trusted_roots("tls.ca_file", of(&tls.ca_file), ca)?,
        None => RootCertStore::empty(),
    };
    // The same choice as the TLS client of the connection makes.
    let client = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| ClusterError::config("tls", error.to_string()))?
        .with_root_certificates(roots);
    let client = match &files.identity {
        Some((cert, key)) => with_identity(client, tls, cert, key)?,
        None => client.with_no_client_auth(),
    };
    if let Some(name) = &tls.server_name
        && ServerName::try_from(name.as_str()).is_err()
    {
        let reason = format!("{name:?} is neither a host name nor an IP address");
        return Err(ClusterError::config("tls.server_name", reason));
    }
    Ok(client)
}

fn with_identity(
    client: ConfigBuilder<ClientConfig, WantsClientCert>,
    tls: &TlsOptions,
    cert: &[u8],
    key: &[u8],
) -> Result<ClientConfig, ClusterError> {
    let (cert_file, key_file) = (of(&tls.cert_file), of(&tls.key_file));
    let invalid_key = |reason: &str| invalid_file("tls.key_file", key_file, reason);
    let chain = certificates("tls.cert_file", cert_file, cert)?;
    let key = private_key("tls.key_file", key_file, key)?;
    client
        .with_client_auth_cert(chain, key)
        .map_err(|error| match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                let cert = cert_file.display();
                invalid_key(&format!("is not the key of the certificate in {cert}"))
            }
            other => invalid_key(&other.to_string()),
        })
}

fn of(path: &Option<PathBuf>) -> &Path {
    path.as_deref().unwrap_or(Path::new(""))
}

#[cfg(test)]
mod tests;
