//! Whether a request that failed is tried again. Pure.

/// How many pooled connections of a request may turn out to be closed before that counts as a
/// failure of the backend. A request that makes each backend end its connection is to cost few of them.
const MAX_STALE_CONNECTIONS: usize = 2;

/// A request that failed after something of it may have been sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    /// The method may be repeated: `GET`, `PUT`, `DELETE` and the like.
    pub(super) is_idempotent: bool,
    /// The method has no side effects: `GET`, `HEAD` and the like.
    pub(super) is_safe: bool,
    /// The whole request is still there to be sent again.
    pub(super) is_repeatable: bool,
    /// Nothing of a response has reached the client.
    pub(super) is_unanswered: bool,
    /// The backend, not the client or this process, is the cause.
    pub(super) is_from_backend: bool,
    /// The backend did not answer in time.
    pub(super) is_timeout: bool,
    /// The backend cannot have read anything of the request.
    pub(super) is_unread: bool,
    /// What Pingora would do.
    pub(super) retry: PingoraRetry,
    /// How often this request has been tried on another backend.
    pub(super) retries: usize,
    /// How many pooled connections of this request turned out to be closed.
    pub(super) stale_connections: usize,
    /// It failed so soon that the connection may have been closed before.
    pub(super) is_prompt: bool,
}

/// Whether Pingora would try a request again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PingoraRetry {
    Yes,
    No,
    /// The connection was taken from the pool, and turned out to be closed.
    StaleConnection,
}

/// What to do with a request that failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Try again, also at the same backend, which may be the only one: an idle connection that was
    /// closed says nothing about the backend. It does not count as a retry.
    RetryAnywhere,
    /// Try another backend.
    RetryElsewhere,
    /// Report the failure to the client, and count it against the backend.
    GiveUp,
    /// Report the failure to the client; it says nothing about the backend.
    GiveUpWithoutBlame,
}

/// What is tried again beyond failed connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetryRules {
    /// Tries on other backends.
    pub(super) most: usize,
    /// Whether a backend that did not answer in time is one reason.
    pub(super) on_timeout: bool,
}

/// Pingora's own rules first, which repeat a request on a pooled connection that turned out to be
/// closed. Beyond them, a method without side effects is tried on another backend as long as nothing
/// has reached the client, and any method of which the backend cannot have read anything.
pub(super) fn decide(failure: &Failure, rules: RetryRules) -> Decision {
    let retry = match failure.retry {
        // It was open when the request came, and the backend ended it.
        PingoraRetry::StaleConnection if !failure.is_prompt => PingoraRetry::No,
        retry => retry,
    };
    let is_stale = retry == PingoraRetry::StaleConnection || failure.is_unread;
    let may_repeat = failure.is_repeatable
        && (failure.is_unread || failure.is_idempotent && retry != PingoraRetry::No);
    if may_repeat && is_stale && failure.stale_connections < MAX_STALE_CONNECTIONS {
        return Decision::RetryAnywhere;
    }
    let may_repeat_unanswered = failure.is_safe
        && failure.is_repeatable
        && failure.is_unanswered
        && failure.is_from_backend
        && (rules.on_timeout || !failure.is_timeout);
    if (may_repeat || may_repeat_unanswered) && failure.retries < rules.most {
        return Decision::RetryElsewhere;
    }
    if is_stale && !may_repeat {
        return Decision::GiveUpWithoutBlame;
    }
    Decision::GiveUp
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `GET` that the backend failed before it answered.
    const GET: Failure = Failure {
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
    const POST: Failure = Failure {
        is_idempotent: false,
        is_safe: false,
        ..GET
    };
    const PUT: Failure = Failure {
        is_safe: false,
        ..GET
    };

    #[test]
    fn each_case_is_decided() {
        use Decision::{GiveUp, GiveUpWithoutBlame, RetryAnywhere, RetryElsewhere};
        use PingoraRetry::{StaleConnection, Yes};
        let stale = |failure| Failure {
            retry: StaleConnection,
            ..failure
        };
        let retried = |failure| Failure {
            retries: 2,
            ..failure
        };
        let yes = |failure| Failure {
            retry: Yes,
            ..failure
        };
        let many_stale = Failure {
            stale_connections: MAX_STALE_CONNECTIONS,
            ..stale(GET)
        };
        let answered = Failure {
            is_unanswered: false,
            ..GET
        };
        let truncated = Failure {
            is_repeatable: false,
            ..stale(GET)
        };
        let by_client = Failure {
            is_from_backend: false,
            ..GET
        };
        let late = Failure {
            is_timeout: true,
            ..GET
        };
        let unread = |failure| Failure {
            is_unread: true,
            ..failure
        };
        let after_work = |failure| Failure {
            is_prompt: false,
            ..failure
        };
        for (failure, expected) in [
            (GET, RetryElsewhere),
            (late, GiveUp),
            (unread(POST), RetryAnywhere),
            (
                Failure {
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
            let rules = RetryRules {
                most: 2,
                on_timeout: false,
            };
            assert_eq!(decide(&failure, rules), expected, "{failure:?}");
        }
        let rules = RetryRules {
            most: 2,
            on_timeout: true,
        };
        assert_eq!(decide(&late, rules), RetryElsewhere);
    }
}
