//! A term of leadership and its fencing token.

use std::sync::Arc;

use crate::ids::Revision;
use crate::node::Node;
use crate::store::Condition;

/// A term of leadership, and the means to reject a leader that has been replaced.
///
/// A leader cannot know that it still leads at the instant at which its work takes effect: the
/// process may be paused between the check and the action. Work that two leaders must not both do
/// therefore has to be refused where it takes effect, by the [token](Self::epoch) or by the
/// [guard](Self::guard). See "Fencing" in the crate guide.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leadership {
    /// The leader, with its metadata as of this call.
    pub node: Arc<Node>,
    /// The fencing token: the revision that created the leader's election key. Every later term
    /// of the group has a greater token, so a system that remembers the greatest token it has seen
    /// can refuse a leader that does not know yet that it has been replaced.
    pub epoch: Revision,
    /// The leader's election key. It exists, created at `epoch`, for as long as the term lasts.
    pub key: Arc<str>,
}

impl Leadership {
    /// The leadership of this node, in the term that created this key at this revision: for tests, and for sources of
    /// nodes that know a leader.
    pub fn new(node: Arc<Node>, epoch: Revision, key: impl Into<Arc<str>>) -> Self {
        Self {
            node,
            epoch,
            key: key.into(),
        }
    }

    /// The condition that limits a transaction to this term: it takes effect while the term lasts,
    /// or not at all. Only for the etcd cluster that holds the election.
    ///
    /// ```no_run
    /// # async fn example(node: pingora_etcd::ClusterNode, mut client: etcd_client::Client)
    /// #     -> Result<(), Box<dyn std::error::Error>> {
    /// use etcd_client::{Compare, CompareOp, Txn, TxnOp};
    /// use pingora_etcd::store;
    ///
    /// # let Some(leadership) = node.leadership() else { return Ok(()) };
    /// // With this crate's store:
    /// let txn = store::Txn::new()
    ///     .when(leadership.guard())
    ///     .put("jobs/next", b"42".to_vec(), None);
    /// // With your own client:
    /// let guard = Compare::create_revision(&*leadership.key, CompareOp::Equal, leadership.epoch);
    /// let write = TxnOp::put("jobs/next", "42", None);
    /// let done = client.txn(Txn::new().when([guard]).and_then([write])).await?;
    /// if !done.succeeded() {
    ///     println!("this term is over: somebody else leads");
    /// }
    /// # Ok(()) }
    /// ```
    pub fn guard(&self) -> Condition {
        Condition::CreatedAt(self.key.to_string(), self.epoch)
    }
}
