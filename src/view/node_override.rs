//! What an operator has said of a node, from outside.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ids::{LeaseId, Revision};
use crate::node::{Node, NodeState};
use crate::validate;

/// What an operator has said of a node: it holds over what the node itself says, for balancers.
///
/// In etcd it is the value of `override/{group}/{node id}`, under the lease of the node's registration, so that
/// it ends with the process that it was meant for. For a node without a lease it has none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NodeOverride {
    /// [`Draining`](NodeState::Draining) to send no new requests. [`Serving`](NodeState::Serving) says nothing: the
    /// node decides.
    #[serde(skip_serializing_if = "says_nothing")]
    pub state: NodeState,
    /// Instead of the static weight of the node. Range: 0 to 1,000,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// The revision that created the entry of a node without a lease, so that it does not hold for another one of the
    /// same id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<Revision>,
    /// The lease that the entry had.
    #[serde(skip)]
    pub lease: Option<LeaseId>,
}

fn says_nothing(state: &NodeState) -> bool {
    *state == NodeState::Serving
}

impl NodeOverride {
    /// Reads the value of an entry with this lease.
    ///
    /// # Errors
    ///
    /// In words, when it is not one.
    pub(crate) fn parse(value: &[u8], lease: Option<LeaseId>) -> Result<Self, String> {
        let fields: Map<String, Value> =
            serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let parsed = Self::deserialize(Value::Object(fields)).map_err(|error| error.to_string())?;
        match validate::weight_fault(parsed.weight) {
            Some(fault) => Err(fault),
            None => Ok(Self { lease, ..parsed }),
        }
    }

    /// The value of the entry.
    pub(crate) fn to_json(self) -> Vec<u8> {
        // Numbers and names are always valid JSON.
        serde_json::to_vec(&self).unwrap_or_default()
    }

    /// Whether it says nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.state == NodeState::Serving && self.weight.is_none()
    }

    /// Whether it is meant for the process that wrote this entry.
    pub fn is_for(&self, node: &Node) -> bool {
        match node.lease() {
            Some(lease) => self.lease == Some(lease),
            None => self.lease.is_none() && self.created == Some(-node.incarnation()),
        }
    }

    /// Whether no new requests are to be sent.
    pub fn is_draining(&self) -> bool {
        self.state != NodeState::Serving
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let lease = Some(LeaseId(7));
        for (state, weight, json) in [
            (NodeState::Draining, None, r#"{"state":"draining"}"#),
            (NodeState::Serving, Some(0.5), r#"{"weight":0.5}"#),
            (NodeState::Serving, None, "{}"),
        ] {
            let said = NodeOverride {
                state,
                weight,
                lease,
                created: None,
            };
            assert_eq!(String::from_utf8(said.to_json()).unwrap(), json);
            assert_eq!(NodeOverride::parse(json.as_bytes(), lease), Ok(said));
            assert_eq!(said.is_empty(), json == "{}");
        }
        for wrong in [
            "",
            "[]",
            r#"{"weight":-1}"#,
            r#"{"weight":"x"}"#,
            r#"{"state":7}"#,
        ] {
            assert!(
                NodeOverride::parse(wrong.as_bytes(), lease).is_err(),
                "{wrong}"
            );
        }
    }
}
