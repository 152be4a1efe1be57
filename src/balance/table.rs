//! The table that picks read: immutable, and replaced as a whole.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::alias::AliasTable;
use super::atomic::AtomicF32;
use super::endpoint::{Endpoint, InFlightCounter};
use super::ring::Ring;
use super::spread::Spread;
use super::weight::Share;

/// How often a draw is repeated that gave an excluded backend, or one that was drawn already. After
/// that the whole table is searched instead (excluded), or fewer candidates have to do (drawn
/// already).
pub(super) const MAX_REDRAWS: usize = 4;

/// So many excluded backends are looked through one by one.
const FEW_EXCLUDED: usize = 32;

/// How many picks from one table are spread evenly. Beyond that they are so many that chance spreads
/// them as well, and threads do not have to share a counter.
const EVEN_TURNS: u32 = 4_096;

/// A backend as a pick sees it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) in_flight: InFlightCounter,
    /// Mean weight as of this table, divided by its weight.
    pub(super) inverse_weight: AtomicF32,
    /// The part of its weight that was not learned, as of this table.
    pub(super) base: f32,
    /// The probability of acceptance that is part of its share, as of this table.
    pub(super) acceptance: f32,
    /// The probability with which it is taken in its turn while it has nothing in flight.
    pub(super) calm: AtomicF32,
}

/// The weight of a backend among those that are drawn.
fn weight(endpoint: &Endpoint) -> f64 {
    endpoint.weight().get() * endpoint.subset_part()
}

impl Slot {
    /// Whether the part of its weight that was not learned is that of another one, but for rounding.
    pub(super) fn has_base_of(&self, other: &Self) -> bool {
        (self.base - other.base).abs() <= 1e-4 * other.base
    }

    /// Requests in flight without tunnels, or with them, for a request that becomes one.
    pub(super) fn busy(&self, for_tunnel: bool) -> usize {
        let in_flight = self.in_flight.get();
        match in_flight > 0 && !for_tunnel {
            true => in_flight.saturating_sub(self.endpoint.state().tunnels() as usize),
            false => in_flight,
        }
    }
}

/// The backends to pick from, with the indexes that the policy in use needs; the other indexes are
/// empty.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) slots: Box<[Slot]>,
    pub(super) mean_weight: f64,
    /// Whether some backends differ in the part of their weight that was not learned.
    pub(super) has_static_weights: bool,
    pub(super) alias: AliasTable,
    /// The same for those that are not in the subset, from `drawn` on.
    pub(super) outside: AliasTable,
    /// The part of the shares of all that those of the subset would have without it.
    pub(super) inside_part: f32,
    pub(super) ring: Ring,
    /// `None` where all shares are equal.
    pub(super) spread: Option<Spread>,
    /// How many of the backends can be drawn: those before the ones that are not in the subset, and the ones that are
    /// ejected.
    pub(super) drawn: usize,
    /// How many are not ejected; all, if all are.
    pub(super) live: usize,
    /// Where the backends are that are ejected, and those that are to get their first request.
    pub(super) ejected: Box<[u32]>,
    pub(super) new: Box<[u32]>,
    /// The turns that have been taken from this table, and those before it.
    pub(super) turns: AtomicU32,
    pub(super) earlier_turns: u64,
    /// How many draws it takes on average to get the wanted number of different candidates; 0 if all
    /// backends are candidates.
    pub(super) draws: usize,
    /// Where the backend at an address is; made when it is needed.
    pub(super) by_addr: OnceLock<HashMap<SocketAddr, usize>>,
    /// The shares it was built from, under a policy whose shares rarely change.
    pub(super) built_from: Box<[Share]>,
}

impl Table {
    /// A table without any index.
    pub(super) fn new(mut endpoints: Vec<Arc<Endpoint>>) -> Self {
        let is_live = |endpoint: &Arc<Endpoint>| endpoint.acceptance() > 0.0;
        let is_drawn = |endpoint: &Arc<Endpoint>| is_live(endpoint) && !endpoint.is_outside();
        let count = |is_wanted: &dyn Fn(&Arc<Endpoint>) -> bool| {
            endpoints.iter().filter(|it| is_wanted(it)).count()
        };
        let (live, drawn) = (count(&is_live), count(&is_drawn));
        if drawn < endpoints.len() {
            endpoints.sort_by_cached_key(|endpoint| (!is_drawn(endpoint), !is_live(endpoint)));
        }
        // Where all are ejected, none is.
        let live = if live == 0 { endpoints.len() } else { live };
        let mean =
            endpoints.iter().map(|it| weight(it)).sum::<f64>() / endpoints.len().max(1) as f64;
        let slot = |endpoint: Arc<Endpoint>| Slot {
            in_flight: endpoint.counter(),
            inverse_weight: AtomicF32::new((mean / weight(&endpoint)) as f32),
            base: endpoint.base() * endpoint.subset_part() as f32,
            acceptance: endpoint.acceptance(),
            calm: AtomicF32::new(endpoint.calm()),
            endpoint,
        };
        let slots: Box<[Slot]> = endpoints.into_iter().map(slot).collect();
        // Where all of the subset are ejected since it was chosen, there is none.
        let drawn = if drawn == 0 { live } else { drawn };
        let drawn_slots = slots[..drawn].windows(2);
        Self {
            live,
            drawn,
            mean_weight: mean,
            has_static_weights: { drawn_slots }.any(|pair| !pair[0].has_base_of(&pair[1])),
            slots,
            ..Self::default()
        }
    }

    /// Lets picks compare a backend by its weight of now, while it is still drawn by the one as of this table.
    pub(super) fn adjust(&self, endpoint: &Arc<Endpoint>) {
        let slot = self.slots.get(endpoint.place() as usize);
        if let Some(slot) = slot.filter(|slot| Arc::ptr_eq(&slot.endpoint, endpoint)) {
            let inverse = self.mean_weight / weight(endpoint);
            slot.inverse_weight.set(inverse as f32);
            slot.calm.set(endpoint.calm());
        }
    }

    /// Whether the weight of one backend is at least that of another one, but for rounding.
    pub(super) fn weighs_at_least(&self, index: usize, other: usize) -> bool {
        let [inverse, others] = [index, other].map(|it| self.slots[it].inverse_weight.get());
        inverse <= others * (1.0 + 1e-4)
    }

    /// The chance of each backend to be drawn.
    pub(super) fn shares(&self) -> Vec<Share> {
        let is_any_live = self.slots.first().is_some_and(|slot| slot.acceptance > 0.0);
        let slots = self.slots.iter().map(|slot| &slot.endpoint);
        slots
            .map(|endpoint| match is_any_live {
                true => Share::new(endpoint.subset_share()),
                false => Share::new(endpoint.weight().get()),
            })
            .collect()
    }

    /// The part of all shares that the first so many have, as if nobody was left out.
    pub(super) fn part_of(&self, count: usize) -> f32 {
        let share = |slots: &[Slot]| -> f64 {
            let shares = slots.iter().map(|slot| slot.endpoint.share().get());
            shares.sum()
        };
        let (some, others) = self.slots[..self.live].split_at(count);
        let (some, others) = (share(some), share(others));
        (some / (some + others).max(f64::MIN_POSITIVE)) as f32
    }

    /// All turns that have been taken so far.
    pub(super) fn turns_so_far(&self) -> u64 {
        self.earlier_turns + u64::from(self.turns.load(Ordering::Relaxed))
    }

    /// Whether its turns have all been taken.
    pub(super) fn is_used_up(&self) -> bool {
        self.turns.load(Ordering::Relaxed) >= EVEN_TURNS
    }

    /// The turn of a pick, while turns are counted.
    pub(super) fn take_turn(&self) -> Option<u64> {
        if self.is_used_up() {
            return None;
        }
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        Some(self.earlier_turns + u64::from(turn))
    }

    /// Whether a table of these backends would be the same, under a policy whose shares rarely
    /// change.
    pub(super) fn is_built_from<'a>(
        &self,
        endpoints: impl Iterator<Item = &'a Arc<Endpoint>>,
    ) -> bool {
        let built = self.slots.iter().zip(&self.built_from);
        built
            .map(|(slot, share)| (Arc::as_ptr(&slot.endpoint), *share))
            .eq(endpoints.map(|endpoint| (Arc::as_ptr(endpoint), endpoint.share())))
    }

    /// The backend at an address.
    pub(super) fn at(&self, addr: SocketAddr) -> Option<&Slot> {
        let by_addr = self.by_addr.get_or_init(|| {
            let slots = self.slots.iter().enumerate();
            slots
                .map(|(index, slot)| (slot.endpoint.addr(), index))
                .collect()
        });
        by_addr.get(&addr).map(|index| &self.slots[*index])
    }

    pub(super) fn is_excluded(&self, index: usize, exclude: &[SocketAddr]) -> bool {
        !exclude.is_empty() && exclude.contains(&self.slots[index].endpoint.addr())
    }

    /// Draws one that is not in the subset, by share; there has to be one.
    pub(super) fn draw_outside(&self, random: u64) -> usize {
        self.drawn + self.outside.draw(random)
    }

    /// Whether a backend is excluded, for those who ask of all: where many are, each would be compared with each.
    pub(super) fn exclusion<'a>(
        &'a self,
        exclude: &'a [SocketAddr],
    ) -> impl Fn(usize) -> bool + use<'a> {
        let is_many = exclude.len() > FEW_EXCLUDED;
        let many: Option<HashSet<_>> = is_many.then(|| exclude.iter().collect());
        move |index| match &many {
            Some(many) => many.contains(&self.slots[index].endpoint.addr()),
            None => self.is_excluded(index, exclude),
        }
    }

    /// Draws one backend by share.
    pub(super) fn draw(&self, exclude: &[SocketAddr], random: &mut fastrand::Rng) -> Option<usize> {
        for _ in 0..MAX_REDRAWS {
            let index = self.alias.draw(random.u64(..));
            if !self.is_excluded(index, exclude) {
                return Some(index);
            }
        }
        self.draw_other_than(exclude, random.u64(..))
    }

    /// Draws one of the backends that are not excluded, by share, in one pass over all of them: for
    /// when draws keep giving excluded ones.
    pub(super) fn draw_other_than(&self, exclude: &[SocketAddr], random: u64) -> Option<usize> {
        let is_excluded = self.exclusion(exclude);
        self.draw_where(|index| !is_excluded(index), random)
    }

    /// The same, of those that are not ejected.
    pub(super) fn draw_working(&self, exclude: &[SocketAddr], random: u64) -> Option<usize> {
        let works = |index: usize| !self.slots[index].endpoint.is_ejected();
        let is_excluded = self.exclusion(exclude);
        self.draw_where(|index| works(index) && !is_excluded(index), random)
    }

    pub(super) fn draw_where(&self, is_fit: impl Fn(usize) -> bool, random: u64) -> Option<usize> {
        let others = || {
            let all = self.slots.iter().enumerate();
            all.filter(|(index, _)| is_fit(*index))
        };
        let total: f64 = others().map(|(_, slot)| slot.endpoint.share().get()).sum();
        if total <= 0.0 {
            // Only those are left that are ejected.
            let count = others().count() as u64;
            let nth = random.checked_rem(count)?;
            return others().nth(nth as usize).map(|(index, _)| index);
        }
        let mut rest = random as f64 / 2_f64.powi(64) * total;
        let mut last = None;
        for (index, slot) in others() {
            last = Some(index);
            rest -= slot.endpoint.share().get();
            if rest < 0.0 {
                break;
            }
        }
        last
    }
}
