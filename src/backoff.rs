//! How long to wait before the next try.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// 1 s, doubling to 15 s, each lengthened by up to its own length at random: 1 s to 30 s in all.
const BUILDER: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(15))
    .without_max_times()
    .with_jitter();

/// Endless exponential backoff with jitter.
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
}
