//! Requests that were answered sooner than the usual work takes, and count as in flight until it would be done.
//!
//! A backend that refuses at once never has anything in flight, and would get the requests of all.

use std::collections::BinaryHeap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::atomic::AtomicF32;
use crate::sync::lock;

/// The backend of such a request. Whoever owns one keeps a request in flight there.
pub(super) trait Backend: fmt::Debug + Send + Sync {
    /// Whether its registration is gone.
    fn is_orphaned(&self) -> bool;
    /// Whether some request there has been answered, and counts as in flight.
    fn is_lingering(&self) -> bool;
    /// One of the requests in flight there has been answered.
    fn begin_lingering(&self);
    /// That one is not in flight any more.
    fn end_lingering(&self);
}

/// More than this number of requests at once are not kept.
const MOST: usize = 10_000;

/// There are none.
const NEVER: u64 = u64::MAX;

/// The requests to one balancer's backends that were answered too soon.
#[derive(Debug)]
pub(super) struct Lingering {
    /// How long successes take at most of the backends, in seconds; 0 as long as it is not known.
    usual_latency: AtomicF32,
    /// When the first of the requests ends, in microseconds after `epoch`, or [`NEVER`]. Every pick reads it.
    next_end: AtomicU64,
    /// When the first request was kept.
    epoch: OnceLock<Instant>,
    requests: Mutex<BinaryHeap<Kept>>,
}

/// A request, as the guard of its backend. The one that ends first is the greatest.
#[derive(Debug)]
struct Kept {
    until: Instant,
    backend: Arc<dyn Backend>,
}

impl Ord for Kept {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.until.cmp(&self.until)
    }
}

impl PartialOrd for Kept {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.until == other.until
    }
}

impl Eq for Kept {}

impl Lingering {
    pub(super) fn new() -> Self {
        Self {
            usual_latency: AtomicF32::new(0.0),
            next_end: AtomicU64::new(NEVER),
            epoch: OnceLock::new(),
            requests: Mutex::default(),
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        let epoch = self.epoch.get_or_init(|| at);
        at.saturating_duration_since(*epoch).as_micros() as u64
    }

    /// To be called after each change, while the requests are locked.
    fn set_next_end(&self, requests: &BinaryHeap<Kept>) {
        let next = requests.peek().map(|kept| self.micros(kept.until));
        self.next_end
            .store(next.unwrap_or(NEVER), Ordering::Relaxed);
    }

    pub(super) fn set_usual_latency(&self, seconds: f64) {
        self.usual_latency.set(seconds as f32);
    }

    /// Keeps a request that took this time, if that is less than usual, for this part of the rest.
    pub(super) fn keep(&self, backend: Arc<dyn Backend>, took: Duration, part: f32, now: Instant) {
        let rest = (self.usual_latency.get() - took.as_secs_f32()) * part;
        let rest = Duration::try_from_secs_f32(rest).unwrap_or_default();
        let Some(until) = now.checked_add(rest).filter(|until| *until > now) else {
            return;
        };
        self.epoch.get_or_init(|| now);
        let mut requests = lock(&self.requests);
        // Those of a backend that is gone have been dropped, and no more may follow: they would keep each other alive.
        if backend.is_orphaned() || requests.len() >= MOST {
            return;
        }
        backend.begin_lingering();
        requests.push(Kept { until, backend });
        self.set_next_end(&requests);
    }

    /// Whether there are any.
    #[inline]
    pub(super) fn is_any(&self) -> bool {
        self.next_end.load(Ordering::Relaxed) != NEVER
    }

    /// Drops what has been kept for long enough, unless another thread is about it.
    #[cold]
    pub(super) fn release(&self, now: Instant) {
        if self.micros(now) < self.next_end.load(Ordering::Relaxed) {
            return;
        }
        let Ok(mut requests) = self.requests.try_lock() else {
            return;
        };
        while requests.peek().is_some_and(|kept| kept.until <= now) {
            if let Some(kept) = requests.pop() {
                kept.backend.end_lingering();
            }
        }
        self.set_next_end(&requests);
    }

    /// Drops all of a backend that is gone.
    pub(super) fn forget(&self, backend: &Arc<dyn Backend>) {
        // Locked before anything else, so that nothing is added afterwards.
        let mut requests = lock(&self.requests);
        if !backend.is_lingering() {
            return;
        }
        requests.retain(|kept| {
            let is_other = !std::ptr::addr_eq(Arc::as_ptr(&kept.backend), Arc::as_ptr(backend));
            if !is_other {
                kept.backend.end_lingering();
            }
            is_other
        });
        self.set_next_end(&requests);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};

    use super::*;

    #[derive(Debug, Default)]
    struct Counted {
        lingering: AtomicU32,
        is_orphaned: AtomicBool,
    }

    impl Backend for Counted {
        fn is_orphaned(&self) -> bool {
            self.is_orphaned.load(Ordering::Relaxed)
        }

        fn is_lingering(&self) -> bool {
            self.lingering.load(Ordering::Relaxed) > 0
        }

        fn begin_lingering(&self) {
            self.lingering.fetch_add(1, Ordering::Relaxed);
        }

        fn end_lingering(&self) {
            self.lingering.fetch_sub(1, Ordering::Relaxed);
        }
    }

    const MS: Duration = Duration::from_millis(1);

    fn kept(backend: &Arc<Counted>) -> (usize, u32) {
        let owners = Arc::strong_count(backend) - 1;
        (owners, backend.lingering.load(Ordering::Relaxed))
    }

    #[test]
    fn a_request_is_kept_until_the_usual_work_would_be_done() {
        let (lingering, backend) = (Lingering::new(), Arc::new(Counted::default()));
        let now = Instant::now();
        lingering.keep(backend.clone(), MS, 1.0, now);
        assert_eq!(kept(&backend), (0, 0), "what is usual is not known");
        lingering.set_usual_latency(0.010);
        lingering.keep(backend.clone(), 10 * MS, 1.0, now);
        lingering.keep(backend.clone(), MS, 0.0, now);
        assert!(!lingering.is_any(), "it took as long as usual");
        lingering.keep(backend.clone(), MS, 1.0, now);
        lingering.keep(backend.clone(), 2 * MS, 0.5, now);
        assert_eq!(kept(&backend), (2, 2));
        lingering.release(now + 3 * MS);
        assert_eq!(kept(&backend), (2, 2));
        lingering.release(now + 5 * MS);
        assert_eq!(kept(&backend), (1, 1), "in the order of their ends");
        lingering.release(now + 10 * MS);
        assert_eq!(kept(&backend), (0, 0));
        assert!(!lingering.is_any());
    }

    #[test]
    fn nothing_is_kept_of_a_backend_that_is_gone() {
        let lingering = Lingering::new();
        lingering.set_usual_latency(1.0);
        let (backend, other) = (Arc::new(Counted::default()), Arc::new(Counted::default()));
        let now = Instant::now();
        lingering.keep(backend.clone(), MS, 1.0, now);
        lingering.keep(other.clone(), MS, 1.0, now);
        backend.is_orphaned.store(true, Ordering::Relaxed);
        lingering.forget(&(backend.clone() as Arc<dyn Backend>));
        lingering.keep(backend.clone(), MS, 1.0, now);
        assert_eq!(kept(&backend), (0, 0));
        assert_eq!(kept(&other), (1, 1));
    }

    #[test]
    fn not_more_than_some_thousands_are_kept() {
        let (lingering, backend) = (Lingering::new(), Arc::new(Counted::default()));
        lingering.set_usual_latency(3_600.0);
        for _ in 0..MOST + 5 {
            lingering.keep(backend.clone(), MS, 1.0, Instant::now());
        }
        assert_eq!(kept(&backend), (MOST, MOST as u32));
    }
}
