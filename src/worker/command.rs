//! What a handle asks of the run in progress.

use tokio::sync::oneshot;

use crate::error::ClusterError;

/// Takes the outcome of a [`Command`] back to the caller.
pub(super) type Reply = oneshot::Sender<Result<(), ClusterError>>;

/// A request of the application. The run carries it out while it waits for a change.
#[derive(Debug)]
pub(super) enum Command {
    /// Give up leadership, or the place in the queue, and queue again.
    Resign(Reply),
    /// Hand leadership to the node with this id.
    Transfer { target: String, reply: Reply },
    /// Announce that the node drains, and leave the election.
    Drain(Reply),
}

/// Sends the outcome to the caller, who may have stopped waiting.
pub(super) fn respond(reply: Reply, outcome: Result<(), ClusterError>) {
    let _ = reply.send(outcome);
}
