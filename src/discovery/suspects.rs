//! Nodes that vanished lately, and which of them are kept as suspects. No clock and no I/O.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::self_preservation::SelfPreservation;
use crate::node::Node;
use crate::view::Nodes;

/// Decides who becomes a suspect. Which nodes are suspects, and until when, is kept in [`Nodes`];
/// here is only their order in time.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    settings: SelfPreservation,
    /// Nodes that were removed from the view no longer than `within` ago.
    removed: BTreeMap<Arc<str>, (Instant, Arc<Node>)>,
    /// The same ordered by time, together with some that have come back since.
    removals: VecDeque<(Instant, Arc<str>)>,
    /// The suspects, ordered by the time until which they are kept.
    due: BTreeSet<(Instant, Arc<str>)>,
}

/// What happens to a node that has vanished.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is removed.
    Gone,
    /// It is kept as a suspect. So are these nodes, which were removed before it was clear that this
    /// is a mass loss.
    Kept(Vec<Arc<Node>>),
}

impl Suspects {
    pub(super) fn new(settings: SelfPreservation) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// Whether losing this many of the nodes is a mass loss, not churn.
    pub(super) fn is_mass_loss(&self, lost: usize, nodes: usize) -> bool {
        self.settings.is_mass_loss(lost, nodes)
    }

    /// Judges a node that has vanished, and is still in `nodes`. `more` other nodes are missing too.
    pub(super) fn vanished(
        &mut self,
        nodes: &mut Nodes,
        node: &Arc<Node>,
        more: usize,
        now: Instant,
    ) -> Verdict {
        if !self.settings.enabled || !node.is_serving() {
            return Verdict::Gone;
        }
        self.forget_old_removals(now);
        let lost = self.removed.len() + nodes.suspects() + 1 + more;
        let all = nodes.len() + self.removed.len();
        let id: Arc<str> = Arc::from(node.id.as_str());
        if !self.is_mass_loss(lost, all) {
            self.removals.push_back((now, id.clone()));
            self.removed.insert(id, (now, node.clone()));
            return Verdict::Gone;
        }
        self.removals.clear();
        let removed = std::mem::take(&mut self.removed);
        let mut returned = Vec::with_capacity(removed.len());
        for (id, (at, node)) in removed {
            self.keep(nodes, id, at + self.settings.hold());
            returned.push(node);
        }
        self.keep(nodes, id, now + self.settings.hold());
        Verdict::Kept(returned)
    }

    fn keep(&mut self, nodes: &mut Nodes, id: Arc<str>, until: Instant) {
        self.release(nodes, &id);
        nodes.mark_suspect(id.clone(), until);
        self.due.insert((until, id));
    }

    /// A node has registered. Returns whether it was a suspect.
    pub(super) fn returned(&mut self, nodes: &mut Nodes, id: &str) -> bool {
        self.removed.remove(id);
        self.release(nodes, id)
    }

    /// A node leaves the view. Returns whether it was a suspect.
    pub(super) fn release(&mut self, nodes: &mut Nodes, id: &str) -> bool {
        let Some((id, until)) = nodes.clear_suspect(id) else {
            return false;
        };
        self.due.remove(&(until, id));
        true
    }

    /// The suspect whose time ends first.
    pub(super) fn first(&self) -> Option<Arc<str>> {
        self.due.first().map(|(_, id)| id.clone())
    }

    /// When the time of a suspect ends next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(until, _)| *until)
    }

    /// The suspects whose time is over.
    pub(super) fn due(&self, now: Instant) -> Vec<Arc<str>> {
        let over = self.due.iter().take_while(|(until, _)| *until <= now);
        over.map(|(_, id)| id.clone()).collect()
    }

    /// Keeps every suspect longer, because nobody could register for this long.
    pub(super) fn postpone(&mut self, nodes: &mut Nodes, away: Duration) {
        let later: Vec<_> = nodes
            .suspects_until()
            .map(|(id, until)| (until + away, id.clone()))
            .collect();
        for (until, id) in &later {
            nodes.mark_suspect(id.clone(), *until);
        }
        self.due = later.into_iter().collect();
    }

    fn forget_old_removals(&mut self, now: Instant) {
        while let Some((at, id)) = self.removals.front() {
            if now.saturating_duration_since(*at) <= self.settings.within() {
                break;
            }
            if self.removed.get(id).is_some_and(|(other, _)| other == at) {
                self.removed.remove(id);
            }
            self.removals.pop_front();
        }
    }
}
