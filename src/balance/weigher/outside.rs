//! Which backends are outside the subset that this process uses.

use super::Weigher;
use crate::balance::policy::{ActivePolicy, RoutingPolicy};
use crate::balance::registration::Registration;
use crate::balance::subset::{last_lot, lot};

impl Weigher {
    /// Chooses anew: of the backends that work, those with the lowest lots are used, in the own zone as in the others.
    /// So others take the places of those that are ejected.
    pub(super) fn choose_subset(&mut self, policy: &ActivePolicy) {
        let is_wanted = self.settings.counts_requests && policy.uses_subset();
        let size = self.subset.size().filter(|_| is_wanted);
        let Some((size, seed)) = size.zip(self.fleet.seed()) else {
            if std::mem::take(&mut self.leaves_some_out) {
                for registration in self.roster.registrations() {
                    registration.endpoint.set_outside(false);
                }
            }
            return;
        };
        self.leaves_some_out = true;
        let zone = self.scale.zone();
        let lot_of = |it: &Registration| {
            let is_own = it.is_in_zone(zone);
            (usize::from(is_own), lot(seed, it.addr()))
        };
        let is_ejected = |it: &Registration| it.endpoint.is_ejected();
        let mut lots = [Vec::new(), Vec::new()];
        for registration in self.roster.used().filter(|it| !is_ejected(it)) {
            let (group, lot) = lot_of(registration);
            lots[group].push(lot);
        }
        let last = lots.map(|mut lots| last_lot(&mut lots, size));
        for registration in self.roster.registrations() {
            let (group, lot) = lot_of(registration);
            let is_outside = !is_ejected(registration) && lot > last[group];
            registration.endpoint.set_outside(is_outside);
        }
    }
}
