//! One step from a state of a group to the next.

use std::sync::Arc;

use super::event::ClusterEvent;
use super::leadership::Leadership;
use super::nodes::Nodes;
use crate::node::Node;

/// A step from one state of a group to the next, as delivered by
/// [`changes`](crate::ServiceDiscovery::changes).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Change {
    /// The complete state: forget everything before it. The next change is the leader.
    Reset(Arc<Nodes>),
    /// A node has registered.
    Joined(Arc<Node>),
    /// A node has written its entry again.
    Updated {
        /// The node before.
        old: Arc<Node>,
        /// The node now.
        new: Arc<Node>,
    },
    /// A node is gone.
    Left(Arc<Node>),
    /// The leader has changed; `None` if there is no leader now.
    Leader(Option<Leadership>),
}

impl Change {
    /// The complete state, as a list. Of several nodes with one id, the last one counts.
    pub fn all(nodes: impl IntoIterator<Item = Node>) -> Self {
        Self::Reset(Arc::new(nodes.into_iter().map(Arc::new).collect()))
    }

    /// The event that reports this change to subscribers, if there is one.
    pub(crate) fn event(&self) -> Option<ClusterEvent> {
        Some(match self {
            Self::Reset(_) => return None,
            Self::Joined(node) => ClusterEvent::NodeJoined(node.clone()),
            Self::Updated { old, new } if new.differs(old) => ClusterEvent::NodeUpdated {
                old: old.clone(),
                new: new.clone(),
            },
            Self::Updated { .. } => return None,
            Self::Left(node) => ClusterEvent::NodeLeft(node.clone()),
            Self::Leader(Some(leadership)) => ClusterEvent::LeaderElected(leadership.node.clone()),
            Self::Leader(None) => ClusterEvent::LeaderLost,
        })
    }
}
