//! The weights of all backends, as they follow from what is known of them.

use std::sync::Arc;
use std::time::Instant;

use super::checked::{Checked, Gate};
use super::endpoint::Endpoint;
use super::mean::Mean;
use super::policy::{ActivePolicy, Reference, RoutingPolicy};
use super::registration::Registration;
use super::roster::Roster;
use super::settings::{Adaptive, Zones};
use super::weight::Weight;
use super::zone::{Spill, ZoneSample, ZoneSource};

/// The part of the weight of all that may have moved before all are weighed again.
const MOST_MOVED: f64 = 0.02;
/// A weight that changes by less than this part stays as it is.
const STILL: f64 = 1e-4;

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

/// What weighs backends: all of them, or some with what all had in common then.
#[derive(Debug)]
pub(super) struct Scale {
    common: Common,
    /// What has been added to weights or taken from them since all were weighed.
    moved: f64,
    spill: Spill,
    /// The balancer's own zone.
    zone: Option<String>,
}

/// What the weight of a backend depends on beside itself.
#[derive(Debug, Default)]
struct Common {
    reference: Reference,
    /// How calm half of the backends that report are at least.
    calm_of_half: f64,
    /// How calm each backend is whose weight says how busy it is.
    calm_by_load_weights: f64,
    /// What counts of a backend in another zone.
    spill: f64,
    /// The mean weight, before zones.
    mean_weight: f64,
    /// The weights of all together.
    total: f64,
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            common: Common {
                calm_of_half: 1.0,
                calm_by_load_weights: 1.0,
                ..Common::default()
            },
            moved: 0.0,
            spill: Spill::default(),
            zone: None,
        }
    }
}

impl Scale {
    /// Forgets which zone is the own one.
    pub(super) fn forget_zone(&mut self) {
        self.zone = None;
    }

    /// The balancer's own zone.
    pub(super) fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// How calm half of the backends that report were at least, when all were weighed.
    pub(super) fn calm_of_half(&self) -> f64 {
        self.common.calm_of_half
    }

    /// Whether weights have moved so much since then that all have to be weighed again.
    pub(super) fn has_moved(&self) -> bool {
        self.moved > MOST_MOVED * self.common.total
    }

    /// Finds this balancer's zone: the one it was given, or that of a node that has registered.
    pub(super) fn find_zone(&mut self, source: &ZoneSource, roster: &Roster) {
        self.zone = match source {
            ZoneSource::None => None,
            ZoneSource::Name(zone) => Some(zone.clone()),
            ZoneSource::OfNode(id) => match roster.get(id) {
                Some(registration) => registration.node().zone.clone(),
                // A node that is gone for a moment has not moved.
                None => self.zone.take(),
            },
        };
    }

    /// Measures the own zone and the others, which decides how much traffic leaves the zone.
    pub(super) fn measure_zones(&mut self, settings: &WeigherSettings, roster: &Roster) {
        let zone = self.zone.as_deref();
        if zone.is_none() {
            return;
        }
        let (mut own, mut others) = (ZoneSample::default(), ZoneSample::default());
        for registration in roster.used() {
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
        let idle_latency = settings.adaptive.idle_latency_ms / 1e3;
        self.spill
            .tick(&settings.zones, idle_latency, &own, &others);
    }

    /// Computes the weights of all backends, and lets picks see them. Returns whether they are what they were.
    pub(super) fn weigh(
        &mut self,
        settings: &WeigherSettings,
        policy: &ActivePolicy,
        roster: &Roster,
        now: Instant,
    ) -> bool {
        let reference = policy.reference(roster, now);
        let registrations = roster.registrations();
        let weights: Vec<_> = registrations
            .iter()
            .map(|registration| policy.weight(registration, &reference, now))
            .collect();
        let zone = self.zone.as_deref();
        let (mut working, mut accepted) = (Mean::default(), Mean::default());
        let mut mean_weight = Mean::default();
        let gate = roster.gate();
        for (registration, weight) in registrations.iter().zip(&weights) {
            if registration.takes_traffic() {
                mean_weight.add(weight.get(), 1.0);
            }
            // Of those that have not been checked nothing is known.
            let acceptance = match (gate, roster.checked(registration)) {
                (Gate::Open, _) | (_, Checked::Well) => registration.endpoint.acceptance_now(),
                (Gate::Well, Checked::Down) => 0.0,
                (Gate::Well, Checked::Unknown) => continue,
            };
            if registration.takes_traffic() && registration.is_in_zone(zone) {
                let works = acceptance > 0.0;
                working.add(f64::from(works), weight.get());
                // How others fare, of which this process uses none, it does not know.
                if works && !registration.endpoint.is_outside() {
                    accepted.add(f64::from(acceptance), weight.get());
                }
            }
        }
        let calm_of_half = calm_of_half(&settings.adaptive, roster);
        self.common = Common {
            reference,
            calm_of_half,
            // Such weights follow the load of all processes, and what is in flight here is a small part of it; unless
            // backends say what they have in flight.
            calm_by_load_weights: match roster.some_report_in_flight() {
                true => calm_of_half,
                false => 1.0,
            },
            spill: (self.spill).level(&settings.zones, working.value() * accepted.value()),
            mean_weight: mean_weight.value(),
            total: 0.0,
        };
        self.moved = 0.0;
        let (mut total, mut is_still) = (0.0, true);
        for (registration, weight) in roster.registrations().iter().zip(weights) {
            let endpoint = &registration.endpoint;
            let acceptance = match policy.reduces_failing_shares() {
                true => endpoint.acceptance_now(),
                false => 1.0,
            };
            let before = (endpoint.share().get(), endpoint.calm());
            self.set_weight(settings, policy, registration, weight, acceptance);
            let share = endpoint.share().get();
            is_still &= (share - before.0).abs() <= STILL * share;
            is_still &= (endpoint.calm() - before.1).abs() <= STILL as f32;
            if registration.takes_traffic() && !endpoint.is_outside() {
                total += endpoint.weight().get();
            }
        }
        self.common.total = total;
        is_still
    }

    /// The same for the backends at these positions, with what all had in common when they were last weighed.
    pub(super) fn weigh_some(
        &mut self,
        settings: &WeigherSettings,
        policy: &ActivePolicy,
        roster: &Roster,
        positions: &[u32],
        now: Instant,
    ) -> Vec<Arc<Endpoint>> {
        let mut weighed = Vec::with_capacity(positions.len());
        let mut moved = 0.0;
        for at in positions {
            let Some(registration) = roster.registrations().get(*at as usize) else {
                continue;
            };
            let endpoint = &registration.endpoint;
            let before = endpoint.weight().get();
            let weight = policy.weight(registration, &self.common.reference, now);
            self.set_weight(
                settings,
                policy,
                registration,
                weight,
                endpoint.acceptance(),
            );
            if registration.takes_traffic() && !endpoint.is_outside() {
                moved += (endpoint.weight().get() - before).abs();
            }
            weighed.push(endpoint.clone());
        }
        self.moved += moved;
        weighed
    }

    /// Lets picks see the weight of a backend.
    fn set_weight(
        &self,
        settings: &WeigherSettings,
        policy: &ActivePolicy,
        registration: &Registration,
        weight: Weight,
        acceptance: f32,
    ) {
        let common = &self.common;
        let endpoint = &registration.endpoint;
        let is_own = !policy.follows_zones() || registration.is_in_zone(self.zone.as_deref());
        let zone_part = if is_own { 1.0 } else { common.spill };
        endpoint.set_base(registration.base().get());
        endpoint.set_weight(weight, common.mean_weight, zone_part, acceptance);
        let adaptive = &settings.adaptive;
        // As for the half below: what was reported long ago says nothing of now.
        let reported = registration.controller.load();
        let load = reported.and_then(|_| adaptive.known_load(registration.believed_load()));
        let calm = match policy.weighs_by_load() {
            true => common.calm_by_load_weights,
            false => load.map_or(common.calm_of_half, |load| adaptive.calm(load)),
        };
        // Whoever is far comes into play when those nearby are compared with it.
        endpoint.set_calm((calm * zone_part) as f32);
    }
}

/// How calm half of the backends that report are at least; entirely, where none reports.
fn calm_of_half(adaptive: &Adaptive, roster: &Roster) -> f64 {
    // What was reported long ago says nothing of now.
    let reporting = roster.used().filter(|it| it.controller.load().is_some());
    let loads = reporting.filter_map(|it| adaptive.known_load(it.believed_load()));
    let mut loads: Vec<f64> = loads.collect();
    if loads.is_empty() {
        return 1.0;
    }
    let middle = (loads.len() - 1) / 2;
    let (_, middle, _) = loads.select_nth_unstable_by(middle, f64::total_cmp);
    adaptive.calm(*middle)
}
