//! This crate's balancer, and its selection for a stock Pingora load balancer.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use pingora::lb::selection::{BackendIter, BackendSelection};
use pingora_etcd::balance::{Adaptive, Balancer, BalancerBuilder, PickOptions};
use pingora_etcd::metrics::LoadReport;
use pingora_etcd::pingora::{BackendNode, LiveWeights, MetricsWeighted};
use pingora_etcd::{Change, Nodes};

use crate::router::{Outcome, Router, Ticket};
use crate::scenario::Scenario;
use crate::server::Server;
use crate::view::{View, address_of, server_at};

/// The constants of the adaptive policy, if the command line sets others than the defaults.
pub static ADAPTIVE: OnceLock<Adaptive> = OnceLock::new();

/// The settings of a balancer in this world.
pub fn settings(scenario: &Scenario) -> BalancerBuilder {
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

/// This crate's [`Balancer`].
pub struct Ours(Balancer);

impl Ours {
    pub fn new(builder: BalancerBuilder, view: &View, start: Instant) -> Self {
        let balancer = builder.default_port(80).try_build().unwrap();
        let ours = Self(balancer);
        ours.set_nodes(view, start);
        ours
    }

    fn set_nodes(&self, view: &View, now: Instant) {
        let nodes: Nodes = view.nodes().cloned().collect();
        self.0.apply(&Change::Reset(Arc::new(nodes)), now);
        self.0.publish(now);
    }
}

impl Router for Ours {
    fn pick(
        &mut self,
        servers: &[Server],
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Option<Ticket> {
        self.pick_again(&[], servers, rng, now)
    }

    fn pick_again(
        &mut self,
        tried: &[usize],
        _: &[Server],
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Option<Ticket> {
        let tried: Vec<_> = tried.iter().map(|server| address_of(*server)).collect();
        let options = PickOptions {
            exclude: &tried,
            now: Some(now),
            random: Some(rng.u64(..)),
            ..PickOptions::default()
        };
        let guard = self.0.pick_with(options)?;
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
        finish(ticket, outcome, report, now);
    }

    fn metrics(&mut self, view: &View, now: Instant) {
        self.set_nodes(view, now);
    }

    fn tick(&mut self, now: Instant) {
        self.0.tick(now);
    }
}

/// Tells the guard of a request how it ended.
fn finish(ticket: Ticket, outcome: Outcome, report: Option<&LoadReport>, now: Instant) {
    let Some(guard) = ticket.guard else { return };
    if let Some(report) = report {
        guard.report(report, now);
    }
    match outcome {
        Outcome::Succeeded(latency) => guard.succeeded(latency),
        Outcome::Failed => guard.failed(),
        Outcome::Refused => guard.unreachable(),
    }
}

/// This crate's selection for a stock Pingora load balancer.
pub struct DropIn {
    weights: Arc<LiveWeights>,
    selection: Arc<MetricsWeighted>,
    /// Whether it is told of requests and their outcomes.
    is_informed: bool,
}

impl DropIn {
    pub fn new(scenario: &Scenario, is_informed: bool, view: &View, start: Instant) -> Self {
        let adaptive = match is_informed {
            true => Adaptive::default(),
            false => Adaptive::metrics_only(),
        };
        let weights = LiveWeights::try_new(&settings_with(scenario, adaptive)).unwrap();
        weights.update(view.nodes(), start);
        let selection = Self::select(&weights);
        Self {
            weights,
            selection,
            is_informed,
        }
    }

    fn select(weights: &Arc<LiveWeights>) -> Arc<MetricsWeighted> {
        let backends = weights.backends().into_iter().map(|(backend, _)| backend);
        Arc::new(MetricsWeighted::build(&backends.collect()))
    }
}

impl Router for DropIn {
    fn pick(&mut self, _: &[Server], _: &mut fastrand::Rng, _: Instant) -> Option<Ticket> {
        let mut choices = self.selection.iter(b"");
        let backend = choices.next()?;
        let guard = || Some(BackendNode::of(backend)?.begin());
        Some(Ticket {
            server: server_at(backend.addr.as_inet().copied()?),
            guard: if self.is_informed { guard() } else { None },
        })
    }

    fn done(
        &mut self,
        ticket: Ticket,
        outcome: Outcome,
        report: Option<&LoadReport>,
        now: Instant,
    ) {
        finish(ticket, outcome, report, now);
    }

    fn metrics(&mut self, view: &View, now: Instant) {
        if self.weights.update(view.nodes(), now) {
            self.selection = Self::select(&self.weights);
        }
    }

    fn tick(&mut self, now: Instant) {
        self.weights.tick(now);
    }
}
