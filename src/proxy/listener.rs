//! A service whose listeners the process cannot do without.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::server::{ListenFds, RuntimeOpts, ShutdownWatch};
use ::pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use async_trait::async_trait;
use tracing::{error, warn};

use super::shutdown::{Shutdown, Successor, check_address, take_over};
use crate::pingora::BalancerService;
use crate::supervise::{caught, say};

/// The runtimes of a server that was asked to end at once have ended within this time.
const RUNTIMES_END_WITHIN: Duration = Duration::from_millis(500);

/// A service that listens. If it ends, it ends the process, which would be useless.
///
/// Pingora tries to listen for half a minute, and then panics in a task that nothing watches: the
/// process would continue without a listener, even when the address is free again.
pub(super) struct RequiredListener<S> {
    service: S,
    /// At least one.
    addresses: Vec<String>,
    /// Where another process, which has the addresses, hands its sockets over.
    takes_over_at: Option<String>,
    balancers: Balancers,
}

/// Those that are used now, which a change of the file may have replaced.
pub(super) type Balancers = Box<dyn Fn() -> Vec<Arc<BalancerService>> + Send + Sync>;

const TAKEN_BY_PINGORA: &str = "Pingora has taken the sockets over, without a word to the process that had them: do not call bootstrap before pingora_etcd::proxy::run";
/// How often to look whether the addresses are listened on.
const STEP: Duration = Duration::from_millis(5);
/// A socket that was taken over is accepted from within this time.
const ACCEPTED_WITHIN: Duration = Duration::from_millis(100);
/// How long a successor waits for the first health checks of all nodes.
const MOST_WAIT_FOR_CHECKS: Duration = Duration::from_secs(5);
/// How often to look whether there is a view of the group.
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl<S: ServiceWithDependents> RequiredListener<S> {
    pub(super) fn new(
        service: S,
        addresses: Vec<String>,
        takes_over_at: Option<String>,
        balancers: Balancers,
    ) -> Self {
        Self {
            service,
            balancers,
            addresses,
            takes_over_at,
        }
    }

    /// Makes sure that the addresses can be listened on: because nobody does, or because the process
    /// that does hands its sockets over. Whoever has taken sockets over has to confirm that.
    async fn prepare(&self, sockets: &ListenFds) -> Result<Option<Successor>, String> {
        let is_open = |address: &String| sockets.lock().get(address).is_some();
        if self.addresses.iter().all(is_open) {
            let are_ours = Shutdown::of_process().listeners().are_taken_over();
            return match self.takes_over_at.is_none() || are_ours {
                true => Ok(None),
                // The predecessor waits for a word, and goes on without it.
                false => Err(TAKEN_BY_PINGORA.to_owned()),
            };
        }
        let mut successor = None;
        if let Some(path) = &self.takes_over_at {
            self.wait_for_view().await;
            let listeners = Shutdown::of_process().listeners();
            listeners.until_prepared(&self.addresses).await;
            successor = take_over(sockets, path, &self.addresses).await?;
        }
        for address in &self.addresses {
            if !is_open(address) {
                check_address(address)?;
            }
        }
        Ok(successor)
    }

    /// Whether another process listens on one of the addresses.
    fn is_any_taken(&self) -> bool {
        let mut addresses = self.addresses.iter();
        addresses.any(|address| check_address(address).is_err())
    }

    /// The predecessor serves better than this process without a view of the group, or without knowing whose health checks
    /// fail, as long as it lives.
    async fn wait_for_view(&self) {
        let are_ready = || {
            (self.balancers)()
                .iter()
                .all(|it| it.discovery().is_ready())
        };
        while !are_ready() && self.is_any_taken() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for balancer in (self.balancers)() {
            balancer.hear_operators().await;
            balancer.catch_up();
        }
        let start = Instant::now();
        let are_checked = || (self.balancers)().iter().all(|it| it.has_checked_all());
        while !are_checked() && start.elapsed() < MOST_WAIT_FOR_CHECKS && self.is_any_taken() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
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
        let successor = self.prepare(&sockets).await?;
        let addresses = self.addresses.clone();
        tokio::spawn(tell_when_open(sockets.clone(), addresses, successor));
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

/// Tells everybody who wants to know when the addresses are listened on.
async fn tell_when_open(sockets: ListenFds, addresses: Vec<String>, successor: Option<Successor>) {
    let is_open = |address: &String| sockets.lock().get(address).is_some();
    while !addresses.iter().all(is_open) {
        tokio::time::sleep(STEP).await;
    }
    if successor.is_some() {
        // The sockets were there before they are accepted from.
        tokio::time::sleep(ACCEPTED_WITHIN).await;
    }
    for address in &addresses {
        Shutdown::of_process().listeners().is_open(address);
    }
    if let Some(successor) = successor {
        successor.confirm().await;
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
            let addresses = self.addresses.join(", ");
            say(|| error!(addresses, reason, "there is no listener, the process ends"));
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
