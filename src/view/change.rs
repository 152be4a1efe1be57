//! What changed in a group between two views.

use std::sync::Arc;

use super::event::ClusterEvent;
use super::leadership::Leadership;
use super::nodes::Nodes;
use crate::node::Node;

/// A step from one state of a group to the next, as
/// [`changes`](crate::ServiceDiscovery::changes) tells it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Change {
    /// Forget what you know: these are the nodes. The leader follows as the next change.
    Reset(Arc<Nodes>),
    /// A node has registered.
    Joined(Arc<Node>),
    /// A node has written its entry again.
    Updated {
        /// As it was.
        old: Arc<Node>,
        /// As it is.
        new: Arc<Node>,
    },
    /// A node is gone.
    Left(Arc<Node>),
    /// Who leads now.
    Leader(Option<Leadership>),
}

impl Change {
    /// The event that tells of this change, if there is one.
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
