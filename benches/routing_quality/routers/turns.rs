//! Turns by weights that follow from reports.

use std::time::Instant;

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::view::View;

/// The weight that follows from CPU, queue and requests per second, and the number of errors since
/// the last report.
type Weigh = fn((f64, f64, f64), f64) -> f64;

/// The part of CPU that is not in use.
pub fn one_minus_load((cpu, _, _): (f64, f64, f64), _: f64) -> f64 {
    (1.0 - cpu).max(0.05)
}

/// gRFC A58: weight = qps / (utilization + eps / qps * penalty), penalty 1.
pub fn grpc_weight((cpu, _, qps): (f64, f64, f64), errors: f64) -> f64 {
    let penalty = if qps > 0.0 { errors / qps } else { 0.0 };
    qps / (cpu + penalty).max(1e-3)
}

/// Turns by weight, evenly spread: the one with the earliest deadline is next, and its deadline
/// moves by the inverse of its weight.
pub struct Turns {
    weigh: Weigh,
    weights: Vec<f64>,
    deadlines: Vec<f64>,
    errors: Vec<f64>,
}

impl Turns {
    pub fn new(count: usize, rng: &mut fastrand::Rng, weigh: Weigh) -> Self {
        Self {
            weigh,
            weights: vec![1.0; count],
            deadlines: (0..count).map(|_| rng.f64()).collect(),
            errors: vec![0.0; count],
        }
    }
}

impl Router for Turns {
    fn pick(&mut self, _: &[Server], _: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let indexes = (0..self.weights.len()).filter(|index| self.weights[*index] > 0.0);
        let next = indexes.min_by(|a, b| self.deadlines[*a].total_cmp(&self.deadlines[*b]))?;
        self.deadlines[next] += 1.0 / self.weights[next];
        Some(Ticket::to(next))
    }

    fn done(&mut self, ticket: Ticket, outcome: Outcome, _: Option<&LoadReport>, _: Instant) {
        if matches!(outcome, Outcome::Failed | Outcome::Refused) {
            self.errors[ticket.server] += 1.0;
        }
    }

    fn metrics(&mut self, view: &View, _: Instant) {
        let known: Vec<f64> = (view.reports.iter().zip(&self.errors))
            .filter_map(|(report, errors)| report.map(|report| (self.weigh)(report, *errors)))
            .collect();
        // A server that has not reported counts with the mean.
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let latest = self.deadlines.iter().copied().fold(0.0, f64::max);
        for index in 0..self.weights.len() {
            let weight = match view.reports[index] {
                Some(report) => (self.weigh)(report, self.errors[index]),
                None if known.is_empty() => 1.0,
                None => mean,
            };
            let was_absent = self.weights[index] == 0.0;
            self.weights[index] = if view.present[index] {
                weight.max(1e-3)
            } else {
                0.0
            };
            if was_absent && view.present[index] {
                self.deadlines[index] = latest;
            }
        }
        let scale = self.weights.iter().copied().fold(0.0, f64::max);
        for weight in &mut self.weights {
            *weight /= scale;
        }
        self.errors.fill(0.0);
    }

    fn tick(&mut self, _: Instant) {}
}
