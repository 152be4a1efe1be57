//! The state of the process: whether it is to end, and what it waits for.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ::pingora::proxy::Session;
use tokio::sync::{Notify, watch};
use tracing::info;

use super::listeners::Listeners;
use crate::supervise::say;

/// How this process ends. There is one for the process, because signals are sent to processes:
/// [`of_process`](Self::of_process). The function [`run`](super::run) says what happens at each signal.
///
/// A background service that has work to do at the end keeps the process from ending before:
///
/// ```
/// use pingora_etcd::proxy::Shutdown;
///
/// // When the service starts:
/// let hold = Shutdown::of_process().hold();
/// // When its work is done:
/// drop(hold);
/// assert!(!Shutdown::of_process().is_draining());
/// ```
#[derive(Debug)]
pub struct Shutdown {
    is_watched: AtomicBool,
    is_draining: AtomicBool,
    drain_begins: Notify,
    /// Pingora was asked to accept nothing any more.
    is_closing: AtomicBool,
    /// Requests that are being received or answered.
    requests: AtomicUsize,
    /// Open connections of clients, with requests or without.
    connections: AtomicUsize,
    holds: AtomicUsize,
    /// What has something to write when everything has been served.
    writers: AtomicUsize,
    /// Whatever the process serves is a hold, if it is not a request of this crate's proxy.
    is_all_held: AtomicBool,
    drain_delay_ms: AtomicU64,
    log_generation: AtomicU64,
    /// How often a reload was asked for; made by whoever follows.
    reloads: OnceLock<watch::Sender<u64>>,
    listeners: Listeners,
}

static OF_PROCESS: Shutdown = Shutdown::new();

/// Something that the process does not end before, for as long as this exists.
#[derive(Debug)]
#[must_use = "dropping it lets the process end"]
pub struct Hold(&'static AtomicUsize);

impl Hold {
    fn new(count: &'static AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // What was done before must be done when the process ends.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Shutdown {
    pub(super) const fn new() -> Self {
        Self {
            is_watched: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            drain_begins: Notify::const_new(),
            is_closing: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            holds: AtomicUsize::new(0),
            writers: AtomicUsize::new(0),
            is_all_held: AtomicBool::new(false),
            drain_delay_ms: AtomicU64::new(0),
            log_generation: AtomicU64::new(0),
            reloads: OnceLock::new(),
            listeners: Listeners::new(),
        }
    }

    /// That of this process.
    pub fn of_process() -> &'static Self {
        &OF_PROCESS
    }

    /// Whether the process is to end and should get no new requests: readiness checks have to fail.
    /// Requests are still served.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Ends the connection of a client after this response, if the process is to end: for the hook `response_filter` of a proxy of
    /// your own. Over HTTP/2 nothing is to be said; the front does that.
    pub fn end_connection(&self, session: &mut Session) {
        if self.is_draining() && !session.is_http2() {
            session.set_keepalive(None);
        }
    }

    /// Keeps the process from ending before the guard is dropped. The grace period and a second
    /// signal end it all the same.
    pub fn hold(&'static self) -> Hold {
        Hold::new(&self.holds)
    }

    /// Keeps the process from ending for a while, although everything has been served: something is still to be written.
    pub(in crate::proxy) fn writer(&'static self) -> Hold {
        Hold::new(&self.writers)
    }

    /// Whether everything has been served that was accepted, and nothing is accepted any more.
    #[cfg(feature = "opentelemetry")]
    pub(in crate::proxy) fn has_served(&self) -> bool {
        self.has_closed() && self.requests.load(Ordering::Acquire) == 0
    }

    pub(super) fn has_writers(&self) -> bool {
        self.writers.load(Ordering::Acquire) > 0
    }

    /// Says that whatever this process serves beside this crate's proxy has a [`hold`](Self::hold).
    /// Without it, a process that listens on other addresses, too, takes the whole of its grace
    /// period, because nobody knows what is in flight there.
    pub fn waits_only_for_holds(&self) {
        self.is_all_held.store(true, Ordering::Relaxed);
    }

    /// A request that is received or answered, from its first byte to its last.
    pub(in crate::proxy) fn request(&'static self) -> Hold {
        Hold::new(&self.requests)
    }

    /// An open connection of a client.
    pub(in crate::proxy) fn connection(&'static self) -> Hold {
        Hold::new(&self.connections)
    }

    pub(in crate::proxy) fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// Connections are accepted for at least this long after SIGTERM, so that load balancers in front notice that the
    /// process is not ready any more. [`ClusterProxy::add_to`](crate::proxy::ClusterProxy::add_to) says it of
    /// `drain_delay_ms`; the longest time that was said holds. Default: 0.
    pub fn accepts_for(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.drain_delay_ms.fetch_max(delay, Ordering::Relaxed);
    }

    /// [`run`](super::run) watches the signals from now on.
    pub(super) fn watch(&self) {
        self.is_watched.store(true, Ordering::Relaxed);
    }

    /// Whether [`run`](super::run) watches the signals of this process, and not Pingora.
    pub(in crate::proxy) fn is_watched(&self) -> bool {
        self.is_watched.load(Ordering::Relaxed)
    }

    /// Gives clients time to finish what they have begun, when nothing is accepted any more and before
    /// idle connections are closed.
    pub(in crate::proxy) async fn settle(&self) {
        const WITHIN: Duration = Duration::from_millis(500);
        const STEP: Duration = Duration::from_millis(10);
        let start = tokio::time::Instant::now();
        while self.connections() > 0 && start.elapsed() < WITHIN {
            tokio::time::sleep(STEP).await;
        }
    }

    /// How often logs were asked to be opened again.
    pub(in crate::proxy) fn log_generation(&self) -> u64 {
        self.log_generation.load(Ordering::Relaxed)
    }

    pub(super) fn open_logs(&self) {
        self.log_generation.fetch_add(1, Ordering::Relaxed);
        say(|| info!("logs are opened again"));
    }

    /// Changes whenever a reload is asked for.
    pub(in crate::proxy) fn follow_reloads(&self) -> watch::Receiver<u64> {
        let reloads = self.reloads.get_or_init(|| watch::channel(0).0);
        reloads.subscribe()
    }

    /// Asks for a reload; whether there is anybody who does it.
    pub(super) fn ask_for_reload(&self) -> bool {
        let follows = self
            .reloads
            .get()
            .filter(|reloads| reloads.receiver_count() > 0);
        if let Some(reloads) = follows {
            reloads.send_modify(|count| *count += 1);
        }
        follows.is_some()
    }

    pub(super) fn begin_draining(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
        self.drain_begins.notify_waiters();
    }

    /// Ends when the process is to end.
    pub(in crate::proxy) async fn until_draining(&self) {
        let begins = self.drain_begins.notified();
        if !self.is_draining() {
            begins.await;
        }
    }

    pub(super) fn begin_closing(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
    }

    pub(super) fn drain_delay(&self) -> Duration {
        Duration::from_millis(self.drain_delay_ms.load(Ordering::Relaxed))
    }

    pub(super) fn in_flight(&self) -> usize {
        self.requests.load(Ordering::Acquire) + self.holds.load(Ordering::Acquire)
    }

    /// Whether requests may be in flight that nobody counts.
    pub(super) fn has_unknown_requests(&self) -> bool {
        !self.is_all_held.load(Ordering::Relaxed) && self.listeners.has_unknown()
    }

    /// Whether the process is about to end and accepts nothing any more, because that was its signal or
    /// because a successor does.
    pub fn has_closed(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed) && self.listeners.are_closed()
    }

    /// Whether nothing is accepted any more and every connection has ended.
    pub(super) fn is_closed_and_empty(&self) -> bool {
        self.listeners.are_closed() && self.connections() == 0
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_counts_until_it_is_dropped() {
        static STATE: Shutdown = Shutdown::new();
        let (request, hold, connection) = (STATE.request(), STATE.hold(), STATE.connection());
        assert_eq!((STATE.in_flight(), STATE.connections()), (2, 1));
        drop((request, connection));
        assert_eq!((STATE.in_flight(), STATE.connections()), (1, 0));
        drop(hold);
        assert_eq!(STATE.in_flight(), 0);
        STATE.accepts_for(Duration::from_secs(2));
        STATE.accepts_for(Duration::from_secs(1));
        assert_eq!(STATE.drain_delay(), Duration::from_secs(2));
    }
}
