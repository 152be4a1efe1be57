//! Entries with host names in a group: their nodes change with what the names lead to.

use std::borrow::Cow;
use std::collections::HashSet;

use tokio::time::Instant;

use super::Group;
use crate::discovery::admission::{Admitted, Refusal};
use crate::discovery::names::Names;
use crate::discovery::staged::{NamedEntry, is_unchanged};
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::store::Entry;
use crate::view::Change;

impl Group {
    /// Takes in an entry that may have a host name: a node for each of its addresses.
    pub(super) fn put_named(&mut self, id: &str, entry: &Entry, changes: &mut Vec<Change>) {
        let before = self.current().ids_of(id);
        let mut admitted = self.admission.admit_all(id, entry);
        let has_room = self.named.len() < self.admission.limits.nodes;
        if !admitted.names.is_empty() && !has_room && !self.named.contains_key(id) {
            self.has_turned_away = true;
            admitted = Err(self.admission.too_many()).into();
        }
        let Admitted { nodes, names } = admitted;
        let ids = match nodes {
            Ok(nodes) => self.put_each(nodes, entry, changes),
            Err(refusal) => self.refuse_each(id, &before, entry, &refusal, changes),
        };
        for id in before.iter().filter(|id| !ids.contains(id)) {
            self.remove_not_accepted(id, changes);
        }
        match NamedEntry::new(id, entry, names, ids) {
            Some(named) => self.named.insert(id.to_owned(), named),
            None => self.named.remove(id),
        };
    }

    /// Returns the ids.
    fn put_each(
        &mut self,
        nodes: Vec<Node>,
        entry: &Entry,
        changes: &mut Vec<Change>,
    ) -> Vec<String> {
        let mut ids = Vec::new();
        for node in nodes {
            let id = node.id.clone();
            let old = self.nodes.get(&id);
            let is_same = old.is_some_and(|old| is_unchanged(old, &node));
            if !is_same || self.nodes.is_suspect(&id) {
                let admitted = self.room_for(&id).map(|()| node);
                self.put_admitted(&id, entry, admitted, changes);
            }
            ids.push(id);
        }
        ids
    }

    /// Returns the ids of the nodes that stay.
    fn refuse_each(
        &mut self,
        id: &str,
        before: &[String],
        entry: &Entry,
        refusal: &Refusal,
        changes: &mut Vec<Change>,
    ) -> Vec<String> {
        let first = before.first().map_or(id, |first| first);
        self.put_admitted(first, entry, Err(refusal.clone()), changes);
        for id in before.iter().skip(1) {
            self.put_refused(id, entry, refusal, changes);
        }
        let stay = before.iter().filter(|id| self.nodes.get(id).is_some());
        stay.cloned().collect()
    }

    /// The entry with this id is deleted: that is one loss, however many nodes it had.
    pub(super) fn vanish_named(&mut self, id: &str, changes: &mut Vec<Change>, now: Instant) {
        let ids = self.current().ids_of(id);
        self.named.remove(id);
        let Some(first) = ids.first() else { return };
        for of_node in &ids {
            let Some(node) = self.nodes.get(of_node).cloned() else {
                continue;
            };
            if of_node == first || self.nodes.is_suspect(first) {
                self.vanish(&node, 0, changes, now);
            } else {
                self.remove(of_node, changes);
            }
        }
    }

    /// What host names lead to has changed. Returns what that changes.
    pub(in crate::discovery) fn readdress(&mut self, names: &Names) -> Vec<Change> {
        let mut changes = Vec::new();
        let changed = names.take_changed();
        let concerned = self.named.values();
        let concerned = concerned.filter(|named| named.names.iter().any(|it| changed.contains(it)));
        let entries: Vec<Entry> = concerned.filter_map(|named| named.entry.clone()).collect();
        for entry in &entries {
            let id = self.keys.node_id(&entry.key).map(Cow::into_owned);
            if let Some(id) = id {
                self.put_named(&id, entry, &mut changes);
            }
        }
        let used = self.named.values().flat_map(|named| &named.names);
        names.keep(&used.map(String::as_str).collect::<HashSet<_>>());
        self.settle(&mut changes);
        changes
    }

    /// Remembers the entries of nodes that were not read from the store, as far as the nodes say it.
    pub(super) fn find_named(&mut self) {
        if !self.admission.resolves() {
            return;
        }
        self.named.clear();
        for node in self.nodes.iter() {
            if node.metadata.string(metadata_keys::HOST_NAME).is_none() {
                continue;
            }
            let id = node.id.strip_suffix(&format!("@{}", node.ip));
            let id = id.unwrap_or(&node.id).to_owned();
            let of_entry = self.named.entry(id).or_insert_with(|| NamedEntry {
                entry: None,
                names: Vec::new(),
                ids: Vec::new(),
            });
            of_entry.ids.push(node.id.clone());
        }
    }
}
