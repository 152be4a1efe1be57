//! Whether to try at all. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::ClusterError;
use crate::store::Circuit;

/// Counts failures in a row. After so many, calls are let through one at a time and only every so
/// often, until one succeeds: a server that is down, or comes back, has no use for a crowd.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    last: String,
    /// Fails at once until then; `None` while there are too few failures.
    until: Option<Instant>,
    is_probing: bool,
}

impl Breaker {
    /// Whether a call may be tried; with true it is the one that is let through, and has to report
    /// what came of it.
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

    /// A connection is there: calls on it are tried, but the failures before are not forgotten yet.
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

    /// The one that was let through was given up by its caller.
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
    fn it_opens_lets_one_through_and_closes() {
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
        // One at a time.
        let later = now + PAUSE;
        assert!(breaker.admit("list", later).unwrap());
        assert_eq!(breaker.circuit(), Circuit::HalfOpen { failures: 3 });
        assert!(breaker.admit("list", later).is_err());
        breaker.failed(&error(), 3, PAUSE, later);
        assert!(breaker.admit("list", later).is_err());
        // One that is given up lets the next one try.
        let later = later + PAUSE;
        assert!(breaker.admit("list", later).unwrap());
        breaker.abandoned();
        assert!(breaker.admit("list", later).unwrap());
        breaker.connected();
        assert_eq!(breaker.circuit(), Circuit::Closed);
        // A connection alone forgets nothing: an answer does.
        breaker.failed(&error(), 3, PAUSE, later);
        assert!(breaker.admit("list", later).is_err());
        breaker.succeeded();
        assert!(!breaker.admit("list", later).unwrap());
        breaker.failed(&error(), 3, PAUSE, later);
        assert_eq!(breaker.circuit(), Circuit::Closed);
    }
}
