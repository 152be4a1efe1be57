//! The headers that the proxy adds and removes.

use std::time::Instant;

use ::pingora::Result;
use ::pingora::http::{RequestHeader, ResponseHeader};
use http::{HeaderName, HeaderValue};
use tracing::trace;

use crate::balance::Upstream;
use crate::load_report::{BINARY_HEADER, LOAD_REPORT_HEADER};
use crate::node::Node;
use crate::pingora::LeaderUpstream;

/// On every proxied response: the id of the node that answered.
const UPSTREAM_NODE: &str = "x-upstream-node";
/// On requests to the leader: the fencing token of its term.
pub(super) const LEADER_EPOCH: HeaderName = HeaderName::from_static("x-leader-epoch");

/// Adds the fencing token to a request for the leader.
pub(super) fn set_leader_epoch(
    request: &mut RequestHeader,
    leader: Option<&LeaderUpstream>,
) -> Result<()> {
    // A client must not be able to send a token of its own.
    if request.headers.keys().any(|name| *name == LEADER_EPOCH) {
        request.remove_header(&LEADER_EPOCH);
    }
    if let Some(leader) = leader {
        request.insert_header(LEADER_EPOCH, leader.epoch.to_string())?;
    }
    Ok(())
}

/// Takes the load report out of a response, which is not for the client.
pub(super) fn take_load_report(
    response: &mut ResponseHeader,
    upstream: Option<&Upstream>,
    now: Instant,
) {
    // Looking at the few names that there are costs less than looking for each of these.
    let is_report = |name: &HeaderName| {
        let name = name.as_str();
        name.starts_with('e') && [BINARY_HEADER, LOAD_REPORT_HEADER].contains(&name)
    };
    if !response.headers.keys().any(is_report) {
        return;
    }
    response.remove_header(BINARY_HEADER);
    if let Some(report) = response.remove_header(LOAD_REPORT_HEADER)
        && let Some(upstream) = upstream
        && let Err(error) = upstream.report_header(report.as_bytes(), now)
    {
        trace!(node = upstream.node().id, %error, "load report refused");
    }
}

/// Names the node that answered.
pub(super) fn set_upstream_node(response: &mut ResponseHeader, node: &Node) -> Result<()> {
    if let Ok(id) = HeaderValue::from_bytes(node.id.as_bytes()) {
        response.insert_header(UPSTREAM_NODE, id)?;
    }
    Ok(())
}
