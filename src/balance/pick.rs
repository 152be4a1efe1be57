//! The pick itself: no lock, no allocation.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::member::{Live, Signals, in_flight_of};
use super::table::Table;
use super::{Balancer, Policy};
use crate::load_report::{LoadReport, LoadReportError};
use crate::node::Node;

/// The most candidates that can be configured.
pub(super) const MAX_CANDIDATES: usize = 8;
/// How often a draw that gave an excluded backend, or one drawn already, is repeated. Then the
/// whole table is searched instead (excluded), or fewer candidates have to do (drawn already).
const REDRAWS: usize = 4;

/// One pick in 256 goes by weight alone: too few to be seen in the 99th percentile.
const EXPLORE: u64 = 255;
/// So many cells of the ring are looked at for an owner that is well and has room.
const RING_STEPS: usize = 256;
/// How often any backend at all is looked at, whatever its weight, when none of those drawn works.
const BLIND_DRAWS: usize = 16;

/// How one of several backends is chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice {
    pub(super) candidates: usize,
    /// How much the request to be placed counts beside those in flight.
    pub(super) own: f32,
}

/// What a request asks of a pick beyond the policy.
#[derive(Debug, Clone, Copy, Default)]
pub struct PickOptions<'a> {
    /// What [`Policy::Consistent`] hashes. Without it, as if it were empty.
    pub key: &'a [u8],
    /// Backends not to pick, because they have been tried. With nothing left, nothing is picked.
    pub exclude: &'a [SocketAddr],
    /// The time, where the caller has read the clock anyway, or has one of its own. The pick needs
    /// it only where backends report their requests in flight, and reads the clock then.
    pub now: Option<Instant>,
}

/// A backend that was picked, counted as busy with one request until this is dropped: so a
/// request that is cancelled, or never sent, leaks nothing. In a Pingora proxy it lives in the
/// request's context.
///
/// Say how it ended: [`succeeded`](Self::succeeded) or [`failed`](Self::failed). Just dropping it
/// says nothing about the backend: for a request that was cancelled, or whose client went away.
pub struct Upstream {
    live: Arc<Live>,
    /// For the policy that needs to know how many there are in all: one owner each.
    _counted: Option<Arc<()>>,
}

impl Upstream {
    /// Where to send the request.
    pub fn addr(&self) -> SocketAddr {
        self.live.addr()
    }

    /// The node, as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.live.node()
    }

    /// Its share of traffic relative to the other backends', as it is now.
    pub fn weight(&self) -> f64 {
        self.live.weight()
    }

    /// How many requests of this process the backend is working on, this one included.
    pub fn in_flight(&self) -> u32 {
        in_flight_of(&self.live)
    }

    /// The request was answered, after `latency` from when it was sent to this backend: what a
    /// retry took before does not count. The policies that learn from outcomes take it from here.
    pub fn succeeded(self, latency: Duration) {
        self.live.succeeded(latency);
    }

    /// The backend failed the request: no connection, a time-out, a 5xx. Not for a client that
    /// went away: drop the guard for that.
    pub fn failed(self) {
        self.live.failed();
    }

    /// Takes over what the backend said of its load with its answer, `now`. Weights follow at the
    /// next [`tick`](Balancer::tick), what it says of its requests in flight counts with the next
    /// pick.
    pub fn report(&self, report: &LoadReport, now: Instant) {
        self.live.report(report, now);
    }

    /// The same with the value of a response's [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER).
    ///
    /// # Errors
    ///
    /// [`LoadReportError`] if it is no report at all; that is counted in
    /// [`refused_metrics`](Balancer::refused_metrics).
    pub fn report_header(&self, value: &[u8], now: Instant) -> Result<(), LoadReportError> {
        let report = LoadReport::parse(value).inspect_err(|_| self.live.refuse_report())?;
        self.report(&report, now);
        Ok(())
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("node", &self.node().id)
            .field("addr", &self.addr())
            .finish()
    }
}

impl Balancer {
    /// Picks a backend for a request; `None` if there is none.
    pub fn pick(&self) -> Option<Upstream> {
        self.pick_with(PickOptions::default())
    }

    /// Picks with a key, or around backends that have been tried.
    pub fn pick_with(&self, options: PickOptions<'_>) -> Option<Upstream> {
        // The thread's generator is asked once a pick; what follows from it stays in registers.
        let mut random = fastrand::Rng::with_seed(fastrand::u64(..));
        self.pick_by(options, || random.u64(..))
    }

    /// Picks with randomness from outside: 64 uniform bits a call, so that a simulation can be
    /// repeated. [`Policy::RoundRobin`] asks for none.
    pub fn pick_by(
        &self,
        options: PickOptions<'_>,
        mut random: impl FnMut() -> u64,
    ) -> Option<Upstream> {
        let table = self.table.load();
        let exclude = options.exclude;
        let choice = self.choice;
        let mut counted = None;
        let index = match self.config.policy {
            _ if table.slots.is_empty() => return None,
            Policy::Headroom | Policy::Adaptive => {
                let signals = &*self.signals;
                if signals.quiet() && exclude.is_empty() {
                    Some(table.quick(choice, &mut random))
                } else {
                    let reporting = signals.reporting();
                    let now = match options.now {
                        None if reporting => Instant::now(),
                        None => self.started,
                        Some(now) => now,
                    };
                    let judge = |index: usize, score: f32, random: &mut _| {
                        if !table.passes(index, signals, random) {
                            return None;
                        }
                        let live = table.slots[index].member.live();
                        Some(if reporting {
                            score * live.busyness(now)
                        } else {
                            score
                        })
                    };
                    table.least_busy(choice, exclude, judge, &mut random)
                }
            }
            Policy::Random => table.draw(exclude, &mut random),
            Policy::RoundRobin => self.next_in_turn(&table, exclude),
            Policy::Consistent => {
                counted = Some(self.in_flight.clone());
                self.owner(&table, options, &mut random)
            }
        }?;
        let live = table.slots[index].member.enter();
        Some(Upstream {
            live,
            _counted: counted,
        })
    }

    fn next_in_turn(&self, table: &Table, exclude: &[SocketAddr]) -> Option<usize> {
        let tries = table.slots.len().min(REDRAWS);
        for _ in 0..tries {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let index = if table.uniform {
                turn % table.slots.len()
            } else {
                table.spread.turn(turn as u64)
            };
            if !table.is_excluded(index, exclude) {
                return Some(index);
            }
        }
        let turn = self.turn.load(Ordering::Relaxed) as u64;
        table.any_other_than(exclude, turn.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Consistent hashing with bounded loads: V. Mirrokni, M. Thorup and M. Zadimoghaddam,
    /// "Consistent hashing with bounded loads", SODA 2018. The first owner of the key that is
    /// well and has room; where none has, the first that is well; where none is, the first.
    fn owner(
        &self,
        table: &Table,
        options: PickOptions<'_>,
        random: &mut impl FnMut() -> u64,
    ) -> Option<usize> {
        // This request has been counted in.
        let in_all = Arc::strong_count(&self.in_flight) - 1;
        let fair =
            in_all as f32 * self.config.consistent.balance_factor as f32 / table.slots.len() as f32;
        let has_room = |index: usize| {
            let slot = &table.slots[index];
            let room = (fair / slot.inverse_weight).ceil() as usize;
            slot.counter.in_flight() < room.max(self.config.consistent.slack)
        };
        // One lot for all, so that a backend with many points is not asked again and again.
        let lot = (random() >> 40) as f32 / (1_u32 << 24) as f32;
        let is_well = |index: usize| {
            !self.signals.gated() || self.signals.chance(table.slots[index].member.success()) > lot
        };
        let is_left = |index: usize| !table.is_excluded(index, options.exclude);
        let (ring, key) = (&table.ring, options.key);
        let mut full = None;
        for index in ring.owners(key).take(RING_STEPS) {
            if is_left(index) && is_well(index) {
                if has_room(index) {
                    return Some(index);
                }
                full.get_or_insert(index);
            }
        }
        // Those that are left, or well, have next to no cells. All of them are asked then.
        full.or_else(|| {
            let is_fit = |index: usize| is_left(index) && is_well(index);
            ring.owner_among(key, |index| is_fit(index) && has_room(index))
                .or_else(|| ring.owner_among(key, is_fit))
        })
        .or_else(|| ring.owner_among(key, is_left))
    }
}

impl Table {
    fn is_excluded(&self, index: usize, exclude: &[SocketAddr]) -> bool {
        !exclude.is_empty() && exclude.contains(&self.slots[index].member.addr())
    }

    /// Whether a backend that has been drawn is well enough to be taken. How it was when the table
    /// was built is part of how often it is drawn already.
    fn passes(&self, index: usize, signals: &Signals, random: &mut impl FnMut() -> u64) -> bool {
        let slot = &self.slots[index];
        let chance = signals.chance(slot.member.success()) / slot.gate;
        chance >= 1.0 || (random() >> 40) as f32 / (1_u32 << 24) as f32 <= chance
    }

    /// One backend by weight.
    fn draw(&self, exclude: &[SocketAddr], random: &mut impl FnMut() -> u64) -> Option<usize> {
        for _ in 0..REDRAWS {
            let index = self.alias.draw(random());
            if !self.is_excluded(index, exclude) {
                return Some(index);
            }
        }
        self.any_other_than(exclude, random())
    }

    /// What is left when draws keep giving excluded backends: by weight among the others.
    fn any_other_than(&self, exclude: &[SocketAddr], random: u64) -> Option<usize> {
        let others = || {
            self.slots
                .iter()
                .enumerate()
                .filter(|(index, _)| !self.is_excluded(*index, exclude))
        };
        let total: f64 = others().map(|(_, slot)| slot.member.share()).sum();
        let mut rest = random as f64 / 2_f64.powi(64) * total;
        let mut last = None;
        for (index, slot) in others() {
            last = Some(index);
            rest -= slot.member.share();
            if rest < 0.0 {
                break;
            }
        }
        last
    }

    /// How busy a backend is for its weight; what decides between candidates.
    ///
    /// Chance decides between backends that are nearly alike, so that with little to do all get
    /// something; but no more, for their weights are all that many proxies with few requests each
    /// have to go by.
    fn score(&self, index: usize, own: f32, chance: f32) -> f32 {
        let slot = &self.slots[index];
        let in_flight = slot.counter.in_flight() as f32;
        (in_flight + own * (1.0 - self.alike * chance)) * slot.inverse_weight
    }

    /// [`least_busy`](Self::least_busy) where all are well, none has been tried, and none says how
    /// busy it is: nearly every pick. Draws a few more instead of looking out for repetition, and
    /// compares without branches, for none of them could be predicted.
    fn quick(&self, choice: Choice, random: &mut impl FnMut() -> u64) -> usize {
        let key = |index: usize, chance: f32| {
            // The bits of floats above 0 have their order.
            let score = self.score(index, choice.own, chance).to_bits();
            u64::from(score) << 32 | index as u64
        };
        let mut bits = random();
        let (first, chance) = self.alias.draw_with_rest(bits);
        // Now and then by weight alone: who is never tried cannot show how good it is.
        if bits & EXPLORE == 0 {
            return first;
        }
        let mut best = u64::MAX;
        if self.draws == 0 {
            for index in 0..self.slots.len() {
                bits = bits.rotate_left(13);
                best = best.min(key(index, (bits as u16) as f32 * (1.0 / 65536.0)));
            }
        } else {
            best = key(first, chance);
            for _ in 1..self.draws {
                let (index, chance) = self.alias.draw_with_rest(random());
                best = best.min(key(index, chance));
            }
        }
        best as u32 as usize
    }

    /// Of several backends drawn by weight the one that is least busy for its weight. `judge`
    /// corrects a score, or says that the backend is not to be had.
    #[inline]
    fn least_busy<R: FnMut() -> u64>(
        &self,
        choice: Choice,
        exclude: &[SocketAddr],
        judge: impl Fn(usize, f32, &mut R) -> Option<f32>,
        random: &mut R,
    ) -> Option<usize> {
        let Choice { candidates, own } = choice;
        let first = random();
        // Now and then by weight alone: who is never tried cannot show how good it is.
        let wanted = if first & EXPLORE == 0 {
            1
        } else {
            candidates.min(self.slots.len())
        };
        let mut next = Some(first);
        let mut drawn = [usize::MAX; MAX_CANDIDATES];
        let mut count = 0;
        let mut best = None;
        let mut least = f32::INFINITY;
        let mut redraws = REDRAWS;
        while count < wanted {
            let (index, chance) = self
                .alias
                .draw_with_rest(next.take().unwrap_or_else(&mut *random));
            let mut judged = None;
            if !drawn[..count].contains(&index) && !self.is_excluded(index, exclude) {
                judged = judge(index, self.score(index, own, chance), random);
            }
            let Some(score) = judged else {
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
        best.or_else(|| self.any_well(exclude, &judge, random))
            .or_else(|| self.draw(exclude, random))
    }

    /// When everything that is drawn by weight has failed since the table was built, as when a
    /// whole zone does: whatever works.
    #[cold]
    fn any_well<R: FnMut() -> u64>(
        &self,
        exclude: &[SocketAddr],
        judge: &impl Fn(usize, f32, &mut R) -> Option<f32>,
        random: &mut R,
    ) -> Option<usize> {
        (0..BLIND_DRAWS).find_map(|_| {
            let index = (random() % self.slots.len() as u64) as usize;
            if self.is_excluded(index, exclude) {
                return None;
            }
            judge(index, 1.0, random).map(|_| index)
        })
    }
}
