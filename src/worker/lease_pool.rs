//! The connection and the leases that the nodes of one process share.

use std::sync::{Arc, Mutex};

use super::lease::SharedLease;
use crate::keys::GroupKeys;
use crate::store::LazyStore;
use crate::sync::lock;

/// The connection and the leases that several nodes of one process share.
///
/// All groups share the first lease. A second node of the same group gets another one, because
/// candidates are distinguished by their leases.
pub(crate) struct LeasePool {
    ttl: i64,
    key_prefix: String,
    store: Arc<LazyStore>,
    leases: Mutex<Vec<Arc<SharedLease>>>,
}

impl LeasePool {
    /// A pool without leases. `ttl` is in seconds.
    pub(crate) fn new(ttl: i64, key_prefix: String, store: Arc<LazyStore>) -> Self {
        Self {
            ttl,
            key_prefix,
            store,
            leases: Mutex::default(),
        }
    }

    pub(crate) fn ttl(&self) -> i64 {
        self.ttl
    }

    pub(crate) fn store(&self) -> &Arc<LazyStore> {
        &self.store
    }

    /// The lease for a node of this group: the first one that has no other node of the group, and
    /// had none lately.
    pub(super) fn enter(&self, keys: &GroupKeys, group: &str, id: &str) -> Arc<SharedLease> {
        let mut leases = lock(&self.leases);
        if let Some(free) = leases.iter().find(|lease| lease.enter(keys, group, id)) {
            return free.clone();
        }
        let lease = Arc::new(SharedLease::new(self.ttl.unsigned_abs(), &self.key_prefix));
        lease.enter(keys, group, id);
        leases.push(lease.clone());
        lease
    }
}
