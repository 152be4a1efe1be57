//! What a client is allowed: times, sizes, rates.

use std::time::Duration;

use tokio::time::Instant;

use super::connection::Phase;

/// How long the start of a slow response may take before its rate counts.
const RATE_GRACE: Duration = Duration::from_secs(5);

/// What every client connection is allowed.
#[derive(Debug, Clone)]
pub(crate) struct FrontLimits {
    pub(crate) timeouts: ClientTimeouts,
    /// Size of the head of a request, in bytes.
    pub(crate) head_bytes: usize,
    /// Bytes a second that a client must read of a response; 0 for any rate.
    pub(crate) least_rate: u64,
}

/// How long to wait for a client.
#[derive(Debug, Clone)]
pub(crate) struct ClientTimeouts {
    /// For the whole head of a request.
    pub(crate) client_header: Duration,
    /// From one part of a body to the next.
    pub(crate) client_body: Duration,
    /// From a response to the next request.
    pub(crate) client_idle: Duration,
    /// From one part of a response that the client reads to the next.
    pub(crate) client_write: Duration,
    /// For the rest of a body that nobody wants, and the next head after it.
    pub(crate) client_drain: Duration,
    /// Without a byte in a tunnel.
    pub(crate) tunnel: Duration,
}

/// What a write is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteLimit {
    within: Duration,
    least_rate: u64,
}

impl FrontLimits {
    pub(super) fn write_limit(&self, phase: Phase) -> WriteLimit {
        match phase {
            Phase::Tunnel => WriteLimit {
                within: self.timeouts.tunnel,
                least_rate: 0,
            },
            _ => WriteLimit {
                within: self.timeouts.client_write,
                least_rate: self.least_rate,
            },
        }
    }
}

/// How long writes have waited for the client, and how much it has taken meanwhile.
#[derive(Debug, Default)]
pub(super) struct WriteClock {
    /// Since when a write waits.
    since: Option<Instant>,
    waited: Duration,
    written: u64,
}

impl WriteClock {
    /// Until when the current write may wait.
    pub(super) fn deadline(&mut self, now: Instant, limit: WriteLimit) -> Option<Instant> {
        let since = *self.since.get_or_insert(now);
        let within = match limit.least_rate {
            0 => limit.within,
            rate => {
                let earned = Duration::from_secs_f64(self.written as f64 / rate as f64);
                let allowed = (RATE_GRACE + earned).saturating_sub(self.waited);
                limit.within.min(allowed)
            }
        };
        since.checked_add(within)
    }

    /// The client has taken this number of bytes.
    pub(super) fn wrote(&mut self, count: usize) {
        self.written += count as u64;
        self.flushed();
    }

    /// No write waits any more.
    pub(super) fn flushed(&mut self) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_write_may_wait_for_the_time_out_or_as_long_as_its_rate_allows() {
        let start = Instant::now();
        let limit = |least_rate| WriteLimit {
            within: 60 * SECOND,
            least_rate,
        };
        let mut clock = WriteClock::default();
        assert_eq!(clock.deadline(start, limit(0)), Some(start + 60 * SECOND));
        // The same wait.
        let later = start + 3 * SECOND;
        assert_eq!(clock.deadline(later, limit(0)), Some(start + 60 * SECOND));
        assert_eq!(clock.deadline(later, limit(100)), Some(start + RATE_GRACE));

        tokio::time::advance(3 * SECOND).await;
        clock.wrote(1_000);
        // 5 s and 10 s for 1,000 bytes, of which 3 are over.
        let now = Instant::now();
        assert_eq!(clock.deadline(now, limit(100)), Some(now + 12 * SECOND));
    }
}
