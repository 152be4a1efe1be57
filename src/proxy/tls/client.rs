//! What this process is as a client of its backends.

use std::sync::{Arc, OnceLock};

use rustls::client::ResolvesClientCert;
use rustls::{ClientConfig, RootCertStore};

use crate::error::ClusterError;
use crate::pem::provider;

/// A client that trusts these CAs, and shows this certificate if it is asked for one.
pub(super) fn client(
    roots: Arc<RootCertStore>,
    identity: Option<Arc<dyn ResolvesClientCert>>,
) -> Result<ClientConfig, ClusterError> {
    let client = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| ClusterError::config("tls", error.to_string()))?
        .with_root_certificates(roots);
    let mut client = match identity {
        Some(identity) => client.with_client_cert_resolver(identity),
        None => client.with_no_client_auth(),
    };
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(client)
}

/// The CAs of the system, as they were when they were first asked for; those that cannot be used are left out.
pub(super) fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let load = || {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    };
    ROOTS.get_or_init(load).clone()
}
