//! TLS to backends: whom they have to be signed by, and who this process is.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ::pingora::upstreams::peer::HttpPeer;
use ::pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore};

use super::client::{client, system_roots};
use super::files::{Check, Named, fingerprint};
use super::reload::Reloaded;
use crate::config::Backends;
use crate::error::ClusterError;
use crate::pem::{certificates, invalid_file, private_key, provider, trusted_roots};
use crate::proxy::connections::Secure;

/// TLS to backends, beyond the name that they are verified by. A file that cannot be used holds up only its own
/// part.
#[derive(Clone)]
pub(in crate::proxy) struct BackendTls {
    /// `None` for the CAs of the system.
    roots: Option<Arc<Reloaded<Marked<Roots>>>>,
    identity: Option<Arc<Reloaded<Marked<Identity>>>>,
    /// What was made last from both.
    client: Arc<ArcSwap<Marked<ClientConfig>>>,
}

/// CAs, as Pingora and rustls want them.
struct Roots {
    wrapped: Arc<[WrappedX509]>,
    store: Arc<RootCertStore>,
}

/// A certificate with its key, the same.
struct Identity {
    wrapped: Arc<CertKey>,
    certified: Arc<SingleCertAndKey>,
}

/// What was made from files.
struct Marked<T> {
    made: Arc<T>,
    /// Keeps connections apart that were made with other files.
    mark: u64,
}

fn marked<T>(made: T, contents: &[Vec<u8>]) -> Marked<T> {
    Marked {
        made: Arc::new(made),
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
        let (roots, identity) = (roots.transpose()?, identity.transpose()?);
        let client = client_of(
            roots.as_ref().map(Reloaded::current).as_deref(),
            identity.as_ref().map(Reloaded::current).as_deref(),
        )?;
        Ok(Self {
            roots: roots.map(Arc::new),
            identity: identity.map(Arc::new),
            client: Arc::new(ArcSwap::from_pointee(client)),
        })
    }

    /// TLS to a backend that is verified by this name; `None` if it can be the name of none.
    pub(in crate::proxy) fn secure(
        &self,
        name: &str,
        connect: Duration,
        handshake: Duration,
    ) -> Option<Secure> {
        let roots = self.roots.as_ref().map(|it| it.current());
        let identity = self.identity.as_ref().map(|it| it.current());
        let (roots, identity) = (roots.as_deref(), identity.as_deref());
        let client = self.client.load();
        let config = match client.mark == mark_of(roots, identity) {
            true => client.made.clone(),
            false => {
                let client = client_of(roots, identity).ok()?;
                let config = client.made.clone();
                self.client.store(Arc::new(client));
                config
            }
        };
        Secure::new(config, name, connect, handshake)
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
            peer.options.ca = Some(roots.made.wrapped.clone());
            peer.group_key ^= roots.mark;
        }
        if let Some(identity) = &self.identity {
            let identity = identity.current();
            peer.client_cert_key = Some(identity.made.wrapped.clone());
            peer.group_key ^= identity.mark;
        }
    }
}

type MarkedRoots<'a> = Option<&'a Marked<Roots>>;
type MarkedIdentity<'a> = Option<&'a Marked<Identity>>;

fn mark_of(roots: MarkedRoots<'_>, identity: MarkedIdentity<'_>) -> u64 {
    roots.map_or(0, |it| it.mark) ^ identity.map_or(0, |it| it.mark)
}

fn client_of(
    roots: MarkedRoots<'_>,
    identity: MarkedIdentity<'_>,
) -> Result<Marked<ClientConfig>, ClusterError> {
    let store = roots.map_or_else(system_roots, |it| it.made.store.clone());
    let certified = identity.map(|it| it.made.certified.clone() as Arc<dyn ResolvesClientCert>);
    Ok(Marked {
        made: Arc::new(client(store, certified)?),
        mark: mark_of(roots, identity),
    })
}

fn roots(file: &Named, pem: &[u8]) -> Result<Roots, ClusterError> {
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
    Ok(Roots {
        wrapped: wrapped(file, all.iter().map(|der| der.to_vec()).collect())?,
        store: Arc::new(usable),
    })
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

fn identity((cert, pem): Content, (key, key_pem): Content) -> Result<Identity, ClusterError> {
    let chain = certificates(&cert.field, &cert.path, pem)?;
    let secret = private_key(&key.field, &key.path, key_pem)?;
    let ders: Vec<_> = chain.iter().map(|der| der.to_vec()).collect();
    let der = secret.secret_der().to_vec();
    let certified = CertifiedKey::from_der(chain, secret, &provider())
        .map_err(|error| invalid_file(&key.field, &key.path, &error.to_string()))?;
    wrapped(cert, ders.clone())?;
    Ok(Identity {
        wrapped: Arc::new(CertKey::new(ders, der)),
        certified: Arc::new(certified.into()),
    })
}
