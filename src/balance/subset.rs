//! Which of the backends a process uses, where it is one of many. Pure.

use std::net::{IpAddr, SocketAddr};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::settings::Adaptive;

/// The part of a difference that a tick takes over.
const KEPT_UP: f64 = 0.1;
/// With so much in flight at once, the mean follows at once: traffic has grown, and chance does not explain it.
const CERTAIN_PART: f64 = 0.5;
/// For how many ticks with requests nothing is left out.
const FIRST_TICKS: u32 = 10;
/// Backends are left out if at most this part of them is wanted, and none is any more with more than that.
const LEAVES_OUT_BELOW: f64 = 0.5;
const USES_ALL_FROM: f64 = 0.75;
/// The number changes if another one is wanted that is smaller or greater by these factors.
const SHRINKS_BELOW: f64 = 0.8;
const GROWS_FROM: f64 = 1.2;
/// If more than this part of those that are left out have little to do, there are too few processes for chance to reach
/// all.
const MOST_IDLE: f64 = 0.1;
/// By how much the number grows with each tick then, for each tenth of them, and how slowly it returns: in ten minutes by
/// half.
const WIDENS: f64 = 1.03;
const NARROWS: f64 = 0.999;
/// For how many ticks nothing is left out if that was to no avail; each time for twice as long, so many times.
const FIRST_REST: u32 = 600;
const MOST_RESTS: u32 = 6;

/// What a tick has seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// Requests of this process in flight at all backends together.
    pub(super) in_flight: f64,
    /// How little the backends report to have to do: 1 if they are calm, or do not report.
    pub(super) calm: f64,
    /// How many work.
    pub(super) backends: usize,
    /// The part of those that are left out that have little to do.
    pub(super) idle_outside: f64,
}

/// How many backends this process uses.
///
/// Of many processes before many backends each sends a few requests a second to each backend. That is too few to learn
/// anything from, and what is in flight there tells next to nothing. If each uses a part of the backends, it knows
/// these well, and chance spreads the processes over all backends. (Subsets as in B. Beyer and others, "Site
/// reliability engineering", 2016, chapter 20.)
#[derive(Debug, Default)]
pub(super) struct Subset {
    /// Requests of this process in flight at all backends together: a moving mean.
    in_flight: f64,
    ticks: u32,
    /// How many times as many are used, because there are few processes: at least 1 after the first tick.
    wider: f64,
    /// How often so many were needed that nobody could be left out, and for how many more ticks nobody is.
    failed: u32,
    rest: u32,
    /// `None` for all.
    size: Option<usize>,
}

impl Subset {
    /// How many backends are used; `None` for all.
    pub(super) fn size(&self) -> Option<usize> {
        self.size
    }

    /// Decides how many of the backends are used.
    pub(super) fn tick(&mut self, settings: &Adaptive, seen: Seen) {
        let Seen {
            in_flight, calm, ..
        } = seen;
        if in_flight > 0.0 || self.ticks > 0 {
            self.ticks = self.ticks.saturating_add(1);
            let part = KEPT_UP.max(1.0 / f64::from(self.ticks));
            self.in_flight += part * (in_flight - self.in_flight);
            self.in_flight = self.in_flight.max(CERTAIN_PART * in_flight);
        }
        let all = seen.backends as f64;
        let factor = match seen.idle_outside > MOST_IDLE {
            true => WIDENS.powf(seen.idle_outside / MOST_IDLE),
            false => NARROWS,
        };
        let wanted = (self.in_flight / settings.subset_in_flight).max(settings.subset_least.into());
        self.wider = (self.wider * factor).clamp(1.0, (all / wanted).max(1.0));
        let wanted = wanted * self.wider;
        let is_known = self.ticks >= FIRST_TICKS && settings.subset_in_flight > 0.0;
        self.rest = self.rest.saturating_sub(1);
        if self.size.is_some() && self.wider > 1.0 && wanted > USES_ALL_FROM * all {
            self.rest = FIRST_REST << self.failed.min(MOST_RESTS);
            self.failed = self.failed.saturating_add(1);
        }
        self.size = match self.size {
            _ if !is_known || self.rest > 0 => None,
            None if calm > 0.0 || wanted > LEAVES_OUT_BELOW * all => None,
            Some(_) if calm > 0.5 || wanted > USES_ALL_FROM * all => None,
            Some(size) if is_close(wanted, size) => Some(size),
            _ => Some(wanted.ceil() as usize),
        };
    }
}

/// Whether a number of backends is so close to the one that is wanted that it is kept.
fn is_close(wanted: f64, size: usize) -> bool {
    (SHRINKS_BELOW..GROWS_FROM).contains(&(wanted / size as f64))
}

/// The lot of a backend, from 0 to 1. Each process has other lots, by its `seed`, but keeps them, so that a backend that
/// comes or goes changes one place.
pub(super) fn lot(seed: u64, addr: SocketAddr) -> f64 {
    let ip = match addr.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; 18];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&addr.port().to_be_bytes());
    xxh3_64_with_seed(&bytes, seed) as f64 / 2_f64.powi(64)
}

/// Some of several backends, by their lots and static weights: the chance of each is proportional to its weight, and that
/// of one with less than the mean as great as with the mean, so that it is not loaded by few processes. All processes
/// together give each what is its due, if each process gives it its weight divided by its chance.
/// (E. Ohlsson, "Sequential Poisson sampling", Journal of Official Statistics 14, 1998; D. Horvitz and D. Thompson, "A
/// generalization of sampling without replacement from a finite universe", 1952.)
#[derive(Debug)]
pub(super) struct Draw {
    count: usize,
    /// The chance of each unit of weight.
    chance: f64,
    /// Weights count as this at least.
    least: f64,
    /// The greatest rank of those that are chosen.
    last: f64,
}

impl Draw {
    /// Draws `size` of these, each given as its lot and its weight; all, if there are no more.
    pub(super) fn new(all: &[(f64, f64)], size: usize) -> Self {
        if all.len() <= size {
            return Self {
                count: all.len(),
                chance: f64::INFINITY,
                least: f64::MIN_POSITIVE,
                last: f64::INFINITY,
            };
        }
        let least = all
            .iter()
            .map(|(_, weight)| weight / all.len() as f64)
            .sum();
        let chance = chance(all.iter().map(|(_, weight)| weight.max(least)), size);
        let ranks = all
            .iter()
            .map(|(lot, weight)| rank(*lot, chance * weight.max(least)));
        let mut ranks: Vec<f64> = ranks.collect();
        let last = size.saturating_sub(1);
        Self {
            count: size,
            chance,
            least,
            last: *ranks.select_nth_unstable_by(last, f64::total_cmp).1,
        }
    }

    /// How many are chosen.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The chance that one of this lot and weight had, if it is chosen.
    pub(super) fn chance(&self, lot: f64, weight: f64) -> Option<f64> {
        let chance = self.chance * weight.max(self.least);
        (rank(lot, chance) <= self.last).then_some(chance.min(1.0))
    }
}

/// Those with the lowest ranks are chosen, and nobody can do without one whose chance is 1 or more.
fn rank(lot: f64, chance: f64) -> f64 {
    match chance >= 1.0 {
        true => 0.0,
        false => lot / chance,
    }
}

/// The chance of each unit of weight with which `size` are chosen on average, where nobody's chance is above 1.
fn chance(weights: impl Iterator<Item = f64> + Clone, size: usize) -> f64 {
    let mut chance = 0.0;
    // Ends as soon as there are no more that are certain; with each turn there are more.
    loop {
        let is_certain = |weight: f64| chance * weight >= 1.0;
        let certain = weights.clone().filter(|weight| is_certain(*weight)).count();
        let rest: f64 = weights.clone().filter(|weight| !is_certain(*weight)).sum();
        let next = size.saturating_sub(certain) as f64 / rest;
        if next <= chance || !next.is_finite() {
            return chance;
        }
        chance = next;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const BUSY: f64 = 0.0;
    const CALM: f64 = 1.0;

    /// Half a request in flight at each.
    fn half() -> Adaptive {
        Adaptive {
            subset_in_flight: 0.5,
            ..Adaptive::default()
        }
    }

    fn after(seconds: u32, in_flight: f64, calm: f64, backends: usize) -> Subset {
        let mut subset = Subset::default();
        goes_on(&mut subset, seconds, in_flight, calm, backends);
        subset
    }

    fn seen(in_flight: f64, calm: f64, backends: usize) -> Seen {
        Seen {
            in_flight,
            calm,
            backends,
            idle_outside: 0.0,
        }
    }

    fn goes_on(subset: &mut Subset, seconds: u32, in_flight: f64, calm: f64, backends: usize) {
        for _ in 0..seconds {
            subset.tick(&half(), seen(in_flight, calm, backends));
        }
    }

    #[test]
    fn more_are_used_while_many_of_the_others_are_idle() {
        let mut subset = after(20, 10.0, BUSY, 100);
        let mut goes_on = |seconds: u32, idle_outside: f64| {
            for _ in 0..seconds {
                let seen = Seen {
                    idle_outside,
                    ..seen(10.0, BUSY, 100)
                };
                subset.tick(&half(), seen);
            }
            subset.size()
        };
        assert_eq!(goes_on(60, 0.1), Some(20), "as chance has it");
        let grown = goes_on(20, 0.11);
        assert!(
            grown.is_some_and(|size| (30..=40).contains(&size)),
            "{grown:?}"
        );
        assert_eq!(goes_on(60, 0.05), grown);
        assert_eq!(goes_on(60, 0.3), None, "nobody else uses them");
        // In time it is tried again, and more rarely.
        let rests: Vec<u32> = (0..4)
            .map(|_| {
                let rest = (1..).find(|_| goes_on(1, 0.0).is_some()).unwrap();
                while goes_on(1, 0.4).is_some() {}
                rest
            })
            .collect();
        assert!(rests[0] >= 600 && rests[0] < 1_200, "{rests:?}");
        assert!(rests[3] >= 4_800 && rests[3] < 6_000, "{rests:?}");
    }

    #[test]
    fn one_of_many_uses_a_part() {
        assert_eq!(after(20, 10.0, BUSY, 100).size(), Some(20));
        assert_eq!(after(20, 1.0, BUSY, 100).size(), Some(12), "the least");
        assert_eq!(after(20, 100.0, BUSY, 1_000).size(), Some(200));
    }

    #[test]
    fn all_are_used_otherwise() {
        assert_eq!(after(20, 8.0, CALM, 100).size(), None, "little to do");
        assert_eq!(after(20, 60.0, BUSY, 100).size(), None, "enough for all");
        assert_eq!(after(20, 1.0, BUSY, 20).size(), None, "few backends");
        assert_eq!(after(9, 8.0, BUSY, 100).size(), None, "not known yet");
        assert_eq!(after(60, 0.0, BUSY, 100).size(), None, "no requests");
        let off = Adaptive {
            subset_in_flight: 0.0,
            ..Adaptive::default()
        };
        let mut subset = after(20, 8.0, BUSY, 100);
        subset.tick(&off, seen(8.0, BUSY, 100));
        assert_eq!(subset.size(), None, "switched off");
    }

    #[test]
    fn more_are_used_at_once_and_fewer_in_time() {
        let mut subset = after(20, 8.0, BUSY, 1_000);
        goes_on(&mut subset, 1, 100.0, BUSY, 1_000);
        assert_eq!(subset.size(), Some(100));
        goes_on(&mut subset, 3, 8.0, BUSY, 1_000);
        assert!(subset.size().is_some_and(|size| size > 60));
        goes_on(&mut subset, 60, 8.0, BUSY, 1_000);
        assert!(subset.size().is_some_and(|size| size <= 25));
        goes_on(&mut subset, 1, 8.0, CALM, 1_000);
        assert_eq!(subset.size(), None);
    }

    #[test]
    fn chance_does_not_change_the_number() {
        let mut subset = after(60, 8.0, BUSY, 100);
        let before = subset.size();
        for in_flight in [4.0, 12.0, 9.0, 7.0, 3.0, 13.0] {
            goes_on(&mut subset, 1, in_flight, BUSY, 100);
            assert_eq!(subset.size(), before);
        }
    }

    fn addr(at: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, (at >> 8) as u8, at as u8], 80))
    }

    /// Which of the backends a process uses, with the part that each gets.
    fn chosen(seed: u64, backends: &[(usize, f64)]) -> HashMap<usize, f64> {
        let entry = |(at, weight): &(usize, f64)| (lot(seed, addr(*at)), *weight);
        let draw = Draw::new(&backends.iter().map(entry).collect::<Vec<_>>(), 12);
        let weights = backends.iter().filter_map(|backend| {
            let (lot, weight) = entry(backend);
            Some((backend.0, weight / draw.chance(lot, weight)?))
        });
        let weights: HashMap<usize, f64> = weights.collect();
        let all: f64 = weights.values().sum();
        let parts = weights.into_iter().map(|(at, weight)| (at, weight / all));
        parts.collect()
    }

    #[test]
    fn each_process_uses_others_and_a_backend_that_goes_changes_one_place() {
        let all: Vec<_> = (0..100).map(|at| (at, 1.0)).collect();
        let mut uses = [0; 100];
        for seed in 0..1_000 {
            let before = chosen(seed, &all);
            assert_eq!(before.len(), 12);
            for at in before.keys() {
                uses[*at] += 1;
            }
            let gone = *before.keys().next().unwrap();
            let rest = all.iter().copied().filter(|(at, _)| *at != gone);
            let after = chosen(seed, &rest.collect::<Vec<_>>());
            assert_eq!(after.len(), 12);
            let changed = before.keys().filter(|at| !after.contains_key(at));
            assert_eq!(changed.count(), 1);
        }
        // 120 expected, and a standard deviation of 10.
        assert!(uses.iter().all(|uses| (75..165).contains(uses)), "{uses:?}");
    }

    #[test]
    fn all_processes_together_heed_static_weights() {
        // One gets a third of all, and the others one, two or three parts each.
        let weights = |at: usize| if at == 0 { 100.0 } else { (1 + at % 3) as f64 };
        let all: Vec<_> = (0..101).map(|at| (at, weights(at))).collect();
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        let mut got = [0.0; 4];
        const PROCESSES: u64 = 3_000;
        for seed in 0..PROCESSES {
            let parts = chosen(seed, &all);
            assert!(parts.contains_key(&0), "nobody can do without it");
            for (at, part) in parts {
                got[if at == 0 { 0 } else { weights(at) as usize }] += part;
            }
        }
        for (kind, got) in got.into_iter().enumerate() {
            let of_kind = all.iter().filter(|(at, weight)| match kind {
                0 => *at == 0,
                _ => *at > 0 && *weight == kind as f64,
            });
            let due: f64 = of_kind.map(|(_, weight)| weight).sum::<f64>() / total;
            let got = got / PROCESSES as f64;
            assert!(
                (got / due - 1.0).abs() < 0.1,
                "{kind}: {got} instead of {due}"
            );
        }
    }

    #[test]
    fn odd_weights_do_no_harm() {
        for weights in [[0.0; 20], [f64::MIN_POSITIVE; 20], [1e300; 20]] {
            let backends: Vec<_> = weights.into_iter().enumerate().collect();
            assert!(chosen(1, &backends).len() <= 20);
        }
        assert_eq!(chosen(1, &[]).len(), 0);
        assert_eq!(chosen(1, &[(1, 5.0)]).len(), 1);
    }
}
