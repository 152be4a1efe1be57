//! What a server has done lately: requests and failures a second, and how busy it was.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Rates are computed from at least this long.
const WINDOW: Duration = Duration::from_secs(1);
/// The time constant of their smoothing: what is older than this counts for a third.
const MEMORY: Duration = Duration::from_secs(3);

/// Counts requests from their beginning to their end.
#[derive(Debug)]
pub(super) struct Work {
    in_flight: AtomicUsize,
    ended: AtomicU64,
    failed: AtomicU64,
    /// How many requests it can work on at once; 0 if that is not known.
    capacity: AtomicU32,
    busy: Mutex<Busy>,
    rates: Mutex<Rates>,
}

/// The sum over time of the requests in flight. How many there are is read from the other count each time, so that a
/// race makes an error for a moment and not for ever.
#[derive(Debug)]
struct Busy {
    in_flight: u32,
    since: Instant,
    /// In seconds of one request.
    sum: f64,
}

#[derive(Debug)]
struct Rates {
    since: Instant,
    ended: u64,
    failed: u64,
    busy: f64,
    last: WorkRates,
}

/// Each `None` until it is known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct WorkRates {
    /// Requests a second.
    pub(super) rps: Option<f64>,
    /// Failed requests a second.
    pub(super) eps: Option<f64>,
    /// How much of the capacity was in use, from 0 to 1.
    pub(super) utilization: Option<f64>,
}

impl Default for Work {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            in_flight: AtomicUsize::new(0),
            ended: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            capacity: AtomicU32::new(0),
            busy: Mutex::new(Busy {
                in_flight: 0,
                since: now,
                sum: 0.0,
            }),
            rates: Mutex::new(Rates {
                since: now,
                ended: 0,
                failed: 0,
                busy: 0.0,
                last: WorkRates::default(),
            }),
        }
    }
}

impl Busy {
    /// From now on this many are in flight.
    fn advance(&mut self, in_flight: usize, now: Instant) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        self.sum += seconds * f64::from(self.in_flight);
        self.since = self.since.max(now);
        self.in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
    }
}

impl Work {
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn set_capacity(&self, requests: u32, now: Instant) {
        let mut rates = lock(&self.rates);
        self.capacity.store(requests, Ordering::Relaxed);
        // What came before was not counted, or by another capacity.
        rates.busy = self.advance(now);
        rates.since = now;
        rates.last.utilization = None;
    }

    /// Returns the sum.
    fn advance(&self, now: Instant) -> f64 {
        let mut busy = lock(&self.busy);
        busy.advance(self.in_flight(), now);
        busy.sum
    }

    /// Whether how busy it is is counted: only then does each request take a lock.
    fn is_timed(&self) -> bool {
        self.capacity.load(Ordering::Relaxed) > 0
    }

    pub(super) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if self.is_timed() {
            self.advance(Instant::now());
        }
    }

    pub(super) fn end(&self, has_failed: bool) {
        if has_failed {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.is_timed() {
            self.advance(Instant::now());
        }
    }

    /// The rates as of the last whole window.
    pub(super) fn rates(&self, now: Instant) -> WorkRates {
        let mut rates = lock(&self.rates);
        let passed = now.saturating_duration_since(rates.since);
        if passed < WINDOW {
            return rates.last;
        }
        let seconds = passed.as_secs_f64();
        // What is remembered of the last value.
        let kept = (-seconds / MEMORY.as_secs_f64()).exp();
        let smooth = |last: Option<f64>, new: f64| {
            Some(last.map_or(new, |last| last * kept + new * (1.0 - kept)))
        };
        let ended = self.ended.load(Ordering::Relaxed);
        let failed = self.failed.load(Ordering::Relaxed);
        let (newly_ended, newly_failed) = (ended - rates.ended, failed - rates.failed);
        let capacity = self.capacity.load(Ordering::Relaxed);
        let mut last = WorkRates {
            rps: smooth(rates.last.rps, newly_ended as f64 / seconds),
            eps: smooth(rates.last.eps, newly_failed as f64 / seconds),
            utilization: None,
        };
        if capacity > 0 {
            let sum = self.advance(now);
            let used = (sum - rates.busy) / seconds / f64::from(capacity);
            last.utilization = smooth(rates.last.utilization, used.clamp(0.0, 1.0));
            rates.busy = sum;
        }
        rates.since = now;
        rates.ended = ended;
        rates.failed = failed;
        rates.last = last;
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_last_seconds() {
        let work = Work::default();
        let start = Instant::now();
        assert_eq!(work.rates(start), WorkRates::default(), "not known yet");
        let serve = |requests: u32, failures: u32| {
            for request in 0..requests {
                work.begin();
                work.end(request < failures);
            }
        };
        serve(10, 1);
        let later = start + Duration::from_secs(2);
        let rates = work.rates(later);
        let close = |value: Option<f64>, expected: f64| (value.unwrap() - expected).abs() < 0.01;
        assert!(close(rates.rps, 5.0) && close(rates.eps, 0.5), "{rates:?}");
        assert_eq!(rates.utilization, None);
        serve(90, 0);
        assert_eq!(
            work.rates(later + WINDOW / 2),
            rates,
            "a window is complete or not"
        );
        let after = work.rates(later + WINDOW * 3);
        // e^-1 of 5, and the rest of 30.
        assert!(close(after.rps, 5.0 * 0.3679 + 30.0 * 0.6321), "{after:?}");
    }

    #[test]
    fn how_busy_it_is_counts_requests_in_progress() {
        let work = Work::default();
        work.begin();
        let start = Instant::now();
        work.set_capacity(4, start);
        work.begin();
        work.begin();
        work.end(false);
        // Two of four are in use the whole time, though none has ended.
        let rates = work.rates(start + Duration::from_secs(10));
        let used = rates.utilization.unwrap();
        assert!((used - 0.5).abs() < 0.05, "{used}");
        work.end(false);
        work.end(false);
        let rates = work.rates(start + Duration::from_secs(100));
        assert!(rates.utilization.unwrap() < 0.01, "{rates:?}");
        assert_eq!(work.in_flight(), 0);
    }
}
