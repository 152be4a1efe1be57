//! One round of dialling: each address of each endpoint in turn. Decides what is dialled when, and
//! which error the round ends with; does no I/O.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::ClusterError;

pub(super) struct Round {
    pub(super) endpoints: Vec<Arc<str>>,
    /// The number of addresses that have been dialled.
    dialled: usize,
    /// The endpoint that was dialled last.
    latest: Option<Arc<str>>,
    /// When the next address is dialled, unless the latest dial fails before.
    pub(super) due: Instant,
    error: Option<ClusterError>,
}

impl Round {
    pub(super) fn new(endpoints: Vec<Arc<str>>, now: Instant) -> Self {
        Self {
            endpoints,
            dialled: 0,
            latest: None,
            due: now,
            error: None,
        }
    }

    /// Whether all of this many addresses have been dialled.
    pub(super) fn is_complete(&self, addresses: usize) -> bool {
        self.dialled >= addresses
    }

    /// An endpoint is being dialled. The next address is dialled at `due`.
    pub(super) fn dials(&mut self, endpoint: Arc<str>, due: Instant) {
        self.dialled += 1;
        self.latest = Some(endpoint);
        self.due = due;
    }

    /// A dial has failed. If it is the latest one, the next address is dialled at once.
    pub(super) fn failed(&mut self, endpoint: &Arc<str>, error: ClusterError, now: Instant) {
        // An error that needs a correction is not replaced by one that does not.
        let needs_correction = |error: &ClusterError| error.needs_correction();
        if !self.error.as_ref().is_some_and(needs_correction) || error.needs_correction() {
            self.error = Some(error);
        }
        if self.latest.as_ref() == Some(endpoint) {
            self.due = now;
        }
    }

    /// The error of a round without a connection. `after`: how long each dial was waited for.
    pub(super) fn into_error(self, after: Duration) -> ClusterError {
        let endpoints = self.endpoints;
        self.error.unwrap_or_else(|| ClusterError::Timeout {
            endpoint: endpoints.join(","),
            operation: "connect",
            after,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_needs_a_correction_is_kept() {
        let now = Instant::now();
        let later = now + Duration::from_secs(2);
        let endpoints: Vec<Arc<str>> = vec!["a:1".into(), "b:1".into()];
        let refused = ClusterError::Auth {
            endpoint: "a:1".to_owned(),
            reason: "wrong user or password".to_owned(),
        };
        let down = ClusterError::Unavailable {
            endpoint: "b:1".to_owned(),
            operation: "connect",
            reason: "refused".to_owned(),
        };
        let mut round = Round::new(endpoints.clone(), now);
        round.dials(endpoints[0].clone(), later);
        round.dials(endpoints[1].clone(), later);
        round.failed(&endpoints[0], refused.clone(), now);
        assert_eq!(round.due, later, "the latest dial is still in progress");
        round.failed(&endpoints[1], down, now);
        assert_eq!(round.due, now);
        assert!(round.is_complete(2) && !round.is_complete(3));
        assert_eq!(round.into_error(Duration::from_secs(2)), refused);
    }

    #[test]
    fn a_round_in_which_nobody_answers_ends_with_a_timeout() {
        let round = Round::new(vec!["a:1".into(), "b:1".into()], Instant::now());
        let error = round.into_error(Duration::from_secs(2)).to_string();
        assert!(error.contains("a:1,b:1"), "{error}");
    }
}
