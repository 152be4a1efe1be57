//! The certificate files of a TLS connection: reading them, comparing them, and checking that a TLS
//! client can use them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WantsClientCert;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ConfigBuilder, Error, InconsistentKeys, RootCertStore};

use super::files::read_file;
use super::tls::TlsOptions;
use crate::error::ClusterError;

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
    // The same choice as the TLS client of the connection makes.
    let provider = match CryptoProvider::get_default() {
        Some(provider) => provider.clone(),
        None => Arc::new(ring::default_provider()),
    };
    let roots = match &files.ca {
        Some(ca) => trusted_roots(tls.ca_file.as_deref(), ca)?,
        None => RootCertStore::empty(),
    };
    let client = ClientConfig::builder_with_provider(provider)
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

fn trusted_roots(path: Option<&Path>, pem: &[u8]) -> Result<RootCertStore, ClusterError> {
    let field = "tls.ca_file";
    let mut roots = RootCertStore::empty();
    // As the TLS client does: a bundle may contain some that it does not understand.
    let (usable, _) = roots.add_parsable_certificates(certificates(field, path, pem)?);
    if usable == 0 {
        return Err(invalid_file(field, path, "has no usable certificate"));
    }
    Ok(roots)
}

fn with_identity(
    client: ConfigBuilder<ClientConfig, WantsClientCert>,
    tls: &TlsOptions,
    cert: &[u8],
    key: &[u8],
) -> Result<ClientConfig, ClusterError> {
    let (cert_file, key_file) = (tls.cert_file.as_deref(), tls.key_file.as_deref());
    let invalid_key = |reason: &str| invalid_file("tls.key_file", key_file, reason);
    let chain = certificates("tls.cert_file", cert_file, cert)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| invalid_key("has no complete PEM private key"))?;
    client
        .with_client_auth_cert(chain, key)
        .map_err(|error| match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                let cert = cert_file.unwrap_or(Path::new("")).display();
                invalid_key(&format!("is not the key of the certificate in {cert}"))
            }
            other => invalid_key(&other.to_string()),
        })
}

/// The certificates in a PEM file. Errors of the PEM parser are not passed on: they may show a line of
/// a key.
fn certificates(
    field: &str,
    path: Option<&Path>,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ClusterError> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(invalid_file(field, path, "has no PEM certificate")),
        Err(_) => Err(invalid_file(field, path, "is not a complete PEM file")),
    }
}

fn invalid_file(field: &str, path: Option<&Path>, reason: &str) -> ClusterError {
    let path = path.unwrap_or(Path::new("")).display();
    ClusterError::config(field, format!("{path}: {reason}"))
}

#[cfg(test)]
mod tests;
