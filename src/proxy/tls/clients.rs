//! TLS to clients: which certificate they get, and which ones of theirs are accepted.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ::pingora::listeners::tls::Acceptor;
use ::pingora::protocols::l4::stream::Stream as L4Stream;
use ::pingora::protocols::{Ssl, Stream};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::BytesMut;
use http::HeaderValue;
use rustls::SignatureScheme;
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, NoClientAuth, ParsedCertificate, ResolvesServerCert, ServerConfig,
    WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;

use super::files::{Check, Named};
use super::reload::Reloaded;
use crate::config::{ClientCertificate, ListenerTls};
use crate::error::ClusterError;
use crate::pem::{certificates, invalid_file, private_key, provider, trusted_roots};

/// A certificate with its key.
type Pair = Reloaded<CertifiedKey>;

/// TLS to clients. What can be renewed by itself is read by itself, so that a file that cannot be used holds up
/// nothing else.
#[derive(Clone)]
pub(in crate::proxy) struct ClientTls {
    /// Made from the CAs of clients, if there are any.
    acceptor: Arc<Reloaded<Acceptor>>,
    pairs: Vec<Arc<Pair>>,
}

impl ClientTls {
    /// What this section of the file says; `field` is its name.
    pub(in crate::proxy) fn new(config: &ListenerTls, field: &str) -> Result<Self, ClusterError> {
        let mut pairs = Vec::new();
        for (index, pair) in config.certificates.iter().enumerate() {
            let field = format!("{field}.certificates[{index}]");
            let cert = Named::new(&format!("{field}.cert_file"), &pair.cert_file);
            let key = Named::new(&format!("{field}.key_file"), &pair.key_file);
            let files = vec![cert.clone(), key.clone()];
            let make = move |contents: &[Vec<u8>]| match contents {
                [cert_pem, key_pem] => certified_key(&cert, cert_pem, &key, key_pem),
                _ => Err(invalid_file(&cert.field, &cert.path, "has no key")),
            };
            pairs.push(Arc::new(Reloaded::new(files, make)?));
        }
        let ca = config.client_ca_file.as_ref();
        let ca = ca.map(|path| Named::new(&format!("{field}.client_ca_file"), path));
        let files = ca.iter().cloned().collect();
        let (config, served, field) = (config.clone(), pairs.clone(), field.to_owned());
        let make = move |contents: &[Vec<u8>]| {
            let ca = ca.as_ref().zip(contents.first());
            let server = server_config(&config, &field, ca, ByName(served.clone()))?;
            Ok(Acceptor::from_server_config(Arc::new(server)))
        };
        Ok(Self {
            acceptor: Arc::new(Reloaded::new(files, make)?),
            pairs,
        })
    }

    pub(in crate::proxy) fn files(&self) -> Vec<Arc<dyn Check>> {
        let mut all: Vec<Arc<dyn Check>> = vec![self.acceptor.clone()];
        for pair in &self.pairs {
            all.push(pair.clone());
        }
        all
    }

    /// Does the handshake on a connection that has just been accepted, of which `ahead` has been read
    /// already. Also returns the client's certificate, as a field for backends.
    pub(in crate::proxy) async fn handshake(
        &self,
        stream: Stream,
        ahead: &BytesMut,
    ) -> Result<(Stream, Option<HeaderValue>), String> {
        let stream = stream.into_any().downcast::<L4Stream>();
        let mut stream =
            stream.map_err(|_| "the connection is none of the listener's".to_owned())?;
        stream.rewind(ahead);
        let handshake = self.acceptor.current();
        let handshake = handshake.tls_handshake(*stream).await;
        let stream = handshake.map_err(|error| error.to_string())?;
        let certificate = stream.get_ssl().and_then(|tls| tls.peer_certificate_der());
        let certificate = certificate.and_then(as_field);
        Ok((Box::new(stream), certificate))
    }
}

/// A certificate as RFC 9440 has it: a byte sequence of a structured field.
fn as_field(certificate: &[u8]) -> Option<HeaderValue> {
    let text = format!(":{}:", STANDARD.encode(certificate));
    HeaderValue::from_str(&text).ok()
}

fn server_config(
    config: &ListenerTls,
    field: &str,
    ca: Option<(&Named, &Vec<u8>)>,
    certificates: ByName,
) -> Result<ServerConfig, ClusterError> {
    let invalid = |error: rustls::Error| ClusterError::config(field, error.to_string());
    let verifier = match ca {
        Some((file, pem)) => verifier(config, &file.field, &file.path, pem)?,
        None => Arc::new(NoClientAuth),
    };
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(invalid)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(certificates));
    if config.http2 {
        server.alpn_protocols.push(b"h2".to_vec());
    }
    server.alpn_protocols.push(b"http/1.1".to_vec());
    Ok(server)
}

fn certified_key(
    cert: &Named,
    cert_pem: &[u8],
    key: &Named,
    key_pem: &[u8],
) -> Result<CertifiedKey, ClusterError> {
    let chain = certificates(&cert.field, &cert.path, cert_pem)?;
    let pem = private_key(&key.field, &key.path, key_pem)?;
    if chain
        .first()
        .is_none_or(|leaf| ParsedCertificate::try_from(leaf).is_err())
    {
        return Err(invalid_file(&cert.field, &cert.path, "cannot be parsed"));
    }
    let certified = CertifiedKey::from_der(chain, pem, &provider());
    certified.map_err(|error| {
        let reason = match error {
            rustls::Error::InconsistentKeys(_) => {
                format!(
                    "is not the key of the certificate in {}",
                    cert.path.display()
                )
            }
            other => other.to_string(),
        };
        invalid_file(&key.field, &key.path, &reason)
    })
}

fn verifier(
    config: &ListenerTls,
    field: &str,
    path: &Path,
    pem: &[u8],
) -> Result<Arc<dyn ClientCertVerifier>, ClusterError> {
    let roots = trusted_roots(field, path, pem)?;
    let builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider());
    let builder = match config.client_certificate {
        ClientCertificate::Optional => builder.allow_unauthenticated(),
        ClientCertificate::None | ClientCertificate::Required => builder,
    };
    let built = builder.build();
    match built {
        Ok(verifier) => Ok(verifier),
        Err(error) => Err(invalid_file(field, path, &error.to_string())),
    }
}

/// Certificates by the names that they are for. The cost of a handshake grows with their number, by
/// about a microsecond each.
struct ByName(Vec<Arc<Pair>>);

impl fmt::Debug for ByName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ByName").field(&self.0.len()).finish()
    }
}

impl ByName {
    /// Of those for the name, the first with which the client can verify a signature: one name may have keys of several
    /// kinds. Without one for the name, the first of all is for everything.
    fn find(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let is_known = |key: &Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        let name = name.and_then(|name| ServerName::try_from(name).ok());
        let is_for = |leaf: &CertificateDer<'_>, name: &ServerName<'_>| {
            let parsed = ParsedCertificate::try_from(leaf);
            parsed.is_ok_and(|parsed| verify_server_name(&parsed, name).is_ok())
        };
        let all = || self.0.iter().map(|pair| pair.current());
        let mut first = None;
        if let Some(name) = name {
            for key in all().filter(|key| key.cert.first().is_some_and(|leaf| is_for(leaf, &name)))
            {
                if is_known(&key) {
                    return Some(key);
                }
                first.get_or_insert(key);
            }
        }
        first
            .or_else(|| all().find(is_known))
            .or_else(|| all().next())
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name(), hello.signature_schemes())
    }
}
