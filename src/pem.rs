//! PEM files: certificates and keys, with errors that name the field and the file, and never show a
//! key.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::ClusterError;

/// The cryptography of this process: the one that it has chosen, or ring.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    match CryptoProvider::get_default() {
        Some(provider) => provider.clone(),
        None => Arc::new(ring::default_provider()),
    }
}

/// The certificates in a PEM file. Errors of the PEM parser are not passed on: they may show a line of
/// a key.
pub(crate) fn certificates(
    field: &str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ClusterError> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(invalid_file(field, path, "has no PEM certificate")),
        Err(_) => Err(invalid_file(field, path, "is not a complete PEM file")),
    }
}

/// The private key in a PEM file.
pub(crate) fn private_key(
    field: &str,
    path: &Path,
    pem: &[u8],
) -> Result<PrivateKeyDer<'static>, ClusterError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|_| invalid_file(field, path, "has no complete PEM private key"))
}

/// Those certificates of a PEM file that can be trusted as CAs: a bundle may contain some that are
/// not understood.
pub(crate) fn trusted_roots(
    field: &str,
    path: &Path,
    pem: &[u8],
) -> Result<RootCertStore, ClusterError> {
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(certificates(field, path, pem)?);
    if usable == 0 {
        return Err(invalid_file(field, path, "has no usable certificate"));
    }
    Ok(roots)
}

/// An error about a file that a field names.
pub(crate) fn invalid_file(field: &str, path: &Path, reason: &str) -> ClusterError {
    ClusterError::config(field, format!("{}: {reason}", path.display()))
}
