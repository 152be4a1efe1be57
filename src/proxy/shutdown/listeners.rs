//! The addresses that the process listens on.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::sync::Mutex;

use ::pingora::server::ListenFds;

use super::service_manager::{Notice, notify};
use crate::sync::lock;

/// The addresses that the process is to listen on, and its sockets.
pub(in crate::proxy) struct Listeners(Mutex<State>);

struct State {
    wanted: BTreeSet<String>,
    open: BTreeSet<String>,
    sockets: Option<ListenFds>,
    /// Whether the sockets are those of a process that has ended or is about to.
    are_taken_over: bool,
}

impl Listeners {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(State {
            wanted: BTreeSet::new(),
            open: BTreeSet::new(),
            sockets: None,
            are_taken_over: false,
        }))
    }

    /// The process is to listen on this address.
    pub(in crate::proxy) fn add(&self, address: &str) {
        lock(&self.0).wanted.insert(address.to_owned());
    }

    /// The sockets that Pingora opens, or that were taken over, are in this table.
    pub(in crate::proxy) fn are_in(&self, sockets: &ListenFds) {
        lock(&self.0).sockets = Some(sockets.clone());
    }

    pub(super) fn sockets(&self) -> Option<ListenFds> {
        lock(&self.0).sockets.clone()
    }

    /// Whether there are sockets of others than this crate's proxy.
    pub(super) fn has_unknown(&self) -> bool {
        let state = lock(&self.0);
        let Some(sockets) = &state.sockets else {
            // Either this crate's proxy is not used, or it does not listen yet.
            return state.wanted.is_empty();
        };
        let (addresses, _) = sockets.lock().serialize();
        addresses
            .iter()
            .any(|address| !state.wanted.contains(address))
    }

    /// The sockets come from another process. Those on addresses that are not listened on here are
    /// closed: clients would wait there for ever.
    pub(super) fn were_taken_over(&self, sockets: &ListenFds) -> Vec<String> {
        let mut state = lock(&self.0);
        state.are_taken_over = true;
        let wanted: HashSet<String> = state.wanted.iter().cloned().collect();
        sockets.lock().close_unclaimed(&wanted)
    }

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
}

/// Checks whether an address can be listened on now; the error says why it cannot.
pub(in crate::proxy) fn check_address(address: &str) -> Result<(), String> {
    match std::net::TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot listen on {address}: {error}")),
    }
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
