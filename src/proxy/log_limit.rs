//! A limit on log lines that each request could cause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The time in which one line may be written.
const EVERY: Duration = Duration::from_secs(1);

/// Allows one line a second, and counts those that it does not allow.
#[derive(Debug)]
pub(super) struct LogLimit {
    created: Instant,
    /// From when on a line may be written, in milliseconds after that.
    next: AtomicU64,
    left_out: AtomicU64,
}

impl LogLimit {
    pub(super) fn new() -> Self {
        Self {
            created: Instant::now(),
            next: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }

    /// Whether a line may be written now; if so, how many have been left out since the one before.
    pub(super) fn take(&self, now: Instant) -> Option<u64> {
        let millis = now.saturating_duration_since(self.created).as_millis() as u64;
        let next = self.next.load(Ordering::Relaxed);
        let later = millis + EVERY.as_millis() as u64;
        let is_taken = millis >= next
            && (self.next)
                .compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if !is_taken {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_says_how_many_were_left_out() {
        let limit = LogLimit::new();
        let after = |millis| limit.created + Duration::from_millis(millis);
        assert_eq!(limit.take(after(0)), Some(0));
        assert_eq!(limit.take(after(1)), None);
        assert_eq!(limit.take(after(999)), None);
        assert_eq!(limit.take(after(1_500)), Some(2));
        assert_eq!(limit.take(after(2_499)), None);
        assert_eq!(limit.take(after(9_000)), Some(1));
    }
}
