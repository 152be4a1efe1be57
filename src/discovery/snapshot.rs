//! One immutable view of a group, and applying changes to it. No I/O, no clock.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use tracing::warn;

use super::event::Change;
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::{Entry, Revision, WatchEvent};
use crate::worker::Leadership;

/// The nodes of a group at one revision. Immutable; two versions share what did not change, so a
/// new one costs what changed and keeping an old one costs little.
#[derive(Clone, Default)]
pub struct Nodes {
    nodes: RedBlackTreeMapSync<Arc<str>, Arc<Node>>,
    revision: Revision,
}

impl Nodes {
    /// Every node, in the order of ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// The node with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Node>> {
        self.nodes.get(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes.size()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The store's revision of the last change that is in this view.
    pub fn revision(&self) -> Revision {
        self.revision
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes")
            .field("revision", &self.revision)
            .field("nodes", &self.nodes.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// The writer's side of a group: what the store has told so far.
pub(crate) struct View {
    keys: GroupKeys,
    nodes: Nodes,
    /// Candidates in line: the first one leads.
    queue: BTreeMap<(Revision, String), String>,
    /// Where in line a candidacy's key is.
    places: HashMap<String, Revision>,
    leader: Option<Leadership>,
    /// The key that was written last, and when, unless it is gone.
    witness: Option<(String, Revision)>,
    /// Keys whose current value could not be used.
    bad: HashSet<String>,
    skipped: u64,
}

impl View {
    pub(crate) fn new(keys: GroupKeys) -> Self {
        Self {
            keys,
            nodes: Nodes::default(),
            queue: BTreeMap::new(),
            places: HashMap::new(),
            leader: None,
            witness: None,
            bad: HashSet::new(),
            skipped: 0,
        }
    }

    /// Starts from a view that is being served already.
    pub(crate) fn adopt(&mut self, nodes: &Nodes, leader: Option<Arc<Leadership>>, skipped: u64) {
        self.skipped = skipped;
        self.nodes = nodes.clone();
        self.leader = leader.map(Arc::unwrap_or_clone);
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(crate) fn leader(&self) -> Option<&Leadership> {
        self.leader.as_ref()
    }

    /// What tells this history from another that has come as far: the key that was written last,
    /// and the revision that wrote it.
    pub(crate) fn witness(&self) -> Option<&(String, Revision)> {
        self.witness.as_ref()
    }

    /// Values seen that could not be used, since the start.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Replaces everything by a fresh listing. Answers with the difference.
    pub(crate) fn reset(
        &mut self,
        registrations: &[Entry],
        candidates: &[Entry],
        revision: Revision,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        let listed: HashSet<&str> = registrations
            .iter()
            .filter_map(|entry| self.keys.node_id(&entry.key))
            .collect();
        let gone: Vec<_> = self
            .nodes
            .nodes
            .keys()
            .filter(|id| !listed.contains(&***id))
            .cloned()
            .collect();
        for id in gone {
            self.remove(&id, &mut changes);
        }
        self.bad
            .retain(|key| registrations.iter().any(|entry| entry.key == *key));
        for entry in registrations {
            self.insert(entry, &mut changes);
        }
        self.queue.clear();
        self.places.clear();
        for entry in candidates {
            self.enqueue(entry);
        }
        let all = registrations.iter().chain(candidates);
        let last = all.max_by_key(|entry| entry.mod_revision);
        self.witness = last.map(|entry| (entry.key.clone(), entry.mod_revision));
        self.nodes.revision = revision;
        self.settle(&mut changes);
        changes
    }

    /// Applies what a watch told, in order. Answers with what that changed.
    pub(crate) fn apply(&mut self, events: &[WatchEvent]) -> Vec<Change> {
        let mut changes = Vec::new();
        for event in events {
            let key = event.key();
            if self.keys.is_candidacy(key) {
                match event {
                    WatchEvent::Put(entry) => self.enqueue(entry),
                    WatchEvent::Delete { key, .. } => self.dequeue(key),
                }
            } else if let Some(id) = self.keys.node_id(key) {
                match event {
                    WatchEvent::Put(entry) => self.insert(entry, &mut changes),
                    WatchEvent::Delete { .. } => {
                        self.bad.remove(key);
                        self.remove(id, &mut changes);
                    }
                }
            }
            match event {
                WatchEvent::Put(entry) => {
                    self.witness = Some((entry.key.clone(), entry.mod_revision));
                }
                WatchEvent::Delete { key, .. } => {
                    self.witness.take_if(|witness| witness.0 == *key);
                }
            }
            self.nodes.revision = self.nodes.revision.max(event.revision());
        }
        self.settle(&mut changes);
        changes
    }

    fn insert(&mut self, entry: &Entry, changes: &mut Vec<Change>) {
        let Some(id) = self.keys.node_id(&entry.key) else {
            return;
        };
        let old = self.nodes.nodes.get(id).cloned();
        match parse(id, entry) {
            Ok(node) => {
                self.bad.remove(&entry.key);
                if let Some(old) = &old
                    && old.last_seen == node.last_seen
                    && !node.differs(old)
                {
                    return;
                }
                let new = Arc::new(node);
                self.nodes.nodes.insert_mut(Arc::from(id), new.clone());
                changes.push(match old {
                    Some(old) => Change::Updated { old, new },
                    None => Change::Joined(new),
                });
            }
            Err(reason) => {
                self.skipped += 1;
                if self.bad.insert(entry.key.clone()) {
                    warn!(
                        key = entry.key,
                        revision = entry.mod_revision,
                        reason,
                        "entry skipped"
                    );
                }
                // The node is alive, for its lease is, and where it is has not changed with a
                // value that says nothing: what it said before stays. Unless the key is another
                // registration's by now.
                if let Some(old) = old
                    && old.incarnation() != incarnation(entry)
                {
                    self.remove(&old.id, changes);
                }
            }
        }
    }

    fn remove(&mut self, id: &str, changes: &mut Vec<Change>) {
        if let Some(old) = self.nodes.nodes.get(id).cloned() {
            self.nodes.nodes.remove_mut(id);
            changes.push(Change::Left(old));
        }
    }

    fn enqueue(&mut self, entry: &Entry) {
        if !self.keys.is_candidacy(&entry.key) {
            return;
        }
        self.dequeue(&entry.key);
        let Ok(id) = std::str::from_utf8(&entry.value) else {
            return;
        };
        self.places.insert(entry.key.clone(), entry.create_revision);
        self.queue
            .insert((entry.create_revision, entry.key.clone()), id.to_owned());
    }

    fn dequeue(&mut self, key: &str) {
        if let Some(place) = self.places.remove(key) {
            self.queue.remove(&(place, key.to_owned()));
        }
    }

    /// Works out who leads. A leader that is not registered (yet) leads nothing: there is nowhere
    /// to send to.
    fn settle(&mut self, changes: &mut Vec<Change>) {
        let leader = self.queue.first_key_value().and_then(|((epoch, key), id)| {
            Some(Leadership {
                node: self.nodes.get(id)?.clone(),
                epoch: *epoch,
                // Settled with every change, and most change no leader.
                key: match &self.leader {
                    Some(leader) if *leader.key == **key => leader.key.clone(),
                    _ => Arc::from(key.as_str()),
                },
            })
        });
        let term = |leadership: &Option<Leadership>| {
            leadership
                .as_ref()
                .map(|leadership| (leadership.node.id.clone(), leadership.epoch))
        };
        if term(&leader) != term(&self.leader) {
            changes.push(Change::Leader(leader.clone()));
        }
        self.leader = leader;
    }
}

fn incarnation(entry: &Entry) -> i64 {
    entry.lease.map_or(entry.create_revision, |lease| lease.0)
}

fn parse(id: &str, entry: &Entry) -> Result<Node, String> {
    let node: Node = serde_json::from_slice(&entry.value).map_err(|error| error.to_string())?;
    if node.id != id {
        return Err(format!("its id is {:?}, which is not its key's", node.id));
    }
    Ok(node.with_incarnation(incarnation(entry)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseId;
    use proptest::prelude::*;

    fn keys() -> GroupKeys {
        GroupKeys::new("", "g")
    }

    fn registration(id: &str, value: &str, revision: Revision, lease: i64) -> Entry {
        Entry {
            key: keys().registration(id),
            value: value.as_bytes().to_vec(),
            create_revision: revision,
            mod_revision: revision,
            lease: Some(LeaseId(lease)),
        }
    }

    fn node(id: &str, revision: Revision, lease: i64) -> Entry {
        let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1","last_seen":{revision}}}"#);
        registration(id, &value, revision, lease)
    }

    fn candidate(id: &str, revision: Revision, lease: i64) -> Entry {
        Entry {
            key: keys().candidacy(LeaseId(lease)),
            value: id.as_bytes().to_vec(),
            create_revision: revision,
            mod_revision: revision,
            lease: Some(LeaseId(lease)),
        }
    }

    fn put(entry: Entry) -> WatchEvent {
        WatchEvent::Put(entry)
    }

    fn delete(key: String, revision: Revision) -> WatchEvent {
        WatchEvent::Delete { key, revision }
    }

    fn told(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .filter_map(Change::event)
            .map(|event| event.to_string())
            .collect()
    }

    #[test]
    fn join_update_leave() {
        let mut view = View::new(keys());
        let changes = view.apply(&[put(node("a", 2, 1)), put(candidate("a", 3, 1))]);
        assert_eq!(
            told(&changes),
            ["node a joined at 10.0.0.1", "node a leads"]
        );
        assert_eq!(view.leader().unwrap().epoch, 3);
        let changes = view.apply(&[
            delete(keys().registration("a"), 4),
            delete(keys().candidacy(LeaseId(1)), 4),
        ]);
        assert_eq!(told(&changes), ["node a left", "no leader"]);
        assert_eq!(view.nodes().revision(), 4);
    }

    #[test]
    fn the_leader_counts_once_it_is_registered() {
        let mut view = View::new(keys());
        assert!(view.apply(&[put(candidate("a", 2, 1))]).is_empty());
        assert!(view.leader().is_none());
        let changes = view.apply(&[put(node("a", 3, 1))]);
        assert_eq!(
            told(&changes),
            ["node a joined at 10.0.0.1", "node a leads"]
        );
    }

    #[test]
    fn a_relist_tells_the_difference_only() {
        let mut view = View::new(keys());
        view.reset(
            &[node("a", 2, 1), node("b", 3, 2)],
            &[candidate("a", 4, 1)],
            5,
        );
        let changes = view.reset(
            &[node("b", 3, 2), node("c", 8, 3)],
            &[candidate("b", 7, 2)],
            9,
        );
        assert_eq!(
            told(&changes),
            ["node a left", "node c joined at 10.0.0.1", "node b leads"]
        );
    }

    #[test]
    fn bad_entries_are_skipped_and_harm_nobody() {
        let mut view = View::new(keys());
        let changes = view.reset(
            &[
                registration("bad", "{", 2, 1),
                registration("liar", r#"{"id":"a","ip":"10.0.0.9"}"#, 3, 2),
                node("a", 4, 3),
            ],
            &[],
            4,
        );
        assert_eq!(told(&changes), ["node a joined at 10.0.0.1"]);
        assert_eq!(view.skipped(), 2);
        // A bad update of a live registration changes nothing, one by another registration does.
        assert!(view.apply(&[put(registration("a", "?", 5, 3))]).is_empty());
        let changes = view.apply(&[put(registration("a", "?", 6, 4))]);
        assert_eq!(told(&changes), ["node a left"]);
        assert_eq!(view.skipped(), 4);
    }

    #[test]
    fn keys_of_other_groups_are_not_ours() {
        let mut view = View::new(keys());
        let mut nested = node("a", 2, 1);
        nested.key = "registry/g/sub/a".to_owned();
        assert!(view.apply(&[put(nested)]).is_empty());
    }

    #[test]
    fn an_update_of_the_time_alone_is_no_event_but_is_in_the_view() {
        let mut view = View::new(keys());
        view.apply(&[put(node("a", 2, 1))]);
        let changes = view.apply(&[put(node("a", 7, 1))]);
        assert_eq!(changes.len(), 1);
        assert!(told(&changes).is_empty());
        assert_eq!(view.nodes().get("a").unwrap().last_seen, 7);
    }

    /// What the store might do to three nodes' keys.
    fn history() -> impl Strategy<Value = Vec<(u8, u8)>> {
        prop::collection::vec((0_u8..3, 0_u8..5), 0..40)
    }

    proptest! {
        /// Following every change ends where one list does, whatever happened; folding the
        /// changes gives the view; and a relist at any point is a shortcut, nothing else.
        #[test]
        fn following_equals_listing(history in history(), relist in 0_usize..40) {
            let mut registered: BTreeMap<String, Entry> = BTreeMap::new();
            let mut queued: BTreeMap<String, Entry> = BTreeMap::new();
            let mut view = View::new(keys());
            let mut folded: BTreeMap<String, u64> = BTreeMap::new();
            for (step, (who, what)) in history.into_iter().enumerate() {
                let revision = step as Revision + 2;
                let id = format!("n{who}");
                let event = match what {
                    0 => put(node(&id, revision, i64::from(who) + 1)),
                    1 => put(registration(&id, "nonsense", revision, i64::from(who) + 1)),
                    2 => delete(keys().registration(&id), revision),
                    3 => put(candidate(&id, revision, i64::from(who) + 1)),
                    _ => delete(keys().candidacy(LeaseId(i64::from(who) + 1)), revision),
                };
                let map = if keys().is_candidacy(event.key()) { &mut queued } else { &mut registered };
                match &event {
                    WatchEvent::Put(entry) => map.insert(entry.key.clone(), entry.clone()),
                    WatchEvent::Delete { key, .. } => map.remove(key),
                };
                let entries = |map: &BTreeMap<String, Entry>| map.values().cloned().collect::<Vec<_>>();
                let changes = if step == relist {
                    view.reset(&entries(&registered), &entries(&queued), revision)
                } else {
                    view.apply(&[event])
                };
                for change in changes {
                    match change {
                        Change::Joined(node) => prop_assert!(folded.insert(node.id.clone(), node.last_seen).is_none()),
                        Change::Updated { new, .. } => prop_assert!(folded.insert(new.id.clone(), new.last_seen).is_some()),
                        Change::Left(node) => prop_assert!(folded.remove(&node.id).is_some()),
                        Change::Leader(_) | Change::Reset(_) => {}
                    }
                }
                let seen: BTreeMap<_, _> = view.nodes().iter().map(|node| (node.id.clone(), node.last_seen)).collect();
                prop_assert_eq!(&seen, &folded);
                for entry in registered.values().filter(|entry| entry.value != b"nonsense") {
                    let id = keys().node_id(&entry.key).unwrap().to_owned();
                    prop_assert_eq!(seen.get(&id), Some(&(entry.mod_revision as u64)));
                }
                prop_assert!(seen.keys().all(|id| registered.contains_key(&keys().registration(id))));
                let first = queued.values().min_by_key(|entry| entry.create_revision)
                    .map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
                    .filter(|id| seen.contains_key(id));
                prop_assert_eq!(view.leader().map(|leader| leader.node.id.clone()), first);
            }
        }
    }
}
