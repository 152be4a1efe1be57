//! TLS to backends: whom they have to be signed by, and who this process is.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use rustls::sign::CertifiedKey;

use super::files::{Check, Named, fingerprint};
use super::reload::Reloaded;
use crate::config::Backends;
use crate::error::ClusterError;
use crate::pem::{certificates, invalid_file, private_key, provider, trusted_roots};

/// TLS to backends, beyond the name that they are verified by.
#[derive(Clone)]
pub(in crate::proxy) struct BackendTls(Arc<Reloaded<Material>>);

#[derive(Default)]
struct Material {
    /// `None` for the CAs of the system.
    roots: Option<Arc<[WrappedX509]>>,
    identity: Option<Arc<CertKey>>,
    /// Keeps connections apart that were made with other files.
    mark: u64,
}

impl BackendTls {
    /// Errors name the field as a part of `field`.
    pub(in crate::proxy) fn new(config: &Backends, field: &str) -> Result<Self, ClusterError> {
        let named = [
            ("ca_file", &config.ca_file),
            ("cert_file", &config.cert_file),
            ("key_file", &config.key_file),
        ];
        let named = named.into_iter().filter_map(|(name, path)| {
            let path = path.as_ref()?;
            Some(Named::new(&format!("{field}.{name}"), path))
        });
        let files: Vec<_> = named.collect();
        let (has_roots, named) = (config.ca_file.is_some(), files.clone());
        let make = move |contents: &[Vec<u8>]| {
            let mut read = named.iter().zip(contents);
            let mut material = Material {
                mark: fingerprint(contents) as u64,
                ..Material::default()
            };
            if has_roots && let Some((file, pem)) = read.next() {
                material.roots = Some(roots(file, pem)?);
            }
            if let (Some(cert), Some(key)) = (read.next(), read.next()) {
                material.identity = Some(identity(cert, key)?);
            }
            Ok(material)
        };
        Reloaded::new(files, make).map(|material| Self(Arc::new(material)))
    }

    pub(in crate::proxy) fn files(&self) -> Arc<dyn Check> {
        self.0.clone()
    }

    /// Adds this to a peer whose name has been set.
    pub(in crate::proxy) fn add_to(&self, peer: &mut HttpPeer) {
        let material = self.0.current();
        peer.options.ca.clone_from(&material.roots);
        peer.client_cert_key.clone_from(&material.identity);
        peer.group_key ^= material.mark;
    }
}

fn roots(file: &Named, pem: &[u8]) -> Result<Arc<[WrappedX509]>, ClusterError> {
    // Pingora refuses each connection if it does not understand one of them.
    let usable = trusted_roots(&file.field, &file.path, pem)?;
    let all = certificates(&file.field, &file.path, pem)?;
    if usable.len() < all.len() {
        return Err(invalid_file(
            &file.field,
            &file.path,
            "has a certificate that cannot be used",
        ));
    }
    wrapped(file, all.iter().map(|der| der.to_vec()).collect())
}

/// Pingora's parser panics at what it does not understand.
fn wrapped(file: &Named, ders: Vec<Vec<u8>>) -> Result<Arc<[WrappedX509]>, ClusterError> {
    let parse = || {
        ders.into_iter()
            .map(|der| WrappedX509::new(der, parse_x509))
            .collect()
    };
    catch_unwind(AssertUnwindSafe(parse))
        .map_err(|_| invalid_file(&file.field, &file.path, "cannot be parsed"))
}

type Content<'a> = (&'a Named, &'a Vec<u8>);

fn identity((cert, pem): Content, (key, key_pem): Content) -> Result<Arc<CertKey>, ClusterError> {
    let chain = certificates(&cert.field, &cert.path, pem)?;
    let secret = private_key(&key.field, &key.path, key_pem)?;
    let ders: Vec<_> = chain.iter().map(|der| der.to_vec()).collect();
    let der = secret.secret_der().to_vec();
    CertifiedKey::from_der(chain, secret, &provider())
        .map_err(|error| invalid_file(&key.field, &key.path, &error.to_string()))?;
    wrapped(cert, ders.clone())?;
    Ok(Arc::new(CertKey::new(ders, der)))
}
