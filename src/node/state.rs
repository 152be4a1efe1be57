//! Whether a node takes requests, and the health of a worker's own registration.

use std::fmt;

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Visitor};

/// Whether a node takes new requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NodeState {
    /// The node is about to leave: it finishes its current requests and takes no new ones. Read in
    /// upper and lower case.
    Draining,
    /// The node takes requests. A state that this version does not know is read as this one.
    #[default]
    Serving,
}

impl NodeState {
    pub(super) fn is_serving(&self) -> bool {
        *self == Self::Serving
    }
}

impl<'de> Deserialize<'de> for NodeState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(StateVisitor)
    }
}

struct StateVisitor;

impl Visitor<'_> for StateVisitor {
    type Value = NodeState;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text such as draining")
    }
    fn visit_str<E>(self, state: &str) -> Result<NodeState, E> {
        Ok(if state.eq_ignore_ascii_case("draining") {
            NodeState::Draining
        } else {
            NodeState::Serving
        })
    }
}

/// The state of a [`ClusterNode`](crate::ClusterNode)'s registration in the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HealthStatus {
    /// Not running, or the first attempt to register has not finished.
    #[default]
    Unknown,
    /// Registered, and the lease is being renewed.
    Healthy,
    /// Three renewals in a row have failed, or the registration is lost and is being restored.
    Unhealthy,
}
