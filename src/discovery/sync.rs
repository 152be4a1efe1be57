//! List, then watch from the next revision; resume, or list again.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::event::{Change, ClusterEvent};
use super::snapshot::View;
use super::{DiscoveryStatus, Shared};
use crate::backoff::Backoff;
use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::store::{Selector, Store, WatchRange};

/// How often a failure of a store that answers may be followed by a try at once: most often one
/// connection broke, or history moved on. When it goes on like that, the backoff takes over.
const AT_ONCE_EVERY: Duration = Duration::from_secs(15);

/// How far following has come.
enum Position {
    /// Nothing is known, or what is known cannot be continued: everything has to be listed.
    Unlisted,
    /// Everything before these revisions is in the view, of this cluster's history.
    Listed(u64, Vec<WatchRange>),
}

impl Shared {
    /// Follows the group for ever.
    pub(super) async fn follow(&self, store: &dyn Store) {
        let mut view = View::new(self.keys.clone());
        // An earlier run's view is still being served: the difference to it is told, not a view
        // that is empty for a moment.
        let skipped = self.skipped.load(Ordering::Relaxed);
        view.adopt(
            &self.nodes.load_full(),
            self.leadership.load_full(),
            skipped,
        );
        let mut position = Position::Unlisted;
        let mut backoff = Backoff::new();
        // One for each of the two: history moves on while a connection is broken.
        let mut at_once: [Option<Instant>; 2] = [None; 2];
        loop {
            let mut answered = false;
            let error = self
                .follow_from(store, &mut view, &mut position, &mut answered)
                .await;
            let missed = matches!(error, ClusterError::Compacted { .. });
            answered |= missed;
            let last = &mut at_once[usize::from(missed)];
            let rested = last.is_none_or(|last| last.elapsed() >= AT_ONCE_EVERY);
            let delay = if last.is_none() || (answered && rested) {
                backoff.reset();
                *last = Some(Instant::now());
                // Not at the same instant as every other watcher.
                Duration::from_millis(fastrand::u64(10..250))
            } else {
                backoff.next_delay()
            };
            if matches!(error, ClusterError::Compacted { .. }) {
                warn!(group = %self.group, %error, ?delay, "events were missed, will list again");
                if bugs::has(Bug::NoRelistAfterCompaction)
                    && let (Position::Listed(_, ranges), ClusterError::Compacted { oldest }) =
                        (&mut position, &error)
                {
                    ranges.iter_mut().for_each(|range| range.from = *oldest);
                } else {
                    position = Position::Unlisted;
                }
            } else if self.went_stale() {
                warn!(group = %self.group, %error, ?delay, "disconnected, the last view stays");
                let _ = self.events.send(ClusterEvent::Disconnected);
            } else if self.status_is_connecting() {
                warn!(group = %self.group, %error, ?delay, "cannot load the group yet");
            } else {
                debug!(group = %self.group, %error, ?delay, "still disconnected");
            }
            sleep(delay).await;
        }
    }

    async fn follow_from(
        &self,
        store: &dyn Store,
        view: &mut View,
        position: &mut Position,
        answered: &mut bool,
    ) -> ClusterError {
        match self.try_follow_from(store, view, position, answered).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_follow_from(
        &self,
        store: &dyn Store,
        view: &mut View,
        position: &mut Position,
        answered: &mut bool,
    ) -> Result<Infallible, ClusterError> {
        let (cluster_id, ranges) = match position {
            Position::Listed(cluster_id, ranges) => (*cluster_id, ranges.clone()),
            Position::Unlisted => {
                let (cluster_id, ranges) = self.load(store, view).await?;
                *position = Position::Listed(cluster_id, ranges.clone());
                (cluster_id, ranges)
            }
        };
        let ranges = if bugs::has(Bug::ResumeFromNow) {
            let from_now = |range: WatchRange| WatchRange { from: 0, ..range };
            ranges.into_iter().map(from_now).collect()
        } else {
            ranges
        };
        let mut watcher = store.watch(ranges).await?;
        // Looked at when the watch is open: what the store does then, it tells.
        let is_same = self
            .is_same_history(store, view, cluster_id, watcher.position())
            .await?;
        *answered = true;
        if !is_same && !bugs::has(Bug::HistoryNotChecked) {
            warn!(group = %self.group, "the store's history is another one");
            return Err(ClusterError::Compacted { oldest: 0 });
        }
        self.went_live();
        loop {
            let events = watcher.next().await;
            // Without events too: a quiet group's position moves on with the store's, so that it
            // is not compacted away.
            *position = Position::Listed(cluster_id, watcher.position().to_vec());
            let changes = view.apply(&events?);
            self.publish(view, changes, false);
        }
    }

    /// Whether the store goes on with what has been seen of it. One that was restored may be another
    /// cluster, or not have come as far: a watch would wait in silence for it to catch up. Or it has
    /// come as far again, with other changes: then the key that was written last here was not
    /// written then.
    async fn is_same_history(
        &self,
        store: &dyn Store,
        view: &View,
        cluster_id: u64,
        seen: &[WatchRange],
    ) -> Result<bool, ClusterError> {
        let any = Selector::Key(self.keys.registry_prefix().to_owned());
        let now = store.list(&any, None).await?;
        if now.cluster_id != cluster_id || seen.iter().any(|range| range.from > now.revision + 1) {
            return Ok(false);
        }
        let Some((key, written)) = view.witness() else {
            return Ok(true);
        };
        let of_it = seen.iter().find(|range| range.keys.matches(key));
        let Some(at) = of_it.map(|range| range.from - 1).filter(|at| at >= written) else {
            return Ok(true);
        };
        let then = store.list(&Selector::Key(key.clone()), Some(at)).await?;
        let entry = then.entries.first();
        Ok(entry.is_some_and(|entry| entry.mod_revision == *written))
    }

    /// Lists nodes and candidates at one revision. Answers with what to watch from there.
    async fn load(
        &self,
        store: &dyn Store,
        view: &mut View,
    ) -> Result<(u64, Vec<WatchRange>), ClusterError> {
        let registry = Selector::Prefix(self.keys.registry_prefix().to_owned());
        let election = Selector::Prefix(self.keys.election_prefix().to_owned());
        let nodes = store.list(&registry, None).await?;
        let revision = nodes.revision;
        let candidates = store.list(&election, Some(revision)).await?;
        let changes = view.reset(&nodes.entries, &candidates.entries, revision);
        info!(group = %self.group, revision, nodes = view.nodes().len(), "group loaded");
        self.publish(view, changes, true);
        self.went_live();
        if !self.ready.send_replace(true) {
            let _ = self.events.send(ClusterEvent::Ready);
        }
        let from = revision + 1;
        let ranges = [registry, election].map(|keys| WatchRange { keys, from });
        Ok((nodes.cluster_id, ranges.into()))
    }

    /// Makes a view and the changes that led to it visible together. Readers see the new state
    /// before they are told of it.
    fn publish(&self, view: &View, changes: Vec<Change>, reset: bool) {
        let _publishing = self.lock_publishing();
        let nodes = Arc::new(view.nodes().clone());
        let leadership = view.leader().cloned();
        let leader = leadership
            .as_ref()
            .map(|leadership| leadership.node.clone());
        self.skipped.store(view.skipped(), Ordering::Relaxed);
        self.nodes.store(nodes.clone());
        let before = self.leadership.swap(leadership.clone().map(Arc::new));
        if reset || !changes.is_empty() {
            self.nodes_watch.send_replace(nodes);
        }
        let same = match (before.as_deref(), &leadership) {
            (Some(before), Some(now)) => {
                before.epoch == now.epoch && Arc::ptr_eq(&before.node, &now.node)
            }
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.leader_watch.send_replace(leader);
        }
        for event in changes.iter().filter_map(Change::event) {
            // Nobody may be listening; the same below.
            let _ = self.events.send(event);
        }
        if reset && !bugs::has(Bug::NoResetAfterRelist) {
            for change in self.state_as_changes() {
                let _ = self.changes.send(change);
            }
        } else if !reset {
            for change in changes {
                let _ = self.changes.send(change);
            }
        }
    }

    fn went_live(&self) {
        let before = self.status.send_replace(DiscoveryStatus::Live);
        if matches!(before, DiscoveryStatus::Stale { .. }) {
            info!(group = %self.group, "reconnected");
            let _ = self.events.send(ClusterEvent::Reconnected);
        }
    }

    fn status_is_connecting(&self) -> bool {
        *self.status.borrow() == DiscoveryStatus::Connecting
    }
}
