//! What keeps a view or a table alive goes on: where it ends or panics, that is said, and it is started
//! again.
//!
//! Pingora runs a service in a task that nobody looks at. If it ends, the process lives on with what it
//! had, for ever.

use std::fmt::Display;
use std::future::Future;
use std::time::{Duration, Instant};

use tracing::error;

use crate::backoff::Backoff;
use crate::supervise::{caught, say};

/// What has gone on for so long is started again without delay, as the first time.
const RESTED: Duration = Duration::from_secs(60);

/// Runs what must not end. If it does, or panics, it is started again: after 1 s to 2 s, and later up to
/// 30 s while it goes on like that.
pub(super) async fn keep<F>(group: &str, task: &str, mut start: impl FnMut() -> F)
where
    F: Future,
    F::Output: Display,
{
    let mut backoff = Backoff::new();
    loop {
        let started = Instant::now();
        let reason = match caught(start()).await {
            Ok(reason) => reason.to_string(),
            Err(panic) => panic,
        };
        if started.elapsed() > RESTED {
            backoff.reset();
        }
        let delay = backoff.next_delay();
        say(|| {
            error!(
                group,
                task,
                reason,
                ?delay,
                "a task has ended that must not, it is started again"
            )
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
        let kept = keep("g", "t", async || {
            starts.set(starts.get() + 1);
            match starts.get() {
                1 => panic!("told to"),
                2 => panic!("told to for the {}nd time", starts.get()),
                3 => "it ended",
                _ => std::future::pending().await,
            }
        });
        let _ = tokio::time::timeout(Duration::from_secs(30), kept).await;
        assert_eq!(starts.get(), 4);
    }
}
