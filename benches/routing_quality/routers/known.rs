//! What a router could do that knew the capacity of each server, but nothing of what others send there.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::view::View;

/// How many servers are compared.
const CANDIDATES: usize = 5;

/// Of five servers, drawn in proportion to what each can do at this moment, the one with the fewest requests of
/// this proxy in flight for that. It shows what of a result is due to not knowing of queues.
pub struct KnownCapacity {
    available: Vec<usize>,
    in_flight: Vec<u32>,
}

impl KnownCapacity {
    pub fn new(view: &View) -> Self {
        Self {
            available: view.available(),
            in_flight: vec![0; view.present.len()],
        }
    }

    /// Draws one; none can do more than `most`.
    fn draw(&self, servers: &[Server], most: f64, rng: &mut fastrand::Rng) -> usize {
        loop {
            let index = self.available[rng.usize(..self.available.len())];
            if rng.f64() * most <= servers[index].capacity() {
                return index;
            }
        }
    }
}

impl Router for KnownCapacity {
    fn pick(&mut self, servers: &[Server], rng: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let all = self.available.iter().map(|index| servers[*index].cores);
        let most = all.fold(0.0, f64::max);
        let mut best = *self.available.first()?;
        let mut least = (f64::INFINITY, 0.0);
        for _ in 0..CANDIDATES {
            let index = self.draw(servers, most, rng);
            let crowd = f64::from(self.in_flight[index]) / servers[index].capacity();
            // Chance decides between those that are alike, such as all that have none in flight.
            let score = (crowd, rng.f64());
            if score < least {
                (best, least) = (index, score);
            }
        }
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
