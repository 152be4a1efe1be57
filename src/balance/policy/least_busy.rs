//! The pick of the weighted policies: of a few backends drawn by share, the one with the fewest
//! requests in flight for its weight.

use std::net::SocketAddr;
use std::time::Instant;

use super::routing::random_unit;
use crate::balance::alias::AliasTable;
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::table::{MAX_REDRAWS, Table};
use crate::balance::weight::Share;

/// How many backends are drawn to choose from by default.
pub(crate) const DEFAULT_CANDIDATES: usize = 5;
/// The greatest number of candidates that can be configured.
pub(in crate::balance) const MAX_CANDIDATES: usize = 8;

/// One pick in 256 goes by share alone, because a backend that is never tried cannot show how good
/// it is. These are too few to be visible in the 99th percentile.
const EXPLORE_MASK: u64 = 255;
/// How many backends are drawn with equal probability when none of those drawn by share works.
const UNIFORM_DRAWS: usize = 16;

/// How one of several backends is chosen.
#[derive(Debug)]
pub(super) struct LeastBusy {
    candidates: usize,
    /// How much the request to be placed counts beside those in flight.
    own_request: f32,
}

impl LeastBusy {
    pub(super) fn new(candidates: usize, own_request: f32) -> Self {
        Self {
            candidates,
            own_request,
        }
    }

    pub(super) fn index(&self, table: &mut Table, shares: &[Share]) {
        table.alias = AliasTable::new(shares);
        table.draws = draws_for(shares.len(), self.candidates);
    }

    #[inline]
    pub(super) fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<usize> {
        if fleet.is_quiet() && options.exclude.is_empty() {
            return Some(self.pick_quickly(table, random));
        }
        let conditions = Conditions {
            table,
            fleet,
            exclude: options.exclude,
            now: fleet
                .some_report_in_flight()
                .then(|| options.now.unwrap_or_else(Instant::now)),
        };
        self.pick_carefully(&conditions, random)
    }

    /// How busy a backend is for its weight, which decides between candidates.
    ///
    /// Chance decides between backends that are almost alike, so that all of them get something while
    /// there is little traffic; but not more, because weights are all that many proxies with few
    /// requests each can go by.
    fn score(&self, table: &Table, index: usize, chance: f32) -> f32 {
        let slot = &table.slots[index];
        let in_flight = slot.in_flight.get() as f32;
        (in_flight + self.own_request * (1.0 - table.alike * chance)) * slot.inverse_weight
    }

    /// The pick while all backends work, none is excluded, and none reports its requests in flight:
    /// almost every pick. It draws a few more times instead of checking for repetitions, and compares
    /// without branches, which could not be predicted.
    fn pick_quickly(&self, table: &Table, random: &mut fastrand::Rng) -> usize {
        let key = |index: usize, chance: f32| {
            // The bits of floats above 0 have the order of the floats.
            let score = self.score(table, index, chance).to_bits();
            u64::from(score) << 32 | index as u64
        };
        let mut bits = random.u64(..);
        let (first, chance) = table.alias.draw_with_rest(bits);
        if bits & EXPLORE_MASK == 0 {
            return first;
        }
        let mut best = u64::MAX;
        if table.draws == 0 {
            for index in 0..table.slots.len() {
                bits = bits.rotate_left(13);
                best = best.min(key(index, (bits as u16) as f32 * (1.0 / 65536.0)));
            }
        } else {
            best = key(first, chance);
            for _ in 1..table.draws {
                let (index, chance) = table.alias.draw_with_rest(random.u64(..));
                best = best.min(key(index, chance));
            }
        }
        best as u32 as usize
    }

    /// The pick in all other cases: candidates are different, allowed and accepted.
    #[inline]
    fn pick_carefully(
        &self,
        conditions: &Conditions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<usize> {
        let table = conditions.table;
        let first = random.u64(..);
        let wanted = if first & EXPLORE_MASK == 0 {
            1
        } else {
            self.candidates.min(table.slots.len())
        };
        let mut next = Some(first);
        let mut drawn = [usize::MAX; MAX_CANDIDATES];
        let mut count = 0;
        let mut best = None;
        let mut least = f32::INFINITY;
        let mut redraws = MAX_REDRAWS;
        while count < wanted {
            let bits = next.take().unwrap_or_else(|| random.u64(..));
            let (index, chance) = table.alias.draw_with_rest(bits);
            let mut accepted = None;
            if !drawn[..count].contains(&index) && conditions.is_allowed(index) {
                let score = self.score(table, index, chance);
                accepted = conditions.accept(index, score, random);
            }
            let Some(score) = accepted else {
                if redraws == 0 {
                    break;
                }
                redraws -= 1;
                continue;
            };
            drawn[count] = index;
            count += 1;
            if score < least {
                (best, least) = (Some(index), score);
            }
        }
        best.or_else(|| conditions.any_accepted(random))
            .or_else(|| table.draw(conditions.exclude, random))
    }
}

/// What a pick has to take into account besides weights and its own counts.
struct Conditions<'a> {
    table: &'a Table,
    fleet: &'a Fleet,
    exclude: &'a [SocketAddr],
    /// The time, if some backend reports its requests in flight.
    now: Option<Instant>,
}

impl Conditions<'_> {
    fn is_allowed(&self, index: usize) -> bool {
        !self.table.is_excluded(index, self.exclude)
    }

    /// Accepts a backend that was drawn, unless it fails, and returns its score, corrected by its own
    /// reports of requests in flight.
    fn accept(&self, index: usize, score: f32, random: &mut fastrand::Rng) -> Option<f32> {
        let slot = &self.table.slots[index];
        // How it was when the table was built is already part of how often it is drawn.
        let chance = self.fleet.acceptance(slot.endpoint.success()) / slot.acceptance;
        let is_accepted = chance >= 1.0 || random_unit(random) <= chance;
        if !is_accepted {
            return None;
        }
        Some(match self.now {
            Some(now) => score * slot.endpoint.state().in_flight_factor(now),
            None => score,
        })
    }

    /// Any backend that works, when everything that is drawn by share has failed since the table was
    /// built, as when a whole zone fails.
    #[cold]
    fn any_accepted(&self, random: &mut fastrand::Rng) -> Option<usize> {
        (0..UNIFORM_DRAWS).find_map(|_| {
            let index = (random.u64(..) % self.table.slots.len() as u64) as usize;
            if !self.is_allowed(index) {
                return None;
            }
            self.accept(index, 1.0, random).map(|_| index)
        })
    }
}

/// How many draws out of `count` give `wanted` different indexes on average; 0 if all are wanted.
fn draws_for(count: usize, wanted: usize) -> usize {
    if count <= wanted {
        return 0;
    }
    let missed = 1.0 - 1.0 / count as f64;
    let different = |draws: i32| count as f64 * (1.0 - missed.powi(draws));
    let enough = (1..64).find(|draws| different(*draws) >= wanted as f64 - 0.5);
    enough.unwrap_or(64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_more_draws_make_up_for_repetitions() {
        assert_eq!(draws_for(5, 5), 0);
        assert_eq!(draws_for(6, 5), 8);
        assert_eq!(draws_for(10, 5), 6);
        assert_eq!(draws_for(1_000, 5), 5);
        assert_eq!(draws_for(1_000, 1), 1);
    }
}
