//! A listing that is being read page by page, while the view in use stays as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::admission::{Admission, Admitted, Refusal};
use super::candidates::candidate_id;
use super::last_write::LastWrite;
use super::rejected::Rejections;
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::Entry;
use crate::validate;
use crate::view::Nodes;

/// What has been read of a listing. Nodes that have not changed are shared with the current view.
#[derive(Default)]
pub(super) struct Staged {
    /// In the order of the listing.
    pub(super) nodes: Vec<(String, StagedNode)>,
    /// The entries with a host name.
    pub(super) named: Vec<(String, NamedEntry)>,
    pub(super) candidates: Vec<Entry>,
    /// Nodes of the current view that are still registered, but not accepted any more.
    pub(super) not_accepted: Vec<String>,
    pub(super) rejections: Rejections,
    pub(super) last_write: Option<LastWrite>,
    /// Something found no room.
    pub(super) has_turned_away: bool,
}

/// An entry with a host name, whose nodes change with what that leads to.
#[derive(Debug)]
pub(super) struct NamedEntry {
    /// `None` if it cannot be read, or is in a snapshot file only: then its nodes stay as they are.
    pub(super) entry: Option<Entry>,
    pub(super) names: Vec<String>,
    /// Of its nodes.
    pub(super) ids: Vec<String>,
}

impl NamedEntry {
    /// What is to be remembered of an entry with this id; `None` if it is an ordinary one.
    pub(super) fn new(
        id: &str,
        entry: &Entry,
        names: Vec<String>,
        ids: Vec<String>,
    ) -> Option<Self> {
        let is_ordinary = names.is_empty() && ids.iter().all(|of_node| of_node == id);
        (!is_ordinary).then(|| Self {
            entry: (!names.is_empty()).then(|| entry.clone()),
            names,
            ids,
        })
    }
}

pub(super) enum StagedNode {
    Valid(Arc<Node>),
    /// The value cannot be used. The node stays as it is in the current view if that is the same
    /// registration.
    Unusable {
        incarnation: i64,
    },
}

/// The current state of a group, which a listing is compared with.
pub(super) struct Current<'g> {
    pub(super) keys: &'g GroupKeys,
    pub(super) admission: &'g Admission,
    pub(super) nodes: &'g Nodes,
    pub(super) named: &'g BTreeMap<String, NamedEntry>,
    pub(super) rejections: &'g Rejections,
}

impl Current<'_> {
    /// The nodes of the entry with this id.
    pub(super) fn ids_of(&self, id: &str) -> Vec<String> {
        match self.named.get(id) {
            Some(named) => named.ids.clone(),
            None => self
                .nodes
                .get(id)
                .map(|node| node.id.clone())
                .into_iter()
                .collect(),
        }
    }
}

impl Staged {
    /// Adds a page of registrations.
    pub(super) fn add_nodes(&mut self, current: &Current<'_>, registrations: &[Entry]) {
        for entry in registrations {
            self.saw(entry);
            if let Some(id) = current.keys.node_id(&entry.key) {
                match current.admission.resolves() {
                    true => self.add_named(current, &id, entry),
                    false => {
                        let admitted = |admission: &Admission| admission.admit(&id, entry);
                        self.add_node(current, &id, entry, admitted);
                    }
                }
            }
        }
    }

    /// The same for an entry that may have a host name.
    fn add_named(&mut self, current: &Current<'_>, id: &str, entry: &Entry) {
        let mut admitted = current.admission.admit_all(id, entry);
        if !admitted.names.is_empty() && self.named.len() >= current.admission.limits.nodes {
            self.has_turned_away = true;
            admitted = Err(current.admission.too_many()).into();
        }
        let Admitted { nodes, names } = admitted;
        let ids = match nodes {
            Ok(nodes) => {
                let mut ids = Vec::new();
                for node in nodes {
                    let of_node = node.id.clone();
                    self.add_node(current, &of_node, entry, |_| Ok(node));
                    ids.push(of_node);
                }
                ids
            }
            Err(refusal) => {
                let mut ids = current.ids_of(id);
                let first = ids.first().map_or(id, |first| first);
                self.add_node(current, first, entry, |_| Err(refusal.clone()));
                for of_node in ids.iter().skip(1) {
                    self.add_refused(of_node, entry, &refusal);
                }
                if !refusal.keeps_the_node() {
                    ids.clear();
                }
                ids
            }
        };
        if let Some(named) = NamedEntry::new(id, entry, names, ids) {
            self.named.push((id.to_owned(), named));
        }
    }

    /// A node of the current view whose entry is refused now.
    fn add_refused(&mut self, id: &str, entry: &Entry, refusal: &Refusal) {
        if !refusal.keeps_the_node() {
            self.not_accepted.push(id.to_owned());
            return;
        }
        let incarnation = entry.incarnation();
        self.nodes
            .push((id.to_owned(), StagedNode::Unusable { incarnation }));
    }

    fn add_node(
        &mut self,
        current: &Current<'_>,
        id: &str,
        entry: &Entry,
        admitted: impl FnOnce(&Admission) -> Result<Node, Refusal>,
    ) {
        let earlier = Some(current.rejections);
        if self.nodes.len() >= current.admission.limits.nodes {
            let refusal = current.admission.too_many();
            self.rejections.skip(earlier, entry, &refusal);
            self.has_turned_away = true;
            return;
        }
        let known = current.nodes.get(id);
        let node = match admitted(current.admission) {
            Ok(node) => {
                if let Some(fault) = validate::weight_fault(node.weight) {
                    self.rejections.ignore_weight(earlier, entry, &fault);
                }
                // Nodes that have not changed are shared with the current view.
                let unchanged = known.filter(|old| is_unchanged(old, &node));
                StagedNode::Valid(unchanged.cloned().unwrap_or_else(|| Arc::new(node)))
            }
            Err(refusal) => {
                self.rejections.skip(earlier, entry, &refusal);
                if known.is_none() {
                    // There is nothing to keep, so it must not count towards the limit of nodes.
                    return;
                }
                return self.add_refused(id, entry, &refusal);
            }
        };
        self.nodes.push((id.to_owned(), node));
    }

    /// Adds a page of candidates.
    pub(super) fn add_candidates(&mut self, current: &Current<'_>, candidates: &[Entry]) {
        for entry in candidates {
            self.saw(entry);
            // Checked before it is kept: a value may be as long as the store allows, and a candidate
            // that is refused later would take the place of another one.
            match candidate_id(current.keys, current.admission, entry) {
                Ok(_) if self.candidates.len() < current.admission.limits.nodes => {
                    self.candidates.push(entry.clone());
                }
                Ok(_) => {
                    self.has_turned_away = true;
                    self.rejections.count(&current.admission.too_many());
                }
                Err(refusal) => self.rejections.count(&refusal),
            }
        }
    }

    fn saw(&mut self, entry: &Entry) {
        let last = self.last_write.as_ref();
        if last.is_none_or(|last| entry.mod_revision >= last.revision()) {
            self.last_write = Some(LastWrite::of(entry));
        }
    }
}

/// Whether an entry says the same as the node in the view, and was written by the same write.
pub(super) fn is_unchanged(old: &Node, new: &Node) -> bool {
    // A node may announce that it is leaving within a millisecond of its last write.
    let stays = old.is_leaving() == new.is_leaving();
    let is_same_write = old.last_seen == new.last_seen && old.revision() == new.revision();
    stays && is_same_write && !new.differs(old)
}
