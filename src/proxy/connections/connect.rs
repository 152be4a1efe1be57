//! Where connections come from: the pool, or the network.

use ::pingora::connectors::L4Connect;
use ::pingora::protocols::l4::ext::connect;
use ::pingora::protocols::l4::socket::SocketAddr;
use ::pingora::protocols::l4::stream::Stream;
use ::pingora::protocols::l4::virt::VirtualSocketStream;
use ::pingora::{Error, ErrorType, Result};
use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::exchange::Exchange;
use super::pool::Connection;
use super::socket::Socket;
use super::stream::BackendStream;

#[async_trait]
impl L4Connect for Exchange {
    async fn connect(&self, addr: &SocketAddr) -> Result<Stream> {
        let reason = "only TCP is connected to here";
        let other = || Error::explain(ErrorType::InternalError, reason);
        let exchange = self.itself().ok_or_else(other)?;
        let target = self.target(*addr.as_inet().ok_or_else(other)?);
        let kept = self.pool().take(target, !self.sent().is_idempotent);
        self.begins(kept.is_some());
        let connection = match kept {
            Some(connection) => connection,
            None => Connection::new(open(target.addr, &exchange).await?),
        };
        let stream = BackendStream::new(connection, target, exchange);
        Ok(VirtualSocketStream::new(Box::new(stream)).into())
    }
}

/// A new connection, with TLS if its peer has it.
async fn open(addr: std::net::SocketAddr, exchange: &Exchange) -> Result<Socket> {
    let Some(secure) = exchange.secure() else {
        return connect_to(addr, exchange).await.map(Socket::from);
    };
    let opening = async { secure.handshake(connect_to(addr, exchange).await?).await };
    match exchange.times().open {
        Some(within) => timeout(within, opening).await.unwrap_or_else(|_| {
            let reason = format!("timeout {within:?} connecting to server {addr}");
            Error::e_explain(ErrorType::ConnectTimedout, reason)
        }),
        None => opening.await,
    }
}

/// A new connection; its errors are those of Pingora's own ones.
async fn connect_to(addr: std::net::SocketAddr, exchange: &Exchange) -> Result<TcpStream> {
    let connecting = connect(&addr, None);
    let connected = match exchange.times().connect {
        Some(within) => timeout(within, connecting).await.unwrap_or_else(|_| {
            let reason = format!("timeout {within:?} connecting to server {addr}");
            Error::e_explain(ErrorType::ConnectTimedout, reason)
        }),
        None => connecting.await,
    };
    connected.map_err(|error| {
        let reason = format!("Fail to connect to {addr}");
        match error.etype() {
            ErrorType::SocketError | ErrorType::BindError => {
                Error::because(ErrorType::InternalError, reason, error)
            }
            _ => error.more_context(reason),
        }
    })
}
