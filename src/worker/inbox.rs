//! What the application has asked for and has not been answered yet. A store that fails for a moment, as when a member of
//! etcd is stopped and each node connects to another one, is no reason to refuse it; one that is away for longer is.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::command::{Command, Reply, respond};
use super::decision::Action;
use super::state::WorkerState;
use crate::error::ClusterError;
use crate::store::Revision;

/// For how long the store may fail before what is asked is refused, and for how long a command waits while it fails.
const REFUSE_AFTER: Duration = Duration::from_secs(2);

/// How many commands wait for the store; further callers wait for room.
const MOST_WAITING: usize = 16;

/// Commands, and what has become of them. It outlives leases.
#[derive(Debug)]
pub(super) struct Inbox {
    commands: mpsc::Receiver<Command>,
    /// Those that came while the store failed.
    waiting: VecDeque<Command>,
    /// Those whose outcome is seen in what is read next.
    begun: Vec<Begun>,
    /// The candidacy that was read last, if nothing was written since.
    own: Option<Revision>,
    /// When the store began to fail, if it does.
    fails_since: Option<Instant>,
}

/// A command that has taken effect in this process, and may have been written.
#[derive(Debug)]
struct Begun {
    what: Change,
    reply: Reply,
}

#[derive(Debug)]
enum Change {
    /// The candidacy that was created then is to go.
    Resign {
        created: Revision,
    },
    Drain,
}

impl Inbox {
    pub(super) fn new(commands: mpsc::Receiver<Command>) -> Self {
        Self {
            commands,
            waiting: VecDeque::new(),
            begun: Vec::new(),
            own: None,
            fails_since: None,
        }
    }

    /// The next command to carry out. Dropping the future loses none.
    pub(super) async fn recv(&mut self) -> Option<Command> {
        match self.waiting.pop_front() {
            None => self.commands.recv().await,
            command => command,
        }
    }

    /// Nothing has come of a command.
    pub(super) fn put_back(&mut self, command: Command) {
        self.waiting.push_front(command);
    }

    /// The election has been read, and is watched.
    pub(super) fn store_works(&mut self) {
        self.fails_since = None;
    }

    /// Something was written, or the lease is another one: which candidacy the node has is to be read.
    pub(super) fn forget_candidacy(&mut self) {
        self.own = None;
    }

    /// The node drains from here on, and this is answered when the store says so.
    pub(super) fn begin_drain(&mut self, state: &WorkerState, reply: Reply) {
        state.set_draining();
        state.end_term();
        let what = Change::Drain;
        self.begun.push(Begun { what, reply });
    }

    /// The candidacy never leads again, and this is answered when it is gone.
    pub(super) fn begin_resign(&mut self, state: &WorkerState, created: Revision, reply: Reply) {
        state.end_term();
        state.record().abandoned = created;
        let what = Change::Resign { created };
        self.begun.push(Begun { what, reply });
    }

    /// Answers what was begun last, unless its outcome will be read.
    pub(super) fn end_last(&mut self, outcome: &Result<(), ClusterError>) {
        if outcome.as_ref().is_err_and(may_pass) {
            return;
        }
        if let Some(begun) = self.begun.pop() {
            respond(begun.reply, outcome.clone());
        }
    }

    /// Answers what was begun and has come about, as far as this reading shows it.
    pub(super) fn settle(&mut self, state: &WorkerState, action: &Action, own: Option<Revision>) {
        self.own = own;
        for begun in std::mem::take(&mut self.begun) {
            let outcome = match (&begun.what, action) {
                (Change::Resign { created }, _) if own != Some(*created) => Ok(()),
                (Change::Drain, Action::StayDrained) => Ok(()),
                (Change::Drain, Action::StandBack { .. }) => Err(state.unavailable(
                    "drain",
                    "the registration is that of another process; the node says that it drains as soon as it is registered again",
                )),
                _ => {
                    self.begun.push(begun);
                    continue;
                }
            };
            respond(begun.reply, outcome);
        }
    }

    /// Waits for `pause` after an error. What is asked waits as well, and is refused with the error if the store fails for too
    /// long, or if waiting does not help.
    pub(super) async fn wait(
        &mut self,
        pause: impl Future<Output = ()>,
        state: &WorkerState,
        error: &ClusterError,
    ) {
        let since = *self.fails_since.get_or_insert_with(Instant::now);
        tokio::pin!(pause);
        loop {
            let waits = may_pass(error) && since.elapsed() < REFUSE_AFTER;
            let oldest = self.refuse(error, waits);
            tokio::select! {
                biased;
                () = &mut pause => return,
                Some(command) = self.commands.recv(), if self.waiting.len() < MOST_WAITING => {
                    self.take(command, state);
                }
                () = sleep_until(oldest.unwrap_or(since).min(since) + REFUSE_AFTER), if waits => {}
            }
        }
    }

    /// Does at once what does not need the store.
    fn take(&mut self, command: Command, state: &WorkerState) {
        let candidacy = state.term().map(|term| term.epoch).or(self.own);
        match (command, candidacy) {
            // Nobody waits any more.
            (Command::Resign(reply) | Command::Transfer { reply, .. }, _) if reply.is_closed() => {}
            (
                Command::Transfer {
                    term: None, reply, ..
                },
                _,
            ) => {
                respond(reply, Err(state.not_leader()));
            }
            // It drains as soon as the store can be written, whatever is answered.
            (Command::Drain(reply), _) => self.begin_drain(state, reply),
            (Command::Resign(reply), Some(created)) => self.begin_resign(state, created, reply),
            (command, _) => self.waiting.push_back(command),
        }
    }

    /// Refuses what has waited for long enough; everything, unless the rest `waits`. Returns since when what is left of it
    /// waits.
    fn refuse(&mut self, error: &ClusterError, waits: bool) -> Option<Instant> {
        let mut oldest = None;
        let mut is_over = |reply: &mut Reply| {
            let since = reply.waits_since();
            let is_over = !waits || since.elapsed() >= REFUSE_AFTER;
            if !is_over {
                oldest = Some(oldest.map_or(since, |oldest: Instant| oldest.min(since)));
            }
            is_over
        };
        for mut command in std::mem::take(&mut self.waiting) {
            match is_over(command.reply()) {
                true => respond(command.into_reply(), Err(error.clone())),
                false => self.waiting.push_back(command),
            }
        }
        for mut begun in std::mem::take(&mut self.begun) {
            match is_over(&mut begun.reply) {
                true => respond(begun.reply, Err(error.clone())),
                false => self.begun.push(begun),
            }
        }
        oldest
    }

    /// The run ends. What has taken effect here is not said to have been refused.
    pub(super) fn end(&mut self, state: &WorkerState) {
        for begun in self.begun.drain(..) {
            let reason = "the node is stopped before the store has it";
            respond(begun.reply, Err(state.unavailable("command", reason)));
        }
    }
}

/// Whether the store may work again in a moment.
pub(super) fn may_pass(error: &ClusterError) -> bool {
    // A lease that is gone is replaced at once.
    error.is_transient() || matches!(error, ClusterError::LeaseNotFound { .. })
}
