//! A connection while a request uses it.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ::pingora::protocols::l4::ext::set_tcp_keepalive;
use ::pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::exchange::Exchange;
use super::pool::Connection;
use crate::proxy::deadline::timed_out;

/// A head up to this size waits for the body that follows it.
const MOST_HELD: usize = 16_384;

/// What is held back of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Nothing is, from now on.
    No,
    /// The head, when it comes.
    Head,
    /// Pingora takes the head for sent. The first part of the body mostly is at hand, and leaves with it, in one system
    /// call and one packet.
    UntilBody,
    /// The response is waited for. If the body does not come by the next look at it, the head leaves alone.
    UntilNextPoll,
}

/// A connection while a request uses it.
#[derive(Debug)]
pub(super) struct BackendStream {
    /// Taken when it goes back to the pool.
    connection: Option<Connection>,
    addr: SocketAddr,
    exchange: Arc<Exchange>,
    /// While it is waited for.
    silent_since: Option<Instant>,
    hold: Hold,
    held: Vec<u8>,
    /// Pingora would use it again.
    is_free: bool,
}

impl BackendStream {
    pub(super) fn new(connection: Connection, addr: SocketAddr, exchange: Arc<Exchange>) -> Self {
        let hold = match exchange.has_body() {
            true => Hold::Head,
            false => Hold::No,
        };
        Self {
            connection: Some(connection),
            silent_since: None,
            addr,
            exchange,
            hold,
            held: Vec::new(),
            is_free: false,
        }
    }

    /// Writes what is held, and then `next`. Ready with how much of `next` was written: 0 only if it is empty.
    fn poll_write_held(
        &mut self,
        context: &mut Context<'_>,
        next: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Some(connection) = &mut self.connection else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut socket = Pin::new(&mut connection.socket);
        self.hold = Hold::No;
        while !self.held.is_empty() {
            let both = [IoSlice::new(&self.held), IoSlice::new(next)];
            let count = match next.is_empty() {
                true => ready!(socket.as_mut().poll_write(context, &self.held))?,
                false => ready!(socket.as_mut().poll_write_vectored(context, &both))?,
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.exchange.writes();
            let of_held = count.min(self.held.len());
            self.held.drain(..of_held);
            if count > of_held {
                return Poll::Ready(Ok(count - of_held));
            }
        }
        if next.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let count = ready!(socket.poll_write(context, next))?;
        self.exchange.writes();
        Poll::Ready(Ok(count))
    }
}

impl AsyncRead for BackendStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.hold {
            Hold::UntilBody => {
                this.hold = Hold::UntilNextPoll;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            _ if this.held.is_empty() => {}
            _ => {
                ready!(this.poll_write_held(context, &[]))?;
            }
        }
        let Some(connection) = &mut this.connection else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        if let Poll::Ready(read) = Pin::new(&mut connection.socket).poll_read(context, buffer) {
            this.silent_since = None;
            return Poll::Ready(read);
        }
        if this.exchange.is_complete() {
            // Nothing more is expected, so it was only looked at: see `Exchange`.
            this.is_free = true;
            return Poll::Ready(Ok(()));
        }
        let Some(silence) = this.exchange.times().silence else {
            return Poll::Pending;
        };
        let since = *this.silent_since.get_or_insert_with(Instant::now);
        ready!(connection.deadline.poll(since + silence, context));
        this.exchange.is_late();
        Poll::Ready(Err(timed_out("the backend did not answer in time")))
    }
}

impl AsyncWrite for BackendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.hold == Hold::Head && this.held.len() + bytes.len() <= MOST_HELD {
            this.held.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        this.poll_write_held(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.hold == Hold::Head {
            this.hold = Hold::UntilBody;
            return Poll::Ready(Ok(()));
        }
        // The socket itself holds nothing.
        this.poll_write_held(context, &[]).map_ok(|_| ())
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.is_free = false;
        ready!(this.poll_write_held(context, &[]))?;
        match &mut this.connection {
            Some(connection) => Pin::new(&mut connection.socket).poll_shutdown(context),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl VirtualSocket for BackendStream {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        let connection = self.connection.as_ref();
        let connection = connection.filter(|_| !self.exchange.is_reused());
        let Some(Connection { socket, .. }) = connection else {
            // They have been set.
            return Ok(());
        };
        match option {
            VirtualSockOpt::NoDelay => socket.set_nodelay(true),
            VirtualSockOpt::KeepAlive(keepalive) => {
                set_tcp_keepalive(socket, &keepalive).map_err(io::Error::other)
            }
            // One that is new to Pingora, and that nobody asks for.
            _ => Ok(()),
        }
    }
}

impl Drop for BackendStream {
    fn drop(&mut self) {
        if !self.is_free || !self.held.is_empty() {
            return;
        }
        if let Some(connection) = self.connection.take() {
            let idle = self.exchange.times().idle;
            self.exchange.pool().put(self.addr, connection, idle);
        }
    }
}
