//! Refuses commands while they cannot be carried out, so that nobody waits for them.

use std::future::Future;

use tokio::sync::mpsc;

use super::command::{Command, respond};
use super::state::WorkerState;
use crate::error::ClusterError;

/// Waits for `pause`, and refuses every command that arrives in the meantime with `error`.
pub(super) async fn refuse_while(
    pause: impl Future<Output = ()>,
    state: &WorkerState,
    inbox: &mut mpsc::Receiver<Command>,
    error: &ClusterError,
) {
    tokio::pin!(pause);
    loop {
        let command = tokio::select! {
            biased;
            () = &mut pause => return,
            Some(command) = inbox.recv() => command,
        };
        let reply = match command {
            Command::Resign(reply) | Command::Transfer { reply, .. } => reply,
            Command::Drain(reply) => {
                // A drain that was requested is carried out as soon as the store can be written.
                state.set_draining();
                state.end_term();
                reply
            }
        };
        respond(reply, Err(error.clone()));
    }
}
