//! A deadline that costs one timer however often it moves.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep, sleep_until};

/// Waits for a deadline that may move at any time. The timer is only moved when it rings too early.
#[derive(Debug, Default)]
pub(super) struct Deadline(Option<Pin<Box<Sleep>>>);

impl Deadline {
    /// Ready as soon as `deadline` has passed; otherwise the task is woken then.
    pub(super) fn poll(&mut self, deadline: Instant, context: &mut Context<'_>) -> Poll<()> {
        let sleep = self
            .0
            .get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        // A timer that would ring too late.
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            if sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

/// The error of what has taken too long.
pub(super) fn timed_out(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_moves_is_kept() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut deadline = Deadline::default();
        // Later, then earlier than the timer.
        for (first, then) in [(10, 20), (60, 30)] {
            let first = poll_fn(|context| Poll::Ready(deadline.poll(after(first), context))).await;
            assert!(first.is_pending());
            poll_fn(|context| deadline.poll(after(then), context)).await;
            assert_eq!(start.elapsed(), Duration::from_secs(then));
        }
        // Already over.
        poll_fn(|context| deadline.poll(start, context)).await;
    }
}
