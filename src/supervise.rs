//! Panics in tasks that nobody looks at: they are caught and told, so that the work can go on.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// What a future comes to, or the words it panicked with.
pub(crate) async fn caught<F: Future>(future: F) -> Result<F::Output, String> {
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
pub(crate) fn say(what: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(what));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[tokio::test]
    async fn the_words_of_a_panic_are_told() {
        assert_eq!(caught(async { 3 }).await, Ok(3));
        let panics = async || -> Infallible { panic!("no {}", 4) };
        assert_eq!(caught(panics()).await, Err("it panicked: no 4".to_owned()));
        say(|| panic!("a subscriber that panics ends nothing"));
    }
}
