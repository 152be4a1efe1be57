//! How long to wait before the next attempt.

use std::ops::Range;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error::ClusterError;

/// 1 s, doubling to 15 s, plus a random jitter of up to the same length: 1 s to 30 s in total.
const BUILDER: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(15))
    .without_max_times()
    .with_jitter();

/// The delay after a transient failure, in milliseconds. It does not grow: the store paces its own
/// dials, so short delays of its callers do not add load.
const TRANSIENT_MILLIS: Range<u64> = 500..2_000;

/// Backoff with jitter and without an end: exponential after a refusal by the store, short after a
/// transient failure.
#[derive(Debug)]
pub(crate) struct Backoff(ExponentialBackoff);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(BUILDER.build())
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new();
    }

    pub(crate) fn next_delay(&mut self) -> Duration {
        self.0.next().unwrap_or(Duration::from_secs(30))
    }

    /// The delay after this failure. It stays short after transient ones, so that a store that was
    /// unreachable for a long time is used again soon after it returns.
    pub(crate) fn after(&mut self, error: &ClusterError) -> Duration {
        if error.is_transient() {
            return Duration::from_millis(fastrand::u64(TRANSIENT_MILLIS));
        }
        self.next_delay()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_from_one_second_to_thirty_and_never_ends() {
        let mut backoff = Backoff::new();
        let first = backoff.next_delay().as_secs_f64();
        assert!((1.0..=2.0).contains(&first), "{first}");
        for _ in 0..200 {
            let delay = backoff.next_delay().as_secs_f64();
            assert!((1.0..=30.0).contains(&delay), "{delay}");
        }
        assert!(backoff.next_delay() >= Duration::from_secs(15));
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_secs(2));
    }

    #[test]
    fn the_delay_after_transient_failures_does_not_grow() {
        let mut backoff = Backoff::new();
        let transient = ClusterError::Timeout {
            endpoint: "e".to_owned(),
            operation: "connect",
            after: Duration::from_secs(2),
        };
        let refused = ClusterError::Auth {
            endpoint: "e".to_owned(),
            reason: "wrong password".to_owned(),
        };
        for _ in 0..1_000 {
            let delay = backoff.after(&transient);
            assert!((500..2_000).contains(&delay.as_millis()), "{delay:?}");
        }
        for _ in 0..10 {
            backoff.after(&refused);
        }
        assert!(backoff.after(&refused) >= Duration::from_secs(15));
    }
}
