#[cfg(unix)]
use ::pingora::server::ListenFds;
use ::pingora::server::{RuntimeOpts, ShutdownWatch};
use ::pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use async_trait::async_trait;
use tracing::error;

use crate::supervise::{caught, say};

/// Within this the runtimes of a server have ended that was told to end at once.
const ENDING: std::time::Duration = std::time::Duration::from_millis(500);

/// A service that listens, and without which the process is of no use: it ends with it.
///
/// Pingora tries to listen for half a minute, panics then in a task that nobody looks at, and the process
/// lives on without a listener, also when the address is free again.
pub(super) struct Listening<S> {
    service: S,
    address: String,
    /// Another process has the address until it lets go of it: then it is waited for.
    takes_over: bool,
}

impl<S: ServiceWithDependents> Listening<S> {
    pub(super) fn new(service: S, address: &str, takes_over: bool) -> Self {
        Self {
            service,
            address: address.to_owned(),
            takes_over,
        }
    }
}

/// Whether an address could be listened on now; if not, why.
pub(super) fn can_listen(address: &str) -> Result<(), String> {
    match std::net::TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot listen on {address}: {error}")),
    }
}

#[async_trait]
impl<S: ServiceWithDependents> ServiceWithDependents for Listening<S> {
    async fn start_service(
        &mut self,
        #[cfg(unix)] fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        #[cfg(unix)]
        let is_given = fds
            .as_ref()
            .is_some_and(|fds| fds.lock().get(&self.address).is_some());
        #[cfg(not(unix))]
        let is_given = false;
        let free = if is_given || self.takes_over {
            Ok(())
        } else {
            can_listen(&self.address)
        };
        let reason = match free {
            Err(reason) => reason,
            Ok(()) => {
                let serving = self.service.start_service(
                    #[cfg(unix)]
                    fds,
                    shutdown.clone(),
                    listeners_per_fd,
                    ready,
                );
                let ended = caught(serving).await;
                if ended.is_ok() && !*shutdown.borrow() {
                    // At Ctrl-C the runtimes end without a word, this one perhaps after that of the
                    // tasks which accept.
                    tokio::time::sleep(ENDING).await;
                }
                match ended {
                    // It was told to, or the server is gone.
                    Ok(()) if *shutdown.borrow() || shutdown.has_changed().is_err() => return,
                    Ok(()) => "nobody accepts connections any more".to_owned(),
                    Err(panic) => panic,
                }
            }
        };
        let address = self.address.as_str();
        say(|| error!(address, reason, "there is no listener, the process ends"));
        std::process::exit(1);
    }

    fn name(&self) -> &str {
        self.service.name()
    }

    fn threads(&self) -> Option<usize> {
        self.service.threads()
    }

    fn runtime_opts_override(&self, global: &RuntimeOpts) -> Option<RuntimeOpts> {
        self.service.runtime_opts_override(global)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        self.service.listen_addresses()
    }
}
