//! The addresses that the process listens on.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use ::pingora::server::ListenFds;

use super::service_manager::{Notice, notify};
use crate::sync::lock;

const STEP: Duration = Duration::from_millis(20);

/// The addresses that the process is to listen on, and its sockets.
pub(in crate::proxy) struct Listeners(Mutex<State>);

struct State {
    wanted: BTreeSet<String>,
    /// Those that could be served.
    prepared: BTreeSet<String>,
    open: BTreeSet<String>,
    /// How many accept nothing any more.
    closed: usize,
    sockets: Option<ListenFds>,
    /// Whether the sockets are those of a process that has ended or is about to.
    are_taken_over: bool,
}

impl Listeners {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(State {
            wanted: BTreeSet::new(),
            prepared: BTreeSet::new(),
            open: BTreeSet::new(),
            closed: 0,
            sockets: None,
            are_taken_over: false,
        }))
    }

    /// The process is to listen on this address.
    pub(in crate::proxy) fn add(&self, address: &str) {
        lock(&self.0).wanted.insert(address.to_owned());
    }

    pub(in crate::proxy) fn wants(&self, address: &str) -> bool {
        lock(&self.0).wanted.contains(address)
    }

    /// The sockets that Pingora opens, or that were taken over, are in this table.
    pub(in crate::proxy) fn are_in(&self, sockets: &ListenFds) {
        lock(&self.0).sockets = Some(sockets.clone());
    }

    /// What is listened on at these addresses could be served. Waits until that is true of all.
    pub(in crate::proxy) async fn until_prepared(&self, addresses: &[String]) {
        lock(&self.0).prepared.extend(addresses.iter().cloned());
        loop {
            {
                let state = lock(&self.0);
                if state.prepared.is_superset(&state.wanted) {
                    return;
                }
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// The table of sockets, if every address is listened on.
    pub(super) fn open_sockets(&self) -> Option<ListenFds> {
        let state = lock(&self.0);
        let is_open = !state.wanted.is_empty() && state.open.is_superset(&state.wanted);
        state.sockets.clone().filter(|_| is_open)
    }

    /// Whether there are sockets of others than this crate's proxy.
    pub(super) fn has_unknown(&self) -> bool {
        let state = lock(&self.0);
        let Some(sockets) = &state.sockets else {
            // Either this crate's proxy is not used, or it does not listen yet.
            return state.wanted.is_empty();
        };
        let (addresses, _) = sockets.lock().serialize();
        let mut addresses = addresses.iter();
        addresses.any(|address| !state.wanted.contains(address))
    }

    /// Sockets come from another process.
    pub(super) fn take_over(&self) {
        lock(&self.0).are_taken_over = true;
    }

    /// Whether they have come.
    pub(in crate::proxy) fn are_taken_over(&self) -> bool {
        lock(&self.0).are_taken_over
    }

    /// This address is listened on now. Returns whether all of them are then, which is what a service
    /// manager is told.
    pub(in crate::proxy) fn is_open(&self, address: &str) -> bool {
        let mut state = lock(&self.0);
        state.open.insert(address.to_owned());
        let are_all_open = state.open.is_superset(&state.wanted);
        if are_all_open {
            notify(match state.are_taken_over {
                true => Notice::ReadyInsteadOfPredecessor,
                false => Notice::Ready,
            });
        }
        are_all_open
    }

    /// At this many more addresses nothing is accepted any more.
    pub(in crate::proxy) fn close(&self, count: usize) {
        lock(&self.0).closed += count;
    }

    pub(super) fn are_closed(&self) -> bool {
        let state = lock(&self.0);
        state.closed >= state.open.len()
    }
}

/// Checks whether an address can be listened on now; the error says why it cannot.
pub(in crate::proxy) fn check_address(address: &str) -> Result<(), String> {
    match listen_error(address) {
        None => Ok(()),
        Some(error) => Err(format!("cannot listen on {address}: {error}")),
    }
}

/// Why an address cannot be listened on now.
pub(super) fn listen_error(address: &str) -> Option<io::Error> {
    std::net::TcpListener::bind(address).err()
}

pub(super) fn is_in_use(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.0);
        f.debug_struct("Listeners")
            .field("wanted", &state.wanted)
            .field("open", &state.open)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_closed_when_as_many_are_as_were_open() {
        let listeners = Listeners::new();
        for address in ["a", "b", "c"] {
            listeners.add(address);
        }
        assert!(!listeners.is_open("a") && !listeners.is_open("b"));
        assert!(listeners.is_open("c"));
        // One service has two of them.
        listeners.close(1);
        assert!(!listeners.are_closed());
        listeners.close(2);
        assert!(listeners.are_closed());
    }
}
