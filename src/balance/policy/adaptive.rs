//! The policy `adaptive`: weights by what the controllers have learned.

use std::time::Instant;

use super::least_busy::LeastBusy;
use super::routing::{Picked, Reference, RoutingPolicy};
use crate::balance::fleet::Fleet;
use crate::balance::mean::Mean;
use crate::balance::pick::PickOptions;
use crate::balance::registration::Registration;
use crate::balance::roster::Roster;
use crate::balance::settings::Adaptive;
use crate::balance::table::Table;
use crate::balance::weight::{Share, Weight};

#[derive(Debug)]
pub(crate) struct AdaptivePolicy {
    /// Boxed, because it is large and no pick reads it.
    settings: Box<Adaptive>,
    least_busy: LeastBusy,
}

impl AdaptivePolicy {
    pub(super) fn new(settings: Adaptive, least_busy: LeastBusy) -> Self {
        Self {
            settings: Box::new(settings),
            least_busy,
        }
    }

    /// The part of its share that a backend which starts slowly gets at least, so that the others, as far as they work,
    /// do not carry too much; 1 if no backend is starting.
    fn slow_start_limit(&self, roster: &Roster, mean_factor: f64, now: Instant) -> f64 {
        let is_starting = |it: &&Registration| self.slow_start(it, now) < 1.0;
        let working = || roster.used().filter(|it| !it.endpoint.is_ejected());
        let starting = working().filter(is_starting);
        let weights = starting.map(|it| self.settled_weight(it, mean_factor));
        let starting: f64 = weights.sum();
        if starting <= 0.0 {
            return 1.0;
        }
        let weights = working().map(|it| self.settled_weight(it, mean_factor));
        let all: f64 = weights.sum();
        let carried = all / self.settings.slow_start_strain;
        ((carried - (all - starting)) / starting).min(1.0)
    }

    /// The weight of a backend that does not start slowly.
    fn settled_weight(&self, registration: &Registration, mean_factor: f64) -> f64 {
        let (least, most) = (self.settings.weight_min, self.settings.weight_max);
        let factor = registration.controller.factor() / mean_factor;
        registration.base().get() * factor.clamp(least, most)
    }

    fn slow_start(&self, registration: &Registration, now: Instant) -> f64 {
        registration.controller.slow_start(&self.settings, now)
    }
}

impl RoutingPolicy for AdaptivePolicy {
    fn is_static(&self) -> bool {
        false
    }

    fn heeds_outcomes(&self) -> bool {
        true
    }

    fn uses_subset(&self) -> bool {
        true
    }

    fn reduces_failing_shares(&self) -> bool {
        true
    }

    fn reference(&self, roster: &Roster, now: Instant) -> Reference {
        let mut mean = Mean::default();
        for registration in roster.active() {
            mean.add(registration.controller.factor(), 1.0);
        }
        let factor = mean.value().max(f64::MIN_POSITIVE);
        Reference {
            factor,
            slow_start_limit: self.slow_start_limit(roster, factor, now),
            ..Reference::default()
        }
    }

    fn weight(&self, registration: &Registration, reference: &Reference, now: Instant) -> Weight {
        let started = self.slow_start(registration, now);
        let started = started.max(reference.slow_start_limit).min(1.0);
        Weight::new(self.settled_weight(registration, reference.factor) * started)
    }

    fn index(&self, table: &mut Table, shares: &[Share]) {
        self.least_busy.index(table, shares);
    }

    #[inline]
    fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked> {
        self.least_busy.pick(table, fleet, options, random)
    }
}
