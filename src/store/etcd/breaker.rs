//! A circuit breaker: decides whether a call is sent at all. Does no I/O.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::ClusterError;
use crate::store::types::Circuit;

/// Counts failures in a row. After too many, one trial call at a time is admitted, with a pause between
/// them, until one succeeds: many calls would not help a server that is down or restarting.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    last: String,
    /// Calls fail at once until then; `None` while the circuit is closed.
    until: Option<Instant>,
    /// Whether a trial call is in progress.
    is_probing: bool,
}

impl Breaker {
    /// Admits a call or refuses it. Returns `true` for a trial call, whose result must be reported.
    pub(super) fn admit(
        &mut self,
        operation: &'static str,
        now: Instant,
    ) -> Result<bool, ClusterError> {
        match self.until {
            None => Ok(false),
            Some(until) if !self.is_probing && now >= until => {
                self.is_probing = true;
                Ok(true)
            }
            Some(_) => Err(ClusterError::CircuitOpen {
                operation,
                failures: self.failures,
                last: self.last.clone(),
            }),
        }
    }

    /// A call or a connection attempt has failed.
    pub(super) fn failed(
        &mut self,
        error: &ClusterError,
        threshold: u32,
        pause: Duration,
        now: Instant,
    ) {
        self.failures = self.failures.saturating_add(1);
        if self.failures >= threshold {
            self.until = Some(now + pause);
        }
        self.last = error.to_string();
        self.is_probing = false;
    }

    /// A connection was made: calls are sent on it, but only an answer resets the count of failures.
    pub(super) fn connected(&mut self) {
        self.until = None;
        self.is_probing = false;
    }

    /// A call was answered.
    pub(super) fn succeeded(&mut self) {
        if self.failures > 0 {
            *self = Self::default();
        }
    }

    /// The caller of the trial call has stopped waiting for it.
    pub(super) fn abandoned(&mut self) {
        self.is_probing = false;
    }

    pub(super) fn circuit(&self) -> Circuit {
        let failures = self.failures;
        match (self.until, self.is_probing) {
            (None, _) => Circuit::Closed,
            (Some(_), true) => Circuit::HalfOpen { failures },
            (Some(_), false) => Circuit::Open { failures },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    fn error() -> ClusterError {
        ClusterError::Unavailable {
            endpoint: "e".to_owned(),
            operation: "connect",
            reason: "refused".to_owned(),
        }
    }

    #[test]
    fn it_opens_admits_a_trial_call_and_closes() {
        let mut breaker = Breaker::default();
        let now = Instant::now();
        for _ in 0..2 {
            breaker.failed(&error(), 3, PAUSE, now);
            assert!(!breaker.admit("list", now).unwrap());
        }
        breaker.failed(&error(), 3, PAUSE, now);
        assert_eq!(breaker.circuit(), Circuit::Open { failures: 3 });
        let refused = breaker.admit("list", now).unwrap_err();
        assert!(refused.is_transient());
        assert!(refused.to_string().contains("refused"), "{refused}");
        // One trial call at a time.
        let later = now + PAUSE;
        assert!(breaker.admit("list", later).unwrap());
        assert_eq!(breaker.circuit(), Circuit::HalfOpen { failures: 3 });
        assert!(breaker.admit("list", later).is_err());
        breaker.failed(&error(), 3, PAUSE, later);
        assert!(breaker.admit("list", later).is_err());
        // After one that was abandoned the next one is admitted.
        let later = later + PAUSE;
        assert!(breaker.admit("list", later).unwrap());
        breaker.abandoned();
        assert!(breaker.admit("list", later).unwrap());
        breaker.connected();
        assert_eq!(breaker.circuit(), Circuit::Closed);
        // A connection alone does not reset the count: an answer does.
        breaker.failed(&error(), 3, PAUSE, later);
        assert!(breaker.admit("list", later).is_err());
        breaker.succeeded();
        assert!(!breaker.admit("list", later).unwrap());
        breaker.failed(&error(), 3, PAUSE, later);
        assert_eq!(breaker.circuit(), Circuit::Closed);
    }
}
