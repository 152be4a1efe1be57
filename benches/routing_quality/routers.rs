//! Everything that is compared: this crate's balancer, what else is in use, and an oracle.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pingora::lb::selection::{BackendIter, BackendSelection};
use pingora_etcd::balance::{Adaptive, Balancer, BalancerBuilder, PickOptions, Policy, Upstream};
use pingora_etcd::pingora::{LiveWeights, MetricsWeighted};
use pingora_etcd::{
    Node,
    metrics::{Deadband, LoadReport},
};

use crate::server::{Discipline, Server};
use crate::world::{MEAN_WORK, Scenario, Seconds};

/// When a worker writes its metrics again, whatever they are.
const MAX_AGE: Seconds = 28.5;

/// What the servers have reported, as all proxies see it.
pub struct View {
    nodes: Vec<Arc<Node>>,
    present: Vec<bool>,
    zones: bool,
    /// CPU, queue and requests per second.
    pub said: Vec<Option<(f64, f64, f64)>>,
    deadband: Deadband,
    /// When each one's metrics were last written.
    written: Vec<Option<Seconds>>,
}

impl View {
    pub fn new(scenario: &Scenario) -> Self {
        let zones = scenario.zones.is_some();
        let node = |index: usize| {
            let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + index as u32);
            let mut node = Node::new(format!("n{index:04}"), ip.into()).with_port(80);
            if zones {
                node = node.with_zone(format!("z{}", index % 2));
            }
            Arc::new(node)
        };
        Self {
            nodes: (0..scenario.servers).map(node).collect(),
            present: vec![true; scenario.servers],
            zones,
            said: vec![None; scenario.servers],
            deadband: match EVERY_REPORT.get() {
                Some(()) => Deadband::none(),
                None => Deadband::default(),
            },
            written: vec![None; scenario.servers],
        }
    }

    pub fn zone(&self, server: usize) -> usize {
        if self.zones { server % 2 } else { 0 }
    }

    pub fn zone_of_proxy(&self, _: usize) -> usize {
        0
    }

    pub fn leave(&mut self, server: usize) {
        self.present[server] = false;
    }

    pub fn join(&mut self, server: usize) {
        self.present[server] = true;
    }

    pub fn has_reported(&self, server: usize) -> bool {
        self.said[server].is_some()
    }

    pub fn report(&mut self, server: usize, now: Seconds, cpu: f64, queue: f64, qps: f64) {
        self.said[server] = Some((cpu, queue, qps));
        let metadata = serde_json::json!({
            "cpu_usage_percent": (cpu * 1000.0).round() / 10.0,
            "queue_depth": queue,
        });
        // As a worker publishes it: what stays within the deadband is not written.
        let fresh = self.written[server].is_some_and(|at| now - at < MAX_AGE);
        if fresh
            && !self
                .deadband
                .is_left(&self.nodes[server].metadata, &metadata)
        {
            return;
        }
        self.written[server] = Some(now);
        let mut node = Node::clone(&self.nodes[server]).with_metadata(metadata);
        node.last_seen = (now * 1e3) as i64 + 1;
        self.nodes[server] = Arc::new(node);
    }

    /// The same again, with a new time.
    pub fn repeat(&mut self, server: usize, now: Seconds) {
        let mut node = Node::clone(&self.nodes[server]);
        node.last_seen = (now * 1e3) as i64 + 1;
        self.nodes[server] = Arc::new(node);
    }

    fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        let all = self.nodes.iter().zip(&self.present);
        all.filter(|(_, present)| **present).map(|(node, _)| node)
    }

    fn available(&self) -> Vec<usize> {
        (0..self.present.len())
            .filter(|index| self.present[*index])
            .collect()
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    Succeeded(Duration),
    Failed,
}

/// A request under way, as its router sees it.
pub struct Ticket {
    pub server: usize,
    guard: Option<Upstream>,
}

impl Ticket {
    fn to(server: usize) -> Self {
        Self {
            server,
            guard: None,
        }
    }
}

/// What one proxy routes with.
pub trait Router {
    fn pick(&mut self, servers: &[Server], rng: &mut fastrand::Rng, now: Instant)
    -> Option<Ticket>;
    fn done(&mut self, ticket: Ticket, outcome: Outcome, report: Option<&LoadReport>, now: Instant);
    fn metrics(&mut self, view: &View, now: Instant);
    fn tick(&mut self, now: Instant);
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterKind {
    Oracle,
    Adaptive { candidates: usize },
    Headroom,
    RoundRobin,
    Random,
    OneMinusLoad,
    GrpcWeighted,
    LeastOfTwo,
    PeakEwma,
    DropIn,
}

impl RouterKind {
    pub fn name(self) -> String {
        match self {
            Self::Oracle => "oracle".into(),
            Self::Adaptive { candidates: 5 } => "adaptive".into(),
            Self::Adaptive { candidates } => format!("adaptive, {candidates} candidates"),
            Self::Headroom => "headroom".into(),
            Self::RoundRobin => "round robin".into(),
            Self::Random => "random".into(),
            Self::OneMinusLoad => "1 - load".into(),
            Self::GrpcWeighted => "gRPC weighted round robin".into(),
            Self::LeastOfTwo => "choice of two, in flight".into(),
            Self::PeakEwma => "choice of two, peak EWMA".into(),
            Self::DropIn => "drop-in selection".into(),
        }
    }

    /// Whether it is this crate's.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Adaptive { .. } | Self::Headroom | Self::DropIn)
    }

    /// Whether it is needed to check a limit.
    pub fn is_limited(self) -> bool {
        matches!(
            self,
            Self::Oracle | Self::Adaptive { candidates: 5 } | Self::LeastOfTwo
        )
    }

    pub fn build(
        self,
        scenario: &Scenario,
        view: &View,
        proxy: usize,
        seed: u64,
        start: Instant,
    ) -> Box<dyn Router> {
        let mut rng = fastrand::Rng::with_seed(seed ^ (proxy as u64) << 32);
        let count = scenario.servers;
        match self {
            Self::Oracle => Box::new(Oracle {
                available: view.available(),
                distance: (0..count)
                    .map(|server| match scenario.zones {
                        Some(far) if view.zone(server) != view.zone_of_proxy(proxy) => far,
                        _ => 0.0,
                    })
                    .collect(),
            }),
            Self::Adaptive { candidates } => {
                let settings = settings(scenario).candidates(candidates);
                Box::new(Ours::new(settings, view, start))
            }
            Self::Headroom => {
                let settings = settings(scenario).policy(Policy::Headroom);
                Box::new(Ours::new(settings, view, start))
            }
            Self::RoundRobin => Box::new(Turns::new(count, &mut rng, |_, _| 1.0)),
            Self::Random => Box::new(Random {
                available: view.available(),
            }),
            Self::OneMinusLoad => Box::new(Turns::new(count, &mut rng, |(cpu, _, _), _| {
                (1.0 - cpu).max(0.05)
            })),
            Self::GrpcWeighted => Box::new(Turns::new(count, &mut rng, |(cpu, _, qps), errors| {
                // gRFC A58: weight = qps / (utilization + eps / qps * penalty), penalty 1.
                let penalty = if qps > 0.0 { errors / qps } else { 0.0 };
                qps / (cpu + penalty).max(1e-3)
            })),
            Self::LeastOfTwo => Box::new(OfTwo::new(count, false)),
            Self::PeakEwma => Box::new(OfTwo::new(count, true)),
            Self::DropIn => Box::new(DropIn::new(scenario, view, start)),
        }
    }
}

/// Set if the command line says that workers have no deadband.
pub static EVERY_REPORT: OnceLock<()> = OnceLock::new();
/// The constants of the adaptive policy; the defaults unless the command line says otherwise.
pub static ADAPTIVE: OnceLock<Adaptive> = OnceLock::new();

fn settings(scenario: &Scenario) -> BalancerBuilder {
    settings_with(scenario, Adaptive::default())
}

fn settings_with(scenario: &Scenario, adaptive: Adaptive) -> BalancerBuilder {
    let adaptive = ADAPTIVE.get().copied().unwrap_or(adaptive);
    let settings = Balancer::builder().default_port(80).adaptive(adaptive);
    match scenario.zones {
        Some(_) => settings.zone("z0"),
        None => settings,
    }
}

/// The server behind an address of [`View`].
pub fn server_at(addr: std::net::SocketAddr) -> usize {
    match addr.ip() {
        std::net::IpAddr::V4(ip) => (ip.to_bits() - 0x0a00_0001) as usize,
        std::net::IpAddr::V6(_) => unreachable!("all are of version 4"),
    }
}

/// This crate's [`Balancer`].
struct Ours(Balancer);

impl Ours {
    fn new(builder: BalancerBuilder, view: &View, start: Instant) -> Self {
        let balancer = builder.default_port(80).try_build().unwrap();
        balancer.update_at(view.nodes(), start);
        Self(balancer)
    }
}

impl Router for Ours {
    fn pick(&mut self, _: &[Server], rng: &mut fastrand::Rng, now: Instant) -> Option<Ticket> {
        let options = PickOptions {
            now: Some(now),
            ..PickOptions::default()
        };
        let guard = self.0.pick_by(options, || rng.u64(..))?;
        Some(Ticket {
            server: server_at(guard.addr()),
            guard: Some(guard),
        })
    }

    fn done(
        &mut self,
        ticket: Ticket,
        outcome: Outcome,
        report: Option<&LoadReport>,
        now: Instant,
    ) {
        let Some(guard) = ticket.guard else { return };
        if let Some(report) = report {
            guard.report(report, now);
        }
        match outcome {
            Outcome::Succeeded(latency) => guard.succeeded(latency),
            Outcome::Failed => guard.failed(),
        }
    }

    fn metrics(&mut self, view: &View, now: Instant) {
        self.0.update_at(view.nodes(), now);
    }

    fn tick(&mut self, now: Instant) {
        self.0.tick(now);
    }
}

/// This crate's selection for a stock Pingora load balancer, which hears of no outcome.
struct DropIn {
    weights: Arc<LiveWeights>,
    selection: Arc<MetricsWeighted>,
}

impl DropIn {
    fn new(scenario: &Scenario, view: &View, start: Instant) -> Self {
        let weights =
            LiveWeights::try_new(&settings_with(scenario, Adaptive::metrics_only())).unwrap();
        weights.update_at(view.nodes(), start);
        let selection = Self::select(&weights);
        Self { weights, selection }
    }

    fn select(weights: &Arc<LiveWeights>) -> Arc<MetricsWeighted> {
        let backends = weights.backends().into_iter().map(|(backend, _)| backend);
        Arc::new(MetricsWeighted::build(&backends.collect()))
    }
}

impl Router for DropIn {
    fn pick(&mut self, _: &[Server], _: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let mut choices = self.selection.iter(b"");
        let addr = choices.next()?.addr.as_inet().copied()?;
        Some(Ticket::to(server_at(addr)))
    }

    fn done(&mut self, _: Ticket, _: Outcome, _: Option<&LoadReport>, _: Instant) {}

    fn metrics(&mut self, view: &View, now: Instant) {
        if self.weights.update_at(view.nodes(), now) {
            self.selection = Self::select(&self.weights);
        }
    }

    fn tick(&mut self, now: Instant) {
        self.weights.tick(now);
    }
}

/// Sees every queue at every instant: sends a request where it will be done first, whatever else
/// comes; of several such servers to the first.
struct Oracle {
    available: Vec<usize>,
    /// Of each server; how much farther away it is.
    distance: Vec<Seconds>,
}

impl Router for Oracle {
    fn pick(&mut self, servers: &[Server], _: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let expected = |index: usize| {
            let server = &servers[index];
            if server.failing {
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

struct Random {
    available: Vec<usize>,
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

/// Turns by weight, evenly spread: the one with the earliest deadline is next, and its deadline
/// moves by the inverse of its weight.
struct Turns {
    weigh: fn((f64, f64, f64), f64) -> f64,
    weights: Vec<f64>,
    deadlines: Vec<f64>,
    errors: Vec<f64>,
}

impl Turns {
    fn new(count: usize, rng: &mut fastrand::Rng, weigh: fn((f64, f64, f64), f64) -> f64) -> Self {
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
        if matches!(outcome, Outcome::Failed) {
            self.errors[ticket.server] += 1.0;
        }
    }

    fn metrics(&mut self, view: &View, _: Instant) {
        let known: Vec<f64> = (view.said.iter().zip(&self.errors))
            .filter_map(|(said, errors)| said.map(|said| (self.weigh)(said, *errors)))
            .collect();
        // What is unknown counts as the mean.
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let latest = self.deadlines.iter().copied().fold(0.0, f64::max);
        for index in 0..self.weights.len() {
            let weight = match view.said[index] {
                Some(said) => (self.weigh)(said, self.errors[index]),
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

/// The better of two drawn alike: by requests in flight, or by peak EWMA of latency times requests
/// in flight, as Finagle and Linkerd do.
struct OfTwo {
    ewma: bool,
    available: Vec<usize>,
    in_flight: Vec<u32>,
    cost: Vec<(f64, Option<Instant>)>,
}

/// Over how much time a peak is forgotten.
const EWMA_DECAY: f64 = 10.0;

impl OfTwo {
    fn new(count: usize, ewma: bool) -> Self {
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
            // Not known yet: as good as it gets with nothing in flight, else a second.
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
