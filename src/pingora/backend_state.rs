//! What a node is used for, and why: registration, drain, operators, self-preservation, checks and outcomes come to
//! one state with one reason.

use std::collections::HashMap;
use std::sync::Arc;

use super::checks::CheckStatus;
use super::service::BalancerService;
use crate::balance::BackendStatus;
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::view::{NodeOverride, Nodes};

/// Below this success rate a node counts as failing, also if it is not ejected.
const FAILING: f64 = 0.5;

/// What a node is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendState {
    /// It gets requests by its weight.
    Serving,
    /// It says of itself that it is not at its best, and gets fewer requests.
    Degraded,
    /// So many requests to it fail that it gets nothing but probes (it is ejected), or most of them do, so that it
    /// gets few.
    Failing,
    /// A health check, or the node itself, says that it is not well. It gets no requests, unless too few nodes are
    /// well.
    Down,
    /// It gets no new requests, because it or an operator has said so.
    Draining,
    /// It has announced that it leaves.
    Leaving,
    /// Its lease is gone, together with those of many others; it may still be there.
    Suspect,
    /// It gets no requests: its weight is 0, or it has not been checked yet.
    Unused,
}

impl BackendState {
    /// Each state.
    pub const ALL: [Self; 8] = [
        Self::Serving,
        Self::Degraded,
        Self::Failing,
        Self::Down,
        Self::Draining,
        Self::Leaving,
        Self::Suspect,
        Self::Unused,
    ];

    /// Its name in one word, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Degraded => "degraded",
            Self::Failing => "failing",
            Self::Down => "down",
            Self::Draining => "draining",
            Self::Leaving => "leaving",
            Self::Suspect => "suspect",
            Self::Unused => "unused",
        }
    }
}

/// A node with its state, as [`BalancerService::backend_states`] gives it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StatedBackend {
    /// The node.
    pub node: Arc<Node>,
    /// What it is used for.
    pub state: BackendState,
    /// Why, in a few words.
    pub reason: String,
    /// What health checks say of it; `None` without checks, or before the first one.
    pub check: Option<CheckStatus>,
    /// What an operator says of it, if anything.
    pub said: Option<NodeOverride>,
}

impl BalancerService {
    /// Every node of the group, ordered by id, with its state. Costs time in proportion to the number of nodes.
    pub fn backend_states(&self) -> Vec<StatedBackend> {
        let (nodes, backends) = (self.discovery().nodes(), self.backends());
        let by_id: HashMap<&str, &BackendStatus> = backends
            .iter()
            .map(|backend| (&*backend.node.id, backend))
            .collect();
        let mut all: Vec<_> = nodes
            .iter()
            .map(|node| self.state_of(node, &nodes, by_id.get(&*node.id).copied()))
            .collect();
        all.sort_by(|one, other| one.node.id.cmp(&other.node.id));
        all
    }

    /// The state of one of these nodes, which the balancer knows as `backend`.
    pub(crate) fn state_of(
        &self,
        node: &Arc<Node>,
        nodes: &Nodes,
        backend: Option<&BackendStatus>,
    ) -> StatedBackend {
        let (check, said) = (self.check_status(&node.id), self.override_of(&node.id));
        let (state, reason) = state(node, nodes, backend, said.as_ref(), check.as_ref());
        StatedBackend {
            node: node.clone(),
            state,
            reason,
            check,
            said,
        }
    }
}

fn state(
    node: &Node,
    nodes: &Nodes,
    backend: Option<&BackendStatus>,
    said: Option<&NodeOverride>,
    check: Option<&CheckStatus>,
) -> (BackendState, String) {
    let is_ejected = backend.is_some_and(|backend| backend.is_ejected);
    let is_failing = backend.is_some_and(|backend| backend.success < FAILING);
    let health = node.metadata.string(metadata_keys::HEALTH);
    let says = |wanted| health.as_deref() == Some(wanted);
    let own_reason = node.metadata.string(metadata_keys::HEALTH_REASON);
    let own_reason = own_reason.as_deref().unwrap_or("no reason given");
    let (state, reason) = match (backend, check) {
        _ if nodes.is_suspect(&node.id) => (
            BackendState::Suspect,
            "its lease is gone, together with those of many others",
        ),
        _ if node.is_leaving() => (BackendState::Leaving, "it has announced that it leaves"),
        _ if !node.is_serving() => (BackendState::Draining, "it takes no new requests"),
        _ if said.is_some_and(NodeOverride::is_draining) => (
            BackendState::Draining,
            "an operator has said that it gets no new requests",
        ),
        _ if said.is_some_and(|said| said.weight == Some(0.0)) => (
            BackendState::Unused,
            "an operator has given it a weight of 0",
        ),
        _ if node.weight == Some(0.0) && said.is_none_or(|said| said.weight.is_none()) => {
            (BackendState::Unused, "it has registered a weight of 0")
        }
        (used, Some(check)) if !check.is_well => {
            let problem = check.problem.as_deref().unwrap_or("it was down before");
            let used = used.map_or("", |_| "; it is used, because too few nodes are well");
            let reason = format!("the health check says: {problem}{used}");
            return (BackendState::Down, reason);
        }
        (used, _) if says("failing") => {
            let used = used.map_or("", |_| "; it is used, because too few nodes are well");
            let reason = format!("it says of itself: {own_reason}{used}");
            return (BackendState::Down, reason);
        }
        (None, _) => (
            BackendState::Unused,
            "it has not been checked yet, or the balancer has no place for it",
        ),
        _ if is_ejected => (
            BackendState::Failing,
            "requests to it fail, so it gets nothing but probes while others work",
        ),
        _ if is_failing => (BackendState::Failing, "most requests to it fail"),
        _ if says("degraded") => {
            let reason = format!("it says of itself: {own_reason}");
            return (BackendState::Degraded, reason);
        }
        _ if backend.is_some_and(|backend| backend.is_outside) => (
            BackendState::Serving,
            "all is well; this process is one of many and uses others (adaptive.subset_in_flight)",
        ),
        _ => (BackendState::Serving, "all is well"),
    };
    (state, reason.to_owned())
}
