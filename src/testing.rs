//! Helpers for unit tests under a paused clock.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Advances time in steps of a millisecond until `state` holds. Returns how long that took.
pub(crate) async fn until(what: &str, mut state: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !state() {
        assert!(start.elapsed() < Duration::from_secs(300), "never: {what}");
        sleep(Duration::from_millis(1)).await;
    }
    start.elapsed()
}
