//! The policy `headroom`: weights by the capacity that nodes report to have left.

use std::time::Instant;

use super::least_busy::LeastBusy;
use super::routing::{Picked, RoutingPolicy};
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::roster::Roster;
use crate::balance::settings::Headroom;
use crate::balance::table::Table;
use crate::balance::weight::{Share, Weight};

#[derive(Debug)]
pub(crate) struct HeadroomPolicy {
    settings: Headroom,
    least_busy: LeastBusy,
}

impl HeadroomPolicy {
    pub(super) fn new(settings: Headroom, least_busy: LeastBusy) -> Self {
        Self {
            settings,
            least_busy,
        }
    }
}

impl RoutingPolicy for HeadroomPolicy {
    fn is_static(&self) -> bool {
        false
    }

    fn heeds_outcomes(&self) -> bool {
        true
    }

    fn weighs_by_load(&self) -> bool {
        true
    }

    fn reduces_failing_shares(&self) -> bool {
        true
    }

    fn weights(&self, roster: &Roster, _: Instant) -> Vec<Weight> {
        let mean = roster.mean_load();
        let registrations = roster.registrations().iter();
        registrations
            .map(|registration| {
                let (base, load) = (registration.base().get(), registration.load());
                Weight::new(self.settings.weight(base, load, &mean))
            })
            .collect()
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
