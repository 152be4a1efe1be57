//! Events of a group in the form that `photon-etcd-cluster` has for them.

use std::fmt;
use std::sync::Arc;

use crate::node::Node;

/// What happened in a group, as [`subscribe`](crate::ServiceDiscovery::subscribe) tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClusterEvent {
    /// A node has registered.
    NodeJoined(Arc<Node>),
    /// A node has changed something about itself other than the time of writing.
    NodeUpdated {
        /// As it was.
        old: Arc<Node>,
        /// As it is.
        new: Arc<Node>,
    },
    /// A node has left, or its lease has run out.
    NodeLeft(Arc<Node>),
    /// A node leads from now on; also a node that leads again, in a new term.
    LeaderElected(Arc<Node>),
    /// Nobody leads for the moment.
    LeaderLost,
    /// The first complete view is there.
    Ready,
    /// The store is not heard any more; the last view stays.
    Disconnected,
    /// The store is heard again; what was missed follows, or has been told.
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
