//! The state of a group as its follower builds it, from listings and watch events. No clock and no
//! I/O.

mod named;
mod room;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::admission::{Admission, Refusal};
use super::candidates::Candidates;
use super::last_write::LastWrite;
use super::rejected::{RejectedEntries, Rejections};
use super::self_preservation::SelfPreservation;
use super::staged::{Current, NamedEntry, Staged, StagedNode, is_unchanged};
use super::suspects::{Suspects, Verdict};
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::{Entry, Revision, WatchEvent};
use crate::validate;
use crate::view::{Change, Leadership, Nodes};

/// The writer's side of a group: the nodes and the leader as the store has reported them so far.
pub(super) struct Group {
    keys: GroupKeys,
    admission: Admission,
    nodes: Nodes,
    candidates: Candidates,
    leader: Option<Leadership>,
    suspects: Suspects,
    /// `None` if the key that was written last has been deleted since.
    last_write: Option<LastWrite>,
    rejections: Rejections,
    /// The entries with a host name, by the id in their keys.
    named: BTreeMap<String, NamedEntry>,
    /// A registration or a candidacy found no room. Whoever wrote it may never write it again.
    has_turned_away: bool,
}

impl Group {
    pub(super) fn new(keys: GroupKeys, admission: Admission, preserve: SelfPreservation) -> Self {
        Self {
            keys,
            admission,
            nodes: Nodes::default(),
            candidates: Candidates::default(),
            leader: None,
            suspects: Suspects::new(preserve),
            last_write: None,
            rejections: Rejections::default(),
            named: BTreeMap::new(),
            has_turned_away: false,
        }
    }

    /// Starts from the view that an earlier run has left.
    pub(super) fn adopt(
        &mut self,
        nodes: &Nodes,
        leader: Option<Arc<Leadership>>,
        rejected: RejectedEntries,
    ) {
        self.rejections.continue_from(rejected);
        self.nodes = nodes.clone();
        self.nodes.clear_suspects();
        self.find_named();
        self.leader = leader.map(Arc::unwrap_or_clone);
    }

    pub(super) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(super) fn leader(&self) -> Option<&Leadership> {
        self.leader.as_ref()
    }

    /// Distinguishes this history of the store from another one that has reached the same revision.
    pub(super) fn last_write(&self) -> Option<&LastWrite> {
        self.last_write.as_ref()
    }

    pub(super) fn rejected_entries(&self) -> RejectedEntries {
        self.rejections.counts()
    }

    /// The number of candidates in the queue, of those in its index, and of logged lines.
    #[cfg(feature = "test-util")]
    pub(super) fn sizes(&self) -> [usize; 3] {
        let [queue, index] = self.candidates.sizes();
        [queue, index, self.rejections.logged_lines()]
    }

    /// Reads a page of registrations into a listing.
    pub(super) fn stage(&self, staged: &mut Staged, registrations: &[Entry]) {
        staged.add_nodes(&self.current(), registrations);
    }

    /// Reads a page of candidates into a listing.
    pub(super) fn stage_candidates(&self, staged: &mut Staged, candidates: &[Entry]) {
        staged.add_candidates(&self.current(), candidates);
    }

    fn current(&self) -> Current<'_> {
        Current {
            keys: &self.keys,
            admission: &self.admission,
            nodes: &self.nodes,
            named: &self.named,
            rejections: &self.rejections,
        }
    }

    /// A listing has failed. What it has logged is not logged again.
    pub(super) fn discard(&mut self, staged: Staged) {
        self.rejections.add_logged(staged.rejections);
    }

    /// Replaces the state by a complete listing. Returns the difference.
    pub(super) fn reset(
        &mut self,
        staged: Staged,
        revision: Revision,
        now: Instant,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for id in &staged.not_accepted {
            self.remove_not_accepted(id, &mut changes);
        }
        self.remove_missing(&staged.nodes, &mut changes, now);
        self.rejections.add(staged.rejections);
        self.named = staged.named.into_iter().collect();
        for (id, node) in staged.nodes {
            match node {
                StagedNode::Valid(node) => {
                    let is_known = self
                        .nodes
                        .get(&id)
                        .is_some_and(|old| is_unchanged(old, &node));
                    if !is_known || self.nodes.is_suspect(&id) {
                        self.take_in(node, &mut changes);
                    }
                }
                StagedNode::Unusable { incarnation } => {
                    self.remove_unless(&id, incarnation, &mut changes);
                }
            }
        }
        self.has_turned_away = staged.has_turned_away;
        self.candidates.clear();
        for entry in &staged.candidates {
            self.add_candidate(entry);
        }
        self.last_write = staged.last_write;
        self.nodes.set_revision(revision);
        self.settle(&mut changes);
        changes
    }

    fn remove_missing(
        &mut self,
        listed: &[(String, StagedNode)],
        changes: &mut Vec<Change>,
        now: Instant,
    ) {
        let ids: HashSet<&str> = listed.iter().map(|(id, _)| &**id).collect();
        let missing: Vec<_> = self
            .nodes
            .iter()
            .filter(|node| !ids.contains(&*node.id) && !self.nodes.is_suspect(&node.id))
            .cloned()
            .collect();
        // By the length of the list: nodes that were replaced by others are no loss.
        let fewer = self.nodes.len().saturating_sub(listed.len());
        let is_mass_loss = self.suspects.is_mass_loss(fewer, self.nodes.len());
        let serving = missing.iter().filter(|node| node.is_serving()).count();
        let mut more = serving.saturating_sub(1);
        for node in missing {
            if !is_mass_loss {
                self.remove(&node.id, changes);
                continue;
            }
            self.vanish(&node, more, changes, now);
            more = more.saturating_sub(usize::from(node.is_serving()));
        }
    }

    /// Replaces the nodes by those of a snapshot file. There is no leader.
    pub(super) fn restore(&mut self, nodes: Vec<Node>, revision: Revision) -> Vec<Change> {
        let mut changes = Vec::new();
        for node in nodes {
            if self.nodes.len() >= self.admission.limits.nodes {
                warn!(
                    reason = self.admission.too_many().reason(),
                    "the rest of the snapshot is ignored"
                );
                break;
            }
            if GroupKeys::is_id(&node.id) && self.admission.readmit(&node).is_ok() {
                self.take_in(Arc::new(node), &mut changes);
            }
        }
        self.nodes.set_revision(revision);
        self.find_named();
        changes
    }

    /// Applies the events of a watch in their order. Returns what they changed.
    pub(super) fn apply(&mut self, events: &[WatchEvent], now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        for event in events {
            let key = event.key();
            if self.keys.is_candidacy(key) {
                match event {
                    WatchEvent::Put(entry) => self.add_candidate(entry),
                    WatchEvent::Delete { key, .. } => self.candidates.remove(key),
                }
            } else if let Some(id) = self.keys.node_id(key) {
                match event {
                    WatchEvent::Put(entry) if self.admission.resolves() => {
                        self.put_named(&id, entry, &mut changes);
                    }
                    WatchEvent::Put(entry) => self.put(&id, entry, &mut changes),
                    WatchEvent::Delete { .. } if self.admission.resolves() => {
                        self.vanish_named(&id, &mut changes, now);
                    }
                    WatchEvent::Delete { .. } => {
                        if let Some(node) = self.nodes.get(&id).cloned() {
                            self.vanish(&node, 0, &mut changes, now);
                        }
                    }
                }
            }
            match event {
                WatchEvent::Put(entry) => self.last_write = Some(LastWrite::of(entry)),
                WatchEvent::Delete { key, .. } => {
                    self.last_write.take_if(|last| last.key() == key);
                }
            }
            let newest = self.nodes.revision().max(event.revision());
            self.nodes.set_revision(newest);
        }
        self.settle(&mut changes);
        changes
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.suspects.next_due()
    }

    /// Removes the suspects whose time is over.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        let due = self.suspects.due(now);
        if due.is_empty() {
            return changes;
        }
        for id in &due {
            self.remove(id, &mut changes);
        }
        let (gone, suspects) = (due.len(), self.nodes.suspects());
        warn!(
            gone,
            suspects, "suspects are removed: they have not come back"
        );
        self.settle(&mut changes);
        changes
    }

    /// Contact with the store is restored. Suspects could not register while it was away.
    pub(super) fn was_away(&mut self, away: Duration) {
        self.suspects.postpone(&mut self.nodes, away);
    }

    /// A node is not registered any more; `more` other nodes are missing too.
    fn vanish(&mut self, node: &Arc<Node>, more: usize, changes: &mut Vec<Change>, now: Instant) {
        if self.nodes.is_suspect(&node.id) {
            return;
        }
        let is_first = self.nodes.suspects() == 0;
        match self.suspects.vanished(&mut self.nodes, node, more, now) {
            Verdict::Gone => self.remove(&node.id, changes),
            Verdict::Kept(removed) => {
                if is_first {
                    warn!(
                        nodes = self.nodes.len(),
                        "many nodes have vanished together without announcing it; they are kept as suspects for a while"
                    );
                }
                self.put_back(removed, changes);
            }
        }
    }

    /// Puts nodes back that were removed before it was clear that they are part of a mass loss.
    fn put_back(&mut self, removed: Vec<Arc<Node>>, changes: &mut Vec<Change>) {
        if removed.is_empty() {
            return;
        }
        let ids: HashSet<&str> = removed.iter().map(|node| &*node.id).collect();
        // Drop unpublished `Left` changes instead of adding `Joined` after them.
        let mut unpublished = HashSet::new();
        changes.retain(|change| match change {
            Change::Left(node) if ids.contains(&*node.id) => {
                unpublished.insert(node.id.clone());
                false
            }
            _ => true,
        });
        for node in removed {
            self.nodes.insert(node.clone());
            if !unpublished.contains(&node.id) {
                changes.push(Change::Joined(node));
            }
        }
    }

    fn put(&mut self, id: &str, entry: &Entry, changes: &mut Vec<Change>) {
        let admitted = self
            .room_for(id)
            .and_then(|()| self.admission.admit(id, entry));
        self.put_admitted(id, entry, admitted, changes);
    }

    fn put_admitted(
        &mut self,
        id: &str,
        entry: &Entry,
        admitted: Result<Node, Refusal>,
        changes: &mut Vec<Change>,
    ) {
        match admitted {
            Ok(node) => {
                if let Some(fault) = validate::weight_fault(node.weight) {
                    self.rejections.ignore_weight(None, entry, &fault);
                }
                self.take_in(Arc::new(node), changes);
            }
            Err(refusal) => {
                self.rejections.skip(None, entry, &refusal);
                self.put_refused(id, entry, &refusal, changes);
            }
        }
    }

    fn put_refused(
        &mut self,
        id: &str,
        entry: &Entry,
        refusal: &Refusal,
        changes: &mut Vec<Change>,
    ) {
        if refusal.keeps_the_node() {
            self.remove_unless(id, entry.incarnation(), changes);
        } else {
            self.remove_not_accepted(id, changes);
        }
    }

    fn take_in(&mut self, node: Arc<Node>, changes: &mut Vec<Change>) {
        if self.suspects.returned(&mut self.nodes, &node.id) && self.nodes.suspects() == 0 {
            info!("there are no suspects any more");
        }
        let old = self.nodes.get(&node.id).cloned();
        self.nodes.insert(node.clone());
        changes.push(match old {
            Some(old) => Change::Updated { old, new: node },
            None => Change::Joined(node),
        });
    }

    /// An unusable value leaves the node as it was, because its lease is alive and it has not moved;
    /// unless the key belongs to another registration by now.
    fn remove_unless(&mut self, id: &str, incarnation: i64, changes: &mut Vec<Change>) {
        let other = self.nodes.get(id).map(|old| old.incarnation());
        if other.is_some_and(|other| other != incarnation) {
            self.remove(id, changes);
        }
    }

    /// Removes a node that is registered, but not accepted. It must not be put back later as part of
    /// a mass loss.
    fn remove_not_accepted(&mut self, id: &str, changes: &mut Vec<Change>) {
        self.suspects.returned(&mut self.nodes, id);
        self.remove(id, changes);
    }

    fn remove(&mut self, id: &str, changes: &mut Vec<Change>) {
        self.suspects.release(&mut self.nodes, id);
        if let Some(old) = self.nodes.get(id).cloned() {
            self.nodes.remove(id);
            changes.push(Change::Left(old));
        }
    }

    fn add_candidate(&mut self, entry: &Entry) {
        let added = self.candidates.insert(&self.keys, &self.admission, entry);
        if let Err(refusal) = added {
            self.has_turned_away |= self.candidates.is_full(self.admission.limits.nodes);
            self.rejections.count(&refusal);
        }
    }

    /// Completes a step: enforces the limit of nodes, and updates the leader.
    fn settle(&mut self, changes: &mut Vec<Change>) {
        self.make_room(changes);
        self.candidates.log_first_without_lease();
        let leader = self.first_in_line();
        if term(leader.as_ref()) != term(self.leader.as_ref()) {
            changes.push(Change::Leader(leader.clone()));
        }
        self.leader = leader;
    }

    /// The leader: the first candidate, if it is registered, and not a suspect. A candidate that is
    /// not registered (yet) cannot be sent to. Neither does a candidate lead if another process has
    /// registered its id since: a term belongs to the process that holds both keys under its lease,
    /// and until the lease of the former process has expired there is no leader.
    fn first_in_line(&self) -> Option<Leadership> {
        let (epoch, key, candidate) = self.candidates.first()?;
        if self.nodes.is_suspect(&candidate.id) {
            return None;
        }
        let node = self.nodes.get(&candidate.id)?;
        let holds_both_keys = candidate.lease.is_some() && node.lease() == candidate.lease;
        if !holds_both_keys {
            return None;
        }
        Some(Leadership {
            node: node.clone(),
            epoch,
            // Reused, because most steps do not change the leader.
            key: match &self.leader {
                Some(leader) if *leader.key == *key => leader.key.clone(),
                _ => Arc::from(key),
            },
        })
    }
}

fn term(leadership: Option<&Leadership>) -> Option<(&str, Revision)> {
    leadership.map(|leadership| (&*leadership.node.id, leadership.epoch))
}

#[cfg(test)]
mod tests;
