//! Registrations that are gone, kept for a while: their processes may only have lost their leases.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use super::registration::Registration;
use crate::node::Node;

/// How long a registration is kept.
const KEPT_FOR: Duration = Duration::from_secs(120);
/// How many registrations are kept at most.
const MAX_KEPT: usize = 10_000;

/// Registrations that are gone, by the runs of their processes.
#[derive(Debug, Default)]
pub(super) struct Departed {
    by_run: HashMap<u64, Entry, Xxh3DefaultBuilder>,
    /// In the order in which they left. Some may have returned.
    order: VecDeque<(Instant, u64)>,
}

#[derive(Debug)]
struct Entry {
    left_at: Instant,
    /// The success rate at that time.
    success: f32,
    registration: Registration,
}

impl Departed {
    /// Keeps a registration that is gone, unless its node has deregistered by itself.
    pub(super) fn keep(&mut self, registration: Registration, success: f32, now: Instant) {
        self.remove_expired(now);
        let node = registration.node();
        let Some(run) = node.run().filter(|_| !node.is_leaving()) else {
            return;
        };
        if self.order.len() >= MAX_KEPT {
            self.remove_oldest();
        }
        self.order.push_back((now, run));
        let entry = Entry {
            left_at: now,
            success,
            registration,
        };
        self.by_run.insert(run, entry);
    }

    /// Returns the registration of the process of `node`, if it left recently.
    pub(super) fn take(
        &mut self,
        node: &Node,
        addr: SocketAddr,
        now: Instant,
    ) -> Option<Registration> {
        self.remove_expired(now);
        let entry = self.by_run.remove(&node.run()?)?;
        if !entry.registration.is_same_process(node, addr) {
            return None;
        }
        entry.registration.endpoint.revive(entry.success);
        Some(entry.registration)
    }

    pub(super) fn remove_expired(&mut self, now: Instant) {
        while let Some((left_at, _)) = self.order.front() {
            if now.saturating_duration_since(*left_at) < KEPT_FOR {
                return;
            }
            self.remove_oldest();
        }
    }

    fn remove_oldest(&mut self) {
        // It may have returned since, and left again.
        if let Some((left_at, run)) = self.order.pop_front()
            && (self.by_run.get(&run)).is_some_and(|entry| entry.left_at == left_at)
        {
            self.by_run.remove(&run);
        }
    }
}
