//! Running a server under our own signals.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use ::pingora::server::configuration::ServerConf;
use ::pingora::server::{
    RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, UnixShutdownSignalWatch,
};
use async_trait::async_trait;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::handover::hand_over;
use super::process::Shutdown;
use super::signals::{Ended, Signals, until_end};
use crate::supervise::{caught, say};
use crate::sync::lock;

/// Without `grace_period_seconds`. With the drain delay it stays below the 30 s after which Kubernetes
/// kills.
const GRACE: Duration = Duration::from_secs(20);
/// Pingora's own grace period begins when ours does and must not end before.
const LONGER_THAN_OURS: u64 = 60;

/// Runs a Pingora server until a signal ends it; instead of Pingora's `run_forever`, whose signals are
/// others. Do not call `bootstrap` before: sockets are taken over when this process can serve.
///
/// | signal | effect |
/// |---|---|
/// | SIGTERM | readiness is off, and connections are still accepted for the drain delay, so that load balancers in front notice; responses say `Connection: close`, and connections of HTTP/2 get GOAWAY. Then nothing is accepted any more, and idle connections are closed. The process ends as soon as nothing is in flight, at the latest after the grace period |
/// | SIGINT (Ctrl-C) | the same without the drain delay |
/// | SIGTERM or SIGINT again | the process ends at once; after a successful SIGQUIT the first one has no effect |
/// | SIGQUIT | hands the listening sockets over to a successor that was started with `upgrade` and is ready, and then ends as after SIGINT. If there is none within 60 s, or it does not confirm that it accepts connections, this process goes on. Linux only |
/// | SIGUSR1 | the access log is opened again, because its file was moved |
/// | SIGHUP | the file is read again and taken over, if a [`ConfigFile`](crate::proxy::ConfigFile) follows it |
/// | SIGUSR2 | no effect, from this call on |
///
/// The grace period is `grace_period_seconds` of the server's configuration (default here: 20), the
/// drain delay is `cluster.drain_delay_ms`. The status is 0 if everything was served, and 1 if a
/// request was cut off or a second signal ended the process.
///
/// Any server may run so. What depends on knowing its listeners holds for those that this crate adds, as
/// [`ClusterProxy::add_to`](crate::proxy::ClusterProxy::add_to) does. In a server that has only others, SIGQUIT is
/// answered by an error in the log, nobody is told that the process is ready, the drain delay is what
/// [`Shutdown::accepts_for`] says, and the whole grace period is waited for, unless each request has a
/// [`hold`](Shutdown::hold) and [`waits_only_for_holds`](Shutdown::waits_only_for_holds) was called.
///
/// A service manager that asked for it by `NOTIFY_SOCKET` (systemd: `Type=notify`,
/// `NotifyAccess=all`) is told when every address is listened on, when the process is about to end,
/// and which process is the main one after a handover.
pub fn run(mut server: Server) -> ExitCode {
    Shutdown::of_process().watch();
    // From here on, because they would end a process that is starting.
    let signals = match handled_from_now_on() {
        Ok(signals) => Mutex::new(Some(signals)),
        Err(error) => {
            say(|| error!(%error, "signals cannot be handled"));
            return ExitCode::FAILURE;
        }
    };
    raise_descriptors();
    let configuration = &server.configuration;
    let seconds = configuration.grace_period_seconds;
    let watch = Watch {
        signals,
        grace: seconds.map_or(GRACE, Duration::from_secs),
        upgrade_sock: configuration.upgrade_sock.clone().into(),
    };
    if let Some(longer) = with_longer_grace(configuration, watch.grace) {
        server.configuration = longer.into();
    }
    server.run(RunArgs {
        shutdown_signal: Box::new(watch),
    });
    ExitCode::SUCCESS
}

/// Fewer descriptors than this are said to be few: each request needs two, and idle connections one each.
const FEW_DESCRIPTORS: u64 = 4_096;

/// A process begins with few descriptors for the sake of old programs, and may have as many as its hard limit says.
fn raise_descriptors() {
    let mut limits = getrlimit(Resource::Nofile);
    if limits.current != limits.maximum {
        limits.current = limits.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limits) {
            say(|| warn!(%error, "the limit of open files cannot be raised"));
        }
    }
    // `None` is no limit.
    let descriptors = getrlimit(Resource::Nofile).current;
    if let Some(descriptors) = descriptors.filter(|it| *it < FEW_DESCRIPTORS) {
        say(|| {
            warn!(
                descriptors,
                "this process may have few connections: raise the limit of open files"
            );
        });
    }
}

/// The signals do not depend on the runtime that they are registered with.
fn handled_from_now_on() -> std::io::Result<Signals> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let _entered = runtime.enter();
    Signals::new()
}

/// Pingora waits for the whole of its grace period, even when there is nothing to wait for.
fn with_longer_grace(configuration: &ServerConf, grace: Duration) -> Option<ServerConf> {
    let mut longer = ServerConf::from_yaml(&configuration.to_yaml()).ok()?;
    longer.grace_period_seconds = Some(grace.as_secs().saturating_add(LONGER_THAN_OURS));
    Some(longer)
}

/// Watches signals in a thread of its own, which ends the process: Pingora's has its own plan from the
/// first signal on.
struct Watch {
    /// Until they are watched.
    signals: Mutex<Option<Signals>>,
    grace: Duration,
    upgrade_sock: PathBuf,
}

#[async_trait]
impl ShutdownSignalWatch for Watch {
    async fn recv(&self) -> ShutdownSignal {
        let (close, closed) = oneshot::channel();
        let (grace, path) = (self.grace, self.upgrade_sock.clone());
        let signals = lock(&self.signals).take();
        // Not before: Pingora may have become another process in between, without its threads.
        let thread = std::thread::Builder::new().name("signals".to_owned());
        let started = thread.spawn(move || watch(signals, grace, &path, close));
        let failed = match started {
            Err(error) => error.to_string(),
            Ok(_) => match closed.await {
                Ok(()) => return ShutdownSignal::GracefulTerminate,
                Err(_) => "its thread has ended".to_owned(),
            },
        };
        say(|| {
            error!(
                failed,
                "signals are not watched as documented, but as Pingora does"
            );
        });
        UnixShutdownSignalWatch.recv().await
    }
}

fn watch(
    signals: Option<Signals>,
    grace: Duration,
    path: &std::path::Path,
    close: oneshot::Sender<()>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return say(|| error!(%error, "signals cannot be watched")),
    };
    let shutdown = Shutdown::of_process();
    let ended = runtime.block_on(caught(async {
        let mut signals = match signals {
            Some(signals) => signals,
            None => Signals::new()?,
        };
        let next = async || signals.next().await;
        let hand_over = async || hand_over(shutdown, path).await;
        let close = || {
            let _ = close.send(());
        };
        Ok::<_, std::io::Error>(until_end(shutdown, grace, next, hand_over, close).await)
    }));
    match ended {
        Ok(Ok(ended)) => exit(ended, shutdown),
        Ok(Err(error)) => say(|| error!(%error, "signals cannot be watched")),
        Err(panic) => say(|| error!(panic, "signals are not watched any more")),
    }
}

fn exit(ended: Ended, shutdown: &Shutdown) -> ! {
    let in_flight = shutdown.in_flight();
    let status = match ended {
        Ended::Served => {
            say(|| info!("everything has been served, the process ends"));
            0
        }
        Ended::GraceOver => {
            say(|| warn!(in_flight, "the grace period is over, the process ends"));
            1
        }
        Ended::SecondSignal => {
            say(|| warn!(in_flight, "a second signal ends the process"));
            1
        }
    };
    std::process::exit(status)
}
