//! A choice of two.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::view::View;

/// The better of two that are drawn with equal probability: by requests in flight, or by peak EWMA of
/// latency times requests in flight, as Finagle and Linkerd do.
pub struct OfTwo {
    ewma: bool,
    available: Vec<usize>,
    in_flight: Vec<u32>,
    cost: Vec<(f64, Option<Instant>)>,
}

/// The time over which a peak is forgotten.
const EWMA_DECAY: f64 = 10.0;

impl OfTwo {
    pub fn new(count: usize, ewma: bool) -> Self {
        Self {
            ewma,
            available: (0..count).collect(),
            in_flight: vec![0; count],
            cost: vec![(0.0, None); count],
        }
    }

    fn score(&self, index: usize, now: Instant) -> f64 {
        let in_flight = f64::from(self.in_flight[index]) + 1.0;
        if !self.ewma {
            return in_flight;
        }
        match self.cost[index] {
            (cost, Some(at)) => {
                let age = now.saturating_duration_since(at).as_secs_f64();
                in_flight * (cost * (-age / EWMA_DECAY).exp()).max(1e-6)
            }
            // Not known yet: the best possible cost with nothing in flight, otherwise one second.
            (_, None) if in_flight == 1.0 => 0.0,
            (_, None) => in_flight,
        }
    }
}

impl Router for OfTwo {
    fn pick(&mut self, _: &[Server], rng: &mut fastrand::Rng, now: Instant) -> Option<Ticket> {
        let count = self.available.len();
        let first = rng.usize(..count);
        let mut second = rng.usize(..count - 1);
        if second >= first {
            second += 1;
        }
        let (first, second) = (self.available[first], self.available[second]);
        let best = if self.score(second, now) < self.score(first, now) {
            second
        } else {
            first
        };
        self.in_flight[best] += 1;
        Some(Ticket::to(best))
    }

    fn done(&mut self, ticket: Ticket, outcome: Outcome, _: Option<&LoadReport>, now: Instant) {
        let index = ticket.server;
        self.in_flight[index] -= 1;
        let Outcome::Succeeded(latency) = outcome else {
            return;
        };
        let latency = latency.as_secs_f64();
        let (cost, at) = self.cost[index];
        let cost = match at {
            Some(at) if latency <= cost => {
                let age = now.saturating_duration_since(at).as_secs_f64();
                let kept = (-age / EWMA_DECAY).exp();
                cost * kept + latency * (1.0 - kept)
            }
            _ => latency,
        };
        self.cost[index] = (cost, Some(now));
    }

    fn metrics(&mut self, view: &View, _: Instant) {
        self.available = view.available();
    }

    fn tick(&mut self, _: Instant) {}
}
