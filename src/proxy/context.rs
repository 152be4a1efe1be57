//! The state of one request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::balance::Upstream;
use crate::ids::Revision;
use crate::node::Node;
use crate::pingora::LeaderUpstream;

/// What [`ClusterProxy`](super::ClusterProxy) keeps about a request.
pub struct RequestContext {
    pub(super) started: Instant,
    /// When the current backend was picked: earlier tries are not its fault.
    pub(super) sent: Instant,
    /// How long the current backend took to answer. Not until the end of the response, which depends
    /// on how fast the client reads.
    pub(super) answered: Option<Duration>,
    /// Dropped with the context, so that a request which is simply dropped stops counting as in
    /// flight.
    pub(super) upstream: Option<Upstream>,
    pub(super) tried: Vec<SocketAddr>,
    pub(super) retries: usize,
    /// How many pooled connections turned out to be closed.
    pub(super) stale_connections: usize,
    pub(super) leader: Option<LeaderUpstream>,
    /// The term of a leader that could not be reached.
    pub(super) failed_epoch: Option<Revision>,
}

impl RequestContext {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            sent: now,
            answered: None,
            upstream: None,
            tried: Vec::new(),
            retries: 0,
            stale_connections: 0,
            leader: None,
            failed_epoch: None,
        }
    }

    /// The node that the request was sent to.
    pub(super) fn node(&self) -> Option<Arc<Node>> {
        match (&self.leader, &self.upstream) {
            (Some(leader), _) => Some(leader.node.clone()),
            (None, Some(upstream)) => Some(upstream.node()),
            (None, None) => None,
        }
    }

    /// The latency of the backend: until it answered, or until now.
    pub(super) fn latency(&self) -> Duration {
        self.answered.unwrap_or_else(|| self.sent.elapsed())
    }
}
