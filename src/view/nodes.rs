//! The nodes of a group at one revision, immutable and shared between versions.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use rpds::RedBlackTreeSetSync;

use crate::ids::Revision;
use crate::node::Node;

/// The nodes of a group at one revision. Immutable; two versions share what did not change, so a
/// new one costs what changed and keeping an old one costs little.
#[derive(Clone, Default)]
pub struct Nodes {
    nodes: RedBlackTreeSetSync<ById>,
    suspects: RedBlackTreeSetSync<Arc<str>>,
    revision: Revision,
}

/// A node in the order of ids.
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
    /// Every node, in the order of ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.iter().map(|node| &node.0)
    }

    /// The node with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Node>> {
        self.nodes.get(id).map(|node| &node.0)
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

    /// Whether this node's lease is gone, and it is here because too many vanished with it
    /// ([`SelfPreservation`](crate::discovery::SelfPreservation)).
    pub fn is_suspect(&self, id: &str) -> bool {
        self.suspects.contains(id)
    }

    /// How many are suspects.
    pub fn suspects(&self) -> usize {
        self.suspects.size()
    }

    /// Adds a node, or replaces the one with its id.
    pub(crate) fn insert(&mut self, node: Arc<Node>) {
        self.nodes.insert_mut(ById(node));
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.nodes.remove_mut(id);
    }

    pub(crate) fn mark_suspect(&mut self, id: &str) {
        self.suspects.insert_mut(Arc::from(id));
    }

    /// Returns whether it was a suspect.
    pub(crate) fn clear_suspect(&mut self, id: &str) -> bool {
        self.suspects.remove_mut(id)
    }

    pub(crate) fn clear_suspects(&mut self) {
        self.suspects = RedBlackTreeSetSync::default();
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
