//! Which backends are outside the subset that this process uses.

use std::time::Instant;

use super::{Weigher, lower_median};
use crate::balance::mean::Mean;
use crate::balance::policy::{ActivePolicy, RoutingPolicy};
use crate::balance::registration::Registration;
use crate::balance::subset::{Draw, Seen, lot};

/// A backend with less than this part of the usual load has little to do.
const LEAST_OF_USUAL: f64 = 0.5;
/// Of so many that are left out, the load of one has to be known at least.
const KNOWN_OF: usize = 4;

impl Weigher {
    /// Decides how many backends are used, with so many requests of this process in flight.
    pub(super) fn settle_subset(&mut self, in_flight: f64, now: Instant) {
        let working = self.roster.used().filter(|it| !it.endpoint.is_ejected());
        let seen = Seen {
            in_flight,
            calm: self.scale.calm_of_half(),
            backends: working.count(),
            idle_outside: self.idle_outside(now),
        };
        self.subset.tick(&self.settings.adaptive, seen);
    }

    /// Chooses anew, of the backends that work: so many of those in the own zone, and as many of the others.
    pub(super) fn choose_subset(&mut self, policy: &ActivePolicy) {
        let is_wanted = self.settings.counts_requests && policy.uses_subset();
        let size = self.subset.size().filter(|_| is_wanted);
        let Some((size, seed)) = size.zip(self.fleet.seed()) else {
            if std::mem::take(&mut self.leaves_some_out) {
                for registration in self.roster.registrations() {
                    registration.endpoint.set_subset_part(1.0, 1.0);
                }
            }
            return;
        };
        self.leaves_some_out = true;
        let zone = self.scale.zone();
        let entry = |it: &Registration| (lot(seed, it.addr()), it.base().get());
        let is_ejected = |it: &Registration| it.endpoint.is_ejected();
        let mut groups = [Vec::new(), Vec::new()];
        for registration in self.roster.used().filter(|it| !is_ejected(it)) {
            let group = usize::from(registration.is_in_zone(zone));
            groups[group].push(entry(registration));
        }
        let all: usize = groups.iter().map(Vec::len).sum();
        let counts = groups.each_ref().map(Vec::len);
        let draws = groups.map(|entries| Draw::new(&entries, size));
        let chosen: usize = draws.iter().map(Draw::count).sum();
        let usual = chosen as f64 / all.max(1) as f64;
        for registration in self.roster.registrations() {
            let group = usize::from(registration.is_in_zone(zone));
            let usual_there = draws[group].count() as f64 / counts[group].max(1) as f64;
            let (lot, weight) = entry(registration);
            let (part, of_share) = match draws[group].chance(lot, weight) {
                _ if is_ejected(registration) => (1.0, 1.0),
                // As if those that leave it out had given it what is its due.
                Some(chance) => (usual_there / chance, usual / chance),
                None => (0.0, 1.0),
            };
            registration.endpoint.set_subset_part(part, of_share);
        }
    }

    /// The part of the backends outside of the subset that report to have little to do beside those in it, of those whose
    /// load is known and that do not start slowly; 0 if these are few. Chance gives each process other backends; where
    /// there are few processes, some backends are used by none.
    fn idle_outside(&self, now: Instant) -> f64 {
        if !self.leaves_some_out {
            return 0.0;
        }
        let is_outside = |it: &&Registration| it.endpoint.is_outside();
        let load = |it: &Registration| it.controller.load();
        let inside = self.roster.used().filter(|it| !is_outside(it));
        let mut loads: Vec<f64> = inside.filter_map(load).collect();
        let Some(usual) = lower_median(&mut loads) else {
            return 0.0;
        };
        let adaptive = &self.settings.adaptive;
        let (mut outside, mut idle) = (0, Mean::default());
        for registration in self.roster.used().filter(is_outside) {
            outside += 1;
            let has_started = registration.controller.slow_start(adaptive, now) >= 1.0;
            if let Some(load) = load(registration).filter(|_| has_started) {
                idle.add(f64::from(u8::from(load < LEAST_OF_USUAL * usual)), 1.0);
            }
        }
        match idle.count() * KNOWN_OF >= outside {
            true => idle.value(),
            false => 0.0,
        }
    }
}
