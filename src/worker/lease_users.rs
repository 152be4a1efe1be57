//! Which nodes use a lease, and which ones have left it lately. No I/O.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::keys::GroupKeys;
use crate::store::LeaseId;

/// How often a lease that lives on is searched for keys of nodes that have left it. At first often,
/// because a late request of such a node may still be carried out, though not much later than the
/// node stopped waiting for it; then rarely, because the store may be restored from older data in
/// which the keys exist again. Each search is one request, however many nodes have left.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
const SWEEP_OFTEN_FOR: Duration = Duration::from_secs(20);
const SWEEP_LATER_EVERY: Duration = Duration::from_secs(30);

/// The nodes that use one lease.
#[derive(Debug, Default)]
pub(super) struct LeaseUsers {
    /// One node of each group: two would have the same candidacy.
    nodes: BTreeMap<String, User>,
    /// Groups whose node has left lately, and when.
    left: Vec<(String, Instant)>,
    /// When to search for orphaned keys; `None` if no node has left.
    sweep: Option<Sweep>,
}

#[derive(Debug)]
struct User {
    keys: GroupKeys,
    id: String,
}

/// When to search a lease for orphaned keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sweep {
    pub(super) lease: LeaseId,
    pub(super) next: Instant,
    /// Until then the search is repeated often.
    often_until: Instant,
}

impl Sweep {
    fn new(lease: LeaseId, now: Instant) -> Self {
        Self {
            lease,
            next: now,
            often_until: now + SWEEP_OFTEN_FOR,
        }
    }

    /// After a search that removed everything it found.
    pub(super) fn completed(&mut self, now: Instant) {
        let is_recent = now < self.often_until;
        self.next = now
            + if is_recent {
                SWEEP_EVERY
            } else {
                SWEEP_LATER_EVERY
            };
    }

    /// After a search that failed: late requests may be carried out from when the store works again.
    pub(super) fn failed(&mut self, now: Instant, retry_after: Duration) {
        self.next = now + retry_after;
        self.often_until = now + SWEEP_OFTEN_FOR;
    }
}

impl LeaseUsers {
    /// Adds a node. Returns whether it may use the lease: not if the lease has a node of the same
    /// group, or had one lately, because a late request of that node would count as the new one's.
    pub(super) fn enter(&mut self, keys: &GroupKeys, group: &str, id: &str, now: Instant) -> bool {
        self.forget_left(now);
        let is_taken =
            self.nodes.contains_key(group) || self.left.iter().any(|(left, _)| left == group);
        if !is_taken {
            let (keys, id) = (keys.clone(), id.to_owned());
            self.nodes.insert(group.to_owned(), User { keys, id });
        }
        !is_taken
    }

    /// Removes the node of `group`. Returns whether there was one.
    pub(super) fn remove(&mut self, group: &str, now: Instant) -> bool {
        let was_there = self.nodes.remove(group).is_some();
        self.forget_left(now);
        was_there
    }

    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The lease ends, and with it every key under it: nothing can be orphaned.
    pub(super) fn forget_all(&mut self) {
        self.left.clear();
        self.sweep = None;
    }

    /// Keeps the group from being used again under this lease for a while.
    pub(super) fn set_left(&mut self, group: &str, now: Instant) {
        self.left.push((group.to_owned(), now));
    }

    /// Searches the lease for orphaned keys, now and repeatedly.
    pub(super) fn schedule_sweep(&mut self, lease: LeaseId, now: Instant) {
        self.sweep = Some(Sweep::new(lease, now));
    }

    pub(super) fn sweep(&self) -> Option<Sweep> {
        self.sweep
    }

    /// The sweep that was begun as `begun`; `None` if another one was scheduled since.
    pub(super) fn same_sweep(&mut self, begun: &Sweep) -> Option<&mut Sweep> {
        self.sweep
            .as_mut()
            .filter(|now| now.often_until == begun.often_until)
    }

    /// The lease is gone, so no keys are left under it.
    pub(super) fn cancel_sweep(&mut self, lease: LeaseId) {
        self.sweep.take_if(|sweep| sweep.lease == lease);
    }

    pub(super) fn forget_left(&mut self, now: Instant) {
        self.left
            .retain(|(_, since)| now.saturating_duration_since(*since) < SWEEP_OFTEN_FOR);
    }

    /// The keys that running nodes may have under the lease.
    pub(super) fn own(&self, lease: LeaseId) -> HashSet<String> {
        let nodes = self.nodes.values();
        nodes
            .flat_map(|node| node.keys.own(&node.id, lease))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_group_has_one_node_and_is_taken_for_a_while_after_it_has_left() {
        let mut users = LeaseUsers::default();
        let now = Instant::now();
        let enter = |users: &mut LeaseUsers, group: &str, now| {
            users.enter(&GroupKeys::new("", group), group, "n", now)
        };
        assert!(enter(&mut users, "a", now));
        assert!(enter(&mut users, "b", now));
        assert!(!enter(&mut users, "a", now), "two in one group");
        assert!(users.own(LeaseId(7)).contains("registry/a/n"));
        assert!(users.remove("a", now) && !users.remove("a", now));
        assert!(!users.own(LeaseId(7)).contains("registry/a/n"));
        users.set_left("a", now);
        let later = now + SWEEP_OFTEN_FOR;
        assert!(!enter(&mut users, "a", later - Duration::from_millis(1)));
        assert!(enter(&mut users, "a", later));
    }

    #[tokio::test(start_paused = true)]
    async fn a_sweep_is_repeated_often_at_first_and_rarely_later() {
        let mut now = Instant::now();
        let mut sweep = Sweep::new(LeaseId(7), now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            sweep.completed(now);
            pauses.push((sweep.next - now).as_secs());
            now = sweep.next;
        }
        assert_eq!(pauses, [5, 5, 5, 5, 30, 30, 30]);
        sweep.failed(now, Duration::from_secs(1));
        assert_eq!(sweep.next, now + Duration::from_secs(1));
        sweep.completed(sweep.next);
        assert_eq!(sweep.next, now + Duration::from_secs(6), "often again");
    }
}
