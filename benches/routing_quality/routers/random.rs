//! At random.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::view::View;

/// Any server with equal probability.
pub struct Random {
    available: Vec<usize>,
}

impl Random {
    pub fn new(view: &View) -> Self {
        Self {
            available: view.available(),
        }
    }
}

impl Router for Random {
    fn pick(&mut self, _: &[Server], rng: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        Some(Ticket::to(
            self.available[rng.usize(..self.available.len())],
        ))
    }

    fn done(&mut self, _: Ticket, _: Outcome, _: Option<&LoadReport>, _: Instant) {}

    fn metrics(&mut self, view: &View, _: Instant) {
        self.available = view.available();
    }

    fn tick(&mut self, _: Instant) {}
}
