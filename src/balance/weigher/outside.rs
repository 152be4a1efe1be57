//! Which backends are outside the subset that this process uses.

use super::Weigher;
use crate::balance::policy::{ActivePolicy, RoutingPolicy};
use crate::balance::registration::Registration;
use crate::balance::subset::{Draw, lot};

impl Weigher {
    /// Chooses anew, of the backends that work: so many of those in the own zone, and as many of the others.
    pub(super) fn choose_subset(&mut self, policy: &ActivePolicy) {
        let is_wanted = self.settings.counts_requests && policy.uses_subset();
        let size = self.subset.size().filter(|_| is_wanted);
        let Some((size, seed)) = size.zip(self.fleet.seed()) else {
            if std::mem::take(&mut self.leaves_some_out) {
                for registration in self.roster.registrations() {
                    registration.endpoint.set_subset_part(1.0);
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
        let draws = groups.map(|entries| Draw::new(&entries, size));
        let chosen: usize = draws.iter().map(Draw::count).sum();
        let usual = chosen as f64 / all.max(1) as f64;
        for registration in self.roster.registrations() {
            let draw = &draws[usize::from(registration.is_in_zone(zone))];
            let (lot, weight) = entry(registration);
            let part = match draw.chance(lot, weight) {
                _ if is_ejected(registration) => 1.0,
                // As if those that leave it out had given it what is its due.
                Some(chance) => usual / chance,
                None => 0.0,
            };
            registration.endpoint.set_subset_part(part);
        }
    }
}
