//! The leases of one process, shared by its nodes.

use std::sync::{Arc, Mutex};

use super::lease::LeaseHolder;
use crate::keys::GroupKeys;
use crate::store::LazyStore;
use crate::sync::lock;

/// The connection and the leases that several nodes of one process share.
///
/// All groups share the first lease. A second node of the same group gets another one, because
/// candidates are told apart by their leases.
pub(crate) struct LeasePool {
    ttl: i64,
    key_prefix: String,
    store: Arc<LazyStore>,
    leases: Mutex<Vec<Arc<LeaseHolder>>>,
}

impl LeasePool {
    /// A pool without leases yet. `ttl` is in seconds.
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

    /// The lease for a node of this group: the first one that no other node of that group uses or
    /// has used.
    pub(crate) fn enter(&self, keys: &GroupKeys, group: &str, id: &str) -> Arc<LeaseHolder> {
        let mut leases = lock(&self.leases);
        if let Some(free) = leases.iter().find(|lease| lease.enter(keys, group, id)) {
            return free.clone();
        }
        let lease = Arc::new(LeaseHolder::new(self.ttl.unsigned_abs(), &self.key_prefix));
        lease.enter(keys, group, id);
        leases.push(lease.clone());
        lease
    }
}
