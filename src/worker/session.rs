//! One lease's life: granted, renewed, lost; and the local deadline.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::Shared;
use crate::error::ClusterError;
use crate::node::HealthStatus;
use crate::store::{Lease, Revision, Store};

/// Renewals missed in a row until the node is unhealthy.
const UNHEALTHY_AFTER: u32 = 3;
/// Renewals missed in a row until the session is given up.
const LOST_AFTER: u32 = 10;

/// A granted lease, with the instant up to which this process may count on it.
pub(super) struct Session {
    pub(super) lease: Lease,
    granted: Instant,
    /// Nanoseconds after `granted`.
    deadline: AtomicU64,
    registered: AtomicBool,
    /// The create revision of a candidacy that has been given up, 0 for none. Whatever became of
    /// the request to delete it, it never leads again.
    abandoned: AtomicI64,
    recheck: Notify,
}

impl Session {
    /// A lease whose grant was asked for at `sent`.
    pub(super) fn new(lease: Lease, sent: Instant) -> Self {
        let session = Self {
            lease,
            granted: sent,
            deadline: AtomicU64::new(0),
            registered: AtomicBool::new(false),
            abandoned: AtomicI64::new(0),
            recheck: Notify::new(),
        };
        session.renewed(sent, lease.ttl);
        session
    }

    /// A renewal that was sent at `sent` has been answered with `ttl`. The store counts from when
    /// it got the request, which is later: so this side stops counting on the lease first.
    fn renewed(&self, sent: Instant, ttl: Duration) {
        let deadline =
            sent.saturating_duration_since(self.granted) + ttl.saturating_sub(margin(ttl));
        let nanos = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        // Never back: an answer with a shorter TTL does not undo a promise made.
        self.deadline.fetch_max(nanos, Ordering::AcqRel);
    }

    /// Whether this process may count on the lease now.
    pub(super) fn is_valid(&self) -> bool {
        self.is_valid_at(Instant::now())
    }

    pub(super) fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Acquire)
    }

    /// Answers with what it was before.
    pub(super) fn set_registered(&self, registered: bool) -> bool {
        self.registered.swap(registered, Ordering::AcqRel)
    }

    pub(super) fn abandoned(&self) -> Revision {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(super) fn abandon(&self, candidacy: Revision) {
        self.abandoned.store(candidacy, Ordering::Release);
    }

    /// Waits until what is known about the election has to be read again.
    pub(super) async fn recheck_asked(&self) {
        self.recheck.notified().await;
    }

    pub(super) fn is_valid_at(&self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.granted).as_nanos();
        elapsed < u128::from(self.deadline.load(Ordering::Acquire))
    }
}

/// For the clocks of two machines that run at slightly different rates, and for the time between
/// asking `is_leader` and acting on it.
fn margin(ttl: Duration) -> Duration {
    Duration::from_millis(500).max(ttl / 10)
}

impl Shared {
    /// Renews the lease every third of its TTL, and after a miss three times as often: what
    /// counts then is to get one through before the TTL is over. Returns why the lease is lost.
    pub(super) async fn keep_alive(&self, store: &dyn Store, session: &Session) -> ClusterError {
        let period = session.lease.ttl / 3;
        let mut keeper = store.keeper(session.lease);
        let mut missed = 0;
        loop {
            sleep(if missed == 0 { period } else { period / 3 }).await;
            let sent = Instant::now();
            match keeper.renew(period).await {
                Ok(ttl) => {
                    if !session.is_valid() {
                        // The deadline has passed: a term is not to come back to life by itself,
                        // only after reading that its key is still there.
                        self.end_term();
                        session.recheck.notify_one();
                    }
                    session.renewed(sent, ttl);
                    if missed >= UNHEALTHY_AFTER {
                        debug!(group = %self.config.group, node = %self.config.id, missed, "lease renewed again");
                    }
                    missed = 0;
                    // A renewed lease alone says little.
                    if session.is_registered() {
                        self.set_health(HealthStatus::Healthy);
                    }
                }
                Err(error @ ClusterError::LeaseNotFound { .. }) => return error,
                Err(error) => {
                    missed += 1;
                    debug!(group = %self.config.group, node = %self.config.id, missed, %error, "renewal missed");
                    if missed == UNHEALTHY_AFTER {
                        warn!(group = %self.config.group, node = %self.config.id, missed, %error, "node is unhealthy");
                        self.set_health(HealthStatus::Unhealthy);
                    }
                    if missed >= LOST_AFTER {
                        return error;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseId;

    fn session(ttl: u64, sent: Instant) -> Session {
        let lease = Lease {
            id: LeaseId(1),
            ttl: Duration::from_secs(ttl),
        };
        Session::new(lease, sent)
    }

    #[test]
    fn counts_from_sending_less_the_margin() {
        let t0 = Instant::now();
        let session = session(5, t0);
        assert!(session.is_valid_at(t0 + Duration::from_millis(4499)));
        assert!(!session.is_valid_at(t0 + Duration::from_millis(4500)));
        session.renewed(t0 + Duration::from_secs(2), Duration::from_secs(5));
        assert!(session.is_valid_at(t0 + Duration::from_millis(6499)));
        assert!(!session.is_valid_at(t0 + Duration::from_millis(6500)));
    }

    #[test]
    fn a_late_answer_to_an_early_renewal_takes_nothing_back() {
        let t0 = Instant::now();
        let session = session(5, t0);
        session.renewed(t0 + Duration::from_secs(3), Duration::from_secs(5));
        session.renewed(t0 + Duration::from_secs(1), Duration::from_secs(5));
        assert!(session.is_valid_at(t0 + Duration::from_millis(7400)));
    }

    #[test]
    fn a_tenth_of_a_long_ttl() {
        let t0 = Instant::now();
        let session = session(60, t0);
        assert!(session.is_valid_at(t0 + Duration::from_millis(53_999)));
        assert!(!session.is_valid_at(t0 + Duration::from_secs(54)));
    }
}
