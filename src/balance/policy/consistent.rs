//! The policy `consistent`: consistent hashing with bounded loads.

use std::sync::Arc;

use super::routing::{Picked, RoutingPolicy, random_unit};
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::ring::Ring;
use crate::balance::settings::Consistent;
use crate::balance::table::Table;
use crate::balance::weight::Share;

/// How many cells of the ring are searched for an owner that works and has room.
const MAX_CELLS_SEARCHED: usize = 256;

/// Consistent hashing with bounded loads: V. Mirrokni, M. Thorup and M. Zadimoghaddam, "Consistent
/// hashing with bounded loads", SODA 2018.
#[derive(Debug)]
pub(crate) struct ConsistentPolicy {
    settings: Consistent,
    /// Every request in flight owns a clone.
    in_flight: Arc<()>,
}

impl ConsistentPolicy {
    pub(super) fn new(settings: Consistent) -> Self {
        Self {
            settings,
            in_flight: Arc::new(()),
        }
    }

    /// Requests that are in flight stay so, whatever the settings are.
    pub(super) fn continue_from(&mut self, former: &Self) {
        self.in_flight = former.in_flight.clone();
    }

    /// The first owner of the key that works and has room. If none has room, the first that works;
    /// if none works, the first.
    fn owner(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<usize> {
        // This request is already included.
        let all = Arc::strong_count(&self.in_flight) - 1;
        let total = match options.for_tunnel {
            true => all,
            false => all.saturating_sub(fleet.tunnels() as usize),
        };
        // Those that work have the part of the others.
        let working = table.slots.len() as f32 * fleet.working_part();
        let fair = total as f32 * self.settings.balance_factor as f32 / working;
        let has_room = |index: usize| {
            let slot = &table.slots[index];
            let room = (fair / slot.inverse_weight.get()).ceil() as usize;
            slot.busy(options.for_tunnel) < room.max(self.settings.slack)
        };
        // One number for all cells, so that a backend with many cells is not accepted at last only
        // because it was asked often.
        let lot = random_unit(random);
        let all_work = !fleet.some_fail() && !fleet.some_ejected();
        let works = |index: usize| all_work || table.slots[index].endpoint.acceptance_now() > lot;
        let is_excluded = table.exclusion(options.exclude);
        let is_allowed = |index: usize| !is_excluded(index);
        let (ring, key) = (&table.ring, options.key);
        let mut full = None;
        for index in ring.owners(key).take(MAX_CELLS_SEARCHED) {
            if is_allowed(index) && works(index) {
                if has_room(index) {
                    return Some(index);
                }
                full.get_or_insert(index);
            }
        }
        // The backends that are allowed and work own almost no cells: search all backends.
        full.or_else(|| {
            let is_fit = |index: usize| is_allowed(index) && works(index);
            ring.owner_among(key, |index| is_fit(index) && has_room(index))
                .or_else(|| ring.owner_among(key, is_fit))
        })
        .or_else(|| match options.only_working {
            true => None,
            false => ring.owner_among(key, is_allowed),
        })
    }

    /// The owner of the key, if it is ejected and due to be probed.
    fn to_probe(&self, table: &Table, fleet: &Fleet, options: &PickOptions<'_>) -> Option<usize> {
        if !fleet.some_ejected() || !fleet.may_probe(options.probes) || !options.may_try() {
            return None;
        }
        let owners = table.ring.owners(options.key).take(MAX_CELLS_SEARCHED);
        let state = |index: usize| table.slots[index].endpoint.state();
        owners
            .filter(|index| !table.is_excluded(*index, options.exclude))
            .take_while(|index| state(*index).is_ejected())
            .find(|index| state(*index).take_probe())
    }
}

impl RoutingPolicy for ConsistentPolicy {
    /// A key stays where it is, whatever zone that is in.
    fn follows_zones(&self) -> bool {
        false
    }

    fn heeds_outcomes(&self) -> bool {
        true
    }

    fn goes_by_keys(&self) -> bool {
        true
    }

    fn count(&self) -> Option<Arc<()>> {
        Some(self.in_flight.clone())
    }

    fn index(&self, table: &mut Table, shares: &[Share]) {
        let addrs = table.slots.iter().map(|slot| slot.endpoint.addr());
        table.ring = Ring::new(addrs.zip(shares.iter().copied()));
    }

    #[inline]
    fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked> {
        let in_flight = self.in_flight.clone();
        let probed = self.to_probe(table, fleet, options);
        let index = probed.or_else(|| self.owner(table, fleet, options, random))?;
        Some(Picked {
            index,
            in_flight: Some(in_flight),
            is_probe: probed.is_some(),
        })
    }
}
