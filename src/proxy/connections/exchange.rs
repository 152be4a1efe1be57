//! One try of a request on a connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ::pingora::connectors::L4Connect;
use ::pingora::protocols::l4::ext::connect;
use ::pingora::protocols::l4::socket::SocketAddr;
use ::pingora::protocols::l4::stream::Stream;
use ::pingora::protocols::l4::virt::VirtualSocketStream;
use ::pingora::{Error, ErrorType, Result};
use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::pool::{Pool, Target};
use super::stream::BackendStream;

/// How long things may take; `None` for any time.
#[derive(Debug)]
pub(super) struct Times {
    pub(super) connect: Option<Duration>,
    /// A silence of the backend while a response is waited for.
    pub(super) silence: Option<Duration>,
    /// How long the connection may be idle afterwards.
    pub(super) idle: Duration,
}

/// One try of a request on a connection, as the proxy, Pingora and the connection know it.
///
/// For Pingora each try has a new connection. After a response it finds out whether the connection can be used again:
/// both messages are complete, neither end has said that it closes, nothing came that nobody asked for. If so, it reads
/// once more from it, for its own pool, to see whether it is quiet. Only if the proxy has said before that the response
/// is complete, that read tells that the connection is free: Pingora learns that it is over, drops it, and it goes to
/// the list. Should Pingora decide in another way one day, connections are closed: none is used that is not free, and none
/// stays in Pingora's pool, where they would have no names of their own.
#[derive(Debug)]
pub(in crate::proxy) struct Exchange {
    itself: Weak<Self>,
    pool: Arc<Pool>,
    /// What keeps connections to one address apart.
    group_key: u64,
    times: Times,
    has_body: bool,
    is_unanswered: AtomicBool,
    is_reused: AtomicBool,
    has_written: AtomicBool,
    is_complete: AtomicBool,
}

impl Exchange {
    pub(super) fn new(pool: Arc<Pool>, group_key: u64, times: Times, has_body: bool) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            pool,
            group_key,
            times,
            has_body,
            is_unanswered: AtomicBool::new(false),
            is_reused: AtomicBool::new(false),
            has_written: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
        })
    }

    /// Whether its connection has served other requests before.
    pub(in crate::proxy) fn is_reused(&self) -> bool {
        self.is_reused.load(Ordering::Relaxed)
    }

    /// Whether the system has taken nothing of the request.
    pub(in crate::proxy) fn is_unsent(&self) -> bool {
        !self.has_written.load(Ordering::Relaxed)
    }

    pub(super) fn writes(&self) {
        self.has_written.store(true, Ordering::Relaxed);
    }

    /// The final response has been read from its head to its end, and the connection is no tunnel.
    pub(in crate::proxy) fn completes(&self) {
        self.is_complete.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Relaxed)
    }

    pub(super) fn has_body(&self) -> bool {
        self.has_body
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub(super) fn times(&self) -> &Times {
        &self.times
    }

    pub(super) fn is_late(&self) {
        self.is_unanswered.store(true, Ordering::Relaxed);
    }

    /// Whether the backend was silent for too long.
    pub(in crate::proxy) fn is_unanswered(&self) -> bool {
        self.is_unanswered.load(Ordering::Relaxed)
    }

    /// A new connection.
    async fn connect_to(&self, addr: std::net::SocketAddr) -> Result<TcpStream> {
        let connecting = connect(&addr, None);
        let connected = match self.times.connect {
            Some(within) => timeout(within, connecting).await.unwrap_or_else(|_| {
                let reason = format!("timeout {within:?} connecting to server {addr}");
                Error::e_explain(ErrorType::ConnectTimedout, reason)
            }),
            None => connecting.await,
        };
        connected.map_err(|error| match error.etype() {
            ErrorType::SocketError | ErrorType::BindError => Error::because(
                ErrorType::InternalError,
                format!("Fail to connect to {addr}"),
                error,
            ),
            _ => error.more_context(format!("Fail to connect to {addr}")),
        })
    }
}

#[async_trait]
impl L4Connect for Exchange {
    async fn connect(&self, addr: &SocketAddr) -> Result<Stream> {
        let reason = "only TCP is connected to here";
        let other = || Error::explain(ErrorType::InternalError, reason);
        let exchange = self.itself.upgrade().ok_or_else(other)?;
        let addr = *addr.as_inet().ok_or_else(other)?;
        let target = Target {
            addr,
            group_key: self.group_key,
        };
        let kept = self.pool.take(target);
        self.is_reused.store(kept.is_some(), Ordering::Relaxed);
        let connection = match kept {
            Some(connection) => connection,
            None => self.connect_to(addr).await?.into(),
        };
        let stream = BackendStream::new(connection, target, exchange);
        Ok(VirtualSocketStream::new(Box::new(stream)).into())
    }
}
