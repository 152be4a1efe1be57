//! The candidates of a group, in the order of their candidacies.

use std::collections::{BTreeMap, HashMap};

use tracing::warn;

use super::admission::{Admission, Refusal, shortened};
use crate::keys::GroupKeys;
use crate::store::{Entry, LeaseId, Revision};
use crate::validate;

/// A candidate, and the lease of its process. A candidacy without a lease never ends by itself.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) id: String,
    pub(super) lease: Option<LeaseId>,
}

/// The queue of candidates. The first one leads.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    /// By create revision and key.
    queue: BTreeMap<(Revision, String), Candidate>,
    /// The create revision of each key in the queue.
    revisions: HashMap<String, Revision>,
    /// The key without a lease that was logged last.
    logged_without_lease: Option<String>,
}

/// The node id of a candidacy.
pub(super) fn candidate_id<'e>(
    keys: &GroupKeys,
    admission: &Admission,
    entry: &'e Entry,
) -> Result<&'e str, Refusal> {
    if !keys.is_candidacy(&entry.key) {
        return Err(Refusal::Unwanted);
    }
    if entry.value.len() > validate::NAME_BYTES {
        return Err(Refusal::TooLarge("its id is too long".to_owned()));
    }
    let limits = &admission.limits;
    limits.check_key(&entry.key).map_err(Refusal::TooLarge)?;
    std::str::from_utf8(&entry.value).map_err(|error| Refusal::Malformed(error.to_string()))
}

impl Candidates {
    /// Adds a candidacy, or replaces the one with the same key.
    pub(super) fn insert(
        &mut self,
        keys: &GroupKeys,
        admission: &Admission,
        entry: &Entry,
    ) -> Result<(), Refusal> {
        self.remove(&entry.key);
        let id = candidate_id(keys, admission, entry)?;
        if self.is_full(admission.limits.nodes) {
            return Err(admission.too_many());
        }
        let candidate = Candidate {
            id: id.to_owned(),
            lease: entry.lease,
        };
        let (key, revision) = (entry.key.clone(), entry.create_revision);
        self.revisions.insert(key.clone(), revision);
        self.queue.insert((revision, key), candidate);
        Ok(())
    }

    pub(super) fn remove(&mut self, key: &str) {
        if let Some(revision) = self.revisions.remove(key) {
            self.queue.remove(&(revision, key.to_owned()));
        }
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.revisions.clear();
    }

    /// The candidacy that was created first: its revision, its key, and who it is for.
    pub(super) fn first(&self) -> Option<(Revision, &str, &Candidate)> {
        let ((revision, key), candidate) = self.queue.first_key_value()?;
        Some((*revision, key, candidate))
    }

    /// Whether there are as many as are allowed.
    pub(super) fn is_full(&self, most: usize) -> bool {
        self.revisions.len() >= most
    }

    /// The lengths of the queue and of the index by key.
    #[cfg(feature = "test-util")]
    pub(super) fn sizes(&self) -> [usize; 2] {
        [self.queue.len(), self.revisions.len()]
    }

    /// Logs a first candidacy that has no lease. It was written by hand, and no expiry will ever
    /// remove it.
    pub(super) fn log_first_without_lease(&mut self) {
        let Some((_, key, Candidate { lease: None, .. })) = self.first() else {
            return;
        };
        if self.logged_without_lease.as_deref() == Some(key) {
            return;
        }
        warn!(
            key = shortened(key),
            "this election key has no lease, so nobody leads the group until it is deleted"
        );
        self.logged_without_lease = Some(key.to_owned());
    }

    #[cfg(test)]
    pub(super) fn logged_without_lease(&self) -> Option<&str> {
        self.logged_without_lease.as_deref()
    }
}
