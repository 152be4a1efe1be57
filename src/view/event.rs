//! The events of a group, in the form that `photon-etcd-cluster` defined.

use std::fmt;
use std::sync::Arc;

use crate::node::Node;

/// Something that happened in a group, as delivered by
/// [`subscribe`](crate::ServiceDiscovery::subscribe).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClusterEvent {
    /// A node has registered.
    NodeJoined(Arc<Node>),
    /// A node has changed something in its entry other than the time of writing.
    NodeUpdated {
        /// The node before.
        old: Arc<Node>,
        /// The node now.
        new: Arc<Node>,
    },
    /// A node has left, or its lease has expired.
    NodeLeft(Arc<Node>),
    /// A node has become the leader. Also sent when the same node leads again in a new term.
    LeaderElected(Arc<Node>),
    /// There is no leader at the moment.
    LeaderLost,
    /// The first complete view is available.
    Ready,
    /// Contact with the store is lost; the last view stays in use.
    Disconnected,
    /// Contact with the store is restored. The events that were missed come before this one, or
    /// follow it.
    Reconnected,
}

impl fmt::Display for ClusterEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodeJoined(node) => write!(f, "node {} joined at {}", node.id, node.ip),
            Self::NodeUpdated { new, .. } => write!(f, "node {} updated", new.id),
            Self::NodeLeft(node) => write!(f, "node {} left", node.id),
            Self::LeaderElected(node) => write!(f, "node {} leads", node.id),
            Self::LeaderLost => f.write_str("no leader"),
            Self::Ready => f.write_str("ready"),
            Self::Disconnected => f.write_str("disconnected"),
            Self::Reconnected => f.write_str("reconnected"),
        }
    }
}
