//! A term of leadership and its fencing token.

use std::sync::Arc;

use crate::ids::Revision;
use crate::node::Node;
use crate::store::Condition;

/// A term of leadership, with what keeps a leader that was replaced from doing harm.
///
/// No leader can know that it still leads at the instant at which its work takes effect: the
/// process may stop for a while between asking and acting. So whatever must not be done by two
/// leaders has to be refused where it takes effect, by the [token](Self::epoch) or by the
/// [guard](Self::guard). See "Fencing" in the crate guide.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leadership {
    /// Who leads. Its metadata is as of the moment of asking.
    pub node: Arc<Node>,
    /// The fencing token: the revision that created the leader's election key. Every later term
    /// in the group has a greater one, so a system that remembers the greatest token it has seen
    /// can refuse a leader that does not know yet that it was replaced.
    pub epoch: Revision,
    /// The leader's election key. It exists, created at `epoch`, for as long as the term lasts.
    pub key: Arc<str>,
}

impl Leadership {
    /// What a transaction of the etcd that holds the election has to be conditional on, so that
    /// it is carried out in this term or not at all.
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
    /// // With a client of one's own:
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
