//! Measures how long answers take on a connection, and derives time-outs from it.
//!
//! The time-outs of the options are for an etcd that answers in milliseconds. One that is far away,
//! overloaded or defragmenting answers later without being dead, so measured times extend them. The
//! estimate is that of RFC 6298: a mean and a mean deviation that follow each answer.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;

/// The longest wait for an answer, unless an option is longer.
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// After how many requests in a row without an answer a connection is given up even if it delivers other
/// data: the member may be cut off from the others and answer only what it can answer alone.
const MOST_MISSED: u32 = 2;
/// Time-outs double with each request that was not answered in time, at most this many times.
const MOST_DOUBLINGS: u32 = 4;

/// The measurements of one connection. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct RoundTrips(Arc<Mutex<Estimate>>);

#[derive(Debug)]
struct Estimate {
    /// In seconds.
    mean: f64,
    /// In seconds.
    deviation: f64,
    /// When any data was received last.
    heard: Instant,
    /// Requests in a row that were not answered in time.
    missed: u32,
}

impl RoundTrips {
    /// Starts with the first answer. `missed`: the requests in a row that were not answered in time on
    /// the connection before.
    pub(super) fn new(first: Duration, missed: u32) -> Self {
        let first = first.as_secs_f64();
        Self(Arc::new(Mutex::new(Estimate {
            mean: first,
            deviation: first / 2.0,
            heard: Instant::now(),
            missed,
        })))
    }

    fn estimate(&self) -> MutexGuard<'_, Estimate> {
        lock(&self.0)
    }

    /// Data was received that is not the answer to a known request.
    pub(super) fn heard(&self) {
        self.estimate().heard = Instant::now();
    }

    /// The request that was sent at that time has been answered.
    pub(super) fn answered(&self, sent: Instant) {
        self.add(sent.elapsed());
    }

    fn add(&self, took: Duration) {
        let mut estimate = self.estimate();
        let took = took.as_secs_f64();
        let off = (estimate.mean - took).abs();
        estimate.deviation += (off - estimate.deviation) / 4.0;
        estimate.mean += (took - estimate.mean) / 8.0;
        estimate.heard = Instant::now();
    }

    /// A call was answered: the next ones have the usual time-out again.
    pub(super) fn request_answered(&self, sent: Instant) {
        self.answered(sent);
        self.estimate().missed = 0;
    }

    /// A call that was sent at that time was not answered. Returns whether the connection must be given
    /// up: not if it has delivered other data since, unless that has happened too often.
    pub(super) fn request_missed(&self, sent: Instant) -> bool {
        let mut estimate = self.estimate();
        estimate.missed = estimate.missed.saturating_add(1);
        estimate.heard <= sent || estimate.missed >= MOST_MISSED
    }

    /// Requests in a row that were not answered in time.
    pub(super) fn missed(&self) -> u32 {
        self.estimate().missed
    }

    /// How long answers take.
    pub(super) fn mean(&self) -> Duration {
        Duration::from_secs_f64(self.estimate().mean.min(LONGEST.as_secs_f64()))
    }

    /// The time that an answer is expected to stay below.
    pub(super) fn overdue(&self) -> Duration {
        let estimate = self.estimate();
        let overdue = estimate.mean + (4.0 * estimate.deviation).max(estimate.mean / 4.0);
        Duration::from_secs_f64(overdue.min(LONGEST.as_secs_f64()))
    }

    /// How long to wait for an answer, if `usual` is enough on a fast connection.
    pub(super) fn patience(&self, usual: Duration) -> Duration {
        usual.max(self.overdue())
    }

    /// How long to wait for the answer to a call, which includes the server's work.
    pub(super) fn request_timeout(&self, usual: Duration) -> Duration {
        let doublings = self.missed().min(MOST_DOUBLINGS);
        let stretched = usual.max(self.overdue() * 2) * 2u32.pow(doublings);
        stretched.min(usual.max(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn fast_answers_do_not_change_the_timeouts() {
        let trips = RoundTrips::new(ms(1), 0);
        for _ in 0..100 {
            trips.add(ms(2));
        }
        assert_eq!(trips.patience(ms(500)), ms(500));
        assert_eq!(trips.request_timeout(ms(3000)), ms(3000));
        // An occasional pause of the server is forgotten again.
        trips.add(ms(2900));
        assert!(trips.patience(ms(2500)) > ms(2500));
        for _ in 0..4 {
            trips.add(ms(2));
        }
        assert_eq!(trips.patience(ms(2500)), ms(2500));
    }

    #[test]
    fn slow_answers_are_waited_for() {
        let trips = RoundTrips::new(ms(4000), 0);
        assert!(trips.overdue() >= ms(12_000));
        for _ in 0..20 {
            trips.add(ms(4000));
        }
        let overdue = trips.overdue();
        assert!((ms(5000)..ms(5500)).contains(&overdue), "{overdue:?}");
        assert!(trips.request_timeout(ms(3000)) >= ms(10_000));
        let slower = RoundTrips::new(ms(60_000), 0);
        assert_eq!(slower.request_timeout(ms(3000)), LONGEST);
        assert_eq!(slower.request_timeout(ms(45_000)), ms(45_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_other_data_is_kept_once() {
        let trips = RoundTrips::new(ms(1), 0);
        let sent = Instant::now();
        tokio::time::advance(ms(3000)).await;
        assert!(trips.request_missed(sent), "nothing was heard");
        trips.request_answered(Instant::now());
        let sent = Instant::now();
        tokio::time::advance(ms(1000)).await;
        trips.heard();
        tokio::time::advance(ms(2000)).await;
        assert!(!trips.request_missed(sent), "it is slow");
        assert_eq!(trips.request_timeout(ms(3000)), ms(6000));
        let sent = Instant::now();
        tokio::time::advance(ms(1000)).await;
        trips.heard();
        assert!(trips.request_missed(sent), "it answers only other things");
        trips.request_answered(Instant::now());
        assert_eq!(trips.request_timeout(ms(3000)), ms(3000));
    }
}
