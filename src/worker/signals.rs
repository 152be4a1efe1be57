//! The signals that end a worker.

use std::io;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

/// Signals that ask a worker to end: SIGTERM, as from Kubernetes, Docker or systemd, SIGINT (Ctrl-C) and SIGQUIT. From when this
/// exists on, none of them ends the process by itself, so that it can leave its group; nor do SIGHUP, SIGUSR1 and SIGUSR2,
/// which end a process that does not handle them, and have no effect here.
///
/// ```no_run
/// # async fn example(node: pingora_etcd::ClusterNode) -> Result<(), Box<dyn std::error::Error>> {
/// use pingora_etcd::worker::EndSignals;
///
/// let mut signals = EndSignals::new()?;
/// node.run_until(async { signals.next().await }).await?;
/// # Ok(()) }
/// ```
///
/// For a program that Pingora serves, `proxy::run` handles signals.
#[derive(Debug)]
pub struct EndSignals {
    ending: Vec<Signal>,
    others: Vec<Signal>,
}

impl EndSignals {
    /// Handles the signals from now on; within a runtime of tokio.
    ///
    /// # Errors
    ///
    /// When the system does not let the process handle them.
    pub fn new() -> io::Result<Self> {
        let ending = [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::quit(),
        ];
        let others = [
            SignalKind::hangup(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        Ok(Self {
            ending: ending.into_iter().map(signal).collect::<Result<_, _>>()?,
            others: others.into_iter().map(signal).collect::<Result<_, _>>()?,
        })
    }

    /// Waits for the next signal that asks the worker to end. Who waits again learns of a second one, after which a program
    /// should end at once. Dropping the future loses none.
    pub async fn next(&mut self) {
        std::future::poll_fn(|context| {
            for other in &mut self.others {
                while other.poll_recv(context).is_ready() {
                    info!("a signal without effect");
                }
            }
            let mut ending = self.ending.iter_mut();
            match ending.any(|signal| signal.poll_recv(context).is_ready()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }
}
