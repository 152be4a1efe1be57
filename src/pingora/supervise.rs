//! What keeps a view or a table alive goes on: where it ends or panics, that is said, and it is started
//! again.
//!
//! Pingora runs a service in a task that nobody looks at. If it ends, the process lives on with what it
//! had, for ever.

use std::fmt::Display;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use tracing::error;

use crate::backoff::Backoff;

/// What has gone on for so long is started again without delay, as the first time.
const RESTED: Duration = Duration::from_secs(60);

/// What a future comes to, or the words it panicked with.
pub(super) async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    std::future::poll_fn(|context| {
        // What a panic leaves half done is not used again: the future is dropped, and what it shares
        // with others is behind locks that are taken over as they are, and made anew from a view.
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(words(&*panic))),
        }
    })
    .await
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let literal = panic
        .downcast_ref::<&str>()
        .map(|words| (*words).to_owned());
    let words = literal.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", words.unwrap_or_default())
}

/// Says something, whatever the subscriber does: it may be what has panicked.
pub(super) fn say(what: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(what));
}

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
    use std::convert::Infallible;

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

    #[tokio::test]
    async fn the_words_of_a_panic_are_told() {
        assert_eq!(caught(async { 3 }).await, Ok(3));
        let panics = async || -> Infallible { panic!("no {}", 4) };
        assert_eq!(caught(panics()).await, Err("it panicked: no 4".to_owned()));
        say(|| panic!("a subscriber that panics ends nothing"));
    }
}
