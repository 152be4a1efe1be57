//! The nodes of a group at one revision, immutable and shared between versions.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};
use tokio::time::Instant;

use crate::ids::Revision;
use crate::node::Node;

/// The nodes of a group at one revision. Immutable. Two versions share what did not change, so a
/// new version costs as much as what changed, and keeping an old one costs little.
#[derive(Clone, Default)]
pub struct Nodes {
    nodes: RedBlackTreeSetSync<ById>,
    /// The nodes that are kept although their leases are gone, and until when. A suspect is always
    /// a member of `nodes`.
    suspects: RedBlackTreeMapSync<Arc<str>, Instant>,
    revision: Revision,
}

/// A node, ordered by id.
#[derive(Clone)]
struct ById(Arc<Node>);

impl Borrow<str> for ById {
    fn borrow(&self) -> &str {
        &self.0.id
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ById {}

impl PartialOrd for ById {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ById {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.id.cmp(&other.0.id)
    }
}

impl Nodes {
    /// All nodes, ordered by id.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.iter().map(|node| &node.0)
    }

    /// The node with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Node>> {
        self.nodes.get(id).map(|node| &node.0)
    }

    /// The number of nodes, suspects included.
    pub fn len(&self) -> usize {
        self.nodes.size()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The store's revision of the last change in this view.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether this node is a suspect: its lease is gone, and it is kept because too many nodes
    /// vanished together ([`SelfPreservation`](crate::discovery::SelfPreservation)).
    pub fn is_suspect(&self, id: &str) -> bool {
        self.suspects.contains_key(id)
    }

    /// The number of suspects.
    pub fn suspects(&self) -> usize {
        self.suspects.size()
    }

    /// Adds a node, or replaces the node with the same id.
    pub(crate) fn insert(&mut self, node: Arc<Node>) {
        self.nodes.insert_mut(ById(node));
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.nodes.remove_mut(id);
    }

    /// Marks a node as a suspect that is kept until this time.
    pub(crate) fn mark_suspect(&mut self, id: Arc<str>, until: Instant) {
        self.suspects.insert_mut(id, until);
    }

    /// Removes the mark. Returns it if the node was a suspect.
    pub(crate) fn clear_suspect(&mut self, id: &str) -> Option<(Arc<str>, Instant)> {
        let (key, until) = self.suspects.get_key_value(id)?;
        let mark = (key.clone(), *until);
        self.suspects.remove_mut(id);
        Some(mark)
    }

    pub(crate) fn clear_suspects(&mut self) {
        self.suspects = RedBlackTreeMapSync::default();
    }

    /// The suspects, and until when each of them is kept.
    pub(crate) fn suspects_until(&self) -> impl Iterator<Item = (&Arc<str>, Instant)> {
        self.suspects.iter().map(|(id, until)| (id, *until))
    }

    pub(crate) fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }
}

/// A view of these nodes at revision 0, for nodes that do not come from a discovery. Of several with
/// the same id the last one counts.
impl FromIterator<Arc<Node>> for Nodes {
    fn from_iter<I: IntoIterator<Item = Arc<Node>>>(nodes: I) -> Self {
        let mut all = Self::default();
        nodes.into_iter().for_each(|node| all.insert(node));
        all
    }
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes")
            .field("revision", &self.revision)
            .field(
                "nodes",
                &self.iter().map(|node| &node.id).collect::<Vec<_>>(),
            )
            .field("suspects", &self.suspects())
            .finish()
    }
}
