//! Where nodes come from.

use super::Change;

/// Where the nodes of a balancer come from: etcd ([`ServiceDiscovery::changes`](crate::ServiceDiscovery::changes)), or
/// anything else, such as a file, a list behind HTTP, DNS, or another registry. A source that only knows whole lists
/// returns [`Change::all`]: what was learned of the nodes that stay in it is kept.
pub trait Source: Send {
    /// Waits for the next change; the first one is the complete state, [`Change::Reset`]. A source has no end: one that
    /// has nothing more to say never returns.
    ///
    /// The future may be dropped at any time, and then `next` is called again: nothing must be lost by that.
    fn next(&mut self) -> impl Future<Output = Change> + Send;
}
