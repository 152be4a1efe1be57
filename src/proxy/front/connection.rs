//! The state of one client connection, shared by its stream, which keeps the deadlines, and the
//! proxy, which knows what is being read.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use ::pingora::http::ResponseHeader;
use ::pingora::protocols::raw_connect::ProxyDigest;
use ::pingora::proxy::Session;
use http::HeaderValue;

use super::statistics::FrontStatistics;

/// What is read from a client at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing has been received on a connection that has just been accepted.
    Accepted,
    /// Nothing of the next request has been received.
    Idle,
    /// The head of a request is incomplete.
    Head,
    /// The client waits for `100 Continue` before it sends the body.
    Expect,
    /// The body of a request is incomplete.
    Body,
    /// The request is complete, so nothing is expected.
    Answer,
    /// The connection has become a tunnel.
    Tunnel,
    /// The response has been sent; the rest of a body that nobody wants, and then the head of the next
    /// request.
    Drain,
}

impl Phase {
    const ALL: [Self; 8] = [
        Self::Accepted,
        Self::Idle,
        Self::Head,
        Self::Expect,
        Self::Body,
        Self::Answer,
        Self::Tunnel,
        Self::Drain,
    ];
}

/// Why a connection was ended by this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The head or the body of a request did not arrive in time.
    ReadTimeout,
    /// The client did not read a response in time.
    WriteTimeout,
    /// The head of a request was too large.
    HeadTooLarge,
    /// The client had left in the middle of a head.
    Left,
}

impl Ended {
    const ALL: [Self; 4] = [
        Self::ReadTimeout,
        Self::WriteTimeout,
        Self::HeadTooLarge,
        Self::Left,
    ];
}

/// The state of one client connection.
#[derive(Debug)]
pub(crate) struct Connection {
    phase: AtomicU8,
    /// 0, or one more than the index of an [`Ended`].
    ended: AtomicU8,
    /// Nothing more is written, and the client is to see that.
    ends_writing: AtomicBool,
    /// What the client has shown, as a field for backends.
    certificate: Option<HeaderValue>,
    /// The address of the other end, as a value of a field.
    peer: OnceLock<HeaderValue>,
    port: OnceLock<HeaderValue>,
    statistics: Arc<FrontStatistics>,
}

impl Connection {
    pub(super) fn new(certificate: Option<HeaderValue>, statistics: Arc<FrontStatistics>) -> Self {
        Self {
            certificate,
            peer: OnceLock::new(),
            port: OnceLock::new(),
            statistics,
            phase: AtomicU8::new(Phase::Accepted as u8),
            ended: AtomicU8::new(0),
            ends_writing: AtomicBool::new(false),
        }
    }

    /// The connection of a request; `None` if its listener has no front.
    pub(crate) fn of(session: &Session) -> Option<&Arc<Self>> {
        let digest = session.digest()?.proxy_digest.as_ref()?;
        digest.user_data.as_ref()?.downcast_ref()
    }

    /// Puts the connection where [`of`](Self::of) finds it.
    pub(super) fn digest(self: &Arc<Self>) -> Option<Arc<ProxyDigest>> {
        // The response that the digest is made for does not exist; this one is never read.
        let response = ResponseHeader::build_no_case(200, None).ok()?;
        let digest = ProxyDigest::new(Box::new(response), Some(Box::new(self.clone())));
        Some(Arc::new(digest))
    }

    /// The address of the other end, as a value of a field; `make` makes it once.
    pub(crate) fn peer_value(&self, make: impl FnOnce() -> HeaderValue) -> &HeaderValue {
        self.peer.get_or_init(make)
    }

    /// The port that the client has connected to, as a value of a field; `make` makes it once.
    pub(crate) fn port_value(&self, make: impl FnOnce() -> HeaderValue) -> &HeaderValue {
        self.port.get_or_init(make)
    }

    /// The client's certificate, for the field `Client-Cert`.
    pub(crate) fn certificate(&self) -> Option<&HeaderValue> {
        self.certificate.as_ref()
    }

    pub(crate) fn statistics(&self) -> &FrontStatistics {
        &self.statistics
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Relaxed))]
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The next read shows the client that nothing more is written.
    pub(crate) fn end_writing(&self) {
        self.ends_writing.store(true, Ordering::Relaxed);
    }

    pub(super) fn ends_writing(&self) -> bool {
        self.ends_writing.load(Ordering::Relaxed)
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        let ended = usize::from(self.ended.load(Ordering::Relaxed));
        Some(Ended::ALL[ended.checked_sub(1)?])
    }

    pub(super) fn end(&self, why: Ended) {
        self.ended.store(why as u8 + 1, Ordering::Relaxed);
    }
}
