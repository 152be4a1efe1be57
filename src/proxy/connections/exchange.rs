//! One try of a request on a connection.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::Secure;
use super::pool::{Pool, Target};

/// How long the backend of a try may be silent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::proxy) struct Silence {
    /// Until its response begins.
    pub(in crate::proxy) response: Duration,
    /// From one part of it to the next.
    pub(in crate::proxy) read: Duration,
}

impl Silence {
    /// The same at any time.
    pub(in crate::proxy) const fn of(time: Duration) -> Self {
        Self {
            response: time,
            read: time,
        }
    }

    /// Where there is one time only.
    pub(in crate::proxy) fn longest(&self) -> Duration {
        self.response.max(self.read)
    }
}

/// How long things may take; `None` for any time.
#[derive(Debug)]
pub(super) struct Times {
    pub(super) connect: Option<Duration>,
    /// To connect, with the handshake of TLS.
    pub(super) open: Option<Duration>,
    pub(super) silence: Silence,
    pub(super) waits: Waits,
    /// How long the connection may be idle afterwards.
    pub(super) idle: Duration,
}

/// How long a request waits.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::proxy) struct Waits {
    /// For its backend: since the last part of the request that it has taken, or of the response. `None` for what the peer
    /// says.
    pub(in crate::proxy) silence: Option<Silence>,
    /// The same while the rest of the request is waited for, if nobody else keeps that time.
    pub(in crate::proxy) client_body: Option<Duration>,
    /// In all, with all of its tries.
    pub(in crate::proxy) end_by: Option<Instant>,
}

/// What follows the head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// Nothing.
    None,
    /// A body as long as the head says.
    Sized,
    /// Chunks. Pingora writes each of them in three parts, and flushes after it.
    Chunked,
}

/// What matters of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) body: Body,
    /// It may be sent again, whatever has become of it.
    pub(super) is_idempotent: bool,
}

/// How a backend is spoken to.
#[derive(Debug)]
pub(super) struct Spoken {
    /// What keeps connections to one address apart.
    pub(super) group_key: u64,
    /// TLS, if it has that.
    pub(super) secure: Option<Secure>,
}

/// One try of a request on a connection, as the proxy, Pingora and the connection know it.
///
/// For Pingora each try has a new connection. After a response it finds out whether the connection can be used again:
/// both messages are complete, neither end has said that it closes, nothing came that nobody asked for. If so, it reads
/// once more from it, for its own pool, to see whether it is quiet. Only if the proxy has said before that the response
/// is complete, that read tells that the connection is free: Pingora learns that it is over, drops it, and it goes to
/// the list. Should Pingora decide in another way one day, connections are closed: none is used that is not free. Nor does
/// Pingora use one that comes into its own pool: it asks the system where a connection leads, and these have no descriptor.
#[derive(Debug)]
pub(in crate::proxy) struct Exchange {
    itself: Weak<Self>,
    pool: Arc<Pool>,
    spoken: Spoken,
    times: Times,
    sent: Sent,
    is_unanswered: AtomicBool,
    is_reused: AtomicBool,
    has_written: AtomicBool,
    is_request_complete: AtomicBool,
    is_answering: AtomicBool,
    is_complete: AtomicBool,
}

impl Exchange {
    pub(super) fn new(pool: Arc<Pool>, spoken: Spoken, times: Times, sent: Sent) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            pool,
            spoken,
            times,
            sent,
            is_unanswered: AtomicBool::new(false),
            is_reused: AtomicBool::new(false),
            has_written: AtomicBool::new(false),
            is_request_complete: AtomicBool::new(false),
            is_answering: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
        })
    }

    /// Itself, to be shared with its stream.
    pub(super) fn itself(&self) -> Option<Arc<Self>> {
        self.itself.upgrade()
    }

    /// Its connection is there.
    pub(super) fn begins(&self, is_reused: bool) {
        self.is_reused.store(is_reused, Ordering::Relaxed);
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

    /// All of the request has been received.
    pub(in crate::proxy) fn request_completes(&self) {
        self.is_request_complete.store(true, Ordering::Relaxed);
    }

    /// The head of the final response has been read.
    pub(in crate::proxy) fn answer_begins(&self) {
        self.is_answering.store(true, Ordering::Relaxed);
    }

    /// Whether that has happened.
    pub(super) fn is_answering(&self) -> bool {
        self.is_answering.load(Ordering::Relaxed)
    }

    /// Whether its connection has TLS.
    pub(in crate::proxy) fn is_secure(&self) -> bool {
        self.spoken.secure.is_some()
    }

    /// Until when to wait, if nothing has been read or written since then.
    pub(super) fn wait_until(&self, since: Instant) -> Instant {
        self.end_of(
            since,
            match self.is_answering() {
                false => self.times.silence.response,
                true => self.times.silence.read,
            },
        )
    }

    /// The same, whether the response has begun by then or not.
    pub(super) fn wait_at_least_until(&self, since: Instant) -> Instant {
        let silence = self.times.silence;
        self.end_of(since, silence.response.min(silence.read))
    }

    fn end_of(&self, since: Instant, silence: Duration) -> Instant {
        let times = &self.times;
        let is_request_complete = self.is_request_complete.load(Ordering::Relaxed);
        let client_body = times.waits.client_body.filter(|_| !is_request_complete);
        let within = client_body.map_or(silence, |client_body| client_body.min(silence));
        let until = since + within;
        times.waits.end_by.map_or(until, |end_by| end_by.min(until))
    }

    /// The final response has been read from its head to its end, and the connection is no tunnel.
    pub(in crate::proxy) fn completes(&self) {
        self.is_complete.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Relaxed)
    }

    pub(super) fn secure(&self) -> Option<&Secure> {
        self.spoken.secure.as_ref()
    }

    pub(super) fn sent(&self) -> Sent {
        self.sent
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    pub(super) fn times(&self) -> &Times {
        &self.times
    }

    /// The time for what was waited for is over.
    pub(super) fn times_out(&self) {
        self.is_unanswered.store(true, Ordering::Relaxed);
    }

    /// Whether that has happened.
    pub(in crate::proxy) fn is_unanswered(&self) -> bool {
        self.is_unanswered.load(Ordering::Relaxed)
    }

    pub(super) fn target(&self, addr: SocketAddr) -> Target {
        Target {
            addr,
            group_key: self.spoken.group_key,
        }
    }
}
