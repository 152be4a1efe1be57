//! The policy `adaptive`: weights by what the controllers have learned.

use std::time::Instant;

use super::least_busy::LeastBusy;
use super::routing::{Picked, RoutingPolicy};
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

    /// The part of its share that a backend which starts slowly gets at least, so that the others do
    /// not carry too much; `None` if no backend is starting.
    fn slow_start_limit(&self, roster: &Roster, weights: &[f64], now: Instant) -> Option<f64> {
        let (mut settled, mut starting) = (0.0, 0.0);
        for (registration, weight) in roster.registrations().iter().zip(weights) {
            if !registration.takes_traffic() {
                continue;
            }
            if self.slow_start(registration, now) < 1.0 {
                starting += weight;
            } else {
                settled += weight;
            }
        }
        if starting <= 0.0 {
            return None;
        }
        let carried = (settled + starting) / self.settings.slow_start_strain;
        Some(((carried - settled) / starting).min(1.0))
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

    fn reduces_failing_shares(&self) -> bool {
        true
    }

    fn weights(&self, roster: &Roster, now: Instant) -> Vec<Weight> {
        let registrations = roster.registrations();
        let factors = registrations.iter().map(|it| it.controller.factor());
        let mut weights: Vec<f64> = factors.collect();
        let mut mean = Mean::default();
        for (registration, factor) in registrations.iter().zip(&weights) {
            if registration.takes_traffic() {
                mean.add(*factor, 1.0);
            }
        }
        let mean = mean.value().max(f64::MIN_POSITIVE);
        let (least, most) = (self.settings.weight_min, self.settings.weight_max);
        for (registration, weight) in registrations.iter().zip(&mut weights) {
            *weight = registration.base().get() * (*weight / mean).clamp(least, most);
        }
        if let Some(limit) = self.slow_start_limit(roster, &weights, now) {
            for (registration, weight) in registrations.iter().zip(&mut weights) {
                *weight *= self.slow_start(registration, now).max(limit);
            }
        }
        weights.into_iter().map(Weight::new).collect()
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
