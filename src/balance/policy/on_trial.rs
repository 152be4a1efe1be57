//! Backends that requests are to try: new ones, and ones that were ejected.

use super::routing::Picked;
use crate::balance::endpoint::EndpointState;
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::table::Table;

/// How many of the backends on trial one pick looks at.
const MOST_ON_TRIAL: usize = 64;

/// A backend that this request is to try, because it is new, or because it was ejected and may work
/// again.
#[cold]
pub(super) fn to_try(
    table: &Table,
    fleet: &Fleet,
    options: &PickOptions<'_>,
    random: &mut fastrand::Rng,
) -> Option<Picked> {
    if !options.may_try() {
        return None;
    }
    let mut in_turn = |places: &[u32], take: fn(&EndpointState) -> bool| {
        let from = random.usize(..places.len().max(1));
        let (before, after) = places.split_at(from);
        let all = after.iter().chain(before).map(|index| *index as usize);
        let is_allowed = |index: &usize| !table.is_excluded(*index, options.exclude);
        all.take(MOST_ON_TRIAL)
            .filter(is_allowed)
            .find(|index| take(table.slots[*index].endpoint.state()))
    };
    let mut new = None;
    if fleet.allows_new() {
        new = in_turn(&table.new, EndpointState::take_first);
    }
    fleet.set_was_new(new.is_some());
    if let Some(index) = new {
        return Some(index.into());
    }
    if !fleet.may_probe(options.probes) || !fleet.can_probe() {
        return None;
    }
    let index = in_turn(&table.ejected, EndpointState::take_probe)?;
    Some(Picked {
        is_probe: true,
        ..Picked::from(index)
    })
}
