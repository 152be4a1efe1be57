//! A lease that one node uses, or all the nodes of a [`Cluster`](crate::Cluster) together.
//!
//! Here is what is known of the lease, and who uses it. A task of its own keeps it alive
//! (`lease_driver`): a node whose future is not polled costs no node its lease.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::lease_users::LeaseUsers;
use super::tenure::Tenure;
use crate::backoff::Backoff;
use crate::error::ClusterError;
use crate::keys::{GroupKeys, Layout};
use crate::signal::{Listener, Signal};
use crate::store::LeaseId;
use crate::sync::lock;

/// Renewals missed in a row until the nodes that use the lease are unhealthy.
pub(super) const UNHEALTHY_AFTER: u32 = 3;

/// A lease, the nodes that use it, and the task that keeps it alive.
#[derive(Debug)]
pub(super) struct SharedLease {
    /// In seconds.
    pub(super) ttl: u64,
    /// Which keys under the lease are written by nodes.
    pub(super) layout: Layout,
    pub(super) task: LeaseTask,
    /// Locked by the task that keeps the lease, so that there is one at a time.
    pub(super) pacing: tokio::sync::Mutex<Pacing>,
    /// A node has left, and its keys may have to be removed.
    pub(super) user_left: Notify,
    /// The store has answered a node that there is no such lease: it is renewed at once, or found to be lost.
    pub(super) doubted: Notify,
    users: Mutex<LeaseUsers>,
    status: Signal<LeaseStatus>,
}

/// What is known of a lease.
#[derive(Debug, Clone, Default)]
pub(super) struct LeaseStatus {
    /// `None` while there is no lease.
    pub(super) tenure: Option<Arc<Tenure>>,
    /// Renewals missed in a row.
    pub(super) missed: u32,
    /// Counts the renewals that were answered after the deadline: what was read before has to be
    /// read again.
    pub(super) revived: u64,
    /// Why there is no lease, or why the last renewal was missed.
    pub(super) error: Option<ClusterError>,
}

impl LeaseStatus {
    fn is_of(&self, tenure: &Arc<Tenure>) -> bool {
        self.tenure
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, tenure))
    }
}

/// When the next lease may be requested. It outlives the task that keeps the lease.
#[derive(Debug)]
pub(super) struct Pacing {
    pub(super) backoff: Backoff,
    pub(super) not_before: Option<Instant>,
}

/// The task that keeps a lease alive: which one it is, and whether it has ended by itself.
#[derive(Debug, Default)]
pub(super) struct LeaseTask {
    current: Mutex<CurrentTask>,
    /// The number of the last task that has ended. Not behind the lock: a runtime that shuts down
    /// drops a task while it is being spawned, and then the lock is held.
    last_ended: AtomicU64,
    ended: Signal,
}

#[derive(Debug, Default)]
struct CurrentTask {
    /// Counts the tasks, from 1.
    number: u64,
    handle: Option<AbortHandle>,
}

impl LeaseTask {
    /// Starts a task by `spawn`, unless one is running. The task has to call
    /// [`set_ended`](Self::set_ended) with its number when it ends, for whatever reason.
    pub(super) fn start(&self, spawn: impl FnOnce(u64) -> AbortHandle) {
        let mut current = lock(&self.current);
        if self.runs(&current) {
            return;
        }
        current.number += 1;
        current.handle = Some(spawn(current.number));
    }

    pub(super) fn is_running(&self) -> bool {
        self.runs(&lock(&self.current))
    }

    fn runs(&self, current: &CurrentTask) -> bool {
        let has_ended = self.last_ended.load(Ordering::Acquire) == current.number;
        current.handle.is_some() && !has_ended
    }

    pub(super) fn set_ended(&self, number: u64) {
        self.last_ended.fetch_max(number, Ordering::AcqRel);
        self.ended.update(|()| ());
    }

    /// Waits for the end of any task.
    pub(super) fn listen_for_end(&self) -> Listener<'_> {
        self.ended.listen()
    }

    fn abort(&self) {
        if let Some(task) = lock(&self.current).handle.take() {
            task.abort();
        }
    }
}

/// What a node that has left a lease still has to do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cleanup {
    /// There is no lease, so there are no keys.
    Nothing,
    /// The node was the last one: revoke the lease.
    Revoke(LeaseId),
    /// Other nodes go on with the lease: delete the node's keys that are under it.
    DeleteKeys(LeaseId),
}

impl SharedLease {
    /// A lease that is not granted yet, for nodes whose keys are under this prefix. `ttl` is in
    /// seconds.
    pub(super) fn new(ttl: u64, key_prefix: &str) -> Self {
        Self {
            ttl,
            layout: Layout::new(key_prefix),
            task: LeaseTask::default(),
            pacing: tokio::sync::Mutex::new(Pacing {
                backoff: Backoff::new(),
                not_before: None,
            }),
            user_left: Notify::new(),
            doubted: Notify::new(),
            users: Mutex::default(),
            status: Signal::default(),
        }
    }

    pub(super) fn users(&self) -> MutexGuard<'_, LeaseUsers> {
        lock(&self.users)
    }

    /// Adds a node. Returns whether it may use this lease; see [`LeaseUsers::enter`].
    pub(super) fn enter(&self, keys: &GroupKeys, group: &str, id: &str) -> bool {
        self.users().enter(keys, group, id, Instant::now())
    }

    /// Removes the node of `group`. With the last one the task ends, too.
    pub(super) fn leave(&self, group: &str) -> Cleanup {
        let now = Instant::now();
        let mut users = self.users();
        if !users.remove(group, now) {
            return Cleanup::Nothing;
        }
        let is_last = users.is_empty();
        if is_last {
            // A node that enters from here on starts another task, and gets another lease.
            self.task.abort();
            users.forget_all();
        }
        let Some(tenure) = self.tenure() else {
            return Cleanup::Nothing;
        };
        let lease = tenure.lease.id;
        if is_last {
            self.status
                .update(|status| *status = LeaseStatus::default());
            return Cleanup::Revoke(lease);
        }
        users.set_left(group, now);
        // A late request of the node may be carried out after it has removed its keys.
        users.schedule_sweep(lease, now);
        self.user_left.notify_one();
        Cleanup::DeleteKeys(lease)
    }

    /// Listens for changes of [`status`](Self::status).
    pub(super) fn listen(&self) -> Listener<'_, LeaseStatus> {
        self.status.listen()
    }

    pub(super) fn status(&self) -> LeaseStatus {
        self.status.with(LeaseStatus::clone)
    }

    pub(super) fn tenure(&self) -> Option<Arc<Tenure>> {
        self.status.with(|status| status.tenure.clone())
    }

    pub(super) fn set_granted(&self, tenure: Arc<Tenure>) {
        self.status.update(|status| {
            *status = LeaseStatus {
                tenure: Some(tenure),
                ..LeaseStatus::default()
            };
        });
    }

    /// There is no lease, for this reason.
    pub(super) fn set_lost(&self, error: ClusterError) {
        self.status.update(|status| {
            *status = LeaseStatus {
                error: Some(error),
                ..LeaseStatus::default()
            };
        });
    }

    /// A renewal was answered; `revived` if that was after the deadline.
    pub(super) fn set_renewed(&self, tenure: &Arc<Tenure>, revived: bool) {
        self.update(tenure, |status| {
            status.missed = 0;
            status.revived += u64::from(revived);
        });
    }

    /// This many renewals in a row were missed, the last one for this reason.
    pub(super) fn set_missed(&self, tenure: &Arc<Tenure>, missed: u32, error: ClusterError) {
        self.update(tenure, |status| {
            status.missed = missed;
            status.error = Some(error);
        });
    }

    fn update(&self, tenure: &Arc<Tenure>, change: impl FnOnce(&mut LeaseStatus)) {
        self.status.update(|status| {
            if status.is_of(tenure) {
                change(status);
            }
        });
    }
}

/// Waits until this tenure is no longer the current one of its lease.
pub(super) async fn until_replaced(changes: &mut Listener<'_, LeaseStatus>, tenure: &Arc<Tenure>) {
    changes.wait_for(|status| !status.is_of(tenure)).await;
}
