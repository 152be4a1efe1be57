//! Restarts the parts of a service that end or panic, and logs it.
//!
//! Pingora runs a service in a task that nothing watches. If it ended, the process would continue
//! indefinitely with the backends it had.

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use tracing::{Span, error};

use crate::backoff::Backoff;
use crate::supervise::{caught, in_span, say};

/// After a run of this length the next restart is as quick as the first one.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Runs a task that must not end. If it ends or panics, it is started again: after 1 s to 2 s, and
/// after up to 30 s if that happens repeatedly. The span is entered inside the guard, because the
/// subscriber may be what panics.
pub(super) async fn restart_forever<F>(span: &Span, task: &str, mut start: impl FnMut() -> F)
where
    F: Future,
    F::Output: Display,
{
    let mut backoff = Backoff::new();
    loop {
        let started = Instant::now();
        let reason = match caught(in_span(span, start())).await {
            Ok(reason) => reason.to_string(),
            Err(panic) => panic,
        };
        if started.elapsed() > STABLE_AFTER {
            backoff.reset();
        }
        let delay = backoff.next_delay();
        say(|| {
            span.in_scope(|| {
                error!(
                    task,
                    reason,
                    ?delay,
                    "a task that must not end has ended; it is started again"
                );
            });
        });
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn what_panics_or_ends_is_started_again() {
        let starts = Cell::new(0);
        let span = Span::none();
        let restarted = restart_forever(&span, "t", async || {
            starts.set(starts.get() + 1);
            match starts.get() {
                1 => panic!("on purpose"),
                2 => panic!("on purpose for the {}nd time", starts.get()),
                3 => "it ended",
                _ => std::future::pending().await,
            }
        });
        let _ = tokio::time::timeout(Duration::from_secs(30), restarted).await;
        assert_eq!(starts.get(), 4);
    }
}
