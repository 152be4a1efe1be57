//! Whether the backends are loaded by others, which are many. Pure.

use super::mean::Mean;

/// The part of the difference that a tick takes over.
const KEPT_UP: f64 = 0.1;
/// With this number of requests in flight at each backend, this process sees enough of their queues itself.
const ENOUGH: f64 = 0.5;

/// How much of what the backends work on comes from others, as far as it matters for learning.
///
/// Where many processes send requests to the same backends, each of them has few in flight, few latencies in a
/// tick, and what it makes of them is noisy. But their noise is not the same, so that most of it is gone from the
/// traffic that all of them send together. So each may follow its latencies faster than a process could that
/// is alone with the backends.
#[derive(Debug)]
pub(super) struct Sharing {
    /// Requests of this process in flight at a backend: a moving mean.
    own: f64,
}

impl Default for Sharing {
    fn default() -> Self {
        // Alone, until it is known to be otherwise.
        Self { own: 1.0 }
    }
}

impl Sharing {
    /// Takes over the requests of this process in flight at each backend.
    pub(super) fn tick(&mut self, in_flight: &Mean) {
        if in_flight.count() > 0 {
            self.own += KEPT_UP * (in_flight.value() - self.own);
        }
    }

    /// From 0 (this process is alone, or the backends have little to do) to 1. `calm` says how little the
    /// backends report to have to do: 1 if they are calm, or do not report.
    pub(super) fn level(&self, calm: f64) -> f64 {
        (1.0 - calm) * (1.0 - self.own / ENOUGH).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_ticks(in_flight: f64) -> Sharing {
        let mut mean = Mean::default();
        mean.add(in_flight, 1.0);
        let mut sharing = Sharing::default();
        for _ in 0..100 {
            sharing.tick(&mean);
        }
        sharing
    }

    #[test]
    fn backends_are_shared_if_they_are_busy_with_what_others_sent() {
        assert!(after_ticks(0.05).level(0.0) > 0.85);
        assert!(after_ticks(0.05).level(1.0) == 0.0, "they are calm");
        assert!(
            after_ticks(0.5).level(0.0) < 0.01,
            "with what this one sent"
        );
        assert!(after_ticks(5.0).level(0.0) == 0.0);
        assert!(Sharing::default().level(0.0) == 0.0, "not known yet");
    }
}
