//! A lease that lasts: granted, renewed, and replaced when it is lost, for ever. One node has one,
//! or all the nodes of a [`Cluster`](crate::Cluster) together.
//!
//! No task of its own: every node that uses it offers to drive it, one does, and when that one
//! stops the next takes over.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::session::{Tenure, margin};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::store::{Condition, LeaseId, Store, Txn};

/// Renewals missed in a row until its nodes are unhealthy.
pub(super) const UNHEALTHY_AFTER: u32 = 3;
/// Renewals missed in a row until the lease is given up.
const LOST_AFTER: u32 = 10;
/// How long a lease that was given up is worth a request to end it.
const REVOKE_BUDGET: Duration = Duration::from_millis(1500);

/// A lease with the nodes that use it.
#[derive(Debug)]
pub(crate) struct LeaseHolder {
    /// In seconds.
    ttl: u64,
    state: watch::Sender<Held>,
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
    /// Registration and candidacy prefix of each node, by group: two of one group would have the
    /// same candidacy.
    by_group: BTreeMap<String, String>,
    /// Keys of nodes that ended without cleaning up, while others keep their lease alive.
    orphans: Vec<Orphan>,
}

#[derive(Debug)]
struct Orphan {
    group: String,
    keys: Vec<String>,
    lease: LeaseId,
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
            state: watch::Sender::default(),
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

    /// Takes a node of `group` in; false if there is one of that group.
    pub(crate) fn enter(&self, group: &str, registration: &str) -> bool {
        let mut users = self.users();
        if users.by_group.contains_key(group) {
            return false;
        }
        // It takes its predecessor's keys over, if they are the same.
        users.orphans.retain(|orphan| orphan.group != group);
        users
            .by_group
            .insert(group.to_owned(), registration.to_owned());
        true
    }

    /// The node of `group` goes, and cleans up itself.
    pub(super) fn leave(&self, group: &str) -> Leave {
        let mut users = self.users();
        users.by_group.remove(group);
        let last = users.by_group.is_empty();
        let tenure = self.state.borrow().tenure.clone();
        match tenure {
            None => Leave::Nothing,
            Some(tenure) if last || bugs::has(Bug::SharedLeaseRevoked) => {
                // Whoever comes now gets another one.
                self.state.send_replace(Held::default());
                Leave::Revoke(tenure.lease.id)
            }
            Some(tenure) => Leave::Delete(tenure.lease.id),
        }
    }

    /// The node of `group` is gone, without a chance to clean up: `candidacy` tells its key there.
    pub(super) fn abandon(&self, group: &str, candidacy: impl Fn(LeaseId) -> String) {
        let mut users = self.users();
        let Some(registration) = users.by_group.remove(group) else {
            return;
        };
        let tenure = self.state.borrow().tenure.clone();
        let Some(tenure) = tenure else { return };
        if users.by_group.is_empty() {
            // Nobody is left to renew it: it runs out.
            self.state.send_replace(Held::default());
        } else if !bugs::has(Bug::OrphanedKeysStay) {
            let lease = tenure.lease.id;
            users.orphans.push(Orphan {
                group: group.to_owned(),
                keys: vec![registration, candidacy(lease)],
                lease,
            });
            self.orphaned.notify_one();
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Held> {
        self.state.subscribe()
    }

    pub(super) fn tenure(&self) -> Option<Arc<Tenure>> {
        self.state.borrow().tenure.clone()
    }

    /// Keeps a lease, once nobody else does.
    pub(super) async fn drive(&self, store: &dyn Store) -> Infallible {
        let mut driver = self.driver.lock().await;
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
                        let delay = driver.backoff.next_delay();
                        warn!(%error, ?delay, "no lease");
                        self.lost(error);
                        driver.not_before = Some(Instant::now() + delay);
                        continue;
                    }
                },
            };
            let error = self.keep(store, &tenure).await;
            // One that lasted proves that the store works: start over without delay, but not at
            // the same instant as everybody else who lost a lease with this one.
            let delay = if started.elapsed() > tenure.lease.ttl {
                driver.backoff.reset();
                Duration::from_millis(fastrand::u64(0..250))
            } else {
                driver.backoff.next_delay()
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
        self.state.send_replace(Held {
            error: Some(error),
            ..Held::default()
        });
    }

    async fn grant(&self, store: &dyn Store) -> Result<Arc<Tenure>, ClusterError> {
        let clock = store.clock();
        let sent = clock.now();
        let lease = store.grant(Duration::from_secs(self.ttl)).await?;
        debug!(lease = %lease.id, ttl = ?lease.ttl, "lease granted");
        let tenure = Arc::new(Tenure::new(lease, clock, sent));
        self.state.send_replace(Held {
            tenure: Some(tenure.clone()),
            ..Held::default()
        });
        Ok(tenure)
    }

    /// Renews the lease every third of its TTL, and after a miss three times as often: what
    /// counts then is to get one through before the TTL is over. Returns why the lease is lost.
    async fn keep(&self, store: &dyn Store, tenure: &Arc<Tenure>) -> ClusterError {
        let period = tenure.lease.ttl / 3;
        let mut keeper = store.keeper(tenure.lease);
        let mut missed = 0;
        let mut changes = self.subscribe();
        loop {
            let pause = if missed == 0 {
                // Counted from when the last one was sent, whoever drove then.
                let due = tenure.lease.ttl.saturating_sub(margin(tenure.lease.ttl) + period);
                tenure.remaining().saturating_sub(due).min(period)
            } else {
                period / 3
            };
            let pause = sleep(pause);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    biased;
                    // The last node has left while nobody else drove.
                    () = replaced(&mut changes, tenure) => {
                        return ClusterError::LeaseNotFound { lease: tenure.lease.id };
                    }
                    () = &mut pause => break,
                    () = self.orphaned.notified() => self.tidy(store).await,
                }
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
                Err(error @ ClusterError::LeaseNotFound { .. }) => return error,
                Err(error) => {
                    missed += 1;
                    debug!(lease = %tenure.lease.id, missed, %error, "renewal missed");
                    if missed == UNHEALTHY_AFTER {
                        warn!(lease = %tenure.lease.id, missed, %error, "the lease cannot be renewed");
                    }
                    if missed >= LOST_AFTER {
                        return error;
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
        self.state.send_if_modified(|held| {
            let current = is_held(held, tenure);
            if current {
                change(held);
            }
            current
        });
    }

    /// Removes what ended nodes have left behind under the lease that lives on.
    async fn tidy(&self, store: &dyn Store) {
        loop {
            let Some(orphan) = self.users().orphans.pop() else {
                return;
            };
            if let Err(error) = delete_held(store, orphan.lease, &orphan.keys).await
                && error.is_transient()
            {
                debug!(%error, "keys of an ended node not removed yet");
                self.users().orphans.push(orphan);
                // Tried again after the next pause between renewals.
                self.orphaned.notify_one();
                sleep(Duration::from_millis(250)).await;
                return;
            }
        }
    }
}

/// Deletes keys, each on the condition that it is under this lease.
pub(super) async fn delete_held(
    store: &dyn Store,
    lease: LeaseId,
    keys: &[String],
) -> Result<(), ClusterError> {
    let all = keys.iter().fold(Txn::new(), |txn, key| {
        let txn = txn.delete(key.clone());
        if bugs::has(Bug::UnconditionalDelete) {
            return txn;
        }
        txn.when(Condition::HeldBy(key.clone(), lease))
    });
    if store.txn(all).await?.is_some() {
        return Ok(());
    }
    // One of them is not: each by itself.
    for key in keys {
        let one = Txn::new()
            .when(Condition::HeldBy(key.clone(), lease))
            .delete(key.clone());
        store.txn(one).await?;
    }
    Ok(())
}

fn is_held(held: &Held, tenure: &Arc<Tenure>) -> bool {
    held.tenure
        .as_ref()
        .is_some_and(|held| Arc::ptr_eq(held, tenure))
}

/// Waits until this tenure is not the holder's any more.
pub(super) async fn replaced(changes: &mut watch::Receiver<Held>, tenure: &Arc<Tenure>) {
    // The sender lives as long as the holder does, and that is as long as its nodes.
    let _ = changes.wait_for(|held| !is_held(held, tenure)).await;
}
