//! What an operator has said of a node, from outside.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ids::{LeaseId, Revision};
use crate::node::{Node, NodeState};
use crate::validate;

/// What an operator has said of a node: it holds over what the node itself says, for balancers.
///
/// In etcd it is the value of `override/{group}/{node id}`. It names the process that it is meant for, so that it
/// says nothing of a successor with the same id. The key has no lease: under the lease of the node, etcd would ask
/// the node for the right to write the key, too, whenever it writes or leaves.
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
    /// Which process it is meant for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<Process>,
    /// Since when an operator has seen that the node is not registered, by the operator's clock, in milliseconds since
    /// 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) absent_since: Option<i64>,
}

/// What tells a process from others with the same node id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Process {
    /// Its run, which stays the same when it loses its lease and registers again.
    Run(NonZeroU64),
    /// The lease of its entry, if it does not say its run.
    Lease(LeaseId),
    /// The revision that created its entry, if that has no lease either.
    Created(Revision),
}

impl From<Process> for String {
    fn from(process: Process) -> Self {
        match process {
            Process::Run(run) => format!("run {run:016x}"),
            Process::Lease(lease) => format!("lease {lease}"),
            Process::Created(revision) => format!("created {revision}"),
        }
    }
}

impl TryFrom<String> for Process {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let process = match text.split_once(' ') {
            Some(("run", run)) => u64::from_str_radix(run, 16)
                .ok()
                .and_then(NonZeroU64::new)
                .map(Self::Run),
            Some(("lease", lease)) => i64::from_str_radix(lease, 16)
                .ok()
                .map(|it| Self::Lease(LeaseId(it))),
            Some(("created", revision)) => revision.parse().ok().map(Self::Created),
            _ => None,
        };
        process.ok_or_else(|| format!("`{text}` names no process"))
    }
}

fn says_nothing(state: &NodeState) -> bool {
    *state == NodeState::Serving
}

impl NodeOverride {
    /// One that says nothing yet, for the process that wrote this entry.
    pub fn of(node: &Node) -> Self {
        let process = match (node.run().and_then(NonZeroU64::new), node.lease()) {
            (Some(run), _) => Process::Run(run),
            (None, Some(lease)) => Process::Lease(lease),
            (None, None) => Process::Created(-node.incarnation()),
        };
        Self {
            process: Some(process),
            ..Self::default()
        }
    }

    /// Reads the value of an entry.
    ///
    /// # Errors
    ///
    /// In words, when it is not one.
    pub(crate) fn parse(value: &[u8]) -> Result<Self, String> {
        let fields: Map<String, Value> =
            serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let parsed = Self::deserialize(Value::Object(fields)).map_err(|error| error.to_string())?;
        match validate::weight_fault(parsed.weight) {
            Some(fault) => Err(fault),
            None => Ok(parsed),
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
        self.process == Self::of(node).process
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
        let node = Node::new("n1", "127.0.0.1".parse().unwrap());
        for (node, process) in [
            (
                node.clone().with_incarnation(26).with_run(7),
                "run 0000000000000007",
            ),
            (node.clone().with_incarnation(26), "lease 1a"),
            (node.clone().with_incarnation(-26), "created 26"),
        ] {
            for (state, weight, fields) in [
                (NodeState::Draining, None, r#""state":"draining","#),
                (NodeState::Serving, Some(0.5), r#""weight":0.5,"#),
                (NodeState::Serving, None, ""),
            ] {
                let said = NodeOverride {
                    state,
                    weight,
                    absent_since: Some(5),
                    ..NodeOverride::of(&node)
                };
                let json = format!(r#"{{{fields}"process":"{process}","absent_since":5}}"#);
                assert_eq!(String::from_utf8(said.to_json()).unwrap(), json);
                assert_eq!(NodeOverride::parse(json.as_bytes()), Ok(said));
                assert_eq!(said.is_empty(), fields.is_empty());
            }
        }
        for wrong in [
            "",
            "[]",
            r#"{"weight":-1}"#,
            r#"{"weight":"x"}"#,
            r#"{"state":7}"#,
            r#"{"process":"run"}"#,
            r#"{"process":"run 0"}"#,
            r#"{"process":"lease x"}"#,
            r#"{"process":7}"#,
        ] {
            assert!(NodeOverride::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn it_is_for_one_process() {
        let node = Node::new("n1", "127.0.0.1".parse().unwrap());
        let [first, again, other] = [(5, 7), (6, 7), (6, 8)]
            .map(|(lease, run)| node.clone().with_incarnation(lease).with_run(run));
        let said = NodeOverride::of(&first);
        assert!(said.is_for(&first));
        assert!(
            said.is_for(&again),
            "it has registered again under another lease"
        );
        assert!(!said.is_for(&other));
        // Without a run the lease tells processes apart, and without a lease the entry.
        for (of, other) in [(5, 6), (-5, -6)] {
            let said = NodeOverride::of(&node.clone().with_incarnation(of));
            assert!(said.is_for(&node.clone().with_incarnation(of)));
            assert!(!said.is_for(&node.clone().with_incarnation(other)));
        }
        // One that names nobody is for nobody.
        assert!(!NodeOverride::default().is_for(&node));
    }
}
