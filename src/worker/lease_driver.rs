//! The task that keeps a lease alive: it requests a lease, renews it, and replaces it when it is
//! lost, without limit.
//!
//! The task starts with the first node that uses the lease and ends with the last one.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{Span, debug, error, warn};

use super::lease::{Pacing, SharedLease, UNHEALTHY_AFTER, until_replaced};
use super::orphans::remove_orphans;
use super::tenure::{Tenure, margin};
use crate::error::ClusterError;
use crate::store::Store;
use crate::supervise::in_span;

/// Renewals missed in a row until they are tried less often; or until the lease is given up, if
/// the store refuses them permanently.
const TRY_OFTEN: u32 = 10;
/// How long to wait before a task that has ended by itself is started again.
const RESTART_AFTER: Duration = Duration::from_millis(200);
/// A lease that has lasted so long, or for its whole TTL, was not lost because the store does not work.
const LASTED: Duration = Duration::from_secs(30);
/// How long to wait for the answer when a lease is revoked that was given up.
const REVOKE_BUDGET: Duration = Duration::from_millis(1500);

/// Makes sure that a task keeps the lease alive, for as long as this future is polled. If the task
/// ends by itself, because something in it has panicked, that is logged and another one is started.
/// The task logs in `span`.
pub(super) async fn keep_alive(
    lease: &Arc<SharedLease>,
    store: &Arc<dyn Store>,
    span: &Span,
) -> Infallible {
    let mut ended = lease.task.listen_for_end();
    loop {
        ended.catch_up();
        start(lease, store, span);
        ended.changed().await;
        // Another node may have started the next one already.
        if !lease.task.is_running() {
            error!("the task that renews the lease has ended unexpectedly and is started again");
            sleep(RESTART_AFTER).await;
        }
    }
}

fn start(lease: &Arc<SharedLease>, store: &Arc<dyn Store>, span: &Span) {
    lease.task.start(|number| {
        let end = EndGuard {
            lease: lease.clone(),
            number,
        };
        let store_of_task = store.clone();
        let task = async move { match drive(&end.lease, &*store_of_task).await {} };
        store.spawn(Box::pin(in_span(span, task)))
    });
}

/// Reports the end of the task when it is dropped: with the task, however that ends.
struct EndGuard {
    lease: Arc<SharedLease>,
    number: u64,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.lease.task.set_ended(self.number);
    }
}

/// Keeps the lease, once no other task does.
async fn drive(lease: &SharedLease, store: &dyn Store) -> Infallible {
    let mut pacing = lease.pacing.lock().await;
    // Side by side: an unanswered request for orphaned keys must not delay a renewal.
    tokio::select! {
        biased;
        never = keep_leases(lease, store, &mut pacing) => never,
        never = remove_orphans(lease, store) => never,
    }
}

/// One lease after another.
async fn keep_leases(lease: &SharedLease, store: &dyn Store, pacing: &mut Pacing) -> Infallible {
    loop {
        // A task that has replaced another one respects the pause that the other one began.
        if let Some(until) = pacing.not_before {
            sleep_until(until).await;
            pacing.not_before = None;
        }
        let started = Instant::now();
        let tenure = match lease.tenure() {
            Some(tenure) => tenure,
            None => match request(lease, store).await {
                Ok(tenure) => tenure,
                Err(error) => {
                    let delay = pacing.backoff.after(&error);
                    warn!(%error, ?delay, "no lease could be obtained");
                    lease.set_lost(error);
                    pacing.not_before = Some(Instant::now() + delay);
                    continue;
                }
            },
        };
        let Some(error) = renew_until_lost(lease, store, &tenure).await else {
            continue;
        };
        // A lease that lasted proves that the store works: request another one without backoff, but
        // not at the same instant as all the nodes that lost a lease together with this one.
        let delay = if started.elapsed() > tenure.lease.ttl.min(LASTED) {
            pacing.backoff.reset();
            Duration::from_millis(fastrand::u64(0..250))
        } else {
            pacing.backoff.after(&error)
        };
        warn!(lease = %tenure.lease.id, %error, ?delay, "lease lost, another one will be requested");
        let is_gone = matches!(error, ClusterError::LeaseNotFound { .. });
        lease.set_lost(error);
        pacing.not_before = Some(Instant::now() + delay);
        if !is_gone {
            // Best effort: a lease that is not renewed expires anyway.
            let _ = timeout(REVOKE_BUDGET, store.revoke(tenure.lease.id)).await;
        }
    }
}

async fn request(lease: &SharedLease, store: &dyn Store) -> Result<Arc<Tenure>, ClusterError> {
    let clock = store.clock();
    let sent = clock.now();
    let granted = store.grant(Duration::from_secs(lease.ttl)).await?;
    let (id, ttl) = (granted.id, granted.ttl);
    debug!(lease = %id, ?ttl, "lease granted");
    if ttl <= margin(ttl) {
        warn!(lease = %id, ?ttl, "the granted TTL is not longer than the safety margin: no node can lead with this lease");
    }
    let tenure = Arc::new(Tenure::new(granted, clock, sent));
    lease.set_granted(tenure.clone());
    Ok(tenure)
}

/// Renews the lease until it is lost. Returns why; `None` if its last node has left, and the node
/// that keeps this task running came after that.
async fn renew_until_lost(
    lease: &SharedLease,
    store: &dyn Store,
    tenure: &Arc<Tenure>,
) -> Option<ClusterError> {
    let id = tenure.lease.id;
    let mut keeper = store.keeper(tenure.lease);
    let mut changes = lease.listen();
    let mut missed = 0;
    loop {
        let pause = pause_before_renewal(tenure.lease.ttl, tenure.remaining(), missed);
        // The deadline counts from before the request, also for an answer that comes late.
        let mut sent = tenure.now();
        let late = tokio::select! {
            biased;
            () = until_replaced(&mut changes, tenure) => return None,
            late = keeper.late(), if missed > 0 => Some(late),
            () = lease.doubted.notified() => None,
            () = tenure.wait(pause) => None,
        };
        let renewal = match late {
            Some(late) => late,
            None => {
                sent = tenure.now();
                keeper.renew(tenure.lease.ttl / 3).await
            }
        };
        match renewal {
            Ok(ttl) => {
                let revived = tenure.renewed(sent, ttl);
                if missed >= UNHEALTHY_AFTER {
                    debug!(lease = %id, missed, "lease renewed again");
                }
                missed = 0;
                lease.set_renewed(tenure, revived);
            }
            Err(error @ ClusterError::LeaseNotFound { .. }) => return Some(error),
            Err(error) => {
                missed += 1;
                debug!(lease = %id, missed, %error, "renewal missed");
                if missed == UNHEALTHY_AFTER {
                    warn!(lease = %id, missed, %error, "the lease cannot be renewed");
                }
                if missed >= TRY_OFTEN && !error.is_transient() {
                    return Some(error);
                }
                lease.set_missed(tenure, missed, error);
            }
        }
    }
}

/// How long to wait before the next renewal of a lease with this TTL, on which the process may
/// rely for `remaining`, after this many misses in a row.
///
/// A third of the TTL; after a miss a third of that, because one renewal has to succeed before the
/// TTL is over. After ten misses a third to a half of the TTL: a store that was away gives every
/// lease its whole TTL anew, so a node that comes back in time has lost nothing.
fn pause_before_renewal(ttl: Duration, remaining: Duration, missed: u32) -> Duration {
    let period = ttl / 3;
    if missed == 0 {
        // From when the last renewal was sent, even if another task has sent it.
        let remaining_then = ttl.saturating_sub(margin(ttl) + period);
        remaining.saturating_sub(remaining_then).min(period)
    } else if missed < TRY_OFTEN {
        period / 3
    } else {
        period.mul_f64(1.0 + 0.5 * fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_come_every_third_of_the_ttl_sooner_after_a_miss_and_rarely_after_ten() {
        const TTL: Duration = Duration::from_secs(9);
        let ms = Duration::from_millis;
        // The margin is 900 ms, so 8,100 ms remain just after a renewal was sent.
        for (remaining, missed, pause) in [
            (ms(8_100), 0, ms(3_000)),
            (ms(7_100), 0, ms(2_000)),
            (ms(5_100), 0, ms(0)),
            (ms(0), 0, ms(0)),
            (ms(5_000), 1, ms(1_000)),
            (ms(0), TRY_OFTEN - 1, ms(1_000)),
        ] {
            let found = pause_before_renewal(TTL, remaining, missed);
            assert_eq!(found, pause, "{remaining:?} remaining, {missed} missed");
        }
        for _ in 0..100 {
            let pause = pause_before_renewal(TTL, ms(0), TRY_OFTEN);
            assert!((ms(3_000)..=ms(4_500)).contains(&pause), "{pause:?}");
        }
    }
}
