//! The way to the leader of a group.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::discovery::ServiceDiscovery;
use crate::ids::Revision;
use crate::node::Node;

/// Where requests for the leader go.
///
/// It reads a discovery that something else runs, usually the
/// [`BalancerService`](super::BalancerService) of the same proxy.
///
/// ```
/// use pingora_etcd::ServiceDiscovery;
/// use pingora_etcd::pingora::LeaderRoute;
///
/// # async fn example(discovery: ServiceDiscovery, method: http::Method) {
/// let leader = LeaderRoute::new(discovery, 8080);
/// if LeaderRoute::is_write(&method) {
///     match leader.wait(std::time::Duration::from_secs(2)).await {
///         Some(upstream) => println!("to {} with token {}", upstream.addr, upstream.epoch),
///         None => println!("503, retry-after: 1"),
///     }
/// }
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LeaderRoute {
    discovery: ServiceDiscovery,
    default_port: u16,
}

/// The leader, as a place to send requests to.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LeaderUpstream {
    /// Where to send the request.
    pub addr: SocketAddr,
    /// The node.
    pub node: Arc<Node>,
    /// The fencing token of its term. Send it with the request: a leader that has been replaced, and
    /// knows it, refuses a request for an older term; a leader that does not know it yet is stopped
    /// by the system that it writes to, if that remembers the greatest token it has seen.
    pub epoch: Revision,
}

impl LeaderUpstream {
    /// This node at this address, in this term: for tests.
    pub fn new(addr: SocketAddr, node: Arc<Node>, epoch: Revision) -> Self {
        Self { addr, node, epoch }
    }
}

impl LeaderRoute {
    /// The way to the leader of a group; `default_port` is for a leader that registered none.
    pub fn new(discovery: ServiceDiscovery, default_port: u16) -> Self {
        Self {
            discovery,
            default_port,
        }
    }

    /// The leader at this instant.
    pub fn leader(&self) -> Option<LeaderUpstream> {
        let leadership = self.discovery.leadership()?;
        Some(LeaderUpstream {
            addr: leadership.node.addr(self.default_port),
            node: leadership.node,
            epoch: leadership.epoch,
        })
    }

    /// The leader; if there is none, waits for one for `at_most`, and returns `None` after that.
    pub async fn wait(&self, at_most: Duration) -> Option<LeaderUpstream> {
        self.wait_for_other_than(None, at_most).await
    }

    /// The same for a leader of another term than `epoch`: for when the leader of that term did not
    /// answer.
    pub async fn wait_for_other_than(
        &self,
        epoch: Option<Revision>,
        at_most: Duration,
    ) -> Option<LeaderUpstream> {
        let mut changed = self.discovery.watch_leader();
        let waiting = async {
            loop {
                changed.mark_unchanged();
                match self.leader() {
                    Some(leader) if Some(leader.epoch) != epoch => return Some(leader),
                    _ => changed.changed().await.ok()?,
                }
            }
        };
        tokio::time::timeout(at_most, waiting).await.ok()?
    }

    /// Whether a request with this method goes to the leader: with any but `GET`, `HEAD`, `OPTIONS` and
    /// `TRACE`, which have no side effects (RFC 9110, section 9.2.1). A method that is not known, such
    /// as `get`, may have some.
    pub fn is_write(method: &http::Method) -> bool {
        !method.is_safe()
    }
}
