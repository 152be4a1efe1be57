//! One immutable view of a group, and applying changes to it. No I/O, no clock.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_64;

use super::admission::{Admission, Refusal, shortened};
use super::suspects::{SelfPreservation, Suspects, Verdict};
use super::told::Told;
use crate::bugs::{self, Bug};
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::{Entry, LeaseId, Revision, WatchEvent};
use crate::validate;
use crate::view::{Change, Leadership, Nodes};

/// How many entries were not taken in since the start, and why. Each key is logged once for each
/// reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RejectedEntries {
    /// They could not be parsed, or their id was not their key's.
    pub malformed: u64,
    /// They were more than the [`EntryLimits`](super::EntryLimits) allow.
    pub too_large: u64,
    /// They pointed to an address or a port that is not allowed, or that nobody can connect to:
    /// unspecified, multicast, broadcast, link-local (IPv6), port 0.
    pub not_allowed: u64,
    /// Not among the skipped: entries that were taken in, but whose `weight` is none (negative, or
    /// no number) and counts as 1.
    pub weights: u64,
}

impl RejectedEntries {
    /// All that were skipped.
    pub fn total(&self) -> u64 {
        self.malformed + self.too_large + self.not_allowed
    }

    fn add(&mut self, other: &Self) {
        self.malformed += other.malformed;
        self.too_large += other.too_large;
        self.not_allowed += other.not_allowed;
        self.weights += other.weights;
    }
}

/// The writer's side of a group: what the store has told so far.
pub(crate) struct View {
    keys: GroupKeys,
    admission: Admission,
    nodes: Nodes,
    /// Candidates in line: the first one leads.
    queue: BTreeMap<(Revision, String), Candidate>,
    /// The candidate without a lease that was told in the log.
    told_without_lease: Option<String>,
    /// Where in line a candidacy's key is.
    places: HashMap<String, Revision>,
    leader: Option<Leadership>,
    suspects: Suspects,
    /// The key that was written last, and when, unless it is gone.
    witness: Option<Witness>,
    /// What the log has been told of values that cannot be used.
    refused: Told,
    skipped: RejectedEntries,
}

/// The key that was written last, which revision wrote it, and what. Key and revision alone are soon the
/// same in another history: those who write at regular intervals write in the same order.
pub(crate) struct Witness {
    key: String,
    written: Revision,
    value: u64,
}

impl Witness {
    fn of(entry: &Entry) -> Self {
        Self {
            key: entry.key.clone(),
            written: entry.mod_revision,
            value: xxh3_64(&entry.value),
        }
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) fn written(&self) -> Revision {
        self.written
    }

    /// Whether the store had this very entry.
    pub(crate) fn is(&self, entry: &Entry) -> bool {
        self.written == entry.mod_revision && self.value == xxh3_64(&entry.value)
    }
}

/// Who stands in line, and the lease of that process. One whose key is under no lease never ends.
struct Candidate {
    id: String,
    lease: Option<LeaseId>,
}

/// A listing that is being read, page by page, while the view stays as it is.
#[derive(Default)]
pub(crate) struct Staged {
    /// In the order of ids.
    nodes: Vec<(String, StagedNode)>,
    candidates: Vec<Entry>,
    /// In the view that is being served, and still registered, but not for it any more.
    unwanted: Vec<String>,
    refused: Told,
    skipped: RejectedEntries,
    witness: Option<Witness>,
}

enum StagedNode {
    New(Arc<Node>),
    /// Its value says nothing: what it said before stays, if it is the same registration.
    Unchanged(i64),
}

impl View {
    pub(crate) fn new(keys: GroupKeys, admission: Admission, preserve: SelfPreservation) -> Self {
        Self {
            keys,
            admission,
            nodes: Nodes::default(),
            queue: BTreeMap::new(),
            told_without_lease: None,
            places: HashMap::new(),
            leader: None,
            suspects: Suspects::new(preserve),
            witness: None,
            refused: Told::default(),
            skipped: RejectedEntries::default(),
        }
    }

    /// Starts from a view that is being served already.
    pub(crate) fn adopt(
        &mut self,
        nodes: &Nodes,
        leader: Option<Arc<Leadership>>,
        skipped: RejectedEntries,
    ) {
        self.skipped = skipped;
        self.nodes = nodes.clone();
        self.nodes.clear_suspects();
        self.leader = leader.map(Arc::unwrap_or_clone);
    }

    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(crate) fn leader(&self) -> Option<&Leadership> {
        self.leader.as_ref()
    }

    /// What tells this history from another that has come as far.
    pub(crate) fn witness(&self) -> Option<&Witness> {
        self.witness.as_ref()
    }

    /// Values seen that could not be used, since the start.
    pub(crate) fn rejected_entries(&self) -> RejectedEntries {
        self.skipped
    }

    /// How many candidates, places and lines of the log are remembered.
    #[cfg(feature = "test-util")]
    pub(crate) fn sizes(&self) -> [usize; 3] {
        [self.queue.len(), self.places.len(), self.refused.len()]
    }

    /// Reads a page of registrations. Costs memory for what is new in it only.
    pub(crate) fn stage(&self, staged: &mut Staged, registrations: &[Entry]) {
        for entry in registrations {
            staged.saw(entry);
            let Some(id) = self.keys.node_id(&entry.key) else {
                continue;
            };
            if staged.nodes.len() >= self.admission.limits.nodes {
                staged.skipped.too_large += 1;
                self.tell_refusal(&mut staged.refused, entry, &self.too_many());
                continue;
            }
            let node = match self.admission.admit(id, entry) {
                Ok(node) => {
                    if let Some(fault) = validate::weight_fault(node.weight) {
                        staged.skipped.weights += 1;
                        self.tell_fault(&mut staged.refused, entry, &fault);
                    }
                    let node = registered(node, entry);
                    // What has not changed is shared with the view that is being served.
                    let same = self.nodes.get(id).filter(|old| is_same(old, &node));
                    StagedNode::New(same.cloned().unwrap_or_else(|| Arc::new(node)))
                }
                Err(refusal) => {
                    let stays = count(&mut staged.skipped, &refusal);
                    if refusal != Refusal::Unwanted {
                        self.tell_refusal(&mut staged.refused, entry, refusal.reason());
                    }
                    if !stays {
                        if self.nodes.get(id).is_some() {
                            staged.unwanted.push(id.to_owned());
                        }
                        continue;
                    }
                    if self.nodes.get(id).is_none() {
                        // There is nothing to keep, and it takes nobody's place.
                        continue;
                    }
                    StagedNode::Unchanged(incarnation(entry))
                }
            };
            staged.nodes.push((id.to_owned(), node));
        }
    }

    /// The same for a page of candidates.
    pub(crate) fn stage_candidates(&self, staged: &mut Staged, candidates: &[Entry]) {
        for entry in candidates {
            staged.saw(entry);
            // Before it is kept: a value may be as long as the store allows, and one that is
            // refused later would take the place of another.
            match self.candidate(entry) {
                Ok(_) if staged.candidates.len() < self.admission.limits.nodes => {
                    staged.candidates.push(entry.clone());
                }
                Ok(_) => staged.skipped.too_large += 1,
                Err(refusal) => drop(count(&mut staged.skipped, &refusal)),
            }
        }
    }

    /// Replaces everything by what has been staged. Answers with the difference.
    pub(crate) fn reset(
        &mut self,
        staged: Staged,
        revision: Revision,
        now: Instant,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for id in &staged.unwanted {
            self.drop_now(id, &mut changes);
        }
        let listed: HashSet<&str> = staged.nodes.iter().map(|(id, _)| &**id).collect();
        let missing: Vec<_> = self
            .nodes
            .iter()
            .filter(|node| !listed.contains(&*node.id) && !self.suspects.contains(&node.id))
            .cloned()
            .collect();
        // Others that have come in their place leave the list as long as it was.
        let shorter = self.nodes.len().saturating_sub(staged.nodes.len());
        let many = self.suspects.are_many(shorter, self.nodes.len());
        let lost = missing.iter().filter(|node| node.is_serving()).count();
        let mut more = lost.saturating_sub(1);
        for node in missing {
            if !many {
                self.remove(&node.id, &mut changes);
                continue;
            }
            self.vanish(&node, more, &mut changes, now);
            more = more.saturating_sub(usize::from(node.is_serving()));
        }
        self.remember(staged.refused);
        self.skipped.add(&staged.skipped);
        for (id, node) in staged.nodes {
            match node {
                StagedNode::New(node) => {
                    let old = self.nodes.get(&id);
                    if self.suspects.contains(&id) || !old.is_some_and(|old| is_same(old, &node)) {
                        self.take_in(node, &mut changes);
                    }
                }
                StagedNode::Unchanged(incarnation) => {
                    self.drop_unless(&id, incarnation, &mut changes);
                }
            }
        }
        self.queue.clear();
        self.places.clear();
        for entry in &staged.candidates {
            self.enqueue(entry);
        }
        self.witness = staged.witness;
        self.nodes.set_revision(revision);
        self.settle(&mut changes);
        changes
    }

    /// Replaces the nodes by those of a file. Nobody leads.
    pub(crate) fn restore(&mut self, nodes: Vec<Node>, revision: Revision) -> Vec<Change> {
        let mut changes = Vec::new();
        for node in nodes {
            if self.nodes.len() >= self.admission.limits.nodes {
                warn!(
                    reason = self.too_many(),
                    "the rest of the snapshot is left out"
                );
                break;
            }
            // As that of a key has to be.
            let has_key = self.keys.node_id(&self.keys.registration(&node.id)) == Some(&*node.id);
            if has_key && self.admission.readmit(&node).is_ok() {
                self.take_in(Arc::new(node), &mut changes);
            }
        }
        self.nodes.set_revision(revision);
        changes
    }

    /// Applies what a watch told, in order. Answers with what that changed.
    pub(crate) fn apply(&mut self, events: &[WatchEvent], now: Instant) -> Vec<Change> {
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
                    WatchEvent::Put(entry) => self.insert(id, entry, &mut changes),
                    WatchEvent::Delete { .. } => {
                        if let Some(node) = self.nodes.get(id).cloned()
                            && !self.suspects.contains(id)
                        {
                            self.vanish(&node, 0, &mut changes, now);
                        }
                    }
                }
            }
            match event {
                WatchEvent::Put(entry) => {
                    self.witness = Some(Witness::of(entry));
                }
                WatchEvent::Delete { key, .. } => {
                    self.witness.take_if(|witness| witness.key == *key);
                }
            }
            let newest = self.nodes.revision().max(event.revision());
            self.nodes.set_revision(newest);
        }
        self.settle(&mut changes);
        changes
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.suspects.next_due()
    }

    /// Lets go of suspects whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        let due = self.suspects.take_due(now);
        if due.is_empty() {
            return changes;
        }
        warn!(
            gone = due.len(),
            suspects = self.suspects.len(),
            "suspects have not come back"
        );
        for id in due {
            self.remove(&id, &mut changes);
        }
        self.settle(&mut changes);
        changes
    }

    /// The store is heard again after so long, in which nobody could register.
    pub(crate) fn was_away(&mut self, away: Duration) {
        self.suspects.postpone(away);
    }

    /// What has been told in the log is not told again.
    pub(crate) fn remember(&mut self, told: Told) {
        self.refused.extend(told);
    }

    /// A node is not registered any more; `more` others are missing too.
    fn vanish(&mut self, node: &Arc<Node>, more: usize, changes: &mut Vec<Change>, now: Instant) {
        if self.suspects.contains(&node.id) {
            return;
        }
        let before = self.suspects.len();
        match self.suspects.vanished(node, self.nodes.len(), more, now) {
            Verdict::Gone => self.remove(&node.id, changes),
            Verdict::Stays(returned) => {
                if before == 0 {
                    warn!(
                        nodes = self.nodes.len(),
                        "many nodes have vanished at once without having said goodbye; they stay as suspects for a while"
                    );
                }
                self.suspect(&node.id);
                if returned.is_empty() {
                    return;
                }
                let ids: HashSet<&str> = returned.iter().map(|node| &*node.id).collect();
                // Whose leaving has not been told yet has not left.
                let mut untold = HashSet::new();
                changes.retain(|change| match change {
                    Change::Left(node) if ids.contains(&*node.id) => {
                        untold.insert(node.id.clone());
                        false
                    }
                    _ => true,
                });
                for node in returned {
                    self.suspect(&node.id);
                    self.nodes.insert(node.clone());
                    if !untold.contains(&node.id) {
                        changes.push(Change::Joined(node));
                    }
                }
            }
        }
    }

    fn suspect(&mut self, id: &str) {
        self.nodes.mark_suspect(id);
    }

    fn insert(&mut self, id: &str, entry: &Entry, changes: &mut Vec<Change>) {
        let is_new = self.nodes.get(id).is_none();
        let admitted = if is_new && self.nodes.len() >= self.admission.limits.nodes {
            Err(Refusal::TooLarge(self.too_many()))
        } else {
            self.admission.admit(id, entry)
        };
        match admitted {
            Ok(node) => {
                if let Some(fault) = validate::weight_fault(node.weight) {
                    self.skipped.weights += 1;
                    let mut told = Told::default();
                    self.tell_fault(&mut told, entry, &fault);
                    self.remember(told);
                }
                self.take_in(Arc::new(registered(node, entry)), changes);
            }
            Err(Refusal::Unwanted) => self.drop_now(id, changes),
            Err(refusal) => {
                let stays = count(&mut self.skipped, &refusal);
                let mut told = Told::default();
                self.tell_refusal(&mut told, entry, refusal.reason());
                self.remember(told);
                if stays {
                    self.drop_unless(id, incarnation(entry), changes);
                } else {
                    self.drop_now(id, changes);
                }
            }
        }
    }

    fn take_in(&mut self, node: Arc<Node>, changes: &mut Vec<Change>) {
        if self.suspects.returned(&node.id) {
            self.nodes.clear_suspect(&node.id);
            if self.suspects.len() == 0 {
                info!("no node is a suspect any more");
            }
        }
        let old = self.nodes.get(&node.id).cloned();
        self.nodes.insert(node.clone());
        changes.push(match old {
            Some(old) => Change::Updated { old, new: node },
            None => Change::Joined(node),
        });
    }

    /// A value that says nothing leaves a node as it was, for its lease is alive and where it is has
    /// not changed. Unless the key is another registration's by now.
    fn drop_unless(&mut self, id: &str, incarnation: i64, changes: &mut Vec<Change>) {
        let other = self.nodes.get(id).map(|old| old.incarnation());
        if other.is_some_and(|other| other != incarnation) {
            self.remove(id, changes);
        }
    }

    /// It is registered, but not for this view.
    fn drop_now(&mut self, id: &str, changes: &mut Vec<Change>) {
        // Not one that has vanished, to come back should others follow.
        if self.suspects.returned(id) {
            self.nodes.clear_suspect(id);
        }
        self.remove(id, changes);
    }

    fn remove(&mut self, id: &str, changes: &mut Vec<Change>) {
        if self.suspects.release(id) || self.nodes.is_suspect(id) {
            self.nodes.clear_suspect(id);
        }
        if let Some(old) = self.nodes.get(id).cloned() {
            self.nodes.remove(id);
            changes.push(Change::Left(old));
        }
    }

    /// Suspects make way when there are more nodes than allowed: those go first that would go first
    /// anyway.
    fn make_room(&mut self, changes: &mut Vec<Change>) {
        while self.nodes.len() > self.admission.limits.nodes {
            let Some(id) = self.suspects.first() else {
                return;
            };
            self.remove(&id, changes);
        }
    }

    fn too_many(&self) -> String {
        let most = self.admission.limits.nodes;
        format!("there are {most} nodes already, and no more are allowed")
    }

    /// Once for each key and reason: who corrects a mistake into another one has to hear of it.
    fn tell_refusal(&self, told: &mut Told, entry: &Entry, reason: &str) {
        if told.tell(&self.refused, &entry.key, reason) {
            // A parser's reason may repeat the value.
            let (key, revision) = (shortened(&entry.key), entry.mod_revision);
            warn!(key, revision, reason = shortened(reason), "entry skipped");
        }
    }

    /// The same for an entry that is good but for something that has a default.
    fn tell_fault(&self, told: &mut Told, entry: &Entry, reason: &str) {
        if told.tell(&self.refused, &entry.key, reason) {
            let (key, revision) = (shortened(&entry.key), entry.mod_revision);
            warn!(key, revision, reason, "entry taken in but for a field");
        }
    }

    fn enqueue(&mut self, entry: &Entry) {
        self.dequeue(&entry.key);
        let candidate = match self.candidate(entry) {
            Ok(_) if self.places.len() >= self.admission.limits.nodes => {
                Err(Refusal::TooLarge(String::new()))
            }
            candidate => candidate,
        };
        match candidate {
            Ok(id) => {
                self.places.insert(entry.key.clone(), entry.create_revision);
                let candidate = Candidate {
                    id: id.to_owned(),
                    lease: entry.lease,
                };
                self.queue
                    .insert((entry.create_revision, entry.key.clone()), candidate);
            }
            Err(refusal) => drop(count(&mut self.skipped, &refusal)),
        }
    }

    /// The id of a candidate.
    fn candidate<'e>(&self, entry: &'e Entry) -> Result<&'e str, Refusal> {
        if !self.keys.is_candidacy(&entry.key) {
            return Err(Refusal::Unwanted);
        }
        let limits = &self.admission.limits;
        if entry.value.len() > validate::NAME_BYTES {
            return Err(Refusal::TooLarge("its id is too long".to_owned()));
        }
        limits.check_key(&entry.key).map_err(Refusal::TooLarge)?;
        std::str::from_utf8(&entry.value).map_err(|error| Refusal::Malformed(error.to_string()))
    }

    fn dequeue(&mut self, key: &str) {
        if let Some(place) = self.places.remove(key) {
            self.queue.remove(&(place, key.to_owned()));
        }
    }

    /// Works out who leads. A leader that is not registered (yet) leads nothing: there is nowhere
    /// to send to. Nor does one whose id has been registered by another process since: a term
    /// belongs to the life of the process that holds both keys, which is its lease. Until the dead
    /// one's lease has run out there is no leader.
    fn settle(&mut self, changes: &mut Vec<Change>) {
        self.make_room(changes);
        self.tell_without_lease();
        let first = self.queue.first_key_value();
        let leader = first.and_then(|((epoch, key), Candidate { id, lease })| {
            if self.suspects.contains(id) {
                return None;
            }
            let node = match &self.leader {
                Some(leader)
                    if bugs::has(Bug::LeaderOutlivesRegistration)
                        && *leader.key == **key
                        && leader.epoch == *epoch =>
                {
                    &leader.node
                }
                _ => self.nodes.get(id)?,
            };
            let is_its_life = lease.is_some() && node.lease() == *lease;
            if !is_its_life && !bugs::has(Bug::LeaderById) {
                return None;
            }
            Some(Leadership {
                node: node.clone(),
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

impl View {
    /// Somebody put it by hand: it is first in line, and no lease will ever take it away.
    fn tell_without_lease(&mut self) {
        let first = self.queue.first_key_value();
        let blocks = first.filter(|(_, candidate)| candidate.lease.is_none());
        let Some(((_, key), _)) = blocks else {
            return;
        };
        if self.told_without_lease.as_ref() != Some(key) {
            let key = key.clone();
            warn!(
                key = shortened(&key),
                "this election key has no lease, so nobody leads the group until it is deleted"
            );
            self.told_without_lease = Some(key);
        }
    }
}

impl Staged {
    pub(crate) fn take_refused(&mut self) -> Told {
        std::mem::take(&mut self.refused)
    }

    fn saw(&mut self, entry: &Entry) {
        let newest = self
            .witness
            .as_ref()
            .is_none_or(|witness| entry.mod_revision >= witness.written);
        if newest {
            self.witness = Some(Witness::of(entry));
        }
    }
}

/// Counts a refusal. Answers whether the node stays as it was: unless it points elsewhere now.
fn count(skipped: &mut RejectedEntries, refusal: &Refusal) -> bool {
    match refusal {
        Refusal::Malformed(_) => skipped.malformed += 1,
        Refusal::TooLarge(_) => skipped.too_large += 1,
        Refusal::NotAllowed(_) => skipped.not_allowed += 1,
        Refusal::Unwanted => {}
    }
    !matches!(refusal, Refusal::NotAllowed(_) | Refusal::Unwanted)
}

fn is_same(old: &Node, new: &Node) -> bool {
    // Saying goodbye may take no longer than a millisecond.
    let stays = old.is_leaving() == new.is_leaving();
    let written_once = old.last_seen == new.last_seen && old.revision() == new.revision();
    stays && written_once && !new.differs(old)
}

fn incarnation(entry: &Entry) -> i64 {
    // Never positive without a lease, whatever a store says.
    let without = -entry.create_revision.saturating_abs();
    entry.lease.map_or(without, |lease| lease.0)
}

/// What its key says of a node: which registration it is, and when it was written.
fn registered(node: Node, entry: &Entry) -> Node {
    node.with_incarnation(incarnation(entry))
        .with_revision(entry.mod_revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::told::MOST_LINES;
    use crate::discovery::{EntryLimits, NodeFilter};
    use proptest::prelude::*;

    fn view() -> View {
        View::new(keys(), Admission::default(), SelfPreservation::off())
    }

    fn reset(
        view: &mut View,
        nodes: &[Entry],
        candidates: &[Entry],
        revision: Revision,
    ) -> Vec<Change> {
        let mut staged = Staged::default();
        // A page of two, so that there are several.
        nodes
            .chunks(2)
            .for_each(|page| view.stage(&mut staged, page));
        view.stage_candidates(&mut staged, candidates);
        view.reset(staged, revision, Instant::now())
    }

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
        let mut view = view();
        let changes = view.apply(
            &[put(node("a", 2, 1)), put(candidate("a", 3, 1))],
            Instant::now(),
        );
        assert_eq!(
            told(&changes),
            ["node a joined at 10.0.0.1", "node a leads"]
        );
        assert_eq!(view.leader().unwrap().epoch, 3);
        let changes = view.apply(
            &[
                delete(keys().registration("a"), 4),
                delete(keys().candidacy(LeaseId(1)), 4),
            ],
            Instant::now(),
        );
        assert_eq!(told(&changes), ["node a left", "no leader"]);
        assert_eq!(view.nodes().revision(), 4);
    }

    #[test]
    fn the_leader_counts_once_it_is_registered() {
        let mut view = view();
        assert!(
            view.apply(&[put(candidate("a", 2, 1))], Instant::now())
                .is_empty()
        );
        assert!(view.leader().is_none());
        let changes = view.apply(&[put(node("a", 3, 1))], Instant::now());
        assert_eq!(
            told(&changes),
            ["node a joined at 10.0.0.1", "node a leads"]
        );
    }

    #[test]
    fn a_relist_tells_the_difference_only() {
        let mut view = view();
        reset(
            &mut view,
            &[node("a", 2, 1), node("b", 3, 2)],
            &[candidate("a", 4, 1)],
            5,
        );
        let changes = reset(
            &mut view,
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
        let mut view = view();
        let changes = reset(
            &mut view,
            &[
                registration("bad", "{", 2, 1),
                registration("liar", r#"{"id":"a","ip":"10.0.0.9"}"#, 3, 2),
                node("a", 4, 3),
            ],
            &[],
            4,
        );
        assert_eq!(told(&changes), ["node a joined at 10.0.0.1"]);
        assert_eq!(view.rejected_entries().malformed, 2);
        // A bad update of a live registration changes nothing, one by another registration does.
        assert!(
            view.apply(&[put(registration("a", "?", 5, 3))], Instant::now())
                .is_empty()
        );
        let changes = view.apply(&[put(registration("a", "?", 6, 4))], Instant::now());
        assert_eq!(told(&changes), ["node a left"]);
        assert_eq!(view.rejected_entries().malformed, 4);
    }

    #[test]
    fn keys_of_other_groups_are_not_ours() {
        let mut view = view();
        let mut nested = node("a", 2, 1);
        nested.key = "registry/g/sub/a".to_owned();
        assert!(view.apply(&[put(nested)], Instant::now()).is_empty());
    }

    #[test]
    fn an_update_of_the_time_alone_is_no_event_but_is_in_the_view() {
        let mut view = view();
        view.apply(&[put(node("a", 2, 1))], Instant::now());
        let changes = view.apply(&[put(node("a", 7, 1))], Instant::now());
        assert_eq!(changes.len(), 1);
        assert!(told(&changes).is_empty());
        assert_eq!(view.nodes().get("a").unwrap().last_seen, 7);
    }

    fn preserving() -> View {
        View::new(keys(), Admission::default(), SelfPreservation::default())
    }

    fn many(count: i64) -> Vec<Entry> {
        (0..count)
            .map(|id| node(&format!("n{id:03}"), id + 2, id + 1))
            .collect()
    }

    #[test]
    fn a_term_is_of_one_life() {
        let mut view = view();
        let now = Instant::now();
        reset(&mut view, &[node("a", 2, 1)], &[candidate("a", 3, 1)], 3);
        assert_eq!(view.leader().unwrap().epoch, 3);
        // Started again under the same id before its lease has run out: the old term is nobody's.
        let moved = r#"{"id":"a","ip":"10.0.0.9"}"#;
        let mut again = registration("a", moved, 2, 9);
        again.mod_revision = 4;
        let changes = view.apply(&[put(again.clone()), put(candidate("a", 5, 9))], now);
        assert_eq!(told(&changes), ["node a updated", "no leader"]);
        assert!(view.leader().is_none());
        // The same for a reader that starts in between.
        let both = [candidate("a", 3, 1), candidate("a", 5, 9)];
        reset(&mut view, &[again], &both, 6);
        assert!(view.leader().is_none());
        let changes = view.apply(&[delete(keys().candidacy(LeaseId(1)), 7)], now);
        assert_eq!(told(&changes), ["node a leads"]);
        let leader = view.leader().unwrap();
        assert_eq!(
            (leader.epoch, leader.node.ip.to_string()),
            (5, "10.0.0.9".into())
        );
    }

    #[test]
    fn keys_without_a_lease() {
        let mut view = view();
        let mut fixed = node("s", 2, 1);
        fixed.lease = None;
        let mut by_hand = candidate("s", 3, 1);
        by_hand.lease = None;
        reset(
            &mut view,
            &[fixed, node("a", 4, 2)],
            &[by_hand, candidate("a", 5, 2)],
            5,
        );
        // A backend like any other, but it leads nothing, and nobody does.
        let node = view.nodes().get("s").unwrap();
        assert_eq!((node.lease(), node.incarnation()), (None, -2));
        assert!(view.leader().is_none());
        let key = keys().candidacy(LeaseId(1));
        assert_eq!(view.told_without_lease.as_ref(), Some(&key));
        view.apply(&[delete(key, 6)], Instant::now());
        assert_eq!(view.leader().unwrap().node.id, "a");
    }

    fn gone(entry: &Entry, revision: Revision) -> WatchEvent {
        delete(entry.key.clone(), revision)
    }

    #[test]
    fn a_few_that_vanish_are_gone_and_many_stay_for_a_while() {
        let start = Instant::now();
        let nodes = many(10);
        let mut view = preserving();
        reset(&mut view, &nodes, &[candidate("n000", 50, 1)], 60);
        // Three of ten are no more than 30 %.
        for (index, entry) in nodes[..3].iter().enumerate() {
            view.apply(&[gone(entry, 61 + index as i64)], start);
        }
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (7, 0));
        // The fourth makes it many: those before come back.
        let changes = view.apply(&[gone(&nodes[3], 64)], start + Duration::from_secs(1));
        assert_eq!(changes.len(), 3, "{:?}", told(&changes));
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (10, 4));
        assert!(view.nodes().is_suspect("n000") && !view.nodes().is_suspect("n009"));
        assert!(view.leader().is_none(), "a suspect leads nothing");
        // The rest, in one go.
        let rest: Vec<_> = nodes[4..].iter().map(|entry| gone(entry, 70)).collect();
        assert!(view.apply(&rest, start + Duration::from_secs(2)).is_empty());
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (10, 10));
        // One comes back: it is a node like any other.
        let changes = view.apply(&[put(node("n000", 80, 1))], start + Duration::from_secs(3));
        assert_eq!(told(&changes), ["node n000 leads"]);
        assert_eq!(view.nodes().suspects(), 9);
        // The others are given up, each after its time.
        assert!(view.expire(start + Duration::from_secs(29)).is_empty());
        assert_eq!(view.next_due(), Some(start + Duration::from_secs(30)));
        assert_eq!(view.expire(start + Duration::from_secs(30)).len(), 2);
        assert_eq!(view.expire(start + Duration::from_secs(32)).len(), 7);
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (1, 0));
        assert_eq!(view.next_due(), None);
    }

    #[test]
    fn a_list_without_many_of_them_is_a_mass_expiry_too() {
        let nodes = many(10);
        for (kept, suspects) in [(10, 0), (7, 0), (6, 4), (0, 10)] {
            let mut view = preserving();
            reset(&mut view, &nodes, &[], 60);
            let changes = reset(&mut view, &nodes[..kept], &[], 90);
            assert_eq!(view.nodes().suspects(), suspects, "{kept}");
            let len = if suspects > 0 { 10 } else { kept };
            assert_eq!(view.nodes().len(), len);
            assert_eq!(changes.len(), 10 - len);
        }
    }

    #[test]
    fn a_list_of_others_is_no_shorter() {
        let nodes = many(10);
        let others: Vec<_> = (20..30)
            .map(|id| node(&format!("n{id:03}"), id + 2, id + 1))
            .collect();
        let mut view = preserving();
        reset(&mut view, &nodes, &[], 60);
        reset(&mut view, &others, &[], 90);
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (10, 0));
    }

    #[test]
    fn who_is_registered_but_not_wanted_any_more_is_no_suspect() {
        let admission = Admission {
            filter: NodeFilter::new().tag("x"),
            ..Admission::default()
        };
        let mut view = View::new(keys(), admission, SelfPreservation::default());
        let tagged = |id: i64, tags: &str, revision| {
            let name = format!("n{id:03}");
            let value = format!(r#"{{"id":"{name}","ip":"10.0.0.1","tags":[{tags}]}}"#);
            registration(&name, &value, revision, id + 1)
        };
        let all = |tagged_from: i64| -> Vec<_> {
            let tags = |id| if id < tagged_from { "" } else { r#""x""# };
            (0..10).map(|id| tagged(id, tags(id), 2)).collect()
        };
        reset(&mut view, &all(0), &[], 60);
        reset(&mut view, &all(5), &[], 90);
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (5, 0));
        // One that vanished and came back without the tag stays away when others vanish.
        let now = Instant::now();
        view.apply(&[delete(keys().registration("n005"), 91)], now);
        view.apply(&[put(tagged(5, "", 92))], now);
        for id in 6..9 {
            view.apply(
                &[delete(keys().registration(&format!("n{id:03}")), 93)],
                now,
            );
        }
        assert!(view.nodes().get("n005").is_none());
        assert!(view.nodes().suspects() > 0);
    }

    #[test]
    fn who_says_goodbye_is_gone() {
        let mut view = preserving();
        let drained = |id: i64, revision| {
            let value = format!(r#"{{"id":"n{id:03}","ip":"10.0.0.1","state":"draining"}}"#);
            registration(&format!("n{id:03}"), &value, revision, id + 1)
        };
        let nodes = many(10);
        reset(&mut view, &nodes, &[], 60);
        for id in 0..10 {
            view.apply(&[put(drained(id, 70 + id))], Instant::now());
        }
        for entry in &nodes {
            view.apply(&[gone(entry, 90)], Instant::now());
        }
        assert!(view.nodes().is_empty());
    }

    #[test]
    fn vanishing_over_a_long_time_is_no_mass_expiry() {
        let start = Instant::now();
        let nodes = many(10);
        let mut view = preserving();
        reset(&mut view, &nodes, &[], 60);
        for (index, entry) in nodes.iter().enumerate() {
            let now = start + Duration::from_secs(11) * index as u32;
            view.apply(&[gone(entry, 70)], now);
        }
        // Each is by itself, and there are never three.
        assert!(view.nodes().is_empty());
    }

    #[test]
    fn a_filter_is_live() {
        let admission = Admission {
            filter: NodeFilter::new().zone("a").tag("x"),
            ..Admission::default()
        };
        let mut view = View::new(keys(), admission, SelfPreservation::off());
        let tagged = |zone: &str, tags: &str, revision| {
            let value = format!(r#"{{"id":"n","ip":"10.0.0.1","zone":"{zone}","tags":[{tags}]}}"#);
            put(registration("n", &value, revision, 1))
        };
        let now = Instant::now();
        assert!(view.apply(&[tagged("a", "", 2)], now).is_empty());
        assert_eq!(
            told(&view.apply(&[tagged("a", r#""x","y""#, 3)], now)),
            ["node n joined at 10.0.0.1"]
        );
        assert_eq!(
            told(&view.apply(&[tagged("b", r#""x""#, 4)], now)),
            ["node n left"]
        );
        assert_eq!(
            view.rejected_entries(),
            RejectedEntries::default(),
            "that is no fault of theirs"
        );
    }

    #[test]
    fn strangers_and_giants_are_skipped_and_counted() {
        let admission = Admission {
            networks: vec!["10.0.0.0/8".parse().unwrap()],
            limits: EntryLimits {
                nodes: 3,
                ..EntryLimits::default()
            },
            ..Admission::default()
        };
        let mut view = View::new(keys(), admission, SelfPreservation::off());
        let at = |id: &str, ip: &str, revision| {
            put(registration(
                id,
                &format!(r#"{{"id":"{id}","ip":"{ip}"}}"#),
                revision,
                1,
            ))
        };
        let now = Instant::now();
        view.apply(&[at("a", "10.0.0.1", 2), at("b", "192.168.0.1", 3)], now);
        assert_eq!(
            (view.nodes().len(), view.rejected_entries().not_allowed),
            (1, 1)
        );
        // One that moves out of the network is not kept where it was.
        assert_eq!(
            told(&view.apply(&[at("a", "192.168.0.1", 4)], now)),
            ["node a left"]
        );
        let large = format!(
            r#"{{"id":"c","ip":"10.0.0.1","metadata":"{}"}}"#,
            "x".repeat(70_000)
        );
        view.apply(&[put(registration("c", &large, 5, 1))], now);
        assert_eq!(
            (view.nodes().len(), view.rejected_entries().too_large),
            (0, 1)
        );
        for id in ["d", "e", "f", "g"] {
            view.apply(&[at(id, "10.0.0.2", 6)], now);
        }
        assert_eq!(
            (view.nodes().len(), view.rejected_entries().too_large),
            (3, 2)
        );
        assert_eq!(view.rejected_entries().total(), 4);
    }

    /// What the store might do to three nodes' keys.
    #[test]
    fn candidates_that_are_none_take_no_place() {
        let limits = EntryLimits {
            nodes: 1,
            ..EntryLimits::default()
        };
        let admission = Admission {
            limits,
            ..Admission::default()
        };
        let mut view = View::new(keys(), admission, SelfPreservation::off());
        let mut staged = Staged::default();
        view.stage(&mut staged, &[node("a", 2, 3)]);
        let mut giant = candidate("a", 3, 1);
        giant.value = vec![b'a'; 1_000_000];
        let mut garbage = candidate("a", 4, 2);
        garbage.value = vec![0xff];
        let good = candidate("a", 5, 3);
        view.stage_candidates(&mut staged, &[giant, garbage, good]);
        assert_eq!(staged.candidates.len(), 1, "only what is used is kept");
        view.reset(staged, 6, Instant::now());
        assert_eq!(view.leader().unwrap().epoch, 5);
        assert_eq!(
            (
                view.rejected_entries().too_large,
                view.rejected_entries().malformed
            ),
            (1, 1)
        );
    }

    #[test]
    fn who_is_no_backend_any_more_is_gone_and_a_weight_that_is_none_is_counted() {
        let mut view = view();
        let put = |fields: &str, revision| {
            let value = format!(r#"{{"id":"n",{fields}}}"#);
            put(registration("n", &value, revision, 1))
        };
        let now = Instant::now();
        view.apply(&[put(r#""ip":"10.0.0.1""#, 2)], now);
        let changes = view.apply(&[put(r#""ip":"0.0.0.0""#, 3)], now);
        assert_eq!(told(&changes), ["node n left"], "not kept where it was");
        view.apply(&[put(r#""ip":"10.0.0.1","port":0"#, 4)], now);
        assert_eq!(
            (view.nodes().len(), view.rejected_entries().not_allowed),
            (0, 2)
        );
        // A weight that is none does not keep out what else the entry says, such as draining.
        for (weight, revision) in [("-5", 5), (r#""0""#, 6), ("[]", 7)] {
            let fields =
                format!(r#""ip":"10.0.0.{revision}","weight":{weight},"state":"DRAINING""#);
            view.apply(&[put(&fields, revision)], now);
            let node = view.nodes().get("n").unwrap();
            assert_eq!(node.ip, std::net::IpAddr::from([10, 0, 0, revision as u8]));
            assert!(!node.is_serving());
        }
        assert_eq!(
            (
                view.rejected_entries().weights,
                view.rejected_entries().total()
            ),
            (3, 2)
        );
        let entry = registration("n", r#"{"id":"n","ip":"10.0.0.1","weight":-1}"#, 8, 1);
        reset(&mut view, &[entry], &[], 9);
        assert_eq!(
            (view.rejected_entries().weights, view.nodes().len()),
            (4, 1)
        );
    }

    #[test]
    fn each_reason_of_a_key_is_told_once() {
        let mut view = view();
        let now = Instant::now();
        let mut lines = Vec::new();
        for (fields, revision) in [
            (r#""port":"80""#, 2),
            (r#""port":"8080","last_seen":12345"#, 3),
            (r#""port":80"#, 4),
            (r#""zone":80"#, 5),
            (r#""port":"80""#, 6),
            (r#""port":80000"#, 7),
        ] {
            let value = format!(r#"{{"id":"n","ip":"10.0.0.1",{fields}}}"#);
            view.apply(&[put(registration("n", &value, revision, 1))], now);
            lines.push(view.refused.len());
        }
        // A text is a text, whatever is in it; the same mistake again is known.
        assert_eq!(lines, [1, 1, 1, 2, 2, 3]);
        assert_eq!(view.rejected_entries().malformed, 5);
    }

    #[test]
    fn few_refused_keys_are_remembered() {
        let mut view = view();
        for at in 0..20_000 {
            let key = format!("{at}-{}", "k".repeat(2_000));
            view.apply(&[put(registration(&key, "{}", at, 1))], Instant::now());
        }
        assert_eq!(view.rejected_entries().too_large, 20_000);
        assert_eq!(view.refused.len(), MOST_LINES);
        let key = keys().registration(&format!("5-{}", "k".repeat(2_000)));
        view.apply(&[delete(key, 20_001)], Instant::now());
        // Else one who comes and goes would fill the log.
        assert_eq!(view.refused.len(), MOST_LINES);
    }

    #[test]
    fn suspects_do_not_exceed_the_limit() {
        let limits = EntryLimits {
            nodes: 4,
            ..EntryLimits::default()
        };
        let admission = || Admission {
            limits,
            ..Admission::default()
        };
        let mut view = View::new(keys(), admission(), SelfPreservation::default());
        let now = Instant::now();
        let event = |(id, is_there): (&str, bool)| match is_there {
            true => put(node(id, 2, 1)),
            false => delete(keys().registration(id), 3),
        };
        // Two are gone and two have come when it turns out that many vanish.
        let events = [("a", true), ("b", true), ("c", true), ("d", true)];
        view.apply(&events.map(event), now);
        for (id, is_there) in [("a", false), ("e", true), ("b", false), ("f", true)] {
            view.apply(&[event((id, is_there))], now);
        }
        view.apply(&[event(("c", false))], now);
        assert_eq!(view.nodes().len(), 4);
        assert!(
            ["d", "e", "f"]
                .iter()
                .all(|id| view.nodes().get(id).is_some())
        );
        // Or a list has others.
        let others = ["w", "x", "y", "z"].map(|id| node(id, 9, 2));
        reset(&mut view, &others, &[], 9);
        assert_eq!((view.nodes().len(), view.nodes().suspects()), (4, 0));
        // Or a file has more.
        let mut view = View::new(keys(), admission(), SelfPreservation::default());
        let ip = "10.0.0.1".parse().unwrap();
        let nodes = ["", "a/b", "1", "2", "3", "4", "5"].map(|id| Node::new(id, ip));
        view.restore(nodes.into(), 1);
        assert!(view.nodes().get("a/b").is_none());
        assert_eq!(view.nodes().len(), 4);
    }

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
            let mut view = view();
            let mut folded: BTreeMap<String, i64> = BTreeMap::new();
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
                    reset(&mut view, &entries(&registered), &entries(&queued), revision)
                } else {
                    view.apply(&[event], Instant::now())
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
                    prop_assert_eq!(seen.get(&id), Some(&entry.mod_revision));
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
