//! Why a TLS connection that came about was closed at once.
//!
//! In TLS 1.3 a server looks at the client's certificate after the client thinks the handshake
//! done. Its alert meets a connection that is in use already, and the layers above lose it.

use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Stream};

use super::EtcdStore;
use super::security::{blocking, is_closed, tls_failure, words_of};
use crate::error::ClusterError;

impl EtcdStore {
    /// The error of a connection that failed, or the alert that it hides.
    /// `at`: the endpoint with the address that was dialled, and which `name` that is an address of.
    pub(super) async fn diagnosed(
        &self,
        endpoint: &str,
        at: &str,
        name: Option<&str>,
        error: ClusterError,
    ) -> ClusterError {
        let ClusterError::Unavailable { reason, .. } = &error else {
            return error;
        };
        if !is_closed(reason) {
            return error;
        }
        let tls = self.shared.options.tls.clone().unwrap_or_default();
        if tls.ca_file.is_none() {
            // The server would not be trusted here.
            return perhaps_mutual(endpoint, error);
        }
        let timeout = self.shared.options.connect_timeout;
        let address = at.strip_prefix("https://").unwrap_or(at);
        let server_name = tls.server_name.clone().or(name.map(str::to_owned));
        let address = address.trim_end_matches('/').to_owned();
        let heard = blocking(endpoint, move || {
            let config = tls.load().and_then(|files| tls.check(&files)).ok()?;
            handshake(&address, server_name.as_deref(), config, timeout).err()
        });
        // The look-up of a name has no time-out of its own.
        let Ok(Ok(Some(heard))) = tokio::time::timeout(timeout, heard).await else {
            return error;
        };
        match tls_failure(endpoint, &words_of(&heard)) {
            Some(told) => self.about_access(told, String::new),
            None => error,
        }
    }
}

fn perhaps_mutual(endpoint: &str, mut error: ClusterError) -> ClusterError {
    if let ClusterError::Unavailable { reason, .. } = &mut error
        && endpoint.starts_with("https://")
    {
        reason.push_str("; perhaps etcd wants another client certificate");
    }
    error
}

/// Waits for the first byte from the server.
fn handshake(
    address: &str,
    server_name: Option<&str>,
    mut config: ClientConfig,
    timeout: Duration,
) -> io::Result<()> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let name = server_name.unwrap_or(host.trim_matches(['[', ']']));
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let mut tls = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let resolved = address.to_socket_addrs()?.next();
    let resolved = resolved.ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut tcp = TcpStream::connect_timeout(&resolved, timeout)?;
    tcp.set_read_timeout(Some(timeout))?;
    tcp.set_write_timeout(Some(timeout))?;
    Stream::new(&mut tls, &mut tcp).read_exact(&mut [0])
}
