//! The state of one client connection, shared by its stream, which keeps the deadlines, and the
//! proxy, which knows what is being read.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use ::pingora::apps::ReusedHttpStream;
use ::pingora::http::ResponseHeader;
use ::pingora::protocols::Digest;
use ::pingora::protocols::raw_connect::ProxyDigest;
use ::pingora::proxy::Session;
use http::HeaderValue;
use tokio::time::Instant;

use super::statistics::FrontStatistics;
use crate::sync::lock;

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
    accepted: Instant,
    /// Until when the request is to be over, whatever its parts take: in microseconds after the connection was accepted,
    /// 0 for any time.
    end_by: AtomicU64,
    /// How long a backend may be silent, where Pingora cannot keep that time, and since when it is; in microseconds,
    /// as above.
    answer_within: AtomicU64,
    answer_since: AtomicU64,
    /// That time was over.
    is_unanswered: AtomicBool,
    /// The requests of HTTP/2, and when the last one has ended, in microseconds as above.
    streams: AtomicUsize,
    last_stream: AtomicU64,
    /// Those of them that have been answered and are not complete, and how many these are.
    drains: Mutex<Drains>,
    draining: AtomicUsize,
    /// What goes on after a response after which Pingora ends the connection.
    kept: Mutex<Option<ReusedHttpStream>>,
}

/// While other requests of a connection go on, what is left of one has so many times its time, because they end with it.
const BESIDE_OTHERS: u32 = 6;

/// A request of HTTP/2, until all of these are dropped.
#[derive(Debug, Clone)]
pub(crate) struct OpenStream(Arc<Stream>);

#[derive(Debug)]
struct Stream {
    connection: Arc<Connection>,
    draining: OnceLock<Draining>,
}

impl OpenStream {
    /// The request has been answered, and what is left of it has to be there within this time: nobody else ends a stream
    /// on which nothing comes.
    pub(crate) fn drains(&self, within: Duration) {
        self.0
            .draining
            .get_or_init(|| self.0.connection.drains(within));
    }

    /// Whether it has been answered.
    pub(crate) fn is_draining(&self) -> bool {
        self.0.draining.get().is_some()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Before it is no stream any more: otherwise the others would be as many as those that are answered.
        drop(self.draining.take());
        let now = micros(self.connection.elapsed());
        self.connection.last_stream.store(now, Ordering::Relaxed);
        self.connection.streams.fetch_sub(1, Ordering::Release);
    }
}

/// Until when what is left of each of these requests is to be there.
#[derive(Debug, Default)]
struct Drains {
    next: u64,
    /// The number of each, since when, and for how long.
    since: Vec<(u64, Instant, Duration)>,
}

/// A request of HTTP/2 that has been answered and is not complete, until this is dropped.
#[derive(Debug)]
struct Draining {
    connection: Arc<Connection>,
    number: u64,
}

impl Drop for Draining {
    fn drop(&mut self) {
        let mut drains = lock(&self.connection.drains);
        drains.since.retain(|(number, ..)| *number != self.number);
        let left = drains.since.len();
        self.connection.draining.store(left, Ordering::Relaxed);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
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
            accepted: Instant::now(),
            end_by: AtomicU64::new(0),
            answer_within: AtomicU64::new(0),
            answer_since: AtomicU64::new(0),
            is_unanswered: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            last_stream: AtomicU64::new(0),
            drains: Mutex::default(),
            draining: AtomicUsize::new(0),
            kept: Mutex::default(),
        }
    }

    /// The connection goes on with this, although Pingora ends it.
    pub(crate) fn keep(&self, stream: ReusedHttpStream) {
        *lock(&self.kept) = Some(stream);
    }

    pub(super) fn take_kept(&self) -> Option<ReusedHttpStream> {
        lock(&self.kept).take()
    }

    /// A request of HTTP/2 begins.
    pub(crate) fn opens(self: &Arc<Self>) -> OpenStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        OpenStream(Arc::new(Stream {
            connection: self.clone(),
            draining: OnceLock::new(),
        }))
    }

    /// How long there has been no request of HTTP/2; `None` while there is one.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        if self.streams.load(Ordering::Acquire) > 0 {
            return None;
        }
        let last = Duration::from_micros(self.last_stream.load(Ordering::Relaxed));
        Some(self.elapsed().saturating_sub(last))
    }

    fn drains(self: &Arc<Self>, within: Duration) -> Draining {
        let mut drains = lock(&self.drains);
        let number = drains.next;
        drains.next += 1;
        drains.since.push((number, Instant::now(), within));
        self.draining.store(drains.since.len(), Ordering::Relaxed);
        Draining {
            connection: self.clone(),
            number,
        }
    }

    pub(super) fn drain_by(&self) -> Option<Instant> {
        if self.draining.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let drains = lock(&self.drains);
        let times = match self.streams.load(Ordering::Relaxed) > drains.since.len() {
            true => BESIDE_OTHERS,
            false => 1,
        };
        let until = |(_, since, within): &(u64, Instant, Duration)| *since + *within * times;
        drains.since.iter().map(until).min()
    }

    /// The connection of a request; `None` if its listener has no front.
    pub(crate) fn of(session: &Session) -> Option<&Arc<Self>> {
        Self::of_digest(session.digest()?)
    }

    /// The same by what Pingora knows of it.
    pub(crate) fn of_digest(digest: &Digest) -> Option<&Arc<Self>> {
        let digest = digest.proxy_digest.as_ref()?;
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

    fn elapsed(&self) -> Duration {
        self.accepted.elapsed()
    }

    /// The request has to be over within this time from now on, if it is given.
    pub(crate) fn expect_end(&self, within: Option<Duration>) {
        let by = within.map(|within| self.elapsed().saturating_add(within));
        self.end_by.store(by.map_or(0, micros), Ordering::Relaxed);
    }

    pub(super) fn end_by(&self) -> Option<Instant> {
        match self.end_by.load(Ordering::Relaxed) {
            0 => None,
            by => self.accepted.checked_add(Duration::from_micros(by)),
        }
    }

    /// A backend may be silent for so long from now on, if a time is given. If it is silent for longer,
    /// [`take_unanswered`](Self::take_unanswered) says so, and a read fails.
    pub(crate) fn expect_answer(&self, within: Option<Duration>) {
        self.answer_within
            .store(within.map_or(0, micros), Ordering::Relaxed);
        self.answer_goes_on();
    }

    /// The backend is not silent, or it is not the backend that is waited for.
    pub(crate) fn answer_goes_on(&self) {
        if self.answer_within.load(Ordering::Relaxed) > 0 {
            self.answer_since
                .store(micros(self.elapsed()), Ordering::Relaxed);
        }
    }

    pub(super) fn answer_by(&self) -> Option<Instant> {
        let within = match self.answer_within.load(Ordering::Relaxed) {
            0 => return None,
            within => Duration::from_micros(within),
        };
        let since = Duration::from_micros(self.answer_since.load(Ordering::Relaxed));
        self.accepted.checked_add(since.saturating_add(within))
    }

    pub(super) fn set_unanswered(&self) {
        self.expect_answer(None);
        self.is_unanswered.store(true, Ordering::Relaxed);
    }

    /// Whether a backend has not answered in time, since this was last asked.
    pub(crate) fn take_unanswered(&self) -> bool {
        self.is_unanswered.swap(false, Ordering::Relaxed)
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        let ended = usize::from(self.ended.load(Ordering::Relaxed));
        Some(Ended::ALL[ended.checked_sub(1)?])
    }

    pub(super) fn end(&self, why: Ended) {
        self.ended.store(why as u8 + 1, Ordering::Relaxed);
    }
}
