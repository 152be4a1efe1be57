//! How long this process may rely on its lease: a deadline that is checked against the clock.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;

use crate::store::{Clock, Lease};

/// How often a wait looks at the clock of the lease. While the machine is suspended, that of timers stands still, and
/// this one does not: a term may have been over for hours when a timer of some seconds begins to go on.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A lease, with the instant up to which this process may rely on it.
pub(super) struct Tenure {
    pub(super) lease: Lease,
    clock: Arc<dyn Clock>,
    /// On the clock, in nanoseconds.
    deadline: AtomicU64,
    /// How often it was extended after it had passed: what was relied on before has to be read again.
    lapses: AtomicU64,
}

/// A deadline that is as near as this counts as passed: it may pass while it is extended.
const NEARLY_OVER: Duration = Duration::from_millis(1);

impl fmt::Debug for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenure({}, {:?})", self.lease.id, self.remaining())
    }
}

impl Tenure {
    /// Starts with a lease whose grant was requested at `sent` on this clock.
    pub(super) fn new(lease: Lease, clock: Arc<dyn Clock>, sent: Duration) -> Self {
        let tenure = Self {
            lease,
            clock,
            deadline: AtomicU64::new(nanos(Duration::MAX)),
            lapses: AtomicU64::new(0),
        };
        let deadline = tenure.deadline_after(sent, lease.ttl);
        tenure.deadline.store(deadline, Ordering::Release);
        tenure
    }

    /// Extends the deadline after a renewal that was sent at `sent` and answered with `ttl`. The
    /// store counts from when it received the request, which is later: so this process stops
    /// relying on the lease before the store ends it. Returns whether the deadline had passed.
    pub(super) fn renewed(&self, sent: Duration, ttl: Duration) -> bool {
        let has_lapsed = self.remaining() <= NEARLY_OVER;
        if has_lapsed {
            // Before the deadline moves: whoever sees the new one sees this, too.
            self.lapses.fetch_add(1, Ordering::AcqRel);
        }
        // The deadline never moves back: a shorter answer does not withdraw an earlier one.
        let deadline = self.deadline_after(sent, ttl);
        self.deadline.fetch_max(deadline, Ordering::AcqRel);
        has_lapsed
    }

    fn deadline_after(&self, sent: Duration, ttl: Duration) -> u64 {
        // The answer may contain only the rest of the TTL; the margin is that of the whole lease.
        let margin = margin(ttl.max(self.lease.ttl));
        let deadline = sent + ttl.saturating_sub(margin);
        nanos(deadline)
    }

    /// How often the deadline was extended after it had passed.
    pub(super) fn lapses(&self) -> u64 {
        self.lapses.load(Ordering::Acquire)
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// How much longer this process may rely on the lease.
    pub(super) fn remaining(&self) -> Duration {
        let deadline = Duration::from_nanos(self.deadline.load(Ordering::Acquire));
        deadline.saturating_sub(self.clock.now())
    }

    /// Waits until this process may not rely on the lease any more.
    pub(super) async fn until_over(&self) {
        loop {
            let remaining = self.remaining();
            if remaining.is_zero() {
                return;
            }
            sleep(remaining.min(LOOK_EVERY)).await;
        }
    }

    /// Waits for this long on the clock of the lease.
    pub(super) async fn wait(&self, pause: Duration) {
        let until = self.now().saturating_add(pause);
        loop {
            let left = until.saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            sleep(left.min(LOOK_EVERY)).await;
        }
    }

    /// Whether this process may rely on the lease now.
    pub(super) fn is_valid(&self) -> bool {
        !self.remaining().is_zero()
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How long before the end of a lease this process stops relying on it. It covers clocks that run
/// at slightly different rates, and the time between asking `is_leader` and acting on the answer.
pub(super) fn margin(ttl: Duration) -> Duration {
    Duration::from_millis(500).max(ttl / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseId;
    use crate::sync::lock;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct ManualClock(Mutex<Duration>);

    impl Clock for ManualClock {
        fn now(&self) -> Duration {
            *lock(&self.0)
        }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A tenure that begins at 100 s, and its clock.
    fn tenure(ttl: u64) -> (Tenure, Arc<ManualClock>) {
        let lease = Lease {
            id: LeaseId(1),
            ttl: Duration::from_secs(ttl),
        };
        let clock = Arc::new(ManualClock::default());
        (Tenure::new(lease, clock.clone(), T0), clock)
    }

    const T0: Duration = Duration::from_secs(100);

    fn is_valid_at(tenure: &(Tenure, Arc<ManualClock>), now: Duration) -> bool {
        *lock(&tenure.1.0) = T0 + now;
        tenure.0.is_valid()
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspend_is_noticed_within_a_second_after_it() {
        let (tenure, clock) = tenure(60);
        *lock(&clock.0) = T0;
        let resumed = async {
            sleep(ms(10)).await;
            // An hour passes, and no timer notices.
            *lock(&clock.0) = T0 + ms(3_600_000);
        };
        let start = tokio::time::Instant::now();
        let (over, waited) = (tenure.until_over(), tenure.wait(ms(20_000)));
        tokio::join!(resumed, over, waited);
        assert!(start.elapsed() <= ms(1_100), "{:?}", start.elapsed());
    }

    #[test]
    fn the_deadline_counts_from_sending_less_the_margin() {
        let tenure = tenure(5);
        assert!(is_valid_at(&tenure, ms(4499)));
        assert!(!is_valid_at(&tenure, ms(4500)));
        tenure.0.renewed(T0 + ms(2000), Duration::from_secs(5));
        assert!(is_valid_at(&tenure, ms(6499)));
        assert!(!is_valid_at(&tenure, ms(6500)));
    }

    #[test]
    fn a_late_answer_to_an_early_renewal_never_moves_the_deadline_back() {
        let tenure = tenure(5);
        tenure.0.renewed(T0 + ms(3000), Duration::from_secs(5));
        tenure.0.renewed(T0 + ms(1000), Duration::from_secs(5));
        assert!(is_valid_at(&tenure, ms(7400)));
    }

    #[test]
    fn an_answer_after_the_deadline_is_a_lapse() {
        let tenure = tenure(5);
        assert!(is_valid_at(&tenure, ms(4_400)));
        assert!(!tenure.0.renewed(T0 + ms(4_400), Duration::from_secs(5)));
        assert_eq!(tenure.0.lapses(), 0);
        assert!(!is_valid_at(&tenure, ms(8_950)));
        assert!(tenure.0.renewed(T0 + ms(8_900), Duration::from_secs(5)));
        assert!(tenure.0.is_valid());
        assert_eq!(tenure.0.lapses(), 1);
    }

    #[test]
    fn the_margin_leaves_at_least_half_of_every_ttl() {
        for ttl in (1..=86_400).map(Duration::from_secs) {
            assert!(margin(ttl) <= ttl / 2, "{ttl:?}");
        }
    }

    #[test]
    fn the_margin_of_a_long_ttl_is_a_tenth() {
        let tenure = tenure(60);
        assert!(is_valid_at(&tenure, ms(53_999)));
        assert!(!is_valid_at(&tenure, ms(54_000)));
    }
}
