//! How often endpoints are dialled, so that a cluster that is down is not flooded.

use std::time::Duration;

use tokio::time::Instant;

/// After one dial of each address at once there is one dial per this time, lengthened by up to a
/// quarter at random.
const INTERVAL: Duration = Duration::from_secs(1);
const JITTER: f64 = 0.25;
/// The longest time between two dials.
pub(super) const LONGEST_INTERVAL: Duration = Duration::from_millis(1_250);

/// When the next dial is allowed. A bucket of tokens, kept as the time when it will be full again.
#[derive(Debug, Default)]
pub(super) struct Pace(Option<Instant>);

impl Pace {
    /// Takes a dial, or returns when the next one is allowed. Up to `burst` can be taken at once.
    pub(super) fn take(&mut self, burst: usize, now: Instant) -> Result<(), Instant> {
        let burst = u32::try_from(burst.saturating_sub(1)).unwrap_or(u32::MAX);
        let spent = self.0.unwrap_or(now);
        // Whatever the jitter of the dials before was.
        let earliest = spent.checked_sub(LONGEST_INTERVAL.saturating_mul(burst));
        match earliest {
            Some(earliest) if earliest > now => Err(earliest),
            _ => {
                let interval = INTERVAL.mul_f64(1.0 + JITTER * fastrand::f64());
                self.0 = Some(spent.max(now) + interval);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dial_a_second_after_one_of_each_endpoint() {
        assert_eq!(LONGEST_INTERVAL, INTERVAL.mul_f64(1.0 + JITTER));
        let mut pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..3 {
            pace.take(3, now).unwrap();
        }
        let start = now;
        for count in 1..=20_u32 {
            now = pace.take(3, now).unwrap_err();
            let earliest = INTERVAL * count;
            let passed = now - start;
            assert!(
                passed + INTERVAL / 2 >= earliest
                    && passed <= earliest.mul_f64(1.0 + JITTER) + INTERVAL,
                "{passed:?}"
            );
            pace.take(3, now).unwrap();
        }
        // After a pause each of them at once again.
        now += INTERVAL * 10;
        for _ in 0..3 {
            pace.take(3, now).unwrap();
        }
        assert!(pace.take(3, now).is_err());
    }
}
