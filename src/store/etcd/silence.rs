//! What to do about a watch stream that delivers nothing: probe it, first by a progress request, then
//! by new watches, and give it up if neither is answered. Does no I/O.

use std::time::Duration;

use tokio::time::Instant;

use super::round_trips::RoundTrips;

/// How a silent stream has been probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Probe {
    /// Not yet.
    None,
    /// By a progress request.
    Progress,
    /// By opening every watch again. The answers show that the stream is alive, and the new watches
    /// deliver what the old ones may have missed.
    Watches,
}

#[derive(Debug)]
pub(super) struct Silence {
    /// How long the stream may deliver nothing.
    timeout: Duration,
    since: Instant,
    pub(super) probe: Probe,
    probed: Instant,
}

impl Silence {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            since: now,
            probe: Probe::None,
            probed: now,
        }
    }

    pub(super) fn probes(&mut self, probe: Probe, now: Instant) {
        self.probe = probe;
        self.probed = now;
    }

    /// The stream has delivered something.
    pub(super) fn ends(&mut self, now: Instant) {
        self.since = now;
        self.probe = Probe::None;
    }

    pub(super) fn duration(&self, now: Instant) -> Duration {
        now - self.since
    }

    /// When the next step is due. All steps fit into nine tenths of the time-out, unless answers were
    /// measured to take longer. Each probe has its time from the moment when it was sent, even if this
    /// process was suspended before.
    pub(super) fn due(&self, round_trips: &RoundTrips) -> Instant {
        match self.probe {
            Probe::None => self.since + self.timeout.mul_f64(0.4),
            _ => self.probed + self.time_to_answer(round_trips),
        }
    }

    /// How long the current step may take.
    pub(super) fn time_to_answer(&self, round_trips: &RoundTrips) -> Duration {
        round_trips.patience(match self.probe {
            Probe::None => self.timeout / 2,
            Probe::Progress | Probe::Watches => self.timeout / 4,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_stream_is_given_up_within_its_timeout() {
        let timeout = Duration::from_secs(5);
        let start = Instant::now();
        let fast = RoundTrips::new(Duration::from_millis(1), 0);
        let mut silence = Silence::new(timeout, start);
        for probe in [Probe::Progress, Probe::Watches] {
            let due = silence.due(&fast);
            silence.probes(probe, due);
        }
        assert_eq!(silence.due(&fast) - start, timeout.mul_f64(0.9));
        let slow = RoundTrips::new(Duration::from_secs(4), 0);
        assert!(silence.due(&slow) - start > timeout);
        silence.ends(start);
        assert_eq!(silence.probe, Probe::None);
        assert_eq!(silence.due(&fast) - start, timeout.mul_f64(0.4));
    }
}
