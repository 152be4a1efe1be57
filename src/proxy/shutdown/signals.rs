//! What each signal asks for, and what follows from it.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{self, SignalKind};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::process::Shutdown;
use super::service_manager::{Notice, notify};
use crate::supervise::say;

/// How often to look whether everything has been served.
const STEP: Duration = Duration::from_millis(10);
/// What is still to be written when everything has been served is waited for at most this long: whoever reads it may not.
const WRITTEN_WITHIN: Duration = Duration::from_secs(4);
/// How long connections without a request in flight are waited for: clients of HTTP/2 have to read
/// that the connection ends, and new connections have to say what they want.
const IDLE_CONNECTIONS_WITHIN: Duration = Duration::from_secs(1);

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// SIGTERM: end, after time for others to notice.
    Terminate,
    /// SIGINT: end.
    Interrupt,
    /// SIGQUIT: hand the sockets over to a successor, and end.
    HandOver,
    /// SIGUSR1: open logs again, which have been moved.
    OpenLogs,
    /// SIGHUP: take over the configuration that is in the file.
    Reload,
    /// SIGUSR2, which ends a process that does not handle it.
    Nothing(&'static str),
}

/// The signals of this process.
pub(super) struct Signals(Vec<(Asked, unix::Signal)>);

impl Signals {
    /// Handles the signals from now on, instead of what the system does by default.
    pub(super) fn new() -> io::Result<Self> {
        let handled = [
            (Asked::Terminate, SignalKind::terminate()),
            (Asked::Interrupt, SignalKind::interrupt()),
            (Asked::HandOver, SignalKind::quit()),
            (Asked::Reload, SignalKind::hangup()),
            (Asked::OpenLogs, SignalKind::user_defined1()),
            (Asked::Nothing("SIGUSR2"), SignalKind::user_defined2()),
        ];
        let handled = handled
            .into_iter()
            .map(|(asked, kind)| Ok((asked, unix::signal(kind)?)));
        handled.collect::<io::Result<_>>().map(Self)
    }

    /// The next signal. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> Asked {
        std::future::poll_fn(|context| {
            for (asked, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(*asked);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

/// Why the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Everything has been served.
    Served,
    /// The grace period was over before.
    GraceOver,
    /// A second signal came before.
    SecondSignal,
}

/// Waits for a signal that ends the process, and then for everything that is to be served first.
/// `next` gives signals, `hand_over` gives the sockets to a successor, `close` stops accepting
/// connections.
pub(super) async fn until_end(
    shutdown: &Shutdown,
    grace: Duration,
    mut next: impl AsyncFnMut() -> Asked,
    hand_over: impl AsyncFnMut() -> Result<(), String>,
    close: impl FnOnce(),
) -> Ended {
    let drain_delay = drain_delay(shutdown, &mut next, hand_over).await;
    shutdown.begin_draining();
    if let Some(delay) = drain_delay {
        // After a handover, the successor is the service.
        notify(Notice::Stopping);
        say(|| info!(?delay, "the process ends; it still accepts connections"));
        if timeout(delay, ending(shutdown, &mut next, false))
            .await
            .is_ok()
        {
            return Ended::SecondSignal;
        }
    }
    let in_flight = shutdown.in_flight();
    say(|| info!(?grace, in_flight, "connections are no longer accepted"));
    shutdown.begin_closing();
    close();
    let second = async {
        if drain_delay.is_none() {
            // SIGQUIT was no order to cut anything off, so that this is the first one.
            ending(shutdown, &mut next, false).await;
            say(|| info!("the process ends already; another signal ends it at once"));
        }
        ending(shutdown, &mut next, false).await
    };
    tokio::select! {
        biased;
        _ = second => Ended::SecondSignal,
        () = served(shutdown) => Ended::Served,
        () = sleep(grace) => match shutdown.in_flight() {
            0 => Ended::Served,
            _ => Ended::GraceOver,
        }
    }
}

/// Waits until the process has to end. How long to accept connections then; `None` if a successor
/// accepts them.
async fn drain_delay(
    shutdown: &Shutdown,
    mut next: impl AsyncFnMut() -> Asked,
    mut hand_over: impl AsyncFnMut() -> Result<(), String>,
) -> Option<Duration> {
    let mut asked = next().await;
    loop {
        asked = match asked {
            Asked::Terminate => return Some(shutdown.drain_delay()),
            Asked::Interrupt => return Some(Duration::ZERO),
            Asked::HandOver => tokio::select! {
                biased;
                asked = ending(shutdown, &mut next, true) => asked,
                handed_over = hand_over() => match handed_over {
                    Ok(()) => return None,
                    Err(reason) => {
                        say(|| warn!(reason, "the sockets were not handed over; this process goes on"));
                        next().await
                    }
                },
            },
            Asked::OpenLogs => {
                shutdown.open_logs();
                next().await
            }
            Asked::Reload => {
                reload(shutdown);
                next().await
            }
            Asked::Nothing(signal) => {
                without_effect(signal);
                next().await
            }
        }
    }
}

/// The next signal that asks for the end. The file is read again until then, if that has a use.
async fn ending(
    shutdown: &Shutdown,
    mut next: impl AsyncFnMut() -> Asked,
    may_reload: bool,
) -> Asked {
    loop {
        match next().await {
            asked @ (Asked::Terminate | Asked::Interrupt) => return asked,
            Asked::HandOver => without_effect("SIGQUIT"),
            Asked::OpenLogs => shutdown.open_logs(),
            Asked::Reload if may_reload => reload(shutdown),
            Asked::Reload => without_effect("SIGHUP"),
            Asked::Nothing(signal) => without_effect(signal),
        }
    }
}

fn reload(shutdown: &Shutdown) {
    if !shutdown.ask_for_reload() {
        without_effect("SIGHUP");
    }
}

fn without_effect(signal: &str) {
    say(|| info!(signal, "a signal without effect"));
}

/// Waits until nothing is in flight and all connections are closed, or not closed in time.
async fn served(shutdown: &Shutdown) {
    if shutdown.has_unknown_requests() {
        std::future::pending::<()>().await;
    }
    let mut since = None;
    loop {
        let now = Instant::now();
        if shutdown.in_flight() > 0 {
            since = None;
        } else {
            let since = *since.get_or_insert(now);
            let waited = now - since;
            // A connection that has just been accepted is counted a moment later.
            let is_empty = shutdown.is_closed_and_empty() && waited >= STEP;
            let is_served = is_empty || waited >= IDLE_CONNECTIONS_WITHIN;
            if is_served && (!shutdown.has_writers() || waited >= WRITTEN_WITHIN) {
                return;
            }
        }
        sleep(STEP).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tokio::sync::mpsc;

    const SECOND: Duration = Duration::from_secs(1);

    /// What happened, and when it ended; each signal is sent this long after the one before.
    async fn ended_after(
        shutdown: &Shutdown,
        signals: &[(Duration, Asked)],
        successor: Option<Duration>,
    ) -> (Ended, Duration, Option<Duration>) {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let sending = async {
            for (after, asked) in signals {
                sleep(*after).await;
                sender.send(*asked).unwrap();
            }
            std::future::pending::<()>().await;
        };
        let start = Instant::now();
        let closed = Cell::new(None);
        let waiting = until_end(
            shutdown,
            20 * SECOND,
            async || receiver.recv().await.unwrap(),
            async || match successor {
                Some(after) => {
                    sleep(after).await;
                    Ok(())
                }
                None => Err("nobody is there".to_owned()),
            },
            || closed.set(Some(start.elapsed())),
        );
        let ended = tokio::select! {
            ended = waiting => ended,
            () = sending => unreachable!(),
        };
        (ended, start.elapsed(), closed.get())
    }

    fn shutdown() -> Shutdown {
        let shutdown = Shutdown::new();
        shutdown.waits_only_for_holds();
        shutdown.accepts_for(5 * SECOND);
        shutdown
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_signal_drains_and_the_second_one_ends() {
        use Asked::{HandOver, Interrupt, Nothing, Terminate};
        let start = |asked| (SECOND, asked);
        let idle = shutdown();
        // Idle: the delay, and nothing more.
        let ended = ended_after(&idle, &[start(Nothing("SIGHUP")), start(Terminate)], None).await;
        assert_eq!(ended, (Ended::Served, 7 * SECOND + STEP, Some(7 * SECOND)));
        assert!(idle.is_draining());
        let ended = ended_after(&shutdown(), &[start(Interrupt)], None).await;
        assert_eq!(ended, (Ended::Served, SECOND + STEP, Some(SECOND)));
        // A request that is never answered: the whole of the grace period.
        static BUSY: Shutdown = Shutdown::new();
        BUSY.waits_only_for_holds();
        BUSY.accepts_for(5 * SECOND);
        let _request = BUSY.request();
        let busy = &BUSY;
        let ended = ended_after(busy, &[start(Terminate)], None).await;
        assert_eq!(ended, (Ended::GraceOver, 26 * SECOND, Some(6 * SECOND)));
        // A connection without a request is not waited for.
        static OPEN: Shutdown = Shutdown::new();
        OPEN.waits_only_for_holds();
        let _connection = OPEN.connection();
        let ended = ended_after(&OPEN, &[start(Interrupt)], None).await;
        assert_eq!(ended, (Ended::Served, 2 * SECOND, Some(SECOND)));
        // Requests that nobody counts have the whole of it, too, but are not known to be cut off.
        let unknown = Shutdown::new();
        let ended = ended_after(&unknown, &[start(Interrupt)], None).await;
        assert_eq!(ended, (Ended::Served, 21 * SECOND, Some(SECOND)));
        // A second signal, in the delay and in the grace period.
        let signals = [start(Terminate), start(Nothing("SIGHUP")), start(Terminate)];
        let ended = ended_after(&shutdown(), &signals, None).await;
        assert_eq!(ended, (Ended::SecondSignal, 3 * SECOND, None));
        let signals = [start(Interrupt), start(HandOver), start(Interrupt)];
        let ended = ended_after(busy, &signals, None).await;
        assert_eq!(ended, (Ended::SecondSignal, 3 * SECOND, Some(SECOND)));
    }

    #[tokio::test(start_paused = true)]
    async fn sockets_are_handed_over_to_somebody_or_nothing_ends() {
        use Asked::{HandOver, Terminate};
        let handed = [(SECOND, HandOver)];
        let ended = ended_after(&shutdown(), &handed, Some(3 * SECOND)).await;
        assert_eq!(ended, (Ended::Served, 4 * SECOND + STEP, Some(4 * SECOND)));
        // Nobody is there: it goes on until it is told to end.
        let signals = [(SECOND, HandOver), (60 * SECOND, Terminate)];
        let ended = ended_after(&shutdown(), &signals, None).await;
        assert_eq!(
            ended,
            (Ended::Served, 66 * SECOND + STEP, Some(66 * SECOND))
        );
        // The end is asked for, as if nobody had been there: the requests in flight have their time, until it is asked for again.
        static HANDED: Shutdown = Shutdown::new();
        HANDED.waits_only_for_holds();
        let _request = HANDED.request();
        let signals = [(SECOND, HandOver), (4 * SECOND, Terminate)];
        let ended = ended_after(&HANDED, &signals, Some(3 * SECOND)).await;
        assert_eq!(ended, (Ended::GraceOver, 24 * SECOND, Some(4 * SECOND)));
        let signals = [
            (SECOND, HandOver),
            (4 * SECOND, Terminate),
            (SECOND, Terminate),
        ];
        let ended = ended_after(&HANDED, &signals, Some(3 * SECOND)).await;
        assert_eq!(ended, (Ended::SecondSignal, 6 * SECOND, Some(4 * SECOND)));
        // The end is asked for while a successor is waited for.
        let signals = [(SECOND, HandOver), (SECOND, Terminate)];
        let ended = ended_after(&shutdown(), &signals, Some(60 * SECOND)).await;
        assert_eq!(ended, (Ended::Served, 7 * SECOND + STEP, Some(7 * SECOND)));
    }
}
