//! TLS to backends: whom they have to be signed by, and who this process is.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use rustls::sign::CertifiedKey;

use super::files::{Check, Named, fingerprint};
use super::reload::Reloaded;
use crate::config::Backends;
use crate::error::ClusterError;
use crate::pem::{certificates, invalid_file, private_key, provider, trusted_roots};

/// TLS to backends, beyond the name that they are verified by. A file that cannot be used holds up only its own
/// part.
#[derive(Clone)]
pub(in crate::proxy) struct BackendTls {
    /// `None` for the CAs of the system.
    roots: Option<Arc<Reloaded<Marked<[WrappedX509]>>>>,
    identity: Option<Arc<Reloaded<Marked<CertKey>>>>,
}

/// What was made from files.
struct Marked<T: ?Sized> {
    made: Arc<T>,
    /// Keeps connections apart that were made with other files.
    mark: u64,
}

fn marked<T: ?Sized>(made: Arc<T>, contents: &[Vec<u8>]) -> Marked<T> {
    Marked {
        made,
        mark: fingerprint(contents) as u64,
    }
}

impl BackendTls {
    /// Errors name the field as a part of `field`.
    pub(in crate::proxy) fn new(config: &Backends, field: &str) -> Result<Self, ClusterError> {
        let named = |name: &str, path: &Path| Named::new(&format!("{field}.{name}"), path);
        let roots = config.ca_file.as_ref().map(|path| {
            let file = named("ca_file", path);
            Reloaded::new(vec![file.clone()], move |contents: &[Vec<u8>]| {
                let pem = contents.first().map_or(&[][..], Vec::as_slice);
                Ok(marked(roots(&file, pem)?, contents))
            })
        });
        let pair = config.cert_file.as_ref().zip(config.key_file.as_ref());
        let identity = pair.map(|(cert, key)| {
            let files = [named("cert_file", cert), named("key_file", key)];
            Reloaded::new(files.to_vec(), move |contents: &[Vec<u8>]| {
                let [cert, key] = &files;
                let pem = |index: usize| contents.get(index).map_or(&[][..], Vec::as_slice);
                let made = identity((cert, pem(0)), (key, pem(1)))?;
                Ok(marked(made, contents))
            })
        });
        Ok(Self {
            roots: roots.transpose()?.map(Arc::new),
            identity: identity.transpose()?.map(Arc::new),
        })
    }

    pub(in crate::proxy) fn files(&self) -> Vec<Arc<dyn Check>> {
        let mut all: Vec<Arc<dyn Check>> = Vec::new();
        if let Some(roots) = &self.roots {
            all.push(roots.clone());
        }
        if let Some(identity) = &self.identity {
            all.push(identity.clone());
        }
        all
    }

    /// Adds this to a peer whose name has been set.
    pub(in crate::proxy) fn add_to(&self, peer: &mut HttpPeer) {
        if let Some(roots) = &self.roots {
            let roots = roots.current();
            peer.options.ca = Some(roots.made.clone());
            peer.group_key ^= roots.mark;
        }
        if let Some(identity) = &self.identity {
            let identity = identity.current();
            peer.client_cert_key = Some(identity.made.clone());
            peer.group_key ^= identity.mark;
        }
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

type Content<'a> = (&'a Named, &'a [u8]);

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
