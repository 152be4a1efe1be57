//! How long to wait after a failure before following is tried again.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::error::ClusterError;

/// The minimum time between two immediate attempts after the same kind of failure. Usually one
/// connection broke, or the history was compacted once; if failures repeat, the backoff takes over.
const IMMEDIATE_EVERY: Duration = Duration::from_secs(15);
/// The delay of an immediate attempt, in milliseconds. Random, because all watchers of a store fail at
/// the same instant.
const IMMEDIATE: std::ops::Range<u64> = 10..250;

/// Paces the attempts of one run.
pub(super) struct Retry {
    backoff: Backoff,
    /// The last immediate attempts after a failure to reach the store, and after missed events. The
    /// history may be compacted while a connection is broken, so they are counted apart.
    after_failure: Option<Instant>,
    after_missed: Option<Instant>,
}

impl Retry {
    pub(super) fn new() -> Self {
        Self {
            backoff: Backoff::new(),
            after_failure: None,
            after_missed: None,
        }
    }

    /// The delay after this failure. `was_watching`: the store had answered before.
    pub(super) fn delay(&mut self, error: &ClusterError, was_watching: bool) -> Duration {
        let is_missed = matches!(error, ClusterError::Compacted { .. });
        let last = if is_missed {
            &mut self.after_missed
        } else {
            &mut self.after_failure
        };
        let has_answered = was_watching || is_missed;
        let is_immediate =
            last.is_none_or(|last| has_answered && last.elapsed() >= IMMEDIATE_EVERY);
        if !is_immediate {
            return self.backoff.after(error);
        }
        self.backoff.reset();
        *last = Some(Instant::now());
        Duration::from_millis(fastrand::u64(IMMEDIATE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_failure_of_each_kind_is_retried_at_once_and_repeated_ones_back_off() {
        let refused = ClusterError::Auth {
            endpoint: "e".to_owned(),
            reason: "wrong password".to_owned(),
        };
        let missed = ClusterError::Compacted { oldest: Some(3) };
        let at_once = Duration::from_millis(250);
        let mut retry = Retry::new();
        assert!(retry.delay(&refused, false) < at_once);
        assert!(retry.delay(&missed, false) < at_once);
        for was_watching in [false, true] {
            assert!(retry.delay(&refused, was_watching) > at_once);
        }
        tokio::time::sleep(IMMEDIATE_EVERY).await;
        assert!(retry.delay(&refused, false) > at_once, "it never answered");
        assert!(retry.delay(&refused, true) < at_once);
        assert!(retry.delay(&missed, false) < at_once);
        assert!(retry.delay(&missed, false) > at_once);
    }
}
