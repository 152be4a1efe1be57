//! Registrations that are gone, kept for a while: their processes may only have lost their leases.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::kept::Kept;
use super::registration::Registration;
use crate::node::Node;

/// How long a registration is kept.
const KEPT_FOR: Duration = Duration::from_secs(120);

/// Registrations that are gone, by the runs of their processes.
#[derive(Debug)]
pub(super) struct Departed(Kept<u64, Gone>);

#[derive(Debug)]
struct Gone {
    /// The success rate when it left.
    success: f32,
    registration: Registration,
}

impl Default for Departed {
    fn default() -> Self {
        Self(Kept::new(KEPT_FOR))
    }
}

impl Departed {
    /// Keeps a registration that is gone, unless its node has deregistered by itself.
    pub(super) fn keep(&mut self, registration: Registration, success: f32, now: Instant) {
        let node = registration.node();
        if let Some(run) = node.run().filter(|_| !node.is_leaving()) {
            let gone = Gone {
                success,
                registration,
            };
            self.0.insert(run, gone, now);
        }
    }

    /// Returns the registration of the process of `node`, if it left recently.
    pub(super) fn take(
        &mut self,
        node: &Node,
        addr: SocketAddr,
        now: Instant,
    ) -> Option<Registration> {
        let gone = self.0.take(&node.run()?, now)?;
        if !gone.registration.is_same_process(node, addr) {
            return None;
        }
        gone.registration.endpoint.revive(gone.success);
        Some(gone.registration)
    }

    pub(super) fn remove_expired(&mut self, now: Instant) {
        self.0.remove_expired(now);
    }
}
