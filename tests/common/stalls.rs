//! Measures for how long this machine has stood still.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the thread sleeps at a time.
const SLEEP: Duration = Duration::from_millis(1);
/// A sleep that is longer by no more than this is as usual.
const USUAL: Duration = Duration::from_millis(5);

/// A thread that sleeps for a millisecond at a time, and adds up by how much it overslept. It ends with the last handle.
///
/// A test that has to be faster than some bound allows as much time more as the machine stood still meanwhile: nothing on
/// a quiet one.
#[derive(Clone)]
pub struct Stalls(Arc<Mutex<Seen>>);

struct Seen {
    stood: Duration,
    asleep_since: Instant,
}

impl Seen {
    /// With the sleep that has not ended yet.
    fn all(&self) -> Duration {
        let slept = self.asleep_since.elapsed();
        self.stood + slept.saturating_sub(SLEEP + USUAL)
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stalls {
    /// Begins now.
    pub fn watch() -> Self {
        let seen = Arc::new(Mutex::new(Seen {
            stood: Duration::ZERO,
            asleep_since: Instant::now(),
        }));
        let watched = Arc::downgrade(&seen);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(SLEEP);
                let Some(seen) = watched.upgrade() else {
                    return;
                };
                let mut seen = lock(&seen);
                seen.stood = seen.all();
                seen.asleep_since = Instant::now();
            }
        });
        Self(seen)
    }

    /// How long the machine has stood still since the beginning.
    pub fn so_far(&self) -> Duration {
        lock(&self.0).all()
    }
}
