//! The pick of the weighted policies: of a few backends drawn by share, the one with the fewest
//! requests in flight for its weight.

use std::net::SocketAddr;
use std::time::Instant;

use super::on_trial::to_try;
use super::routing::{Picked, random_unit, unit};
use crate::balance::alias::AliasTable;
use crate::balance::endpoint::Endpoint;
use crate::balance::fleet::Fleet;
use crate::balance::heard::HEARD;
use crate::balance::pick::PickOptions;
use crate::balance::settings::Adaptive;
use crate::balance::spread::Spread;
use crate::balance::table::{MAX_REDRAWS, Table};
use crate::balance::weight::Share;

/// How many backends are drawn to choose from by default.
pub(crate) const DEFAULT_CANDIDATES: usize = 5;
/// The greatest number of candidates that can be configured.
pub(in crate::balance) const MAX_CANDIDATES: usize = 8;

/// One pick in 256 goes by share alone, because a backend that is never tried cannot show how good
/// it is. These are too few to be visible in the 99th percentile.
const EXPLORE_MASK: u64 = 255;
/// How many more backends are drawn by share, when none of the candidates works, before all are looked at.
const FURTHER_DRAWS: usize = 16;

/// A backend that reports more requests in flight than the others, by this factor on its score, is not
/// calm.
const MOST_CALM_FACTOR: f32 = 1.1;
/// From so many requests in flight at the best candidate on, some that are not in the subset are looked at; and from so
/// many times what is in flight at each on average.
const SPILLS_FROM: f64 = 4.0;
/// So many of them.
const SPILL_DRAWS: usize = 2;

/// How one of several backends is chosen.
#[derive(Debug)]
pub(super) struct LeastBusy {
    candidates: usize,
    /// How much the request to be placed counts beside those in flight.
    own_request: f32,
    /// Chance decides between backends without requests in flight whose weights differ by less than this
    /// part.
    alike: f32,
    spills_from: usize,
}

/// The best candidate so far.
struct Best {
    index: Option<usize>,
    score: f32,
}

impl Best {
    const NONE: Self = Self {
        index: None,
        score: f32::INFINITY,
    };

    fn consider(&mut self, index: usize, score: f32) {
        if score < self.score {
            (self.index, self.score) = (Some(index), score);
        }
    }
}

impl LeastBusy {
    pub(super) fn new(candidates: usize, own_request: f32, adaptive: &Adaptive) -> Self {
        Self {
            candidates,
            own_request,
            alike: adaptive.alike as f32,
            spills_from: (SPILLS_FROM * adaptive.subset_in_flight.max(1.0)).ceil() as usize,
        }
    }

    pub(super) fn index(&self, table: &mut Table, shares: &[Share]) {
        let drawn = &shares[..table.drawn];
        table.alias = AliasTable::new(drawn);
        table.outside = AliasTable::new(&shares[table.drawn..table.live]);
        table.inside_part = table.part_of(table.drawn);
        let all_equal = drawn.windows(2).all(|pair| pair[0] == pair[1]);
        table.spread = (!all_equal).then(|| Spread::new(drawn));
        table.draws = draws_for(table.drawn, self.candidates);
        for (slot, place) in table.slots.iter().zip(0..) {
            slot.endpoint.set_place(place);
        }
        let places = |is_wanted: fn(&Endpoint) -> bool| {
            let slots = table.slots.iter().zip(0_u32..);
            let wanted = slots.filter(|(slot, _)| is_wanted(&slot.endpoint));
            wanted.map(|(_, index)| index).collect()
        };
        table.ejected = places(Endpoint::is_ejected);
        table.new = places(|it| !it.is_ejected() && !it.is_outside() && it.is_due());
    }

    #[inline]
    pub(super) fn pick(
        &self,
        table: &Table,
        fleet: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked> {
        if fleet.lingering().is_any() {
            let now = options.now.unwrap_or_else(Instant::now);
            fleet.lingering().release(now);
        }
        if fleet.some_on_trial()
            && let Some(picked) = to_try(table, fleet, options, random)
        {
            return Some(picked);
        }
        if fleet.is_quiet() && options.exclude.is_empty() {
            return Some(self.pick_quickly(table, fleet, random).into());
        }
        let conditions = Conditions {
            table,
            exclude: options.exclude,
            only_working: options.only_working,
            for_tunnel: options.for_tunnel,
            some_full: options.some_full,
            now: fleet
                .some_report_in_flight()
                .then(|| options.now.unwrap_or_else(Instant::now)),
        };
        self.pick_carefully(&conditions, fleet, random)
            .map(Picked::from)
    }

    /// The first candidate, and whose turn it is: backends take turns by their shares, so that their parts are right even of a
    /// few requests; with very many requests it is drawn by chance.
    fn first(table: &Table, fleet: &Fleet, random: &mut fastrand::Rng) -> (usize, Option<u64>) {
        let Some(turn) = table.take_turn() else {
            return (table.alias.draw(random.u64(..)), None);
        };
        let turn = fleet.first_turn(random).wrapping_add(turn);
        let index = match &table.spread {
            None => (turn % table.drawn as u64) as usize,
            Some(spread) => spread.turn(turn),
        };
        (index, Some(turn))
    }

    /// The second candidate, and a number by chance. It is drawn, unless it is a turn that is passed on: where a backend
    /// has nothing to do here, but is loaded by others, the others take turns at what it does not get, because by chance
    /// the parts of a few requests would not be right.
    #[inline]
    fn second(table: &Table, passed_on: Option<u64>, random: &mut fastrand::Rng) -> (usize, f32) {
        let drawn = table.drawn as u64;
        let Some(turn) = passed_on.filter(|_| drawn > 1) else {
            return table.alias.draw_with_rest(random.u64(..));
        };
        let index = match &table.spread {
            None => ((turn % drawn + 1 + turn / drawn % (drawn - 1)) % drawn) as usize,
            Some(spread) => spread.passed_on(turn),
        };
        (index, random_unit(random))
    }

    /// Whether a candidate that comes by its turn, or next after one that is loaded, is taken without
    /// comparing it with others: where backends have nothing to do, traffic follows the weights.
    fn is_calm(table: &Table, index: usize, in_flight: usize, chance: f32) -> bool {
        in_flight == 0 && chance < table.slots[index].calm.get()
    }

    /// How busy a backend is for its weight, which decides between candidates.
    ///
    /// Chance decides between backends that are almost alike, so that all of them get something while
    /// there is little traffic; but not more, because weights are all that many proxies with few
    /// requests each can go by.
    fn score(&self, table: &Table, index: usize, in_flight: usize, chance: f32) -> f32 {
        let own = self.own_request * (1.0 - self.alike * chance);
        (in_flight as f32 + own) * table.slots[index].inverse_weight.get()
    }

    /// The pick while all backends work, none is excluded, none reports its requests in flight, and there is no tunnel:
    /// almost every pick. It draws a few more times instead of checking for repetitions, and compares
    /// without branches, which could not be predicted.
    fn pick_quickly(&self, table: &Table, fleet: &Fleet, random: &mut fastrand::Rng) -> usize {
        let key = |index: usize, chance: f32| {
            // The bits of floats above 0 have the order of the floats.
            let in_flight = table.slots[index].in_flight.get();
            let score = self.score(table, index, in_flight, chance).to_bits();
            u64::from(score) << 32 | index as u64
        };
        let (first, turn) = Self::first(table, fleet, random);
        let mut bits = random.u64(..);
        let chance = unit(bits);
        let is_only = self.candidates == 1 || bits & EXPLORE_MASK == 0;
        let is_calm = |index: usize, chance: f32| {
            Self::is_calm(table, index, table.slots[index].in_flight.get(), chance)
        };
        if is_only || is_calm(first, chance) {
            return first;
        }
        // If the first one is loaded, calm ones share its turn by their weights.
        let mut best = key(first, chance);
        let passed_on = turn.filter(|_| table.slots[first].in_flight.get() == 0);
        let (second, chance) = Self::second(table, passed_on, random);
        let is_better = key(second, chance) < best;
        // Without chance, where it has its turn.
        let is_next = passed_on.map_or(is_better, |_| table.weighs_at_least(second, first));
        if is_next && is_calm(second, chance) {
            return self.keep_turn(table, (first, 1.0), (second, 1.0), false);
        }
        if table.draws == 0 {
            // All are candidates.
            for index in 0..table.drawn {
                bits = bits.rotate_left(13);
                best = best.min(key(index, unit(bits)));
            }
        } else {
            best = best.min(key(second, chance));
            for _ in 2..table.draws {
                let (index, chance) = table.alias.draw_with_rest(random.u64(..));
                best = best.min(key(index, chance));
            }
        }
        let chosen = self.keep_turn(table, (first, 1.0), (best as u32 as usize, 1.0), false);
        match table.drawn < table.live {
            true => self.or_outside(
                table,
                chosen,
                (false, self.spills_from),
                |_, _| true,
                random,
            ),
            false => chosen,
        }
    }

    /// This candidate, or one that is not in the subset, where even the best one of the subset has much to do: more
    /// requests have come since the last tick, which will use more backends.
    #[inline(never)]
    fn or_outside(
        &self,
        table: &Table,
        chosen: usize,
        (for_tunnel, spills_from): (bool, usize),
        is_fit: impl Fn(usize, &mut fastrand::Rng) -> bool,
        random: &mut fastrand::Rng,
    ) -> usize {
        let busy = table.slots[chosen].busy(for_tunnel);
        if busy < spills_from {
            return chosen;
        }
        let mut best = Best::NONE;
        best.consider(chosen, self.score(table, chosen, busy, 0.0));
        for _ in 0..SPILL_DRAWS {
            let index = table.draw_outside(random.u64(..));
            if is_fit(index, random) {
                let busy = table.slots[index].busy(for_tunnel);
                best.consider(index, self.score(table, index, busy, 0.0));
            }
        }
        best.index.unwrap_or(chosen)
    }

    /// Who is taken when it is the turn of one backend, and another one is less busy for its weight; each with the
    /// factor on its score. As long as the first one has nothing to do, that the other has a greater static weight is
    /// no reason to take it: otherwise the one with the greatest would get all that comes one after the other. What
    /// was learned of the other one is a reason.
    #[inline]
    fn keep_turn(
        &self,
        table: &Table,
        turn: (usize, f32),
        other: (usize, f32),
        for_tunnel: bool,
    ) -> usize {
        match table.has_static_weights && turn.0 != other.0 {
            true => self.compare_learned(table, turn, other, for_tunnel),
            false => other.0,
        }
    }

    #[inline(never)]
    fn compare_learned(
        &self,
        table: &Table,
        turn: (usize, f32),
        other: (usize, f32),
        for_tunnel: bool,
    ) -> usize {
        let slots = [turn, other].map(|(index, factor)| (&table.slots[index], factor));
        let [(its, _), (others, _)] = slots;
        if its.busy(for_tunnel) > 0 || its.has_base_of(others) {
            return other.0;
        }
        let [its, others] = slots.map(|(slot, factor)| {
            let busy = slot.busy(for_tunnel) as f32 + self.own_request;
            busy * slot.inverse_weight.get() * slot.base * factor
        });
        match others < its * (1.0 - self.alike) {
            true => other.0,
            false => turn.0,
        }
    }

    /// The pick in all other cases: candidates are different, allowed and accepted.
    #[inline]
    fn pick_carefully(
        &self,
        conditions: &Conditions<'_>,
        fleet: &Fleet,
        random: &mut fastrand::Rng,
    ) -> Option<usize> {
        let table = conditions.table;
        let (first, turn) = Self::first(table, fleet, random);
        let bits = random.u64(..);
        let chance = unit(bits);
        let wanted = match bits & EXPLORE_MASK {
            0 => 1,
            _ => self.candidates.min(table.drawn),
        };
        let (mut next, mut passed_on) = (Some((first, chance)), None);
        let mut drawn = [usize::MAX; MAX_CANDIDATES + HEARD];
        let mut count = 0;
        let mut best = Best::NONE;
        let mut redraws = MAX_REDRAWS;
        while count < wanted {
            let by_turn = passed_on.take();
            let draw = || Self::second(table, by_turn, random);
            let (index, chance) = next.take().unwrap_or_else(draw);
            let is_new = !drawn[..count].contains(&index) && conditions.is_allowed(index);
            if is_new && conditions.accepts(index, random) {
                let factor = conditions.factor(index);
                let in_flight = table.slots[index].busy(conditions.for_tunnel);
                let score = self.score(table, index, in_flight, chance) * factor;
                let is_better = score < best.score;
                let is_next = by_turn.map_or(is_better, |_| table.weighs_at_least(index, first));
                let is_early = count < 2 && is_next && factor <= MOST_CALM_FACTOR;
                drawn[count] = index;
                count += 1;
                passed_on = turn.filter(|_| count == 1 && index == first && in_flight == 0);
                if is_early && Self::is_calm(table, index, in_flight, chance) {
                    return Some(conditions.keep_turn(self, drawn[0], index));
                }
                best.consider(index, score);
            } else if redraws > 0 {
                redraws -= 1;
            } else {
                break;
            }
        }
        if let Some(now) = conditions.now
            && wanted > 1
        {
            for index in fleet.heard(now).filter(|index| *index < table.drawn) {
                let is_new = !drawn[..count].contains(&index) && conditions.is_allowed(index);
                if is_new && conditions.accepts_undrawn(index, random) {
                    let in_flight = table.slots[index].busy(conditions.for_tunnel);
                    let score = self.score(table, index, in_flight, random_unit(random));
                    best.consider(index, score * conditions.factor(index));
                    drawn[count] = index;
                    count += 1;
                }
            }
        }
        (best.index)
            .map(|index| conditions.keep_turn(self, drawn[0], index))
            .map(|chosen| conditions.or_outside(self, chosen, random))
            .or_else(|| conditions.any_accepted(random))
            .or_else(|| match conditions.only_working {
                true => table.draw_working(conditions.exclude, random.u64(..)),
                false => table.draw(conditions.exclude, random),
            })
    }
}

/// What a pick has to take into account besides weights and its own counts.
struct Conditions<'a> {
    table: &'a Table,
    exclude: &'a [SocketAddr],
    only_working: bool,
    for_tunnel: bool,
    some_full: bool,
    /// The time, if some backend reports its requests in flight.
    now: Option<Instant>,
}

impl Conditions<'_> {
    fn is_allowed(&self, index: usize) -> bool {
        !self.table.is_excluded(index, self.exclude)
    }

    /// Whether a backend that was drawn is accepted: not always, if it fails.
    fn accepts(&self, index: usize, random: &mut fastrand::Rng) -> bool {
        let chance = self.chance(index);
        chance >= 1.0 || random_unit(random) < chance
    }

    /// How probable it is that a backend is accepted that was drawn by its share.
    fn chance(&self, index: usize) -> f32 {
        let slot = &self.table.slots[index];
        let now = slot.endpoint.acceptance_now();
        // How it was when the table was built is already part of how often it is drawn.
        match slot.acceptance > 0.0 {
            true => now / slot.acceptance,
            false => now,
        }
    }

    /// Whether a backend is accepted that was not drawn by its share, of which this would be part.
    fn accepts_undrawn(&self, index: usize, random: &mut fastrand::Rng) -> bool {
        let chance = self.table.slots[index].endpoint.acceptance_now();
        chance >= 1.0 || random_unit(random) < chance
    }

    /// By how much its own reports of requests in flight change its score.
    fn factor(&self, index: usize) -> f32 {
        let state = self.table.slots[index].endpoint.state();
        self.now.map_or(1.0, |now| state.in_flight_factor(now))
    }

    /// Who is taken when the first candidate was this one, and another one is less busy for its weight.
    #[inline]
    fn keep_turn(&self, policy: &LeastBusy, first: usize, other: usize) -> usize {
        if !self.table.has_static_weights {
            return other;
        }
        let [turn, other] = [first, other].map(|index| (index, self.factor(index)));
        policy.keep_turn(self.table, turn, other, self.for_tunnel)
    }

    /// The same, or one that is not in the subset.
    fn or_outside(&self, policy: &LeastBusy, chosen: usize, random: &mut fastrand::Rng) -> usize {
        if self.table.drawn == self.table.live {
            return chosen;
        }
        let is_fit = |index: usize, random: &mut fastrand::Rng| {
            self.is_allowed(index) && self.accepts(index, random)
        };
        let spills_from = match self.some_full {
            false => policy.spills_from,
            true => 0,
        };
        let spill = (self.for_tunnel, spills_from);
        policy.or_outside(self.table, chosen, spill, is_fit, random)
    }

    /// Any backend that works, by share, when everything that was drawn is excluded or has failed since the table was
    /// built, as when a whole zone fails.
    #[cold]
    fn any_accepted(&self, random: &mut fastrand::Rng) -> Option<usize> {
        let table = self.table;
        for _ in 0..FURTHER_DRAWS {
            let is_inside = table.drawn == table.live || random_unit(random) < table.inside_part;
            let bits = random.u64(..);
            let index = match is_inside {
                true => table.alias.draw(bits),
                false => table.draw_outside(bits),
            };
            if self.is_allowed(index) && self.accepts(index, random) {
                return Some(index);
            }
        }
        // One number for all, because each is asked twice.
        let lot = random_unit(random);
        let is_excluded = table.exclusion(self.exclude);
        let is_fit = |index: usize| !is_excluded(index) && self.chance(index) > lot;
        table.draw_where(is_fit, random.u64(..))
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
