//! Probing, as in B. Wydrowski, R. Kleinberg, S. Rumble and A. Archer, "Load is not what you should
//! balance: introducing Prequal", NSDI 2024, with the parameters of its section 4.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pingora_etcd::metrics::LoadReport;

use crate::router::{Outcome, Router, Ticket};
use crate::server::Server;
use crate::units::Seconds;
use crate::view::View;

/// Probes sent for each request.
const PROBES: usize = 3;
/// The most answers that are kept.
const POOL: usize = 16;
/// How long an answer is kept.
const AGE: Duration = Duration::from_secs(1);
/// A server with more requests in flight than this part of the recent answers is hot.
const HOT: f64 = 0.84;
/// How many recent answers that part is of.
const RECENT: usize = 128;
/// By how much the pool is to fill faster than it is used.
const DELTA: f64 = 1.0;

struct Probe {
    server: usize,
    in_flight: usize,
    latency: Seconds,
    at: Instant,
    uses: u32,
}

impl Probe {
    /// Compares two answers, the better one first: those that are not hot by latency, the others by
    /// requests in flight.
    fn compare(&self, other: &Self, hot: usize) -> Ordering {
        let cost = |probe: &Self| match probe.in_flight > hot {
            true => (true, probe.in_flight as f64),
            false => (false, probe.latency),
        };
        let (own, other) = (cost(self), cost(other));
        own.0.cmp(&other.0).then(own.1.total_cmp(&other.1))
    }
}

/// Of the servers that have answered a probe: the quickest one of those that are not hot, else the one
/// with the fewest requests in flight.
pub struct Prequal {
    available: Vec<usize>,
    /// The oldest first.
    pool: VecDeque<Probe>,
    recent: VecDeque<usize>,
    removes_oldest: bool,
}

impl Prequal {
    pub fn new(count: usize) -> Self {
        Self {
            available: (0..count).collect(),
            pool: VecDeque::new(),
            recent: VecDeque::new(),
            removes_oldest: false,
        }
    }

    /// More answers than half of the servers would say the same twice.
    fn most(&self) -> usize {
        POOL.min(self.available.len() / 2).max(1)
    }

    /// How often an answer is used.
    fn uses(&self, rng: &mut fastrand::Rng) -> u32 {
        let free = 1.0 - self.most() as f64 / self.available.len() as f64;
        let uses = ((1.0 + DELTA) / (free * PROBES as f64 - 1.0).max(0.1)).max(1.0);
        let more = rng.f64() < uses.fract();
        uses as u32 + u32::from(more)
    }

    fn probe(&mut self, servers: &[Server], rng: &mut fastrand::Rng, now: Instant) {
        for _ in 0..PROBES {
            let server = self.available[rng.usize(..self.available.len())];
            let in_flight = servers[server].in_flight();
            let uses = self.uses(rng);
            self.recent.push_back(in_flight);
            if self.recent.len() > RECENT {
                self.recent.pop_front();
            }
            self.pool.retain(|probe| probe.server != server);
            self.pool.push_back(Probe {
                server,
                in_flight,
                latency: servers[server].expected_latency(),
                at: now,
                uses,
            });
        }
        while self.pool.len() > self.most() {
            self.pool.pop_front();
        }
        let is_old = |probe: &Probe| now.saturating_duration_since(probe.at) > AGE;
        self.pool.retain(|probe| !is_old(probe));
    }

    fn hot(&self) -> usize {
        let mut recent: Vec<_> = self.recent.iter().copied().collect();
        let rank = ((recent.len() - 1) as f64 * HOT) as usize;
        *recent.select_nth_unstable(rank).1
    }

    /// For each request one answer goes, the oldest one or the worst one in turn.
    fn remove_one(&mut self, hot: usize) {
        if self.pool.len() < 2 {
            return;
        }
        self.removes_oldest = !self.removes_oldest;
        if self.removes_oldest {
            self.pool.pop_front();
            return;
        }
        let all = self.pool.iter().enumerate();
        let worst = all.max_by(|(_, one), (_, two)| one.compare(two, hot));
        if let Some(worst) = worst.map(|(index, _)| index) {
            self.pool.remove(worst);
        }
    }
}

impl Router for Prequal {
    fn pick(
        &mut self,
        servers: &[Server],
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Option<Ticket> {
        self.probe(servers, rng, now);
        let hot = self.hot();
        let all = self.pool.iter().enumerate();
        let best = all.min_by(|(_, one), (_, two)| one.compare(two, hot));
        let best = best.map(|(index, _)| index)?;
        let probe = &mut self.pool[best];
        let server = probe.server;
        probe.in_flight += 1;
        probe.uses = probe.uses.saturating_sub(1);
        if probe.uses == 0 {
            self.pool.remove(best);
        }
        self.remove_one(hot);
        Some(Ticket::to(server))
    }

    fn done(&mut self, _: Ticket, _: Outcome, _: Option<&LoadReport>, _: Instant) {}

    fn metrics(&mut self, view: &View, _: Instant) {
        self.available = view.available();
    }

    fn tick(&mut self, _: Instant) {}
}
