//! A service whose listener the process cannot do without.

use std::time::Duration;

use ::pingora::server::{ListenFds, RuntimeOpts, ShutdownWatch};
use ::pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use async_trait::async_trait;
use tracing::{error, warn};

use super::shutdown::{Shutdown, check_address, confirm, take_over};
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
    /// Where another process, which has the address, hands its socket over.
    takes_over_at: Option<String>,
}

/// How often to look whether the address is listened on.
const STEP: Duration = Duration::from_millis(5);

impl<S: ServiceWithDependents> RequiredListener<S> {
    pub(super) fn new(service: S, address: &str, takes_over_at: Option<String>) -> Self {
        Self {
            service,
            address: address.to_owned(),
            takes_over_at,
        }
    }

    /// Makes sure that the address can be listened on: because nobody does, or because the process
    /// that does hands its socket over.
    async fn prepare(&self, sockets: &ListenFds) -> Result<(), String> {
        let is_inherited = sockets.lock().get(&self.address).is_some();
        if is_inherited {
            return Ok(());
        }
        if let Some(path) = &self.takes_over_at
            && take_over(sockets, path, &self.address).await
        {
            return Ok(());
        }
        check_address(&self.address)
    }

    /// Listens until the shutdown. Otherwise, the reason why nothing is listened on.
    async fn listen(
        &mut self,
        sockets: ListenFds,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) -> Result<(), String> {
        Shutdown::of_process().listeners().are_in(&sockets);
        self.prepare(&sockets).await?;
        let path = self.takes_over_at.clone();
        tokio::spawn(tell_when_open(sockets.clone(), self.address.clone(), path));
        let serving =
            self.service
                .start_service(Some(sockets), shutdown.clone(), listeners_per_fd, ready);
        caught(serving).await?;
        if !*shutdown.borrow() {
            // At Ctrl-C, Pingora's runtimes end without notice, and this one may end after that of
            // the tasks that accept connections.
            tokio::time::sleep(RUNTIMES_END_WITHIN).await;
        }
        // The shutdown was requested, or the server is gone.
        if *shutdown.borrow() || shutdown.has_changed().is_err() {
            return Ok(());
        }
        Err("the listener ended without a shutdown request".to_owned())
    }
}

/// Tells everybody who wants to know when the address is listened on.
async fn tell_when_open(sockets: ListenFds, address: String, takes_over_at: Option<String>) {
    while sockets.lock().get(&address).is_none() {
        tokio::time::sleep(STEP).await;
    }
    // Connections of a socket that was there before are accepted a moment later.
    tokio::time::sleep(STEP).await;
    let listeners = Shutdown::of_process().listeners();
    let are_all_open = listeners.is_open(&address);
    if let Some(path) = takes_over_at
        && are_all_open
        && listeners.are_taken_over()
    {
        confirm(&path).await;
    }
}

#[async_trait]
impl<S: ServiceWithDependents> ServiceWithDependents for RequiredListener<S> {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        if !Shutdown::of_process().is_watched() {
            say(|| {
                warn!(
                    "Pingora handles the signals of this process, because it does not call pingora_etcd::proxy::run"
                );
            });
        }
        let listened = match fds {
            Some(sockets) => {
                self.listen(sockets, shutdown, listeners_per_fd, ready)
                    .await
            }
            None => Err("the server has no table of sockets".to_owned()),
        };
        if let Err(reason) = listened {
            let address = self.address.as_str();
            say(|| error!(address, reason, "there is no listener, the process ends"));
            std::process::exit(1);
        }
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
