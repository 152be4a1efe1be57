//! Why a TLS connection was closed at once.
//!
//! In TLS 1.3 a server checks the client's certificate after the client considers the handshake done.
//! Its alert arrives on a connection that is already in use, and the layers above lose it. So a second
//! handshake is made here, and its alert is read.

use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Stream};

use super::files::blocking;
use super::tls::TlsOptions;
use super::tls_failure::{TlsFailure, error_chain};
use super::tls_files;

/// What is dialled.
pub(super) struct Target<'a> {
    pub(super) endpoint: &'a str,
    /// The endpoint with the address that is dialled.
    pub(super) address: &'a str,
    /// The name that this is an address of, if the endpoint has one.
    pub(super) name: Option<&'a str>,
}

/// The alert of a server that closes connections at once, if it sends one within this time.
pub(super) async fn find_alert(
    target: &Target<'_>,
    tls: TlsOptions,
    timeout: Duration,
) -> Option<TlsFailure> {
    let server_name = tls.server_name.clone().or(target.name.map(str::to_owned));
    let address = target.address;
    let address = address.strip_prefix("https://").unwrap_or(address);
    let address = address.trim_end_matches('/').to_owned();
    let failed = blocking(target.endpoint, move || {
        let files = tls_files::load(&tls).ok()?;
        let config = tls_files::check(&tls, &files).ok()?;
        handshake(&address, server_name.as_deref(), config, timeout).err()
    });
    // The lookup of a name has no time-out of its own.
    let error = tokio::time::timeout(timeout, failed).await.ok()?.ok()??;
    TlsFailure::of_text(&error_chain(&error))
}

/// Makes a handshake and waits for the first byte from the server. Blocks.
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
