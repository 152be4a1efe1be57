//! Whether this process can make connections, as far as it is known.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sync::lock;

/// The last new connection to a backend of a group.
#[derive(Debug, Default)]
pub(super) struct LastConnected(Mutex<Option<(SocketAddr, Instant)>>);

/// For how long it shows that this process can connect.
const SHOWS_FOR: Duration = Duration::from_secs(10);

impl LastConnected {
    pub(super) fn add(&self, addr: SocketAddr, now: Instant) {
        *lock(&self.0) = Some((addr, now));
    }

    /// Whether another backend than this one was connected to a short while ago.
    pub(super) fn was_another(&self, addr: SocketAddr, now: Instant) -> bool {
        lock(&self.0).is_some_and(|(other, at)| {
            other != addr && now.saturating_duration_since(at) < SHOWS_FOR
        })
    }
}
