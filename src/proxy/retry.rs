//! Whether a request that failed is tried again: the rules of the bundled proxy, for a proxy of one's own.
//!
//! ```
//! use std::time::Instant;
//! use pingora_etcd::config::Retry;
//! use pingora_etcd::proxy::retry::{Decision, FailedTry, RetryBudget, RetryRules};
//!
//! let config = Retry::default();
//! let (rules, budget) = (RetryRules::new(2), RetryBudget::new(&config));
//! budget.count_request(); // when a request begins
//! // In `error_while_proxy`, `FailedTry::of` says what Pingora knows. A `GET` that its backend broke off:
//! let mut failed = FailedTry::default();
//! failed.is_safe = true;
//! failed.is_idempotent = true;
//! failed.is_repeatable = true;
//! failed.is_unanswered = true;
//! failed.is_from_backend = true;
//! let decision = rules.decide(&failed);
//! assert_eq!(decision, Decision::RetryElsewhere);
//! assert!(budget.take(Instant::now())); // then `error.set_retry(true)`
//! // A `POST` may have taken effect.
//! failed.is_safe = false;
//! failed.is_idempotent = false;
//! assert_eq!(rules.decide(&failed), Decision::GiveUp);
//! ```

use super::failed_try::MAX_STALE_CONNECTIONS;
pub use super::failed_try::{FailedTry, PingoraRetry, Sent, is_local};
pub use super::retry_budget::RetryBudget;

/// What to do with a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// Try again, also at the same backend, which may be the only one: an idle connection that was
    /// closed says nothing about the backend. It does not count as a retry, and needs no
    /// [budget](RetryBudget).
    RetryAnywhere,
    /// Try another backend, if there is one and the [budget](RetryBudget) allows it, and count the failure
    /// against this one.
    RetryElsewhere,
    /// Report the failure to the client, and count it against the backend.
    GiveUp,
    /// Report the failure to the client; it says nothing about the backend.
    GiveUpWithoutBlame,
}

/// What is tried again beyond failed connections.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct RetryRules {
    /// Tries on other backends.
    pub most: usize,
    /// Whether a backend that did not answer in time is one reason. Default: false, because one slow request would
    /// become several.
    pub on_timeout: bool,
}

impl RetryRules {
    /// The usual rules, with at most this number of tries on other backends.
    pub const fn new(most: usize) -> Self {
        Self {
            most,
            on_timeout: false,
        }
    }

    /// Whether a backend that did not answer in time is a reason for a try on another one.
    #[must_use]
    pub const fn on_timeout(mut self, on_timeout: bool) -> Self {
        self.on_timeout = on_timeout;
        self
    }

    /// Pingora's own rules first, which repeat a request on a pooled connection that turned out to be
    /// closed. Beyond them, a method without side effects is tried on another backend as long as nothing
    /// has reached the client, and any method of which the backend cannot have read anything.
    pub fn decide(&self, failed: &FailedTry) -> Decision {
        let retry = match failed.retry {
            // It was open when the request came, and the backend ended it.
            PingoraRetry::StaleConnection if !failed.is_prompt => PingoraRetry::No,
            retry => retry,
        };
        let is_stale = retry == PingoraRetry::StaleConnection || failed.is_unread;
        let may_repeat = failed.is_repeatable
            && (failed.is_unread || failed.is_idempotent && retry != PingoraRetry::No);
        if may_repeat && is_stale && failed.stale_connections < MAX_STALE_CONNECTIONS {
            return Decision::RetryAnywhere;
        }
        let may_repeat_unanswered = failed.is_safe
            && failed.is_repeatable
            && failed.is_unanswered
            && failed.is_from_backend
            && (self.on_timeout || !failed.is_timeout);
        if (may_repeat || may_repeat_unanswered) && failed.retries < self.most {
            return Decision::RetryElsewhere;
        }
        if is_stale && !may_repeat {
            return Decision::GiveUpWithoutBlame;
        }
        Decision::GiveUp
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `GET` that the backend failed before it answered.
    const GET: FailedTry = FailedTry {
        is_idempotent: true,
        is_safe: true,
        is_repeatable: true,
        is_unanswered: true,
        is_from_backend: true,
        is_timeout: false,
        is_unread: false,
        retry: PingoraRetry::No,
        retries: 0,
        stale_connections: 0,
        is_prompt: true,
    };
    const POST: FailedTry = FailedTry {
        is_idempotent: false,
        is_safe: false,
        ..GET
    };
    const PUT: FailedTry = FailedTry {
        is_safe: false,
        ..GET
    };

    #[test]
    fn each_case_is_decided() {
        use Decision::{GiveUp, GiveUpWithoutBlame, RetryAnywhere, RetryElsewhere};
        use PingoraRetry::{StaleConnection, Yes};
        let stale = |failure| FailedTry {
            retry: StaleConnection,
            ..failure
        };
        let retried = |failure| FailedTry {
            retries: 2,
            ..failure
        };
        let yes = |failure| FailedTry {
            retry: Yes,
            ..failure
        };
        let many_stale = FailedTry {
            stale_connections: MAX_STALE_CONNECTIONS,
            ..stale(GET)
        };
        let answered = FailedTry {
            is_unanswered: false,
            ..GET
        };
        let truncated = FailedTry {
            is_repeatable: false,
            ..stale(GET)
        };
        let by_client = FailedTry {
            is_from_backend: false,
            ..GET
        };
        let late = FailedTry {
            is_timeout: true,
            ..GET
        };
        let unread = |failure| FailedTry {
            is_unread: true,
            ..failure
        };
        let after_work = |failure| FailedTry {
            is_prompt: false,
            ..failure
        };
        for (failure, expected) in [
            (GET, RetryElsewhere),
            (late, GiveUp),
            (unread(POST), RetryAnywhere),
            (
                FailedTry {
                    is_repeatable: false,
                    ..unread(POST)
                },
                GiveUpWithoutBlame,
            ),
            (retried(GET), GiveUp),
            (answered, GiveUp),
            (by_client, GiveUp),
            (PUT, GiveUp),
            (POST, GiveUp),
            (yes(PUT), RetryElsewhere),
            (yes(POST), GiveUp),
            (stale(GET), RetryAnywhere),
            (stale(retried(GET)), RetryAnywhere),
            (stale(PUT), RetryAnywhere),
            (stale(POST), GiveUpWithoutBlame),
            (truncated, GiveUpWithoutBlame),
            (many_stale, RetryElsewhere),
            (retried(many_stale), GiveUp),
            (after_work(stale(GET)), RetryElsewhere),
            (after_work(stale(PUT)), GiveUp),
            (after_work(stale(POST)), GiveUp),
            (after_work(unread(POST)), RetryAnywhere),
        ] {
            assert_eq!(RetryRules::new(2).decide(&failure), expected, "{failure:?}");
        }
        let rules = RetryRules::new(2).on_timeout(true);
        assert_eq!(rules.decide(&late), RetryElsewhere);
    }
}
