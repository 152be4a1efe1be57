//! TLS to backends of HTTP/1, on connections that this crate makes and keeps.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::{Error, ErrorType, Result};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use xxhash_rust::xxh3::xxh3_64;

use super::socket::Socket;
use crate::opaque::opaque_debug;

/// TLS of one connection.
pub(in crate::proxy) struct Secure {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    /// How long it may take to connect.
    pub(super) connect: Duration,
    handshake: Duration,
}

impl Secure {
    /// Verifies a backend by this name; `None` if it can be the name of none.
    pub(in crate::proxy) fn new(
        config: Arc<ClientConfig>,
        name: &str,
        connect: Duration,
        handshake: Duration,
    ) -> Option<Self> {
        Some(Self {
            config,
            name: ServerName::try_from(name).ok()?.to_owned(),
            connect,
            handshake,
        })
    }

    /// Keeps its connections apart from those that were verified by another name.
    pub(super) fn mark(&self) -> u64 {
        xxh3_64(self.name.to_str().as_bytes())
    }

    /// Does the handshake on a new connection; the errors are those of Pingora's own ones.
    pub(super) async fn handshake(&self, tcp: TcpStream) -> Result<Socket> {
        let connector = TlsConnector::from(self.config.clone());
        let shaking = connector.connect(self.name.clone(), tcp);
        let name = self.name.to_str();
        match timeout(self.handshake, shaking).await {
            Ok(Ok(tls)) => Ok(Socket::Tls(Box::new(tls))),
            Ok(Err(error)) => {
                let reason = format!("TLS connect() failed: {error}, SNI: {name}");
                Error::e_explain(ErrorType::TLSHandshakeFailure, reason)
            }
            Err(_) => {
                let reason = format!(
                    "timeout {:?} of the TLS handshake, SNI: {name}",
                    self.handshake
                );
                Error::e_explain(ErrorType::ConnectTimedout, reason)
            }
        }
    }
}

opaque_debug!(Secure);
