//! What a connection to a backend is made of: TCP, with or without TLS.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
#[cfg(feature = "proxy-tls")]
use tokio_rustls::client::TlsStream;

/// A connection to a backend.
#[derive(Debug)]
pub(super) enum Socket {
    Plain(TcpStream),
    #[cfg(feature = "proxy-tls")]
    Tls(Box<TlsStream<TcpStream>>),
}

/// Does the same with either.
macro_rules! with {
    ($socket:expr, $inner:ident => $do:expr) => {
        match $socket {
            Socket::Plain($inner) => $do,
            #[cfg(feature = "proxy-tls")]
            Socket::Tls($inner) => $do,
        }
    };
}

impl Socket {
    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            #[cfg(feature = "proxy-tls")]
            Self::Tls(tls) => tls.get_ref().0,
        }
    }

    pub(super) fn is_tls(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

impl From<TcpStream> for Socket {
    fn from(tcp: TcpStream) -> Self {
        Self::Plain(tcp)
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        with!(self.get_mut(), inner => Pin::new(inner).poll_read(context, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        with!(self.get_mut(), inner => Pin::new(inner).poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        with!(self.get_mut(), inner => Pin::new(inner).poll_write_vectored(context, parts))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self.get_mut(), inner => Pin::new(inner).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        with!(self.get_mut(), inner => Pin::new(inner).poll_shutdown(context))
    }
}
