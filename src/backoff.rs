//! How long to wait before the next try.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::error::ClusterError;

/// 1 s, doubling to 15 s, each lengthened by up to its own length at random: 1 s to 30 s in all.
const BUILDER: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(15))
    .without_max_times()
    .with_jitter();

/// While the store is away, or has no room: in milliseconds. It does not grow, for what it spares the
/// store is spared by the store's own dialling, which is paced whatever the number of callers.
const AWAY: std::ops::Range<u64> = 500..2_000;

/// Endless backoff with jitter: exponential where the store answers, short while it is away.
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

    /// After this failure. However long the store was away, it is noticed soon that it is back.
    pub(crate) fn after(&mut self, error: &ClusterError) -> Duration {
        if error.is_transient() {
            return Duration::from_millis(fastrand::u64(AWAY));
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
    fn a_store_that_is_away_is_tried_again_soon_however_long_it_was() {
        let mut backoff = Backoff::new();
        let away = ClusterError::Timeout {
            endpoint: "e".to_owned(),
            operation: "connect",
            after: Duration::from_secs(2),
        };
        let refused = ClusterError::Auth {
            endpoint: "e".to_owned(),
            reason: "wrong password".to_owned(),
        };
        for _ in 0..1_000 {
            let delay = backoff.after(&away);
            assert!((500..2_000).contains(&delay.as_millis()), "{delay:?}");
        }
        for _ in 0..10 {
            backoff.after(&refused);
        }
        assert!(backoff.after(&refused) >= Duration::from_secs(15));
    }
}
