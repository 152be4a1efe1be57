//! The command, and the signals for it.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::task::Poll;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tracing::warn;

/// The running command, in a process group of its own.
pub struct Child {
    child: tokio::process::Child,
    group: Option<Pid>,
}

impl Child {
    /// Starts the command without these variables.
    pub fn start(command: &[String], secrets: &[String]) -> Result<Self, String> {
        let (program, arguments) = command.split_first().ok_or("no command is given")?;
        let mut command = Command::new(program);
        command.args(arguments).process_group(0);
        for name in secrets {
            command.env_remove(name);
        }
        let child = command
            .spawn()
            .map_err(|error| format!("{program} cannot be started: {error}"))?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Ok(Self {
            child,
            group: id.and_then(Pid::from_raw),
        })
    }

    /// The id of its process.
    pub fn id(&self) -> u32 {
        self.group
            .map_or(0, |group| group.as_raw_nonzero().get().unsigned_abs())
    }

    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Sends a signal to the command and whatever it has started.
    pub fn signal(&self, signal: i32) {
        let Some((group, signal)) = self.group.zip(Signal::from_named_raw(signal)) else {
            return;
        };
        // It may have ended by itself.
        let _ = kill_process_group(group, signal);
    }

    /// Waits for the end, and kills the command after `grace`. Signals are passed on meanwhile.
    pub async fn ended_within(
        &mut self,
        grace: Duration,
        signals: &mut Signals,
    ) -> io::Result<ExitStatus> {
        let mut over = std::pin::pin!(tokio::time::sleep(grace));
        let mut is_killed = false;
        loop {
            tokio::select! {
                status = self.child.wait() => return status,
                signal = signals.next() => self.signal(signal),
                () = &mut over, if !is_killed => {
                    warn!(?grace, "the command has not ended in time and is killed");
                    self.signal(Signal::KILL.as_raw());
                    is_killed = true;
                }
            }
        }
    }
}

impl Child {
    /// Ends what the command has started and left behind. Signals are passed on meanwhile.
    pub async fn end_rest(&mut self, grace: Duration, signals: &mut Signals) {
        let Some(group) = self.group else {
            return;
        };
        let start = Instant::now();
        self.signal(Signal::TERM.as_raw());
        while test_kill_process_group(group).is_ok() {
            if start.elapsed() >= grace {
                warn!(
                    ?grace,
                    "what the command has started has not ended in time and is killed"
                );
                break;
            }
            tokio::select! {
                () = sleep(Duration::from_millis(20)) => {}
                signal = signals.next() => self.signal(signal),
            }
        }
        self.signal(Signal::KILL.as_raw());
        self.group = None;
    }
}

impl Drop for Child {
    /// Nothing is left behind when this program ends by itself, or by a panic. Only after SIGKILL nobody is there to do this:
    /// the command runs on, and its registration ends with the lease.
    fn drop(&mut self) {
        self.signal(Signal::KILL.as_raw());
    }
}

/// As a shell has it: 128 and the number of the signal that ended the command.
pub fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code();
    let code = code.or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The signals that are not for this program alone.
pub struct Signals {
    all: Vec<(SignalKind, tokio::signal::unix::Signal)>,
}

impl Signals {
    const ENDING: [fn() -> SignalKind; 3] = [
        SignalKind::terminate,
        SignalKind::interrupt,
        SignalKind::quit,
    ];

    pub fn new() -> io::Result<Self> {
        let others = [
            SignalKind::hangup,
            SignalKind::user_defined1,
            SignalKind::user_defined2,
        ];
        let kinds = Self::ENDING.into_iter().chain(others).map(|kind| kind());
        let all = kinds.map(|kind| Ok((kind, signal(kind)?)));
        Ok(Self {
            all: all.collect::<io::Result<_>>()?,
        })
    }

    /// The number of the next signal.
    pub async fn next(&mut self) -> i32 {
        std::future::poll_fn(|context| {
            for (kind, signal) in &mut self.all {
                if signal.poll_recv(context).is_ready() {
                    return Poll::Ready(kind.as_raw_value());
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Whether a signal asks the program to end.
    pub fn ends(signal: i32) -> bool {
        Self::ENDING
            .iter()
            .any(|kind| kind().as_raw_value() == signal)
    }
}
