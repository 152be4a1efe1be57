//! Which cluster has granted a lease, to notice when another one answers for it.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::ids::LeaseId;
use crate::sync::lock;

/// Leases that are remembered: a process has only a few.
const MOST: usize = 64;

/// The leases granted last, with the id of the cluster that granted them.
#[derive(Debug, Default)]
pub(super) struct Grants(Mutex<VecDeque<(LeaseId, Option<u64>)>>);

impl Grants {
    pub(super) fn add(&self, lease: LeaseId, cluster: Option<u64>) {
        let mut grants = lock(&self.0);
        grants.truncate(MOST - 1);
        grants.push_front((lease, cluster));
    }

    /// The cluster that granted a lease; `None` if that is not known.
    pub(super) fn cluster_of(&self, lease: LeaseId) -> Option<u64> {
        let grants = lock(&self.0);
        let grant = grants.iter().find(|(id, _)| *id == lease);
        grant.and_then(|(_, cluster)| *cluster)
    }
}
