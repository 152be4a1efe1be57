//! A service whose listener the process cannot do without.

use std::time::Duration;

#[cfg(unix)]
use ::pingora::server::ListenFds;
use ::pingora::server::{RuntimeOpts, ShutdownWatch};
use ::pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use async_trait::async_trait;
use tracing::error;

use crate::supervise::{caught, say};

/// The runtimes of a server that was asked to end at once have ended within this time.
const RUNTIMES_END_WITHIN: Duration = Duration::from_millis(500);

/// A service that listens. If its listener ends, it ends the process, which would be useless.
///
/// Pingora tries to listen for half a minute, and then panics in a task that nothing watches: the
/// process would continue without a listener, even when the address is free again.
pub(super) struct RequiredListener<S> {
    service: S,
    address: String,
    /// Another process has the address until it hands it over: wait for that.
    takes_over: bool,
}

impl<S: ServiceWithDependents> RequiredListener<S> {
    pub(super) fn new(service: S, address: &str, takes_over: bool) -> Self {
        Self {
            service,
            address: address.to_owned(),
            takes_over,
        }
    }
}

/// Checks whether an address can be listened on now; the error says why it cannot.
pub(super) fn check_address(address: &str) -> Result<(), String> {
    match std::net::TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot listen on {address}: {error}")),
    }
}

#[async_trait]
impl<S: ServiceWithDependents> ServiceWithDependents for RequiredListener<S> {
    async fn start_service(
        &mut self,
        #[cfg(unix)] fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        #[cfg(unix)]
        let is_inherited = fds
            .as_ref()
            .is_some_and(|fds| fds.lock().get(&self.address).is_some());
        #[cfg(not(unix))]
        let is_inherited = false;
        let checked = if is_inherited || self.takes_over {
            Ok(())
        } else {
            check_address(&self.address)
        };
        let reason = match checked {
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
                    // At Ctrl-C the runtimes end without notice, and this one may end after that of
                    // the tasks that accept connections.
                    tokio::time::sleep(RUNTIMES_END_WITHIN).await;
                }
                match ended {
                    // The shutdown was requested, or the server is gone.
                    Ok(()) if *shutdown.borrow() || shutdown.has_changed().is_err() => return,
                    Ok(()) => "the listener ended without a shutdown request".to_owned(),
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
