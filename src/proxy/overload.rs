//! More requests than backends can take: limits, a queue, and pauses that backends ask for.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};
use tokio::sync::{Mutex, Notify, OwnedSemaphorePermit, Semaphore};

use super::unserved::Unserved;
use crate::config;

/// Somebody who waits looks again after this time, in case an end was not told.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Backends that may be paused at one time; more of them are overload of all, where a pause does not
/// help.
const MOST_PAUSED: usize = 64;

/// The limits, and who waits.
#[derive(Debug)]
pub(super) struct Overload {
    /// 0 for any number.
    most_in_all: usize,
    in_all: Option<Arc<Semaphore>>,
    /// `u32::MAX` for any number.
    per_node: u32,
    queue: usize,
    waiting: AtomicUsize,
    /// Those of them that wait for a backend with room.
    for_backend: Line,
    /// Those that wait for room at the leader; the others wait for a place in all.
    for_leader: Line,
    patience: Duration,
    most_pause: Duration,
    /// Shared with what comes after a reload.
    paused: Arc<ArcSwap<HashMap<SocketAddr, Instant>>>,
}

/// Who waits for the same: only the first one looks, so that nobody is served before those who have waited longer.
#[derive(Debug, Default)]
struct Line {
    /// Whoever has it is the first one; it goes to those who wait in their order.
    turn: Mutex<()>,
    freed: Notify,
    waiting: AtomicUsize,
}

impl Line {
    /// Waits until `try_again` gives something. Who cannot take what others can does not stand in line before them.
    async fn wait_for<T>(&self, is_in_line: bool, mut try_again: impl FnMut() -> Option<T>) -> T {
        let _turn = match is_in_line {
            true => Some(self.turn.lock().await),
            false => None,
        };
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // In line before looking, so that no end in between is missed.
            freed.as_mut().enable();
            if let Some(given) = try_again() {
                return given;
            }
            let _ = tokio::time::timeout(LOOK_EVERY, freed).await;
        }
    }
}

/// A place in the queue.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pause that `Retry-After` asks for: seconds, or a date, which is as exact as both clocks are.
fn pause_of(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    date.duration_since(now).ok()
}

impl Overload {
    pub(super) fn new(config: &config::Overload) -> Self {
        let limit = |limit: usize| (limit > 0).then_some(limit);
        let per_node = limit(config.max_in_flight_per_node);
        Self {
            most_in_all: config.max_in_flight,
            in_all: limit(config.max_in_flight).map(|limit| Arc::new(Semaphore::new(limit))),
            per_node: per_node.map_or(u32::MAX, |limit| u32::try_from(limit).unwrap_or(u32::MAX)),
            queue: config.queue,
            waiting: AtomicUsize::new(0),
            for_backend: Line::default(),
            for_leader: Line::default(),
            patience: Duration::from_millis(config.queue_timeout_ms),
            most_pause: Duration::from_millis(config.retry_after_most_ms),
            paused: Arc::default(),
        }
    }

    /// Goes on where another one with other settings has been: with the requests that have places, if there are as many
    /// places, and with the pauses.
    pub(super) fn continue_from(&mut self, former: &Self) {
        if self.most_in_all == former.most_in_all {
            self.in_all = former.in_all.clone();
        }
        self.paused = former.paused.clone();
    }

    /// Lets a request in that may still take this long, if that is limited; what it gets has to be kept as long as the
    /// request. The error is why it is not served.
    pub(super) async fn enter(
        &self,
        left: Option<Duration>,
    ) -> Result<Option<OwnedSemaphorePermit>, Unserved> {
        let Some(places) = &self.in_all else {
            return Ok(None);
        };
        if let Ok(place) = places.clone().try_acquire_owned() {
            return Ok(Some(place));
        }
        match self.wait(left, places.clone().acquire_owned()).await {
            Some(Ok(place)) => Ok(Some(place)),
            Some(Err(_)) | None => Err(Unserved::TooMany),
        }
    }

    /// Whether a backend may have this number of requests in flight.
    pub(super) fn allows(&self, in_flight: u32) -> bool {
        in_flight <= self.per_node
    }

    /// Waits in the queue until `try_again` gives a backend that has room, at most for the time that is left.
    /// `is_in_line` means that it takes any of them.
    pub(super) async fn wait_for_backend<T>(
        &self,
        left: Option<Duration>,
        is_in_line: bool,
        try_again: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let line = &self.for_backend;
        line.waiting.fetch_add(1, Ordering::Relaxed);
        let _counted = Waiting(&line.waiting);
        self.wait(left, line.wait_for(is_in_line, try_again)).await
    }

    /// The same for the leader.
    pub(super) async fn wait_for_leader<T>(
        &self,
        left: Option<Duration>,
        try_again: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let line = &self.for_leader;
        line.waiting.fetch_add(1, Ordering::Relaxed);
        let _counted = Waiting(&line.waiting);
        self.wait(left, line.wait_for(true, try_again)).await
    }

    async fn wait<T>(&self, left: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
        let place = Waiting(&self.waiting);
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.queue {
            drop(place);
            return None;
        }
        let patience = left.map_or(self.patience, |left| left.min(self.patience));
        tokio::time::timeout(patience, future).await.ok()
    }

    /// A request has ended.
    pub(super) fn freed(&self) {
        if self.per_node < u32::MAX {
            // All look: those who try again, and cannot take any, are beside the line.
            for line in [&self.for_backend, &self.for_leader] {
                if line.waiting.load(Ordering::Relaxed) > 0 {
                    line.freed.notify_waiters();
                }
            }
        }
    }

    /// Takes notice of what a backend says in a response. `refuses_most` says whether most of its clients are refused now, and
    /// is asked only if it asks for a pause.
    pub(super) fn answered(
        &self,
        addr: SocketAddr,
        status: StatusCode,
        fields: &HeaderMap,
        refuses_most: impl FnOnce(Instant) -> bool,
    ) {
        let is_overload =
            status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE;
        if !is_overload || self.most_pause.is_zero() {
            return;
        }
        let value = fields.get(RETRY_AFTER);
        let pause = value.and_then(|value| pause_of(value.to_str().ok()?, SystemTime::now()));
        let now = Instant::now();
        // It may be about this client (RFC 6585), or what it asks for: then it could have every backend paused for all others.
        if let Some(pause) = pause.filter(|pause| !pause.is_zero())
            && refuses_most(now)
        {
            self.pause(addr, now, now + pause.min(self.most_pause));
        }
    }

    fn pause(&self, addr: SocketAddr, now: Instant, until: Instant) {
        self.paused.rcu(|paused| {
            let mut paused = HashMap::clone(paused);
            paused.retain(|_, until| *until > now);
            let longest = paused.get(&addr).map_or(until, |it| until.max(*it));
            if paused.len() < MOST_PAUSED || paused.contains_key(&addr) {
                paused.insert(addr, longest);
            }
            paused
        });
    }

    /// The backends that are given nothing now, of this number: none if more than half of them asked for
    /// that, because the others could not carry it.
    pub(super) fn paused(&self, now: Instant, backends: impl FnOnce() -> usize) -> Vec<SocketAddr> {
        let paused = self.paused.load();
        if paused.is_empty() {
            return Vec::new();
        }
        let still = paused.iter().filter(|(_, until)| **until > now);
        let still: Vec<_> = still.map(|(addr, _)| *addr).collect();
        match still.len() * 2 <= backends() {
            true => still,
            false => Vec::new(),
        }
    }

    /// Whether requests wait for a backend that has room.
    pub(super) fn some_wait_for_backend(&self) -> bool {
        self.for_backend.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether requests wait for room at the leader.
    pub(super) fn some_wait_for_leader(&self) -> bool {
        self.for_leader.waiting.load(Ordering::Relaxed) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overload(change: impl FnOnce(&mut config::Overload)) -> Overload {
        let mut config = config::Overload::default();
        change(&mut config);
        Overload::new(&config)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_for_a_place_in_a_bounded_queue() {
        let overload = overload(|config| {
            config.max_in_flight = 1;
            config.queue = 1;
        });
        let place = overload.enter(None).await.unwrap();
        let start = tokio::time::Instant::now();
        let (first, second) = tokio::join!(overload.enter(None), overload.enter(None));
        // The queue has room for one, which waits in vain.
        assert!(first.is_err() && second.is_err());
        assert_eq!(start.elapsed(), Duration::from_secs(1));
        let (waited, ()) = tokio::join!(overload.enter(None), async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            drop(place);
        });
        assert_eq!(overload.waiting.load(Ordering::Relaxed), 0);
        // Whoever waits for a place does not stand in the way of those who have one.
        let _place = waited.unwrap();
        let (waited, ()) = tokio::join!(overload.enter(None), async {
            tokio::task::yield_now().await;
            assert_eq!(overload.waiting.load(Ordering::Relaxed), 1);
            assert!(!overload.some_wait_for_backend());
        });
        assert!(waited.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_backend_is_told_when_one_is_free() {
        let overload = overload(|config| config.max_in_flight_per_node = 2);
        assert!(overload.allows(2) && !overload.allows(3));
        let free = std::cell::Cell::new(false);
        let (got, ()) = tokio::join!(
            overload.wait_for_backend(None, true, || free.get().then_some(7)),
            async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                free.set(true);
                overload.freed();
            }
        );
        assert_eq!(got, Some(7));
        free.set(false);
        assert_eq!(
            overload
                .wait_for_backend(None, true, || free.get().then_some(7))
                .await,
            None
        );
    }

    /// With as many ends as there are requests that wait, in less than they wait, each of them is served in its turn.
    #[tokio::test(start_paused = true)]
    async fn who_waits_is_served_in_the_order_of_coming() {
        let overload = Arc::new(overload(|config| {
            config.max_in_flight_per_node = 1;
            config.queue = 1_000;
        }));
        let (room, served) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut all = tokio::task::JoinSet::new();
        let mut come = |number: usize| {
            let (overload, room, served) = (overload.clone(), room.clone(), served.clone());
            all.spawn(async move {
                let take = || {
                    let less = |left: usize| left.checked_sub(1);
                    room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                        .ok()
                };
                let got = overload.wait_for_backend(None, true, take).await;
                (number, got.map(|_| served.fetch_add(1, Ordering::SeqCst)))
            });
        };
        for number in 0..100 {
            come(number);
            tokio::task::yield_now().await;
        }
        for number in 100..190 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            room.fetch_add(1, Ordering::SeqCst);
            overload.freed();
            come(number);
        }
        let served = all.join_all().await;
        for (number, place) in served {
            if number < 90 {
                assert_eq!(place, Some(number));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_beyond_the_time_of_the_request() {
        let overload = overload(|config| config.max_in_flight = 1);
        let _place = overload.enter(None).await.unwrap();
        let start = tokio::time::Instant::now();
        let left = Some(Duration::from_millis(300));
        assert!(overload.enter(left).await.is_err());
        assert_eq!(start.elapsed(), Duration::from_millis(300));
        assert_eq!(overload.wait_for_leader(left, || None::<()>).await, None);
        assert_eq!(start.elapsed(), Duration::from_millis(600));
    }

    #[test]
    fn a_pause_is_in_seconds_or_until_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, seconds) in [
            ("3", Some(3)),
            ("Sun, 06 Nov 1994 08:49:40 GMT", Some(3)),
            ("Sunday, 06-Nov-94 08:49:40 GMT", Some(3)),
            ("Sun Nov  6 08:49:40 1994", Some(3)),
            ("Sun, 06 Nov 1994 08:49:30 GMT", None),
            ("-3", None),
            ("soon", None),
        ] {
            assert_eq!(
                pause_of(text, now),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }

    #[test]
    fn a_pause_is_heeded_within_bounds() {
        let overload = overload(|config| config.retry_after_most_ms = 2_000);
        let addr = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let says = |port, status, text: &'static str| {
            let fields = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            overload.answered(addr(port), status, &fields, |_| true);
        };
        let (busy, many) = (
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::TOO_MANY_REQUESTS,
        );
        says(1, busy, "1");
        says(2, many, "3600");
        // Not shorter than another response has asked for.
        says(2, many, "1");
        says(3, StatusCode::OK, "5");
        says(4, busy, "soon");
        says(5, busy, "0");
        overload.answered(addr(6), busy, &HeaderMap::new(), |_| true);
        let fields = HeaderMap::from_iter([(RETRY_AFTER, "5".parse().unwrap())]);
        overload.answered(addr(7), many, &fields, |_| false);
        overload.answered(addr(8), busy, &fields, |_| false);
        let paused = |after| {
            let now = Instant::now() + Duration::from_millis(after);
            let mut paused = overload.paused(now, || 1_000);
            paused.sort_unstable();
            paused
        };
        assert_eq!(paused(0), [addr(1), addr(2)]);
        assert_eq!(paused(1_500), [addr(2)]);
        assert!(paused(2_500).is_empty());
        for port in 100..1_000 {
            says(port, busy, "1");
        }
        assert_eq!(paused(0).len(), MOST_PAUSED);
        // More than half of all: that would be the end of the others.
        assert!(overload.paused(Instant::now(), || 100).is_empty());
    }
}
