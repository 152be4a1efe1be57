//! How many requests may be tried again, in proportion to all.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::config::Retry;
use crate::sync::lock;

/// Of how long ago requests still allow retries.
const WINDOW: Duration = Duration::from_secs(10);

/// Limits retries to a part of the requests of the last ten seconds, and to a number a second that is
/// allowed in any case. A request that begins costs an addition; a retry takes a lock for a moment.
#[derive(Debug)]
pub struct RetryBudget {
    part: f64,
    per_second: f64,
    /// Requests since the balance was settled.
    requests: AtomicU64,
    balance: Mutex<Balance>,
}

#[derive(Debug)]
struct Balance {
    /// Retries that may be made now.
    retries: f64,
    settled: Instant,
}

impl RetryBudget {
    /// By `budget` and `least_per_second` of the section `retry`.
    pub fn new(config: &Retry) -> Self {
        let per_second = f64::from(config.least_per_second);
        Self {
            part: config.budget,
            per_second,
            requests: AtomicU64::new(0),
            balance: Mutex::new(Balance {
                retries: per_second,
                settled: Instant::now(),
            }),
        }
    }

    /// A request begins.
    pub fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether one more retry may be made; if so, it counts.
    pub fn take(&self, now: Instant) -> bool {
        let mut balance = lock(&self.balance);
        let requests = self.requests.swap(0, Ordering::Relaxed) as f64;
        let elapsed = now.saturating_duration_since(balance.settled).as_secs_f64();
        balance.settled = balance.settled.max(now);
        // What was not used fades, so that quiet hours do not pay for a storm.
        let window = WINDOW.as_secs_f64();
        let kept = balance.retries * (1.0 - elapsed / window).max(0.0);
        // Only the requests of the last ten seconds count, as far as that is known.
        let requests = requests * (window / elapsed.max(window));
        let least = self.per_second * elapsed.min(1.0);
        balance.retries = kept + requests * self.part + least;
        if balance.retries < 1.0 {
            return false;
        }
        balance.retries -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &RetryBudget, now: Instant) -> usize {
        std::iter::repeat_with(|| budget.take(now))
            .take_while(|taken| *taken)
            .count()
    }

    #[test]
    fn retries_are_a_part_of_requests_and_a_few_in_any_case() {
        let budget = RetryBudget::new(&Retry::default());
        let start = Instant::now();
        assert_eq!(taken(&budget, start), 3);
        let second = Duration::from_secs(1);
        assert_eq!(taken(&budget, start + second), 3);
        for _ in 0..100 {
            budget.count_request();
        }
        assert_eq!(taken(&budget, start + second), 20);
        // Of an hour of requests only ten seconds count.
        for _ in 0..3_600 {
            budget.count_request();
        }
        assert_eq!(taken(&budget, start + 3_600 * second), 3 + 2);
        let start = start + 3_600 * second;
        // A quiet minute earns no more than a second does.
        assert_eq!(taken(&budget, start + 60 * second), 3);
        let none = RetryBudget::new(&Retry {
            budget: 0.0,
            least_per_second: 0,
            ..Retry::default()
        });
        none.count_request();
        assert_eq!(taken(&none, start + second), 0);
    }
}
