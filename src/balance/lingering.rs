//! Requests that were answered sooner than the usual work takes, and count as in flight until it would be done.
//!
//! A backend that refuses at once never has anything in flight, and would get the requests of all.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::atomic::AtomicF32;

/// The backend of such a request. Whoever owns one keeps a request in flight there.
pub(super) trait Backend: fmt::Debug + Send + Sync {
    /// Whether its registration is gone.
    fn is_orphaned(&self) -> bool;
    /// One of the requests in flight there has been answered.
    fn begin_lingering(&self);
    /// That one is not in flight any more.
    fn end_lingering(&self);
}

/// More than this number of requests at once are not kept; the oldest ones go first.
const MOST: usize = 10_000;

/// There are none.
const NEVER: u64 = u64::MAX;

/// The requests to one balancer's backends that were answered too soon.
#[derive(Debug)]
pub(super) struct Lingering {
    /// The mean latency of successes, in seconds; 0 as long as it is not known.
    usual_latency: AtomicF32,
    /// When the first of the requests ends, in microseconds after `epoch`, or [`NEVER`]. Every pick reads it.
    next_end: AtomicU64,
    /// The time of the first request.
    epoch: OnceLock<Instant>,
    /// Roughly in the order in which they end. Each is the guard of a request.
    requests: Mutex<VecDeque<(Instant, Arc<dyn Backend>)>>,
}

impl Lingering {
    pub(super) fn new() -> Self {
        Self {
            usual_latency: AtomicF32::new(0.0),
            next_end: AtomicU64::new(NEVER),
            epoch: OnceLock::new(),
            requests: Mutex::default(),
        }
    }

    fn requests(&self) -> MutexGuard<'_, VecDeque<(Instant, Arc<dyn Backend>)>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn micros(&self, at: Instant) -> u64 {
        let epoch = self.epoch.get_or_init(|| at);
        at.saturating_duration_since(*epoch).as_micros() as u64
    }

    /// To be called after each change, while the requests are locked.
    fn set_next_end(&self, requests: &VecDeque<(Instant, Arc<dyn Backend>)>) {
        let next = requests.front().map(|(until, _)| self.micros(*until));
        self.next_end
            .store(next.unwrap_or(NEVER), Ordering::Relaxed);
    }

    pub(super) fn set_usual_latency(&self, seconds: f64) {
        self.usual_latency.set(seconds as f32);
    }

    /// Keeps a request that was answered after this time, if that is less than usual.
    pub(super) fn keep(&self, backend: Arc<dyn Backend>, latency: Duration, now: Instant) {
        let rest = self.usual_latency.get() - latency.as_secs_f32();
        let rest = Duration::try_from_secs_f32(rest).unwrap_or_default();
        let Some(until) = now.checked_add(rest).filter(|until| *until > now) else {
            return;
        };
        let mut requests = self.requests();
        // Those of a backend that is gone have been dropped, and no more may follow: they would keep each other alive.
        if backend.is_orphaned() {
            return;
        }
        if requests.len() >= MOST
            && let Some((_, oldest)) = requests.pop_front()
        {
            oldest.end_lingering();
        }
        backend.begin_lingering();
        requests.push_back((until, backend));
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
        while requests.front().is_some_and(|(until, _)| *until <= now) {
            if let Some((_, backend)) = requests.pop_front() {
                backend.end_lingering();
            }
        }
        self.set_next_end(&requests);
    }

    /// Drops all of a backend that is gone.
    pub(super) fn forget(&self, backend: &Arc<dyn Backend>) {
        // Locked in any case, so that nothing is added afterwards.
        let mut requests = self.requests();
        if requests.is_empty() {
            return;
        }
        requests.retain(|(_, kept)| !std::ptr::addr_eq(Arc::as_ptr(kept), Arc::as_ptr(backend)));
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
        lingering.keep(backend.clone(), MS, now);
        assert_eq!(kept(&backend), (0, 0), "what is usual is not known");
        lingering.set_usual_latency(0.010);
        lingering.keep(backend.clone(), 10 * MS, now);
        assert!(!lingering.is_any(), "it took as long as usual");
        lingering.keep(backend.clone(), MS, now);
        lingering.keep(backend.clone(), 5 * MS, now);
        assert_eq!(kept(&backend), (2, 2));
        lingering.release(now + 8 * MS);
        assert_eq!(kept(&backend), (2, 2), "in order");
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
        lingering.keep(backend.clone(), MS, now);
        lingering.keep(other.clone(), MS, now);
        backend.is_orphaned.store(true, Ordering::Relaxed);
        lingering.forget(&(backend.clone() as Arc<dyn Backend>));
        lingering.keep(backend.clone(), MS, now);
        assert_eq!(kept(&backend).0, 0);
        assert_eq!(kept(&other), (1, 1));
    }

    #[test]
    fn not_more_than_some_thousands_are_kept() {
        let (lingering, backend) = (Lingering::new(), Arc::new(Counted::default()));
        lingering.set_usual_latency(3_600.0);
        for _ in 0..MOST + 5 {
            lingering.keep(backend.clone(), MS, Instant::now());
        }
        assert_eq!(kept(&backend), (MOST, MOST as u32));
    }
}
