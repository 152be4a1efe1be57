//! A connection while a request uses it.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ::pingora::protocols::l4::ext::set_tcp_keepalive;
use ::pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::exchange::{Body, Exchange};
use super::pool::{Connection, Target};
use crate::proxy::deadline::timed_out;

/// Parts of a request up to this size are gathered: to copy them costs less than a system call for each.
const MOST_HELD: usize = 16_384;

/// What is held back of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Nothing is.
    No,
    /// The head, when it comes.
    Head,
    /// Pingora takes the head for sent. The first part of the body mostly is at hand, and leaves with it, in one system
    /// call.
    UntilBody,
    /// The response is waited for. If the body does not come by the next look at it, the head leaves alone.
    UntilNextPoll,
    /// The parts of a chunk, until Pingora flushes.
    Chunk,
}

/// A connection while a request uses it.
pub(super) struct BackendStream {
    /// Taken when it goes back to the pool.
    connection: Option<Connection>,
    target: Target,
    exchange: Arc<Exchange>,
    /// While it is waited for, since something was read or written last.
    silent_since: Option<Instant>,
    hold: Hold,
    held: Vec<u8>,
    /// Pingora would use it again.
    is_free: bool,
}

impl BackendStream {
    pub(super) fn new(connection: Connection, target: Target, exchange: Arc<Exchange>) -> Self {
        let hold = match exchange.sent().body {
            Body::None => Hold::No,
            Body::Sized | Body::Chunked => Hold::Head,
        };
        Self {
            connection: Some(connection),
            silent_since: None,
            target,
            exchange,
            hold,
            held: Vec::new(),
            is_free: false,
        }
    }

    /// What is held when the head has left, or leaves with what follows.
    fn after_head(&self) -> Hold {
        match self.exchange.sent().body {
            Body::None | Body::Sized => Hold::No,
            Body::Chunked => Hold::Chunk,
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
        if self.held.len() + next.len() > MOST_HELD && connection.socket.is_tls() {
            // More than one record: the first ones may have been sent though the write fails.
            self.exchange.writes();
        }
        while !self.held.is_empty() {
            let socket = Pin::new(&mut connection.socket);
            let both = [IoSlice::new(&self.held), IoSlice::new(next)];
            let written = match next.is_empty() {
                true => socket.poll_write(context, &self.held),
                false => socket.poll_write_vectored(context, &both),
            };
            let count = ready!(until_end(written, connection, &self.exchange, context))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.exchange.writes();
            self.silent_since = None;
            let of_held = count.min(self.held.len());
            self.held.drain(..of_held);
            if count > of_held {
                return Poll::Ready(Ok(count - of_held));
            }
        }
        if next.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let written = Pin::new(&mut connection.socket).poll_write(context, next);
        let count = ready!(until_end(written, connection, &self.exchange, context))?;
        self.exchange.writes();
        self.silent_since = None;
        Poll::Ready(Ok(count))
    }

    /// Writes what is held before the response is waited for. Ready once that is done, or has failed.
    fn poll_write_first(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Error>> {
        match self.hold {
            Hold::UntilBody => {
                self.hold = Hold::UntilNextPoll;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Hold::UntilNextPoll => self.hold = self.after_head(),
            Hold::No | Hold::Head | Hold::Chunk => {}
        }
        let written = ready!(self.poll_write_all(context));
        Poll::Ready(written.err().inspect(|_| self.held.clear()))
    }

    /// Writes what is held here, or in TLS.
    fn poll_write_all(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_held(context, &[]))?;
        match &mut self.connection {
            Some(connection) => {
                let flushed = Pin::new(&mut connection.socket).poll_flush(context);
                until_end(flushed, connection, &self.exchange, context)
            }
            None => Poll::Ready(Ok(())),
        }
    }

    /// Whether a connection that others have used was over before a response began.
    fn is_over_before_answer(&self, error: &io::Error) -> bool {
        let is_end = error.kind() == io::ErrorKind::UnexpectedEof;
        is_end && self.exchange.is_reused() && !self.exchange.is_answering()
    }

    /// What comes of a read that finds nothing.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(connection) = &mut self.connection else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        // That the response has begun wakes nobody here.
        let first = self.exchange.wait_at_least_until(since);
        ready!(connection.deadline.poll(first, context));
        let until = self.exchange.wait_until(since);
        ready!(connection.deadline.poll(until, context));
        self.exchange.times_out();
        Poll::Ready(Err(timed_out("what was waited for did not come in time")))
    }
}

/// A write that waits ends with the request. How long else it may wait, is Pingora's.
fn until_end<T>(
    written: Poll<io::Result<T>>,
    connection: &mut Connection,
    exchange: &Exchange,
    context: &mut Context<'_>,
) -> Poll<io::Result<T>> {
    if let Some(end_by) = exchange.times().waits.end_by
        && written.is_pending()
    {
        ready!(connection.deadline.poll(end_by, context));
        exchange.times_out();
        return Poll::Ready(Err(timed_out("the time of the request was over")));
    }
    written
}

impl AsyncRead for BackendStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.is_free = false;
        let written = this.poll_write_first(context);
        let failed = match written {
            // What there is to read is no response to it.
            Poll::Ready(Some(error)) if this.exchange.is_unsent() => {
                return Poll::Ready(Err(error));
            }
            Poll::Pending if this.exchange.is_unsent() => return this.poll_silence(context),
            // A backend may answer before it has read all, or instead of that.
            Poll::Ready(failed) => failed,
            Poll::Pending => None,
        };
        let Some(connection) = &mut this.connection else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let before = buffer.filled().len();
        let read = Pin::new(&mut connection.socket).poll_read(context, buffer);
        if let Some(failed) = failed
            && buffer.filled().len() == before
        {
            return Poll::Ready(Err(failed));
        }
        if let Poll::Ready(read) = read {
            this.silent_since = None;
            return Poll::Ready(match read {
                // Without a word of TLS; no part of a response is missing.
                Err(error) if this.is_over_before_answer(&error) => Ok(()),
                read => read,
            });
        }
        if this.exchange.is_complete() {
            // Nothing more is expected, so it was only looked at: see `Exchange`.
            this.is_free = true;
            return Poll::Ready(Ok(()));
        }
        this.poll_silence(context)
    }
}

impl AsyncWrite for BackendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.is_free = false;
        match this.hold {
            Hold::UntilBody | Hold::UntilNextPoll => this.hold = this.after_head(),
            Hold::No | Hold::Head | Hold::Chunk => {}
        }
        if this.hold != Hold::No && this.held.len() + bytes.len() <= MOST_HELD {
            this.held.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        this.poll_write_held(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.hold == Hold::Head {
            this.hold = match this.held.is_empty() {
                // It was too large.
                true => this.after_head(),
                false => Hold::UntilBody,
            };
            return Poll::Ready(Ok(()));
        }
        if matches!(this.hold, Hold::UntilBody | Hold::UntilNextPoll) {
            this.hold = this.after_head();
        }
        this.poll_write_all(context)
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
            VirtualSockOpt::NoDelay => socket.tcp().set_nodelay(true),
            VirtualSockOpt::KeepAlive(keepalive) => {
                set_tcp_keepalive(socket.tcp(), &keepalive).map_err(io::Error::other)
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
            self.exchange.pool().put(self.target, connection, idle);
        }
    }
}

/// Pingora writes it to its log, where neither requests nor other connections belong.
impl fmt::Debug for BackendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendStream")
            .field("addr", &self.target.addr)
            .finish_non_exhaustive()
    }
}
