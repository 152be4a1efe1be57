//! A listener whose connections are limited in number, and end when nothing happens on them: whoever opens many, or
//! vanishes, is not to take the descriptors that the proxy needs.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// Connections at one time. One more waits until there is room.
const CONNECTIONS: usize = 256;
/// How long nothing may happen on a connection, and how long a request may take from its first byte to the first one of its
/// answer: whoever sends it byte by byte has no more time than one who sends nothing. An open page gets something each
/// second.
const IDLE: Duration = Duration::from_secs(60);

pub(super) struct LimitedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    idle: Duration,
}

impl LimitedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self::with(listener, CONNECTIONS, IDLE)
    }

    fn with(listener: TcpListener, connections: usize, idle: Duration) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(connections)),
            idle,
        }
    }
}

impl Listener for LimitedListener {
    type Io = LimitedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (LimitedStream, SocketAddr) {
        // It fails only for a closed one, which nobody closes.
        let place = self.places.clone().acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let stream = LimitedStream {
            stream,
            idle: self.idle,
            ends: Box::pin(sleep(self.idle)),
            is_answered: false,
            _place: place,
        };
        (stream, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

pub(super) struct LimitedStream {
    stream: TcpStream,
    idle: Duration,
    ends: Pin<Box<Sleep>>,
    /// Something was written after the last request.
    is_answered: bool,
    _place: Option<OwnedSemaphorePermit>,
}

impl LimitedStream {
    /// Something has been written, or the time is over.
    fn after<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.is_answered = true;
            self.begin();
            return written;
        }
        self.over(context)
    }

    /// The time begins anew.
    fn begin(&mut self) {
        let ends = Instant::now() + self.idle;
        self.ends.as_mut().reset(ends);
    }

    fn over<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        ready!(self.ends.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for LimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if Instant::now() >= self.ends.deadline() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_pending() {
            return self.over(context);
        }
        if std::mem::take(&mut self.is_answered) {
            // The first byte of the next request.
            self.begin();
        }
        read
    }
}

impl AsyncWrite for LimitedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.after(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.after(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// One who sends nothing is let go, and the next one has its place.
    #[tokio::test]
    async fn whoever_does_nothing_makes_room_for_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limited = LimitedListener::with(listener, 1, Duration::from_millis(300));
        let router = Router::new().route("/", get(async || "ok"));
        tokio::spawn(axum::serve(limited, router).into_future());
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        let reading = client.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(20), reading)
            .await
            .unwrap()
            .unwrap();
        assert!(answer.ends_with("ok"), "{answer}");
        let mut rest = Vec::new();
        silent.read_to_end(&mut rest).await.unwrap();
        // Nor does a byte now and then keep a place.
        let mut slow = TcpStream::connect(address).await.unwrap();
        let dripping = async {
            while slow.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), dripping)
            .await
            .expect("it is let go");
    }
}
