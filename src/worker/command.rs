//! What a handle asks of the run in progress.

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::ClusterError;
use crate::store::Revision;

/// Takes the outcome of a [`Command`] back to the caller.
#[derive(Debug)]
pub(super) struct Reply {
    outcome: oneshot::Sender<Result<(), ClusterError>>,
    /// Since when it waits for a store that fails.
    waits_since: Option<Instant>,
}

impl Reply {
    /// For a command; and where its outcome comes.
    pub(super) fn new() -> (Self, oneshot::Receiver<Result<(), ClusterError>>) {
        let (outcome, receiver) = oneshot::channel();
        let reply = Self {
            outcome,
            waits_since: None,
        };
        (reply, receiver)
    }

    /// Since when it waits for a store that fails: from now on, if it has not before.
    pub(super) fn waits_since(&mut self) -> Instant {
        *self.waits_since.get_or_insert_with(Instant::now)
    }

    /// Whether the caller has stopped waiting.
    pub(super) fn is_closed(&self) -> bool {
        self.outcome.is_closed()
    }
}

/// A request of the application. The run carries it out while it waits for a change.
#[derive(Debug)]
pub(super) enum Command {
    /// Give up leadership, or the place in the queue, and queue again.
    Resign(Reply),
    /// Hand leadership to the node with this id, in the term in which it is asked.
    Transfer {
        target: String,
        term: Option<Revision>,
        reply: Reply,
    },
    /// Announce that the node drains, and leave the election.
    Drain(Reply),
}

impl Command {
    pub(super) fn reply(&mut self) -> &mut Reply {
        match self {
            Self::Resign(reply) | Self::Transfer { reply, .. } | Self::Drain(reply) => reply,
        }
    }

    pub(super) fn into_reply(self) -> Reply {
        match self {
            Self::Resign(reply) | Self::Transfer { reply, .. } | Self::Drain(reply) => reply,
        }
    }
}

/// Sends the outcome to the caller, who may have stopped waiting.
pub(super) fn respond(reply: Reply, outcome: Result<(), ClusterError>) {
    let _ = reply.outcome.send(outcome);
}
