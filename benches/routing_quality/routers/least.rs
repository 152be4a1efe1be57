//! The fewest requests in flight of all.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::view::View;

/// Of all servers the one with the fewest requests of this proxy in flight, by chance if there are
/// several: `least_conn` of nginx, `leastconn` of HAProxy.
pub struct LeastOfAll {
    available: Vec<usize>,
    in_flight: Vec<u32>,
}

impl LeastOfAll {
    pub fn new(count: usize) -> Self {
        Self {
            available: (0..count).collect(),
            in_flight: vec![0; count],
        }
    }
}

impl Router for LeastOfAll {
    fn pick(&mut self, _: &[Server], rng: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let from = rng.usize(..self.available.len());
        let (before, after) = self.available.split_at(from);
        let in_turn = after.iter().chain(before).copied();
        let best = in_turn.min_by_key(|index| self.in_flight[*index])?;
        self.in_flight[best] += 1;
        Some(Ticket::to(best))
    }

    fn done(&mut self, ticket: Ticket, _: Outcome, _: Option<&LoadReport>, _: Instant) {
        self.in_flight[ticket.server] -= 1;
    }

    fn metrics(&mut self, view: &View, _: Instant) {
        self.available = view.available();
    }

    fn tick(&mut self, _: Instant) {}
}
