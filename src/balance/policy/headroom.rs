//! The policy `headroom`: weights by the capacity that nodes report to have left.

use std::time::Instant;

use super::least_busy::LeastBusy;
use super::routing::{Picked, Reference, RoutingPolicy};
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::registration::Registration;
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

    fn reference(&self, roster: &Roster, _: Instant) -> Reference {
        Reference {
            load: roster.mean_load(),
            ..Reference::default()
        }
    }

    fn weight(&self, registration: &Registration, reference: &Reference, _: Instant) -> Weight {
        let (base, load) = (registration.base().get(), registration.believed_load());
        Weight::new(self.settings.weight(base, load, &reference.load))
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
