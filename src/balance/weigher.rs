//! From the nodes of a group, and the outcomes of requests, to the weights of backends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checked::{Checked, Gate};
use super::controller::{Controller, ReportContext, Trust};
use super::endpoint::Endpoint;
use super::fleet::Fleet;
use super::load::Load;
use super::mean::Mean;
use super::policy::{ActivePolicy, RoutingPolicy};
use super::roster::Roster;
use super::settings::{Adaptive, Zones};
use super::zone::{Spill, ZoneSample, ZoneSource};
use crate::node::Node;
use crate::view::NodeOverride;

/// How long a report of requests in flight counts.
const IN_FLIGHT_REPORT_VALID: Duration = Duration::from_secs(5);

/// What weights follow from, beside the policy.
#[derive(Debug, Clone)]
pub(super) struct WeigherSettings {
    pub(super) adaptive: Adaptive,
    pub(super) zones: Zones,
    pub(super) zone: ZoneSource,
    pub(super) default_port: u16,
    /// Whether requests are counted and their outcomes reported. If not, every backend counts as
    /// busy.
    pub(super) counts_requests: bool,
}

/// Weighs the nodes of a group, and learns about each registration what a single report does not
/// show.
#[derive(Debug)]
pub(crate) struct Weigher {
    settings: WeigherSettings,
    fleet: Arc<Fleet>,
    roster: Roster,
    trust: Trust,
    spill: Spill,
    /// The balancer's own zone.
    zone: Option<String>,
    last_tick: Option<Instant>,
}

/// What one tick found out about all backends together.
#[derive(Default)]
struct TickSummary {
    best_success: Option<f32>,
    worst_success: f32,
    reports_in_flight: bool,
    /// Of the logarithms of weights by metrics, where there is a recent report.
    metrics: Mean,
    loads: Mean,
    excess_latency: Mean,
}

impl Weigher {
    pub(super) fn new(settings: WeigherSettings) -> Self {
        let fleet = Arc::new(Fleet::new(&settings.adaptive));
        Self {
            roster: Roster::new(settings.default_port, fleet.clone()),
            fleet,
            settings,
            trust: Trust::default(),
            spill: Spill::default(),
            zone: None,
            last_tick: None,
        }
    }

    /// Works by other settings from now on, with what it knows of the nodes.
    pub(super) fn change(&mut self, settings: WeigherSettings, now: Instant) {
        self.fleet.change(&settings.adaptive);
        self.roster.set_default_port(settings.default_port, now);
        self.zone = None;
        self.settings = settings;
    }

    pub(super) fn set_overrides(&mut self, overrides: &HashMap<String, NodeOverride>) {
        self.roster.set_overrides(overrides);
    }

    pub(super) fn override_of(&self, id: &str) -> Option<NodeOverride> {
        self.roster.get(id)?.said()
    }

    pub(super) fn set_checks(&mut self, panic_threshold: Option<f64>) {
        self.roster.set_checks(panic_threshold);
    }

    pub(super) fn set_checked(&mut self, node: &Node, is_well: bool) -> Option<bool> {
        self.roster.set_checked(node, is_well)
    }

    /// Whether health checks find so few nodes well that all are used.
    pub(super) fn is_panicking(&self) -> bool {
        let has_down = || {
            self.roster
                .active()
                .any(|it| self.roster.checked(it) == Checked::Down)
        };
        self.roster.gate() == Gate::Open && has_down()
    }

    pub(super) fn fleet(&self) -> &Arc<Fleet> {
        &self.fleet
    }

    /// Replaces everything by these nodes; takes effect with the next [`settle`](Self::settle).
    pub(crate) fn reset<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) {
        self.roster.reset(nodes, now);
    }

    /// Takes over a node that is new or has written its entry again; takes effect with the next
    /// [`settle`](Self::settle).
    pub(super) fn insert(&mut self, node: &Arc<Node>, now: Instant) {
        self.roster.insert(node, now);
    }

    /// Removes a node; requests avoid it from now on.
    pub(super) fn remove(&mut self, id: &str, now: Instant) {
        self.roster.remove(id, now);
    }

    /// Computes the weights that follow from the changes so far. Costs time in proportion to the
    /// number of nodes.
    pub(crate) fn settle(&mut self, policy: &ActivePolicy, now: Instant) {
        self.find_zone();
        self.learn_from_reports(now);
        self.weigh(policy, now);
    }

    /// The same, and takes over what time and requests have brought; to be called once a second.
    pub(crate) fn tick(&mut self, policy: &ActivePolicy, now: Instant) {
        let last = self.last_tick.replace(now).unwrap_or(now);
        let passed = now.saturating_duration_since(last);
        self.roster.tick(now);
        self.find_zone();
        self.learn_from_reports(now);
        self.learn_from_requests(now, passed);
        self.measure_zones();
        self.weigh(policy, now);
    }

    /// Finds this balancer's zone: the one it was given, or that of a node that has registered.
    fn find_zone(&mut self) {
        self.zone = match &self.settings.zone {
            ZoneSource::None => None,
            ZoneSource::Name(zone) => Some(zone.clone()),
            ZoneSource::OfNode(id) => match self.roster.get(id) {
                Some(registration) => registration.node().zone.clone(),
                // A node that is gone for a moment has not moved.
                None => self.zone.take(),
            },
        };
    }

    /// Gives the controllers the reports that are new.
    fn learn_from_reports(&mut self, now: Instant) {
        let adaptive = &self.settings.adaptive;
        let new = self.roster.take_new_loads();
        let mean = self.roster.mean_load();
        for at in &new {
            let at = *at as usize;
            let Some(registration) = self.roster.registrations().get(at) else {
                continue;
            };
            if registration.has_new_load {
                let success = registration.endpoint.success();
                let load = adaptive.load(registration.load(), &mean, success);
                self.roster.set_controlled_load(at, load, now);
            }
        }
        let mean = *self.roster.controlled_load();
        let registrations = self.roster.registrations_mut();
        for at in new {
            let Some(registration) = registrations.get_mut(at as usize) else {
                continue;
            };
            let is_new = std::mem::take(&mut registration.has_new_load);
            // With a single report there is nothing to compare it with.
            if !is_new || mean.count() < 2 || registration.is_shadowed {
                continue;
            }
            let was_used = std::mem::take(&mut registration.was_used);
            let endpoint = &registration.endpoint;
            let context = ReportContext {
                success: endpoint.success(),
                is_idle: self.settings.counts_requests
                    && !was_used
                    && !endpoint.is_active_since(registration.outcomes_at_tick),
            };
            let trust = &mut self.trust;
            let controller = &mut registration.controller;
            controller.correct_by_load(adaptive, trust, &mean, context);
        }
    }

    /// Takes over what requests have found out since the last tick, which was `passed` ago.
    fn learn_from_requests(&mut self, now: Instant, passed: Duration) {
        let adaptive = &self.settings.adaptive;
        let mut summary = TickSummary {
            worst_success: 1.0,
            ..TickSummary::default()
        };
        for registration in self.roster.registrations_mut() {
            let endpoint = &registration.endpoint;
            let controller = &mut registration.controller;
            controller.age(adaptive, now, passed);
            let is_active = endpoint.is_active_since(registration.outcomes_at_tick);
            if is_active || !self.settings.counts_requests {
                registration.was_used = true;
            } else {
                controller.forget_a_part(adaptive);
            }
            controller.set_latencies(endpoint.take_latencies(adaptive.latency_samples));
            registration.outcomes_at_tick = endpoint.outcomes();
            if registration.takes_traffic() {
                summary.add(&registration.endpoint, &registration.controller, now);
            }
        }
        // Without those that have just become stale.
        self.roster.replace_controlled_load(summary.loads);
        for registration in self.roster.registrations_mut() {
            if registration.takes_traffic() {
                let controller = &mut registration.controller;
                controller.center(summary.metrics.value());
                controller.correct_by_latency(adaptive, &summary.excess_latency);
            }
        }
        if !summary.reports_in_flight {
            self.fleet.clear_in_flight_reports();
        }
        // Without any backend all is well: the first one to come has not failed yet.
        let best = summary.best_success.unwrap_or(1.0);
        self.fleet.set_success_rates(best, summary.worst_success);
    }

    /// Measures the own zone and the others, which decides how much traffic leaves the zone.
    fn measure_zones(&mut self) {
        let zone = self.zone.as_deref();
        if zone.is_none() {
            return;
        }
        let (mut own, mut others) = (ZoneSample::default(), ZoneSample::default());
        for registration in self.roster.used() {
            let is_own = registration.is_in_zone(zone);
            let sample = if is_own { &mut own } else { &mut others };
            let weight = registration.endpoint.weight().get();
            if let Some(load) = registration.controller.load() {
                sample.load.add(load, weight);
            }
            if let Some(latency) = registration.controller.new_mean_latency() {
                sample.latency.add(latency, weight);
            }
        }
        self.spill.tick(&self.settings.zones, &own, &others);
    }

    /// Computes the weights of all backends, and lets picks see them.
    fn weigh(&mut self, policy: &ActivePolicy, now: Instant) {
        let weights = policy.weights(&self.roster, now);
        let registrations = self.roster.registrations();
        let zone = self.zone.as_deref();
        let mut working = Mean::default();
        let gate = self.roster.gate();
        for (registration, weight) in registrations.iter().zip(&weights) {
            let is_used = gate == Gate::Open || self.roster.checked(registration) == Checked::Well;
            if registration.takes_traffic() && is_used && registration.is_in_zone(zone) {
                let acceptance = self.fleet.acceptance(registration.endpoint.success());
                working.add(f64::from(acceptance), weight.get());
            }
        }
        let spill = self.spill.level(&self.settings.zones, working.value());
        let (follows_zones, reduces_failing_shares) =
            (policy.follows_zones(), policy.reduces_failing_shares());
        for (registration, weight) in registrations.iter().zip(weights) {
            let is_own = !follows_zones || registration.is_in_zone(zone);
            let acceptance = if reduces_failing_shares {
                self.fleet.acceptance(registration.endpoint.success())
            } else {
                1.0
            };
            let zone_part = if is_own { 1.0 } else { spill };
            registration
                .endpoint
                .set_weight(weight, zone_part, acceptance);
        }
    }

    /// Up to which relative difference in weight chance decides between idle backends: any, while
    /// all of them report little load.
    pub(super) fn alike(&self) -> f32 {
        let adaptive = &self.settings.adaptive;
        let active = self.roster.used();
        let loads = active.filter_map(|it| adaptive.load(it.load(), &Load::default(), 1.0));
        let Some(busiest) = loads.reduce(f64::max) else {
            return adaptive.alike as f32;
        };
        // Any difference up to the calm load, and the configured one from twice that on.
        let calm = (2.0 - busiest / adaptive.calm_load.max(1e-9)).clamp(0.0, 1.0);
        (adaptive.alike + (1.0 - adaptive.alike) * calm) as f32
    }

    /// One backend for each address, including those that drain or have a static weight of 0.
    #[cfg(feature = "pingora")]
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.roster.holders()
    }

    /// The backends that take traffic.
    pub(super) fn active_endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> + Clone {
        self.roster.used().map(|it| &it.endpoint)
    }

    /// How many metrics were refused so far.
    pub(super) fn refused(&self) -> u64 {
        self.roster.refused() + self.fleet.refused()
    }
}

impl TickSummary {
    fn add(&mut self, endpoint: &Endpoint, controller: &Controller, now: Instant) {
        let success = endpoint.success();
        let best = self.best_success.map_or(success, |best| best.max(success));
        self.best_success = Some(best);
        self.worst_success = self.worst_success.min(success);
        self.reports_in_flight |= endpoint.reports_in_flight(IN_FLIGHT_REPORT_VALID, now);
        if let Some(load) = controller.load() {
            self.metrics.add(controller.metrics(), 1.0);
            self.loads.add(load, 1.0);
        }
        if let Some(excess) = controller.excess_latency() {
            self.excess_latency.add(excess, endpoint.share().get());
        }
    }
}
