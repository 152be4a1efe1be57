//! Catches panics in background tasks, so that they are logged and the work continues.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::task::Poll;

use tracing::Span;

/// Runs a future, and returns its output or the message of its panic.
pub(crate) async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
    let mut future = pin!(future);
    std::future::poll_fn(|context| {
        // Unwind safety: a future that has panicked is not polled again. State that it shares with
        // others is behind locks that ignore poisoning, and is rebuilt from the current view.
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(panic_message(&*panic))),
        }
    })
    .await
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let literal = panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned());
    let message = literal.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", message.unwrap_or_default())
}

/// Runs a future within a span. A subscriber that panics when the span is entered, left or closed,
/// because it cannot write, costs the span only: the future is polled and dropped all the same.
pub(crate) fn in_span<F: Future>(
    span: &Span,
    future: F,
) -> impl Future<Output = F::Output> + use<F> {
    let span = QuietSpan(span.clone());
    async move {
        let mut future = Box::pin(future);
        std::future::poll_fn(|context| {
            let mut entered = None;
            say(|| entered = Some(span.0.enter()));
            // Left before the panic goes on: a second one during unwinding would end the process.
            let poll = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
            say(|| drop(entered));
            poll.unwrap_or_else(|panic| resume_unwind(panic))
        })
        .await
    }
}

/// A new span; none if the subscriber panics.
pub(crate) fn new_span(make: impl FnOnce() -> Span) -> Span {
    let mut span = Span::none();
    say(|| span = make());
    span
}

/// A span whose end may be logged, or not.
struct QuietSpan(Span);

impl Drop for QuietSpan {
    fn drop(&mut self) {
        let span = std::mem::replace(&mut self.0, Span::none());
        say(|| drop(span));
    }
}

/// Runs a logging call, and ignores a panic in it: the subscriber may be what has panicked.
pub(crate) fn say(log: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(log));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[tokio::test]
    async fn the_message_of_a_panic_is_returned() {
        assert_eq!(caught(async { 3 }).await, Ok(3));
        let panics = async || -> Infallible { panic!("no {}", 4) };
        assert_eq!(caught(panics()).await, Err("it panicked: no 4".to_owned()));
        say(|| panic!("a panic in the subscriber is ignored"));
        assert!(new_span(|| panic!("so is this one")).is_none());
    }
}
