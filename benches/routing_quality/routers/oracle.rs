//! The optimum that the others are compared with.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::scenario::Scenario;
use crate::server::{Discipline, Server};
use crate::units::{MEAN_WORK, Seconds};
use crate::view::View;

/// Sees every queue at every instant, and sends a request where it will be finished first if no other
/// requests come; of several such servers to the first.
pub struct Oracle {
    available: Vec<usize>,
    /// The additional latency of each server.
    distance: Vec<Seconds>,
}

impl Oracle {
    pub fn new(scenario: &Scenario, view: &View, proxy: usize) -> Self {
        let distance = |server| match scenario.zones {
            Some(far) if view.zone(server) != view.zone_of_proxy(proxy) => far,
            _ => 0.0,
        };
        Self {
            available: view.available(),
            distance: (0..scenario.servers).map(distance).collect(),
        }
    }
}

impl Router for Oracle {
    fn pick(&mut self, servers: &[Server], _: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let expected = |index: usize| {
            let server = &servers[index];
            if server.fault.is_some() {
                return f64::INFINITY;
            }
            let crowd = (server.in_flight() + 1) as f64 / server.capacity();
            let stretch = match server.discipline {
                Discipline::Pipe => crowd,
                _ => crowd.max(1.0) / server.warmth,
            };
            stretch * MEAN_WORK + self.distance[index]
        };
        let expected = self
            .available
            .iter()
            .map(|index| (*index, expected(*index)));
        let (best, _) = expected.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        Some(Ticket::to(best))
    }

    fn done(&mut self, _: Ticket, _: Outcome, _: Option<&LoadReport>, _: Instant) {}

    fn metrics(&mut self, view: &View, _: Instant) {
        self.available = view.available();
    }

    fn tick(&mut self, _: Instant) {}
}
