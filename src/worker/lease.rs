//! A lease that lasts: granted, renewed, and replaced when it is lost, for ever. One node has one,
//! or all the nodes of a [`Cluster`](crate::Cluster) together.
//!
//! No task of its own: every node that uses it offers to drive it, one does, and when that one
//! stops the next takes over.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::session::{Tenure, margin};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::signal::{Listener, Signal};
use crate::store::{Condition, LeaseId, Selector, Store, Txn};

/// Renewals missed in a row until its nodes are unhealthy.
pub(super) const UNHEALTHY_AFTER: u32 = 3;
/// Renewals missed in a row until they are tried less often; or until the lease is given up, if the
/// store refuses for good.
const OFTEN: u32 = 10;
/// How often keys of an ended node are removed under a lease that lives on: at first because a
/// request of it may be carried out after its end, though not much later than it is given up; then
/// because the store may have been given older data, in which they are there again.
const TIDY_EVERY: Duration = Duration::from_secs(5);
const TIDY_FOR: Duration = Duration::from_secs(20);
const TIDY_THEN_EVERY: Duration = Duration::from_secs(30);
/// How long a lease that was given up is worth a request to end it.
const REVOKE_BUDGET: Duration = Duration::from_millis(1500);

/// A lease with the nodes that use it.
#[derive(Debug)]
pub(crate) struct LeaseHolder {
    /// In seconds.
    ttl: u64,
    state: Signal<Held>,
    /// Whoever has it drives.
    driver: tokio::sync::Mutex<Driver>,
    users: Mutex<Users>,
    orphaned: Notify,
}

/// How it stands with the lease.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    pub(super) tenure: Option<Arc<Tenure>>,
    /// Renewals missed in a row.
    pub(super) missed: u32,
    /// Counts renewals answered after the deadline: what was known before has to be read again.
    pub(super) revived: u64,
    /// Why there is no lease, or why a renewal was missed.
    pub(super) error: Option<ClusterError>,
}

#[derive(Debug)]
struct Driver {
    backoff: Backoff,
    not_before: Option<Instant>,
}

#[derive(Debug, Default)]
struct Users {
    /// One node of each: two of one group would have the same candidacy.
    groups: BTreeSet<String>,
    /// Keys of nodes that ended, while others keep their lease alive.
    orphans: Vec<Orphan>,
}

/// What an ended node has left behind, or may leave yet: a request of it can be carried out after
/// it is gone.
#[derive(Debug, Clone)]
struct Orphan {
    group: String,
    keys: Vec<String>,
    lease: LeaseId,
    /// When to remove it again; often, until then.
    next: Instant,
    until: Instant,
}

/// What is left to do for a node that leaves.
pub(super) enum Leave {
    /// There is no lease.
    Nothing,
    /// It was the last one: the lease can go.
    Revoke(LeaseId),
    /// Others go on with the lease: these keys have to go, if they are under it still.
    Delete(LeaseId),
}

impl LeaseHolder {
    pub(crate) fn new(ttl: u64) -> Self {
        Self {
            ttl,
            state: Signal::default(),
            driver: tokio::sync::Mutex::new(Driver {
                backoff: Backoff::new(),
                not_before: None,
            }),
            users: Mutex::default(),
            orphaned: Notify::new(),
        }
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a node of `group` in; false if there is one of that group, or has been one under this
    /// lease: a late request of that one would be taken for one of the new one's.
    pub(crate) fn enter(&self, group: &str) -> bool {
        let mut users = self.users();
        let current = self.tenure().map(|tenure| tenure.lease.id);
        users.orphans.retain(|orphan| Some(orphan.lease) == current);
        let was_here = users.orphans.iter().any(|orphan| orphan.group == group);
        !was_here && users.groups.insert(group.to_owned())
    }

    /// The node of `group` goes, and removes these of its keys under the lease itself, if others
    /// keep it.
    pub(super) fn leave(&self, group: &str, keys: impl Fn(LeaseId) -> Vec<String>) -> Leave {
        let mut users = self.users();
        if !users.groups.remove(group) {
            return Leave::Nothing;
        }
        let Some(tenure) = self.tenure() else {
            return Leave::Nothing;
        };
        let lease = tenure.lease.id;
        if users.groups.is_empty() || bugs::has(Bug::SharedLeaseRevoked) {
            // Whoever comes now gets another one.
            self.state.update(|held| *held = Held::default());
            return Leave::Revoke(lease);
        }
        if !bugs::has(Bug::OrphanedKeysStay) {
            users.orphans.push(Orphan {
                group: group.to_owned(),
                keys: keys(lease),
                lease,
                next: Instant::now(),
                until: Instant::now() + TIDY_FOR,
            });
            self.orphaned.notify_one();
        }
        Leave::Delete(lease)
    }

    pub(super) fn listen(&self) -> Listener<'_, Held> {
        self.state.listen()
    }

    pub(super) fn held(&self) -> Held {
        self.state.with(Held::clone)
    }

    pub(super) fn tenure(&self) -> Option<Arc<Tenure>> {
        self.state.with(|held| held.tenure.clone())
    }

    /// Keeps a lease, once nobody else does.
    pub(super) async fn drive(&self, store: &dyn Store) -> Infallible {
        let mut driver = self.driver.lock().await;
        // Side by side: a request that is not answered must not hold a renewal up.
        tokio::select! {
            biased;
            never = self.keep_leases(store, &mut driver) => never,
            never = self.tidy(store) => never,
        }
    }

    async fn keep_leases(&self, store: &dyn Store, driver: &mut Driver) -> Infallible {
        loop {
            // Not before its time, even if the one who drove until then has ended.
            if let Some(until) = driver.not_before {
                sleep_until(until).await;
                driver.not_before = None;
            }
            let started = Instant::now();
            let tenure = match self.tenure() {
                Some(tenure) => tenure,
                None => match self.grant(store).await {
                    Ok(tenure) => tenure,
                    Err(error) => {
                        let delay = driver.backoff.after(&error);
                        warn!(%error, ?delay, "no lease");
                        self.lost(error);
                        driver.not_before = Some(Instant::now() + delay);
                        continue;
                    }
                },
            };
            let Some(error) = self.keep(store, &tenure).await else {
                continue;
            };
            // One that lasted proves that the store works: start over without delay, but not at
            // the same instant as everybody else who lost a lease with this one.
            let delay = if started.elapsed() > tenure.lease.ttl {
                driver.backoff.reset();
                Duration::from_millis(fastrand::u64(0..250))
            } else {
                driver.backoff.after(&error)
            };
            warn!(lease = %tenure.lease.id, %error, ?delay, "lease lost, will get another");
            let gone = matches!(error, ClusterError::LeaseNotFound { .. });
            self.lost(error);
            driver.not_before = Some(Instant::now() + delay);
            if !gone {
                // Not to leave a lease behind that nobody renews. Best effort: it ends anyway.
                let _ = timeout(REVOKE_BUDGET, store.revoke(tenure.lease.id)).await;
            }
        }
    }

    fn lost(&self, error: ClusterError) {
        self.state.update(|held| {
            *held = Held {
                error: Some(error),
                ..Held::default()
            };
        });
    }

    async fn grant(&self, store: &dyn Store) -> Result<Arc<Tenure>, ClusterError> {
        let clock = store.clock();
        let sent = clock.now();
        let lease = store.grant(Duration::from_secs(self.ttl)).await?;
        debug!(lease = %lease.id, ttl = ?lease.ttl, "lease granted");
        if lease.ttl <= margin(lease.ttl) {
            warn!(lease = %lease.id, ttl = ?lease.ttl, "the granted TTL is no more than the margin: nobody can lead with it");
        }
        let tenure = Arc::new(Tenure::new(lease, clock, sent));
        self.state.update(|held| {
            *held = Held {
                tenure: Some(tenure.clone()),
                ..Held::default()
            };
        });
        Ok(tenure)
    }

    /// Renews the lease every third of its TTL, and after a miss three times as often: what
    /// counts then is to get one through before the TTL is over. After ten misses it is tried every
    /// third to half of the TTL: a store that was away gives leases their whole TTL anew, and who
    /// comes back in time has lost nothing. Returns why the lease is lost; `None` if its last node has
    /// left, and this one came after.
    async fn keep(&self, store: &dyn Store, tenure: &Arc<Tenure>) -> Option<ClusterError> {
        let period = tenure.lease.ttl / 3;
        let mut keeper = store.keeper(tenure.lease);
        let mut missed = 0;
        let mut changes = self.listen();
        loop {
            let pause = if missed == 0 {
                // Counted from when the last one was sent, whoever drove then.
                let due = tenure
                    .lease
                    .ttl
                    .saturating_sub(margin(tenure.lease.ttl) + period);
                tenure.remaining().saturating_sub(due).min(period)
            } else if missed < OFTEN {
                period / 3
            } else {
                period.mul_f64(1.0 + 0.5 * fastrand::f64())
            };
            tokio::select! {
                biased;
                () = replaced(&mut changes, tenure) => return None,
                () = sleep(pause) => {}
            }
            let sent = tenure.now();
            let mut renewal = keeper.renew(period).await;
            if bugs::has(Bug::LeaseGoneIgnored)
                && let Err(ClusterError::LeaseNotFound { .. }) = renewal
            {
                renewal = Ok(tenure.lease.ttl);
            }
            match renewal {
                Ok(ttl) => {
                    let revived = !tenure.is_valid();
                    tenure.renewed(sent, ttl);
                    if missed >= UNHEALTHY_AFTER {
                        debug!(lease = %tenure.lease.id, missed, "lease renewed again");
                    }
                    missed = 0;
                    self.update(tenure, |held| {
                        held.missed = 0;
                        held.revived += u64::from(revived);
                    });
                }
                Err(error @ ClusterError::LeaseNotFound { .. }) => return Some(error),
                Err(error) => {
                    missed += 1;
                    debug!(lease = %tenure.lease.id, missed, %error, "renewal missed");
                    if missed == UNHEALTHY_AFTER {
                        warn!(lease = %tenure.lease.id, missed, %error, "the lease cannot be renewed");
                    }
                    if missed >= OFTEN && !error.is_transient() {
                        return Some(error);
                    }
                    self.update(tenure, |held| {
                        held.missed = missed;
                        held.error = Some(error);
                    });
                }
            }
        }
    }

    fn update(&self, tenure: &Arc<Tenure>, change: impl FnOnce(&mut Held)) {
        self.state.update(|held| {
            if is_held(held, tenure) {
                change(held);
            }
        });
    }

    /// Removes what ended nodes have left behind under the lease that lives on.
    async fn tidy(&self, store: &dyn Store) -> Infallible {
        loop {
            let next = self.users().orphans.iter().map(|orphan| orphan.next).min();
            let due = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.orphaned.notified() => continue,
                () = due => {}
            }
            let current = self.tenure().map(|tenure| tenure.lease.id);
            let now = Instant::now();
            let due: Vec<Orphan> = {
                let mut users = self.users();
                users.orphans.retain(|orphan| Some(orphan.lease) == current);
                let due = users.orphans.iter_mut().filter(|orphan| orphan.next <= now);
                due.map(|orphan| {
                    let often = now < orphan.until;
                    orphan.next = now + if often { TIDY_EVERY } else { TIDY_THEN_EVERY };
                    orphan.clone()
                })
                .collect()
            };
            for orphan in due {
                let Err(error) = delete_held(store, orphan.lease, &orphan.keys).await else {
                    continue;
                };
                debug!(%error, "keys of an ended node not removed yet");
                let mut users = self.users();
                let own = users
                    .orphans
                    .iter_mut()
                    .find(|own| own.lease == orphan.lease && own.group == orphan.group);
                if let Some(own) = own {
                    // The time counts from when the store could be written.
                    own.next = Instant::now() + TIDY_EVERY / 5;
                    own.until = Instant::now() + TIDY_FOR;
                }
            }
        }
    }
}

/// Deletes those of the keys that are under this lease, on the condition that they are still.
pub(super) async fn delete_held(
    store: &dyn Store,
    lease: LeaseId,
    keys: &[String],
) -> Result<(), ClusterError> {
    let selectors: Vec<_> = keys.iter().cloned().map(Selector::Key).collect();
    let listings = store.list_all(&selectors).await?;
    let there = listings.into_iter().flat_map(|listing| listing.entries);
    let mut txn = Txn::new();
    for entry in there {
        let unconditional = bugs::has(Bug::UnconditionalDelete);
        if entry.lease == Some(lease) && !unconditional {
            // Not on its create revision: a process that takes the id over keeps that.
            let condition = Condition::HeldBy(entry.key.clone(), lease);
            txn = txn.when(condition).delete(entry.key);
        } else if unconditional {
            txn = txn.delete(entry.key);
        }
    }
    if txn.writes.is_empty() {
        return Ok(());
    }
    // If one of them has changed since, they are looked at again before long.
    store.txn(txn).await.map(drop)
}

fn is_held(held: &Held, tenure: &Arc<Tenure>) -> bool {
    held.tenure
        .as_ref()
        .is_some_and(|held| Arc::ptr_eq(held, tenure))
}

/// Waits until this tenure is not the holder's any more.
pub(super) async fn replaced(changes: &mut Listener<'_, Held>, tenure: &Arc<Tenure>) {
    changes.wait_for(|held| !is_held(held, tenure)).await;
}
