//! What a run has seen and done, as far as later decisions depend on it.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::store::{Entry, LeaseId, Revision};

/// How many of its latest leases a run remembers as its own. Older ones have expired.
const OWN_LEASES: usize = 16;

/// How long nothing is handed over to a candidate that is not registered.
const PASSED_OVER_FOR: Duration = Duration::from_secs(5);

/// What one run remembers; the next run starts with an empty record.
#[derive(Debug, Default)]
pub(super) struct RunRecord {
    /// Its own leases, the latest last.
    pub(super) leases: VecDeque<LeaseId>,
    /// It has read its own registration at least once.
    pub(super) was_registered: bool,
    /// The create revision of a candidacy that was given up, 0 for none. It never leads again,
    /// whatever became of the request to delete it.
    pub(super) abandoned: Revision,
    /// A candidacy that could not be handed over to, because its process is not registered, and until when it is passed
    /// over: its request may last as long as its lease.
    passed_over: Option<(String, Revision, Instant)>,
    /// The epoch that was announced last, 0 for none.
    pub(super) announced: Revision,
    /// When the term is to be announced again.
    pub(super) announce_due: Option<Instant>,
    /// It has written a request under `handover/`, and may have left one behind.
    pub(super) has_requested: bool,
    /// On the store's clock: until then this node claims no leadership, because a leader may still
    /// rely on a lease of an earlier history of the store.
    pub(super) quiet_until: Duration,
    /// The cluster and the revision that were read last.
    history: Option<(u64, Revision)>,
    /// The candidate without a lease that was logged last.
    logged_without_lease: Option<String>,
}

impl RunRecord {
    /// Starts with another lease: a candidacy under an earlier one is not its own any more.
    pub(super) fn begin_lease(&mut self, lease: LeaseId) {
        self.leases.push_back(lease);
        if self.leases.len() > OWN_LEASES {
            self.leases.pop_front();
        }
        self.abandoned = 0;
    }

    /// Records what was read last. Returns whether the store has another history than before: data
    /// was restored, as another cluster or at an older revision.
    pub(super) fn is_another_history(&mut self, cluster_id: u64, revision: Revision) -> bool {
        let before = self.history.replace((cluster_id, revision));
        before.is_some_and(|(former_cluster, former_revision)| {
            former_cluster != cluster_id || former_revision > revision
        })
    }

    /// Nothing is handed over to this candidacy for a while.
    pub(super) fn pass_over(&mut self, candidate: &Entry) {
        let until = Instant::now() + PASSED_OVER_FOR;
        self.passed_over = Some((candidate.key.clone(), candidate.create_revision, until));
    }

    /// The candidacy to which nothing is handed over now: its key, and when it was created.
    pub(super) fn passed_over(&self) -> Option<(&str, Revision)> {
        let (key, created, until) = self.passed_over.as_ref()?;
        (Instant::now() < *until).then_some((key, *created))
    }

    /// Whether this candidate without a lease is another one than was logged last.
    pub(super) fn is_new_without_lease(&mut self, key: &str) -> bool {
        let is_new = self.logged_without_lease.as_deref() != Some(key);
        if is_new {
            self.logged_without_lease = Some(key.to_owned());
        }
        is_new
    }
}
