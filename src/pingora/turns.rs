//! A counter of turns that threads take without waiting for each other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Turns of several threads: each thread has a counter of its own, as long as there are no more
/// threads than counters.
#[derive(Debug)]
pub(super) struct Turns([Counter; 16]);

/// Alone on its cache line and on the adjacent one, which processors fetch along.
#[derive(Debug)]
#[repr(align(128))]
struct Counter(AtomicU64);

impl Turns {
    pub(super) fn new() -> Self {
        // Proxies that start at the same time should not all begin with the same backend.
        Self(std::array::from_fn(|_| {
            Counter(AtomicU64::new(fastrand::u64(..)))
        }))
    }

    pub(super) fn next(&self) -> u64 {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static THREAD: usize = THREADS.fetch_add(1, Ordering::Relaxed);
        }
        let Counter(turn) = &self.0[THREAD.with(|thread| thread % self.0.len())];
        turn.fetch_add(1, Ordering::Relaxed)
    }
}
