//! What the application asks for, while the election is waited for.

use super::Election;
use crate::error::ClusterError;
use crate::store::Revision;
use crate::worker::command::{Command, respond};
use crate::worker::inbox::{Inbox, may_pass};

impl Election<'_> {
    /// Carries out a command of the application. In each case the term ends here before anything is
    /// written, so that it never overlaps with the successor's; and if the answer is lost, the
    /// candidacy stays given up. After an error that may pass, the next readings show what has become of it.
    pub(super) async fn carry_out(
        &mut self,
        command: Command,
        candidacy: Option<Revision>,
        inbox: &mut Inbox,
    ) -> Result<(), ClusterError> {
        let (participant, state) = (self.participant, self.participant.state);
        let outcome = match command {
            // Nobody waits any more.
            Command::Resign(reply) | Command::Transfer { reply, .. } if reply.is_closed() => Ok(()),
            Command::Resign(reply) => {
                let Some(created) = candidacy else {
                    respond(reply, Ok(()));
                    return Ok(());
                };
                inbox.begin_resign(state, created, reply);
                let outcome = participant.withdraw(created).await;
                inbox.end_last(&outcome);
                outcome
            }
            Command::Drain(reply) => {
                inbox.begin_drain(state, reply);
                let outcome = participant.announce_draining(candidacy).await;
                // Otherwise the next reading shows whose registration it is.
                if !matches!(outcome, Ok(false)) {
                    inbox.end_last(&outcome.clone().map(drop));
                }
                outcome.map(drop)
            }
            Command::Transfer {
                target,
                term,
                reply,
            } => match self.handover.begin_transfer(target, term, reply).await {
                Ok(()) => Ok(()),
                Err((command, error)) => {
                    inbox.put_back(command);
                    Err(error)
                }
            },
        };
        match outcome {
            Err(error) if may_pass(&error) => Err(error),
            _ => Ok(()),
        }
    }
}
