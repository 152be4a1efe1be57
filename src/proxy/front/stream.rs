//! The stream of a client: reads and writes as the one below it, within deadlines.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use ::pingora::protocols::raw_connect::ProxyDigest;
use ::pingora::protocols::{ALPN, Shutdown, SocketDigest, Stream};
use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

use super::connection::{Connection, Ended, Phase};
use super::limits::{FrontLimits, WriteClock};
use super::refusal::Refusal;
use super::refused::Refusals;
use crate::proxy::deadline::{Deadline, timed_out};
use crate::proxy::shutdown::{self, Hold};

/// With which an HTTP/2 connection begins (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Follows a head that is given up, so that Pingora's parser refuses it and the connection ends
/// without a line at the level of errors. A head in which a zero stands anywhere is none.
const REFUSED_HEAD: &[u8] = b"\0\r\n\0\r\n\r\n";

/// Up to this number of bytes wait for what follows them, so that the head of a response and its body
/// leave in one system call. As much as Pingora holds by default; here the stream below holds nothing.
const HELD: usize = 1_460;
/// Pingora writes at most three slices at a time: those of a chunk.
const MOST_SLICES: usize = 4;

pub(super) struct ClientStream {
    inner: Stream,
    /// What was read to find out what the connection is.
    ahead: BytesMut,
    connection: Arc<Connection>,
    limits: Arc<FrontLimits>,
    refusals: Refusals,
    digest: Option<Arc<ProxyDigest>>,
    socket: Option<Arc<SocketDigest>>,
    is_http2: bool,
    /// It is being found out whether that is so.
    is_peeking: bool,
    /// Since when the client is waited for in this phase, or when something of it was received last. `None` until
    /// it is waited for, because some phases have no time, and to read the clock has its cost.
    since: Option<Instant>,
    /// The phase as it was last looked at.
    phase: Phase,
    /// How much of the head has been received.
    head_bytes: usize,
    read_deadline: Deadline,
    write_deadline: Deadline,
    writes: WriteClock,
    has_ended_writing: bool,
    /// Written by the proxy, and not yet to the stream below.
    held: Vec<u8>,
    /// While there is a request. Over HTTP/2 each request has its own.
    request: Option<Hold>,
}

impl ClientStream {
    pub(super) fn new(
        inner: Stream,
        ahead: BytesMut,
        certificate: Option<HeaderValue>,
        socket: Option<Arc<SocketDigest>>,
        limits: Arc<FrontLimits>,
        refusals: Refusals,
    ) -> Self {
        let connection = Arc::new(Connection::new(certificate, refusals.statistics.clone()));
        let digest = connection.digest();
        let is_http2 = matches!(inner.selected_alpn_proto(), Some(ALPN::H2));
        let socket = socket.or_else(|| inner.get_socket_digest());
        Self {
            inner,
            ahead,
            connection,
            limits,
            refusals,
            digest,
            socket,
            is_http2,
            is_peeking: false,
            since: Some(Instant::now()),
            phase: Phase::Accepted,
            head_bytes: 0,
            read_deadline: Deadline::default(),
            write_deadline: Deadline::default(),
            writes: WriteClock::default(),
            has_ended_writing: false,
            held: Vec::new(),
            request: None,
        }
    }

    /// The phase now. Where the proxy has changed it, its time has not begun.
    fn phase(&mut self) -> Phase {
        let phase = self.connection.phase();
        if phase != self.phase {
            self.phase = phase;
            self.since = None;
            self.head_bytes = 0;
            match phase {
                Phase::Accepted | Phase::Idle => self.request = None,
                // What it is, is not known yet.
                _ if self.is_http2 || self.is_peeking => self.request = None,
                _ => self.count_request(),
            }
        }
        phase
    }

    /// The process does not end before the request of this connection has.
    fn count_request(&mut self) {
        let process = shutdown::Shutdown::of_process();
        self.request.get_or_insert_with(|| process.request());
    }

    fn enter(&mut self, phase: Phase) {
        self.connection.enter(phase);
        self.phase();
    }

    fn received(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        match self.phase() {
            Phase::Accepted if self.is_http2 => {
                // The preface has the time of a head.
                if self.head_bytes + count >= PREFACE.len() {
                    self.enter(Phase::Answer);
                }
            }
            phase @ (Phase::Accepted | Phase::Idle) => {
                // The first head has its time from the accepting on.
                let since = self.since.filter(|_| phase == Phase::Accepted);
                self.enter(Phase::Head);
                // That of a later one begins when the rest of it is waited for.
                self.since = since;
                self.writes = WriteClock::default();
            }
            Phase::Expect => self.enter(Phase::Body),
            Phase::Body => self.since = None,
            Phase::Tunnel => self.since = Some(Instant::now()),
            Phase::Head | Phase::Answer | Phase::Drain => {}
        }
        self.head_bytes += count;
    }

    /// Until when to wait for the client now.
    fn read_deadline(&mut self) -> Option<Instant> {
        let phase = self.phase();
        let timeouts = &self.limits.timeouts;
        let within = match phase {
            Phase::Accepted | Phase::Head => timeouts.client_header,
            Phase::Idle => timeouts.client_idle,
            Phase::Body => timeouts.client_body,
            Phase::Tunnel => timeouts.tunnel,
            Phase::Drain => timeouts.client_drain,
            // Over HTTP/2 all the time, without any: `serve_http_2` ends a connection that has no requests.
            Phase::Answer if self.is_http2 => return self.connection.drain_by(),
            Phase::Answer | Phase::Expect => {
                let (answer, end) = (self.connection.answer_by(), self.connection.end_by());
                return answer.into_iter().chain(end).min();
            }
        };
        let since = *self.since.get_or_insert_with(Instant::now);
        let is_body = phase == Phase::Body;
        let end_by = is_body.then(|| self.connection.end_by()).flatten();
        since.checked_add(within).into_iter().chain(end_by).min()
    }

    /// Gives up reading, with an answer to an HTTP/1 client that has begun a request.
    fn give_up(
        &mut self,
        why: Ended,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> io::Result<()> {
        let phase = self.phase;
        if matches!(phase, Phase::Answer | Phase::Expect) && !self.is_http2 {
            // The client does nothing wrong, and the request may be tried at another backend.
            self.connection.set_unanswered();
            return Err(timed_out("what was waited for did not come in time"));
        }
        self.connection.end(why);
        match phase {
            Phase::Head if !self.is_http2 => {
                let refusal = match why {
                    Ended::HeadTooLarge => Some(Refusal::HeadTooLarge),
                    Ended::ReadTimeout | Ended::WriteTimeout => Some(Refusal::Timeout),
                    Ended::Left => None,
                };
                if let Some(refusal) = refusal {
                    self.refusals.statistics.count(refusal);
                    self.tell_refused(refusal.status());
                    // What does not fit into the socket at once is lost: this client does not read.
                    let _ = Pin::new(&mut self.inner).poll_write(context, refusal.response());
                    let _ = Pin::new(&mut self.inner).poll_flush(context);
                }
                buffer.put_slice(&REFUSED_HEAD[..REFUSED_HEAD.len().min(buffer.remaining())]);
                Ok(())
            }
            // Nothing has been requested: the connection ends as if the client had ended it.
            Phase::Accepted => {
                self.refusals.statistics.count_idle();
                Ok(())
            }
            Phase::Idle => {
                self.refusals.statistics.count_idle();
                self.end_between(buffer);
                Ok(())
            }
            _ => {
                self.refusals.statistics.count_read_timeout();
                Err(timed_out("the client sent nothing for too long"))
            }
        }
    }

    /// The client has closed the connection, or broken it off: no error of this process, unless a request is lost.
    fn client_left(
        &mut self,
        result: io::Result<()>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> io::Result<()> {
        match self.phase() {
            _ if self.is_http2 || self.is_peeking || buffer.remaining() == 0 => result,
            // The parser asks for more, so the head is incomplete.
            Phase::Head => self.give_up(Ended::Left, context, buffer),
            Phase::Accepted => Ok(()),
            Phase::Idle => {
                self.connection.end(Ended::Left);
                self.end_between(buffer);
                Ok(())
            }
            _ => result,
        }
    }

    /// Ends a connection between two requests. Pingora may have read more than the last one with it: a part of the
    /// next one, which will never be one.
    fn end_between(&self, buffer: &mut ReadBuf<'_>) {
        if !self.is_http2 && !self.is_peeking {
            buffer.put_slice(&REFUSED_HEAD[..REFUSED_HEAD.len().min(buffer.remaining())]);
        }
    }

    /// Whether the answer to the client has been given here, so that no other must follow.
    fn is_answered(&self) -> bool {
        let is_between = matches!(self.phase, Phase::Head | Phase::Idle);
        !self.is_http2 && self.connection.ended().is_some() && is_between
    }

    /// Ends a write that waits for too long.
    fn blocked<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if self.is_http2 {
            // The requests are over as soon as their responses are in the buffers of HTTP/2.
            self.count_request();
        }
        let write = self.limits.write_limit(self.phase);
        let Some(deadline) = self.writes.deadline(Instant::now(), write) else {
            return Poll::Pending;
        };
        ready!(self.write_deadline.poll(deadline, context));
        self.connection.end(Ended::WriteTimeout);
        self.refusals.statistics.count_write_timeout();
        Poll::Ready(Err(timed_out("the client did not read in time")))
    }

    /// The client has taken `count` bytes of those that were held and of those that followed them:
    /// returns how many of the latter.
    fn taken(&mut self, count: usize) -> usize {
        self.writes.wrote(count);
        let of_held = count.min(self.held.len());
        self.held.drain(..of_held);
        match self.phase() {
            Phase::Expect => self.enter(Phase::Body),
            // What is written postpones a deadline that reads wait for already.
            Phase::Tunnel => self.since = Some(Instant::now()),
            Phase::Answer => self.connection.answer_goes_on(),
            _ => {}
        }
        count - of_held
    }

    /// Writes what is held, and then `next`, in one call if the stream below can do that. Ready with how
    /// much of `next` was written: 0 only if it is empty.
    fn poll_write_held(
        &mut self,
        context: &mut Context<'_>,
        next: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let is_last = self.held.is_empty();
            if is_last && next.iter().all(|slice| slice.is_empty()) {
                return Poll::Ready(Ok(0));
            }
            let inner = Pin::new(&mut self.inner);
            let can_gather = inner.is_write_vectored() && (1..MOST_SLICES).contains(&next.len());
            let written = match (is_last, next) {
                (true, [one]) => inner.poll_write(context, one),
                (true, _) => inner.poll_write_vectored(context, next),
                (false, _) if can_gather => {
                    let mut all = [io::IoSlice::new(&self.held); MOST_SLICES];
                    all[1..=next.len()].copy_from_slice(next);
                    inner.poll_write_vectored(context, &all[..=next.len()])
                }
                (false, _) => inner.poll_write(context, &self.held),
            };
            match written {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => match self.taken(count) {
                    0 => {}
                    of_next => return Poll::Ready(Ok(of_next)),
                },
                // The refusal of what was no request reaches nobody.
                Poll::Ready(Err(_)) if !self.is_http2 && self.phase() == Phase::Head => {
                    self.connection.end(Ended::Left);
                    self.held.clear();
                    return Poll::Ready(Ok(next.iter().map(|slice| slice.len()).sum()));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.blocked(context),
            }
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let count = this.ahead.len().min(buffer.remaining());
            buffer.put_slice(&this.ahead[..count]);
            this.ahead.advance(count);
            this.received(count);
            return Poll::Ready(Ok(()));
        }
        if this.connection.ended().is_some() {
            return Poll::Ready(Ok(()));
        }
        // The parser asks for more, so the head is incomplete.
        if this.phase() == Phase::Head && this.head_bytes > this.limits.head_bytes {
            return Poll::Ready(this.give_up(Ended::HeadTooLarge, context, buffer));
        }
        if this.connection.ends_writing() && !this.has_ended_writing {
            ready!(Pin::new(&mut *this).poll_shutdown(context))?;
            this.has_ended_writing = true;
        }
        let before = buffer.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut this.inner).poll_read(context, buffer) {
            let count = buffer.filled().len() - before;
            this.received(count);
            return Poll::Ready(match count {
                0 => this.client_left(result, context, buffer),
                _ => result,
            });
        }
        let Some(deadline) = this.read_deadline() else {
            return Poll::Pending;
        };
        ready!(this.read_deadline.poll(deadline, context));
        Poll::Ready(this.give_up(Ended::ReadTimeout, context, buffer))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let count: usize = slices.iter().map(|slice| slice.len()).sum();
        if this.is_answered() {
            return Poll::Ready(Ok(count));
        }
        this.look_at(slices.first().map_or(&[], |slice| slice));
        if this.held.len() + count <= HELD {
            for slice in slices {
                this.held.extend_from_slice(slice);
            }
            return Poll::Ready(Ok(count));
        }
        this.poll_write_held(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_write_held(context, &[]))?;
        match Pin::new(&mut this.inner).poll_flush(context) {
            Poll::Ready(result) => {
                this.writes.flushed();
                if this.is_http2 {
                    this.request = None;
                }
                Poll::Ready(result)
            }
            Poll::Pending => this.blocked(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.has_ended_writing {
            return Poll::Ready(Ok(()));
        }
        ready!(this.poll_write_held(context, &[]))?;
        match Pin::new(&mut this.inner).poll_shutdown(context) {
            Poll::Ready(result) => Poll::Ready(result),
            Poll::Pending => this.blocked(context),
        }
    }
}

impl Drop for ClientStream {
    /// Where a response breaks off, the client gets what there is of it, as far as the socket takes it.
    fn drop(&mut self) {
        if self.held.is_empty() || self.connection.ended().is_some() {
            return;
        }
        let mut context = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut self.inner).poll_write(&mut context, &self.held);
        let _ = Pin::new(&mut self.inner).poll_flush(&mut context);
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        // Not by the stream below, which would wait for the client for any time.
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl fmt::Debug for ClientStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientStream")
            .field("inner", &self.inner)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

mod identity;
mod preface;
mod refused;
#[cfg(test)]
mod tests;
