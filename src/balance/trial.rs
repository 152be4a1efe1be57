//! When a backend that has been ejected is tried again. Pure.

use std::time::{Duration, Instant};

/// The pause before the first probe; each one that fails doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// What is known of the probes of one backend.
#[derive(Debug, Clone, Default)]
pub(super) struct Trial {
    failed: u32,
    /// When the next probe is due, unless one is under way.
    next: Option<Instant>,
}

impl Trial {
    /// It has not been ejected, or is used again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether a probe is due, of a backend that is ejected and has none to come or under way; with
    /// the longest pause between two.
    pub(super) fn is_due(&mut self, most_pause: Duration, now: Instant) -> bool {
        match self.next {
            Some(next) if next <= now => {
                self.next = None;
                true
            }
            Some(_) => false,
            // It has just been ejected, or the last probe has failed.
            None => {
                let pause = FIRST_PAUSE.saturating_mul(1 << self.failed.min(16));
                self.failed = self.failed.saturating_add(1);
                self.next = now.checked_add(pause.min(most_pause));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_probes_become_longer_up_to_a_limit() {
        let start = Instant::now();
        let mut trial = Trial::default();
        let seconds = |trial: &mut Trial| {
            let due = (0..40).filter(|second| {
                trial.is_due(Duration::from_secs(5), start + Duration::from_secs(*second))
            });
            due.collect::<Vec<_>>()
        };
        // Each fails at once, which the next call notices.
        assert_eq!(seconds(&mut trial), [1, 4, 9, 15, 21, 27, 33, 39]);
        trial.reset();
        assert_eq!(seconds(&mut trial)[..3], [1, 4, 9]);
    }
}
