//! A lease that lasts: granted, renewed, and replaced when it is lost, for ever. One node has one,
//! or all the nodes of a [`Cluster`](crate::Cluster) together.
//!
//! It is kept by a task of its own, which starts with the first node that uses it and ends with the
//! last one: a node whose task is busy elsewhere costs neither itself nor the others their lease.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, error, warn};

use super::session::{Tenure, margin};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::keys::{GroupKeys, Layout};
use crate::signal::{Listener, Signal};
use crate::store::{Condition, LeaseId, Selector, Store, Txn};
use crate::sync::lock;

/// Renewals missed in a row until its nodes are unhealthy.
pub(super) const UNHEALTHY_AFTER: u32 = 3;
/// Renewals missed in a row until they are tried less often; or until the lease is given up, if the
/// store refuses for good.
const OFTEN: u32 = 10;
/// How often keys of ended nodes are looked for under a lease that lives on: at first because a
/// request of such a node may be carried out after its end, though not much later than it is given
/// up; then because the store may have been given older data, in which they are there again. One
/// request each time, however many have ended.
const TIDY_EVERY: Duration = Duration::from_secs(5);
const TIDY_FOR: Duration = Duration::from_secs(20);
const TIDY_THEN_EVERY: Duration = Duration::from_secs(30);
/// So many keys are removed by one transaction; etcd allows 128 operations in one.
const TIDY_AT_ONCE: usize = 100;
/// How long to wait until a task that has ended by itself is started again.
const START_AGAIN: Duration = Duration::from_millis(200);
/// How long a lease that was given up is worth a request to end it.
const REVOKE_BUDGET: Duration = Duration::from_millis(1500);

/// A lease with the nodes that use it.
#[derive(Debug)]
pub(crate) struct LeaseHolder {
    /// In seconds.
    ttl: u64,
    layout: Layout,
    state: Signal<Held>,
    /// The task that keeps it has this.
    driver: tokio::sync::Mutex<Driver>,
    task: Mutex<Keeping>,
    /// The number of the last task that has ended. A lock would not do: a runtime that ends drops what
    /// is spawned on it at once, while it is being started.
    last_ended: AtomicU64,
    ended: Signal,
    users: Mutex<Users>,
    has_left: Notify,
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

/// The task that keeps the lease, and the number of tasks so far.
#[derive(Debug, Default)]
struct Keeping {
    number: u64,
    task: Option<AbortHandle>,
}

#[derive(Debug)]
struct Driver {
    backoff: Backoff,
    not_before: Option<Instant>,
}

#[derive(Debug, Default)]
struct Users {
    /// One node of each group: two would have the same candidacy.
    nodes: BTreeMap<String, User>,
    /// Groups whose node has ended lately, and when.
    ended: Vec<(String, Instant)>,
    tidy: Option<Tidy>,
}

#[derive(Debug)]
struct User {
    keys: GroupKeys,
    id: String,
}

/// What ended nodes have left behind under a lease that lives on, or may leave yet: a request of
/// theirs can be carried out after they are gone.
#[derive(Debug, Clone, Copy)]
struct Tidy {
    lease: LeaseId,
    /// When to look again; often, until then.
    next: Instant,
    until: Instant,
}

impl Users {
    fn forget_ended(&mut self, now: Instant) {
        self.ended
            .retain(|(_, since)| now.saturating_duration_since(*since) < TIDY_FOR);
    }

    /// Whether a running node may have this key under the lease.
    fn has(&self, key: &str, lease: LeaseId) -> bool {
        let mut nodes = self.nodes.values();
        nodes.any(|node| node.keys.own(&node.id, lease).iter().any(|own| own == key))
    }
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
    /// Of so many seconds, for nodes whose keys are under this prefix.
    pub(crate) fn new(ttl: u64, key_prefix: &str) -> Self {
        Self {
            ttl,
            layout: Layout::new(key_prefix),
            state: Signal::default(),
            driver: tokio::sync::Mutex::new(Driver {
                backoff: Backoff::new(),
                not_before: None,
            }),
            task: Mutex::default(),
            last_ended: AtomicU64::new(0),
            ended: Signal::default(),
            users: Mutex::default(),
            has_left: Notify::new(),
        }
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        lock(&self.users)
    }

    fn keeping(&self) -> MutexGuard<'_, Keeping> {
        lock(&self.task)
    }

    /// Takes a node of `group` in; false if there is one of that group, or has been one lately under
    /// this lease: a late request of that one would be taken for one of the new one's.
    pub(crate) fn enter(&self, keys: &GroupKeys, group: &str, id: &str) -> bool {
        let mut users = self.users();
        users.forget_ended(Instant::now());
        let is_taken =
            users.nodes.contains_key(group) || users.ended.iter().any(|(ended, _)| ended == group);
        if !is_taken {
            let (keys, id) = (keys.clone(), id.to_owned());
            users.nodes.insert(group.to_owned(), User { keys, id });
        }
        !is_taken
    }

    /// The node of `group` goes, and removes its keys under the lease itself, if others keep it.
    pub(super) fn leave(&self, group: &str) -> Leave {
        let mut users = self.users();
        if users.nodes.remove(group).is_none() {
            return Leave::Nothing;
        }
        let now = Instant::now();
        users.forget_ended(now);
        let is_last = users.nodes.is_empty();
        if is_last {
            // Whoever comes now starts another one, and gets another lease.
            if let Some(task) = self.keeping().task.take() {
                task.abort();
            }
            users.ended.clear();
            users.tidy = None;
        }
        let Some(tenure) = self.tenure() else {
            return Leave::Nothing;
        };
        let lease = tenure.lease.id;
        if is_last || bugs::has(Bug::SharedLeaseRevoked) {
            self.state.update(|held| *held = Held::default());
            return Leave::Revoke(lease);
        }
        users.ended.push((group.to_owned(), now));
        if !bugs::has(Bug::OrphanedKeysStay) {
            users.tidy = Some(Tidy {
                lease,
                next: now,
                until: now + TIDY_FOR,
            });
            self.has_left.notify_one();
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

    /// Sees to it that a task keeps the lease, for as long as this is polled. Should it end by itself,
    /// because something in it has panicked, that is told and another one is started.
    pub(super) async fn be_kept(self: &Arc<Self>, store: &Arc<dyn Store>) -> Infallible {
        let mut ended = self.ended.listen();
        loop {
            ended.catch_up();
            self.start(store);
            ended.changed().await;
            // It may be another node's by now.
            if !self.is_kept(&self.keeping()) {
                error!("the task that renews the lease has ended by itself, it is started again");
                sleep(START_AGAIN).await;
            }
        }
    }

    fn is_kept(&self, keeping: &Keeping) -> bool {
        let has_ended = self.last_ended.load(Ordering::Acquire) == keeping.number;
        keeping.task.is_some() && !has_ended
    }

    /// Starts the task, unless there is one.
    fn start(self: &Arc<Self>, store: &Arc<dyn Store>) {
        let mut keeping = self.keeping();
        if self.is_kept(&keeping) {
            return;
        }
        keeping.number += 1;
        let (holder, kept_in) = (self.clone(), store.clone());
        let ending = Ending {
            holder: self.clone(),
            number: keeping.number,
        };
        keeping.task = Some(store.spawn(Box::pin(async move {
            let _ending = ending;
            match holder.drive(&*kept_in).await {}
        })));
    }

    /// Keeps a lease, once nobody else does.
    async fn drive(&self, store: &dyn Store) -> Infallible {
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
            // What is answered counts from before it was asked for.
            let mut sent = tenure.now();
            let late = tokio::select! {
                biased;
                () = replaced(&mut changes, tenure) => return None,
                late = keeper.late(), if missed > 0 => Some(late),
                () = sleep(pause) => None,
            };
            let mut renewal = match late {
                Some(late) => late,
                None => {
                    sent = tenure.now();
                    keeper.renew(period).await
                }
            };
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
        let mut backoff = Backoff::new();
        loop {
            let tidy = self.users().tidy;
            let until = tidy.map(|tidy| tidy.until);
            let due = async {
                match tidy {
                    Some(tidy) => sleep_until(tidy.next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.has_left.notified() => continue,
                () = due => {}
            }
            let Some(lease) = tidy.map(|tidy| tidy.lease) else {
                continue;
            };
            let tidied = match self.tenure() {
                Some(tenure) if tenure.lease.id == lease => self.tidy_lease(store, lease).await,
                // It is gone, and every key with it.
                _ => {
                    self.users().tidy.take_if(|tidy| tidy.lease == lease);
                    continue;
                }
            };
            let now = Instant::now();
            let mut users = self.users();
            users.forget_ended(now);
            // Unless another node has left meanwhile: that is seen to at once.
            let same = users.tidy.as_mut().filter(|now| Some(now.until) == until);
            let Some(tidy) = same else {
                continue;
            };
            match tidied {
                Ok(()) => {
                    backoff.reset();
                    tidy.next = now
                        + if now < tidy.until {
                            TIDY_EVERY
                        } else {
                            TIDY_THEN_EVERY
                        };
                }
                Err(error) => {
                    debug!(%error, "keys of ended nodes not removed yet");
                    // The time counts from when the store could be written.
                    tidy.next = now + backoff.after(&error);
                    tidy.until = now + TIDY_FOR;
                }
            }
        }
    }

    async fn tidy_lease(&self, store: &dyn Store, lease: LeaseId) -> Result<(), ClusterError> {
        let mut keys = store.keys_of(lease).await?;
        {
            let users = self.users();
            keys.retain(|key| self.layout.has(key) && !users.has(key, lease));
        }
        for keys in keys.chunks(TIDY_AT_ONCE) {
            delete_held(store, lease, keys).await?;
        }
        Ok(())
    }
}

/// Tells that the task has ended, however it did.
struct Ending {
    holder: Arc<LeaseHolder>,
    number: u64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.holder
            .last_ended
            .fetch_max(self.number, Ordering::AcqRel);
        self.holder.ended.update(|()| ());
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
