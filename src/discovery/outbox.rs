//! Changes that wait to be published, and when they are. No I/O.

use std::time::Duration;

use tokio::time::Instant;

use crate::view::Change;

/// Collects changes and paces their publication: the first change is published at once, those that
/// follow within the interval are published together, and a change of leader never waits.
pub(super) struct Outbox {
    interval: Duration,
    changes: Vec<Change>,
    /// Whether one of them is a change of leader.
    has_leader: bool,
    /// Whether there is anything to publish. A new revision is, even if nothing else has changed.
    is_dirty: bool,
    next: Instant,
}

impl Outbox {
    pub(super) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            changes: Vec::new(),
            has_leader: false,
            is_dirty: false,
            next: now,
        }
    }

    /// Adds the changes of one step, which may be none.
    pub(super) fn add(&mut self, changes: Vec<Change>) {
        let is_leader = |change: &Change| matches!(change, Change::Leader(_));
        self.has_leader |= changes.iter().any(is_leader);
        self.changes.extend(changes);
        self.is_dirty = true;
    }

    /// When to publish next, if there is something to publish.
    pub(super) fn due(&self) -> Option<Instant> {
        self.is_dirty.then_some(self.next)
    }

    /// The changes to publish now; `None` if they have to wait.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Vec<Change>> {
        let is_due = now >= self.next;
        if !self.is_dirty || !(is_due || self.has_leader) {
            return None;
        }
        // A change of leader that is published by itself does not delay the next change.
        let is_leader_alone = self.has_leader && self.changes.len() == 1;
        if is_due && !is_leader_alone {
            self.next = now + self.interval;
        }
        self.take()
    }

    /// All changes that have not been published; `None` if there is nothing to publish.
    pub(super) fn take(&mut self) -> Option<Vec<Change>> {
        self.has_leader = false;
        std::mem::take(&mut self.is_dirty).then(|| std::mem::take(&mut self.changes))
    }

    /// The changes that have not been published, followed by those of a new listing. Readers are given
    /// the whole state instead, but the events of all changes are still sent.
    pub(super) fn take_before(&mut self, listed: Vec<Change>) -> Vec<Change> {
        let mut changes = self.take().unwrap_or_default();
        changes.extend(listed);
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Node;

    fn joined() -> Vec<Change> {
        let node = Node::new("n", "10.0.0.1".parse().unwrap());
        vec![Change::Joined(node.into())]
    }

    #[test]
    fn changes_are_paced_and_a_change_of_leader_is_not() {
        let start = Instant::now();
        let interval = Duration::from_millis(20);
        let mut outbox = Outbox::new(interval, start);
        let published = |outbox: &mut Outbox, now| outbox.take_due(now).map(|all| all.len());
        assert_eq!((outbox.due(), published(&mut outbox, start)), (None, None));

        outbox.add(joined());
        assert_eq!(published(&mut outbox, start), Some(1), "the first one");
        for _ in 0..3 {
            outbox.add(joined());
            assert_eq!(published(&mut outbox, start), None);
        }
        assert_eq!(outbox.due(), Some(start + interval));
        assert_eq!(published(&mut outbox, start + interval), Some(3));

        outbox.add(joined());
        outbox.add(vec![Change::Leader(None)]);
        assert_eq!(published(&mut outbox, start + interval), Some(2));
        assert_eq!(outbox.due(), None);

        // By itself it does not delay others.
        let later = start + 3 * interval;
        outbox.add(vec![Change::Leader(None)]);
        assert_eq!(published(&mut outbox, later), Some(1));
        outbox.add(joined());
        assert_eq!(published(&mut outbox, later), Some(1));

        outbox.add(Vec::new());
        assert_eq!(published(&mut outbox, later), None);
        assert_eq!(
            published(&mut outbox, later + interval),
            Some(0),
            "a revision"
        );
        outbox.add(joined());
        assert_eq!(outbox.take_before(joined()).len(), 2);
        assert!(outbox.take().is_none());
    }
}
