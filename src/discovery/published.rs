//! What the readers of a group see: one writer, any number of readers.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{broadcast, watch};

use super::rejected::RejectedEntries;
use super::status::DiscoveryStatus;
use crate::node::Node;
use crate::sync::lock;
use crate::view::{Change, ClusterEvent, Leadership, Nodes};

/// How many events a slow subscriber may be behind before it misses some.
const EVENT_BUFFER: usize = 256;
/// How many changes a slow reader may be behind before it is given a `Reset` instead.
const CHANGE_BUFFER: usize = 1_024;

/// The published state of a group.
pub(super) struct Published {
    pub(super) nodes: ArcSwap<Nodes>,
    pub(super) leadership: ArcSwapOption<Leadership>,
    pub(super) nodes_watch: watch::Sender<Arc<Nodes>>,
    pub(super) leader_watch: watch::Sender<Option<Arc<Node>>>,
    pub(super) status: watch::Sender<DiscoveryStatus>,
    /// Whether there has been a complete view.
    pub(super) ready: watch::Sender<bool>,
    /// Whether the last write of the snapshot file has failed.
    pub(super) snapshot_failing: Arc<AtomicBool>,
    pub(super) events: broadcast::Sender<ClusterEvent>,
    changes: broadcast::Sender<Change>,
    rejected: Mutex<RejectedEntries>,
    /// Held while a view is published together with its changes, so that a reader who subscribes
    /// sees either both or neither.
    publishing: Mutex<()>,
}

/// A state to publish, and how it came about.
pub(super) struct Update<'g> {
    pub(super) nodes: &'g Nodes,
    pub(super) leader: Option<&'g Leadership>,
    pub(super) rejected: RejectedEntries,
    /// The changes since what was published before.
    pub(super) changes: Vec<Change>,
    /// Whether readers of changes are given the whole state instead: after a listing.
    pub(super) is_reset: bool,
}

impl Published {
    pub(super) fn new() -> Self {
        let nodes = Arc::new(Nodes::default());
        Self {
            nodes: ArcSwap::new(nodes.clone()),
            leadership: ArcSwapOption::empty(),
            nodes_watch: watch::Sender::new(nodes),
            leader_watch: watch::Sender::new(None),
            status: watch::Sender::new(DiscoveryStatus::Connecting),
            ready: watch::Sender::new(false),
            snapshot_failing: Arc::default(),
            events: broadcast::Sender::new(EVENT_BUFFER),
            changes: broadcast::Sender::new(CHANGE_BUFFER),
            rejected: Mutex::default(),
            publishing: Mutex::new(()),
        }
    }

    pub(super) fn leader(&self) -> Option<Leadership> {
        let leadership = self.leadership.load();
        leadership.as_ref().map(|leadership| (**leadership).clone())
    }

    pub(super) fn rejected_entries(&self) -> RejectedEntries {
        *self.lock_rejected()
    }

    pub(super) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    pub(super) fn status(&self) -> DiscoveryStatus {
        *self.status.borrow()
    }

    /// A receiver of the changes that follow, and the state before them.
    pub(super) fn subscribe(&self) -> (broadcast::Receiver<Change>, [Change; 2]) {
        let _publishing = lock(&self.publishing);
        (self.changes.subscribe(), self.state_as_changes())
    }

    fn lock_rejected(&self) -> MutexGuard<'_, RejectedEntries> {
        lock(&self.rejected)
    }

    fn state_as_changes(&self) -> [Change; 2] {
        [
            Change::Reset(self.nodes.load_full()),
            Change::Leader(self.leader()),
        ]
    }

    /// Makes a state and the changes that led to it visible together. The state is replaced before
    /// the changes are sent, so that no reader is notified of a change and then reads the state before it.
    pub(super) fn publish(&self, update: Update<'_>) {
        let Update {
            changes, is_reset, ..
        } = update;
        let _publishing = lock(&self.publishing);
        let nodes = Arc::new(update.nodes.clone());
        *self.lock_rejected() = update.rejected;
        let suspects = self.nodes.swap(nodes.clone()).suspects();
        let before = self.leadership.swap(update.leader.cloned().map(Arc::new));
        if is_reset || !changes.is_empty() || suspects != nodes.suspects() {
            self.nodes_watch.send_replace(nodes);
        }
        let is_same_leader = match (before.as_deref(), update.leader) {
            (Some(before), Some(now)) => {
                before.epoch == now.epoch && Arc::ptr_eq(&before.node, &now.node)
            }
            (None, None) => true,
            _ => false,
        };
        if !is_same_leader {
            let leader = update.leader.map(|leadership| leadership.node.clone());
            self.leader_watch.send_replace(leader);
        }
        if self.events.receiver_count() > 0 {
            for event in changes.iter().filter_map(Change::event) {
                self.send(event);
            }
        }
        if is_reset {
            self.send_changes(self.state_as_changes());
        } else if self.changes.receiver_count() > 0 {
            self.send_changes(changes);
        }
    }

    pub(super) fn send(&self, event: ClusterEvent) {
        // Fails if there are no subscribers.
        let _ = self.events.send(event);
    }

    fn send_changes(&self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            // Fails if there are no readers.
            let _ = self.changes.send(change);
        }
    }

    pub(super) fn set_status(&self, status: DiscoveryStatus) {
        self.status.send_replace(status);
    }

    /// The first complete view is published.
    pub(super) fn set_ready(&self) {
        if !self.ready.send_replace(true) {
            self.send(ClusterEvent::Ready);
        }
    }

    /// A run begins: the view is followed again, and is as old as it is.
    pub(super) fn run_begins(&self) {
        let is_ready = self.is_ready();
        self.status.send_if_modified(|status| {
            let DiscoveryStatus::Ended { since } = *status else {
                return false;
            };
            *status = match is_ready {
                true => DiscoveryStatus::Stale { since },
                false => DiscoveryStatus::Connecting,
            };
            true
        });
    }

    /// A run has ended: the view is not followed any more.
    pub(super) fn run_ended(&self) {
        let since = SystemTime::now();
        let before = self.status.send_replace(DiscoveryStatus::Ended { since });
        if before == DiscoveryStatus::Live {
            self.send(ClusterEvent::Disconnected);
        }
    }
}
