//! The ring of consistent hashing: which backend a key belongs to.

use std::net::SocketAddr;
use std::sync::LazyLock;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// How many bits of a key's hash say which cell it is in.
const CELL_BITS: u32 = 17;
/// Into how many cells the ring is cut, whatever the number of backends and their weights.
const CELLS: usize = 1 << CELL_BITS;
const LAST_CELL: u32 = CELLS as u32 - 1;
/// How often a backend's order of cells is mixed. With two rounds a few orders are too much alike.
const ROUNDS: usize = 3;

/// Consistent hashing. The hashes are cut into 131,072 cells of equal length, and each cell belongs to
/// one backend. Who owns it is decided by weighted rendezvous hashing (C. Schindelhauer and G.
/// Schomaker, "Weighted distributed hash tables", SPAA 2005): each backend has a time for each cell
/// that follows from its address and the cell, divided by its weight, and the least one wins.
///
/// So keys move as little as can be, by construction. The time of a backend depends on no other: one
/// that joins takes cells, and none changes hands between two others; one that leaves gives its cells
/// away, and no others move; a weight that changes moves cells to or from its backend alone. And the
/// unit of weight plays no part, for only the order of the times does.
///
/// Times are distributed exponentially, which makes shares proportional to weights on average. They
/// differ from it by chance: a share `p` by about `0.7 * sqrt(p / 131,072)`. That is 1 % of its share
/// for one of ten equal backends, 2 % of 100, 6 % of 1,000 and 20 % of 10,000. A backend whose share
/// is far below one cell owns one cell or none.
///
/// A backend visits all cells in an order of its own, a permutation as in Maglev (D. E. Eisenbud and
/// others, NSDI 2016), and the time of its k-th cell is about the mean of the k-th least of as many
/// exponential times as there are cells (A. Rényi, "On the theory of order statistics", 1953). So cells
/// can be visited in the order of time, and those visits that cannot win are left out: there are about
/// `cells * (1 + ln backends)` instead of `cells * backends`.
///
/// Memory: 512 KiB and 48 bytes a backend. While it is built, 1 MiB more; and 512 KiB once in a
/// process.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Of each cell. Empty where there is nobody to own them.
    owners: Box<[u32]>,
    racers: Box<[Racer]>,
}

/// When, if its weight is 1, a backend is at the cells that it visits, from the first on.
static LAGS: LazyLock<Box<[f32]>> = LazyLock::new(|| {
    let mut lag = 0.0;
    // Sums in the same order everywhere, and no logarithms: all processes agree to the last bit.
    let lags = (0..=CELLS).map(|rank| {
        let at = lag as f32;
        lag += 1.0 / (CELLS - rank).max(1) as f64;
        at
    });
    lags.collect()
});

/// A backend as it competes for cells.
#[derive(Debug)]
struct Racer {
    index: u32,
    /// What its order of cells begins with.
    offset: u32,
    /// Odd, so that multiplying by them can be undone.
    factors: [u32; ROUNDS],
    inverses: [u32; ROUNDS],
    /// Time per unit of lag.
    pace: f64,
    /// How far it is on its way from one cell to the next, 0 to 1: so that one with next to no weight
    /// gets its first cell as often as it should, and not always or never.
    phase: f64,
}

impl Racer {
    /// `None` for one that is to get nothing.
    fn new(index: u32, [first, second]: [u64; 2], weight: f64) -> Option<Self> {
        if !(weight > 0.0 && weight.is_finite()) {
            return None;
        }
        let bits = |round: usize| (first >> (round as u32 * CELL_BITS)) as u32 & LAST_CELL;
        let factors = std::array::from_fn(|round| bits(round) | 1);
        Some(Self {
            index,
            offset: second as u32 & LAST_CELL,
            factors,
            inverses: factors.map(inverse),
            pace: weight.recip(),
            phase: (second >> 32) as f64 / 2_f64.powi(32),
        })
    }

    /// The cell that it visits after so many others.
    fn cell(&self, rank: u32) -> u32 {
        let mut cell = rank.wrapping_add(self.offset) & LAST_CELL;
        for factor in self.factors {
            cell = cell.wrapping_mul(factor) & LAST_CELL;
            cell ^= cell >> CELL_BITS.div_ceil(2);
        }
        cell
    }

    /// How many others it visits before this cell.
    fn rank(&self, mut cell: u32) -> u32 {
        for inverse in self.inverses.iter().rev() {
            // Done twice this is undone: it is a shift by half of the bits or more.
            cell ^= cell >> CELL_BITS.div_ceil(2);
            cell = cell.wrapping_mul(*inverse) & LAST_CELL;
        }
        cell.wrapping_sub(self.offset) & LAST_CELL
    }

    /// When it visits the cell between these two lags. 0 or more, so that its bits have its order, and
    /// never less than for the cell before.
    fn time(&self, [this, next]: [f32; 2]) -> f32 {
        let (this, next) = (f64::from(this), f64::from(next));
        ((this + self.phase * (next - this)) * self.pace) as f32
    }
}

/// What undoes multiplying by an odd number, but for the bits above those of a cell. Each step
/// doubles the number of bits that are right, which is 3 to begin with.
fn inverse(factor: u32) -> u32 {
    let mut inverse = factor;
    for _ in 0..4 {
        inverse = inverse.wrapping_mul(2_u32.wrapping_sub(factor.wrapping_mul(inverse)));
    }
    inverse & LAST_CELL
}

/// The one that is there first; of two that are equally fast, the first of them.
fn winner<'a>(racers: impl Iterator<Item = &'a Racer>, lags: &[f32], cell: u32) -> Option<u32> {
    let times = racers.map(|racer| {
        let rank = racer.rank(cell) as usize;
        (racer.time([lags[rank], lags[rank + 1]]), racer.index)
    });
    let first = times.min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(first.1)
}

impl Ring {
    /// A ring for backends at these addresses with these weights. One whose weight is not above 0
    /// owns nothing.
    pub(super) fn new(backends: impl Iterator<Item = (SocketAddr, f64)>) -> Self {
        let mut total = 0.0;
        let mut racers = Vec::new();
        for (index, (addr, weight)) in (0..).zip(backends) {
            // By address, not by id: what is kept for a key is kept in a process.
            let name = addr.to_string();
            let hashes = [0, 1].map(|seed| xxh3_64_with_seed(name.as_bytes(), seed));
            if let Some(racer) = Racer::new(index, hashes, weight) {
                total += weight;
                racers.push((hashes, racer));
            }
        }
        // The first of two that are equally fast wins: whatever order they were given in.
        racers.sort_unstable_by_key(|(hashes, _)| *hashes);
        let racers: Box<[Racer]> = racers.into_iter().map(|(_, racer)| racer).collect();
        Self {
            owners: race(&racers, total),
            racers,
        }
    }

    fn cell(key: &[u8]) -> u32 {
        (xxh3_64_with_seed(key, 0) >> (u64::BITS - CELL_BITS)) as u32
    }

    /// The owner of `key`, then those of the cells after its own: other backends by chance, in
    /// proportion to their weights. Each may come repeatedly, and one of little weight never.
    pub(super) fn owners(&self, key: &[u8]) -> impl Iterator<Item = usize> {
        let start = (Self::cell(key) as usize).min(self.owners.len());
        let (before, after) = self.owners.split_at(start);
        after.iter().chain(before).map(|owner| *owner as usize)
    }

    /// Who would own `key` if there were only those that `is_wanted`. Costs time in proportion to
    /// the number of backends.
    pub(super) fn owner_among(
        &self,
        key: &[u8],
        is_wanted: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let wanted = self.racers.iter();
        let wanted = wanted.filter(|racer| is_wanted(racer.index as usize));
        winner(wanted, &LAGS, Self::cell(key)).map(|index| index as usize)
    }
}

/// Who wins each cell.
///
/// Cells are visited in the order of time, roughly: a stretch of time for one backend after the
/// other, then the next stretch. When a stretch is over, the first at a cell is known for good. In the
/// time in which all together visit each cell once on average, all but one in e cells are: so after
/// `ln backends` of these the few that are left cost less if the winner is worked out for each.
/// Where that ends decides nothing but what it costs.
fn race(racers: &[Racer], total: f64) -> Box<[u32]> {
    const NOBODY: u64 = u64::MAX;
    let lags = &**LAGS;
    if racers.is_empty() {
        return Box::default();
    }
    // Time and place among the racers in one number: the least is found without a branch, which
    // could not be predicted.
    let mut first = vec![NOBODY; CELLS];
    let mut ranks = vec![0; racers.len()];
    let stretches = (racers.len() as f64).ln().round() as u32;
    for stretch in 1..=stretches {
        let end = (f64::from(stretch) / total) as f32;
        for ((place, racer), rank) in (0..).zip(racers).zip(&mut ranks) {
            for pair in lags[*rank as usize..].windows(2) {
                let time = racer.time([pair[0], pair[1]]);
                if time > end {
                    break;
                }
                let cell = racer.cell(*rank) as usize;
                first[cell] = first[cell].min(u64::from(time.to_bits()) << 32 | place);
                *rank += 1;
            }
        }
    }
    let owners = (0..).zip(first).map(|(cell, first)| match first {
        NOBODY => winner(racers.iter(), lags, cell).unwrap_or_default(),
        // The lower half is the place.
        first => racers[first as u32 as usize].index,
    });
    owners.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn addr(host: u32) -> SocketAddr {
        let ip = std::net::Ipv4Addr::from_bits(0x0a00_0001 + host);
        SocketAddr::new(ip.into(), 8080)
    }

    fn ring(weights: &[f64]) -> Ring {
        Ring::new((0..).map(addr).zip(weights.iter().copied()))
    }

    /// How many cells each has.
    fn cells(ring: &Ring, count: usize) -> Vec<usize> {
        let mut cells = vec![0; count];
        for owner in &ring.owners {
            cells[*owner as usize] += 1;
        }
        cells
    }

    /// Whether so many cells are what this share comes to, but for chance.
    fn is_share(cells: usize, share: f64) -> bool {
        let expected = share * CELLS as f64;
        // Five standard deviations of independent cells; it is less here.
        let chance = 5.0 * (expected * (1.0 - share)).max(0.0).sqrt() + 2.0;
        (cells as f64 - expected).abs() <= chance
    }

    #[test]
    fn every_backend_visits_every_cell_once() {
        for host in 0..20 {
            let ring = Ring::new([(addr(host), 1.0)].into_iter());
            let racer = &ring.racers[0];
            let mut visited = vec![false; CELLS];
            for rank in 0..CELLS as u32 {
                let cell = racer.cell(rank);
                assert_eq!(racer.rank(cell), rank);
                assert!(!std::mem::replace(&mut visited[cell as usize], true));
            }
        }
    }

    #[test]
    fn times_are_the_order_statistics_of_exponential_ones() {
        // At the very end means are no quantiles.
        for rank in (0..CELLS * 9 / 10).step_by(1_000) {
            let exact = -(-(rank as f64) / CELLS as f64).ln_1p();
            let lag = f64::from(LAGS[rank]);
            assert!((lag - exact).abs() < 1e-3, "{rank}: {lag} for {exact}");
        }
        assert!(LAGS.windows(2).all(|pair| pair[0] < pair[1]));
    }

    /// What the race skips would not have won.
    #[test]
    fn the_least_time_wins_every_cell() {
        let ones = [1.0; 40];
        let steep: Vec<f64> = (-6..=6).map(|power| 10_f64.powi(power)).collect();
        for weights in [&[1.0][..], &[1.0, 1.0], &[5.0, 1.0, 1e-6], &ones, &steep] {
            let ring = ring(weights);
            assert_eq!(ring.owners.len(), CELLS);
            for (cell, owner) in (0..).zip(&ring.owners) {
                let least = winner(ring.racers.iter(), &LAGS, cell);
                assert_eq!(least, Some(*owner), "{weights:?}, {cell}");
            }
        }
    }

    #[test]
    fn shares_are_proportional_whatever_the_unit() {
        for weights in [
            [1.0, 10.0],
            [100.0, 1_000.0],
            [1e-6, 1e-5],
            [1e5, 1e6],
            [0.3, 3.0],
        ] {
            let cells = cells(&ring(&weights), 2);
            let ratio = cells[1] as f64 / cells[0] as f64;
            assert!((ratio - 10.0).abs() < 0.4, "{weights:?}: 1 to {ratio}");
        }
        for (count, spread) in [(10, 0.03), (100, 0.1), (1_000, 0.3)] {
            let cells = cells(&ring(&vec![100.0; count]), count);
            let fair = (CELLS / count) as f64;
            for cells in cells {
                let off = (cells as f64 / fair - 1.0).abs();
                assert!(off < spread, "{count}: {cells} for {fair}");
            }
        }
    }

    /// Over many groups: alone it is one cell or none.
    #[test]
    fn next_to_no_weight_gets_its_share_on_average() {
        let share = 0.25;
        let groups = 200;
        let weight = share / CELLS as f64;
        let got: usize = (0..groups)
            .map(|group| {
                let backends = [(addr(9), 1.0), (addr(1_000 + group), weight)];
                cells(&Ring::new(backends.into_iter()), 2)[1]
            })
            .sum();
        let mean = got as f64 / f64::from(groups);
        assert!((mean - share).abs() < 0.15, "{mean} cells");
    }

    #[test]
    fn a_weight_of_nothing_owns_nothing() {
        let some = ring(&[0.0, 1.0, f64::NAN, -1.0, 2.0, f64::INFINITY]);
        let cells = cells(&some, 6);
        assert_eq!(cells[1] + cells[4], CELLS);
        assert!(is_share(cells[1], 1.0 / 3.0), "{cells:?}");
        assert_eq!(some.owner_among(b"k", |index| index == 0), None);
        for weights in [&[][..], &[0.0, 0.0]] {
            let none = ring(weights);
            assert_eq!(none.owners(b"k").next(), None);
            assert_eq!(none.owner_among(b"k", |_| true), None);
        }
    }

    #[test]
    fn who_would_own_a_key_without_some_owns_it_without_them() {
        let weights = [3.0, 1.0, 1e-6, 2.0, 2e-6];
        let all = ring(&weights);
        for gone in [&[0][..], &[0, 1], &[0, 1, 3]] {
            let left = |index: usize| !gone.contains(&index);
            let kept = (0..weights.len()).filter(|index| left(*index));
            let of_left = kept.clone().map(|at| (addr(at as u32), weights[at]));
            let without = Ring::new(of_left);
            let kept: Vec<_> = kept.collect();
            for key in 0..500_u32 {
                let key = key.to_le_bytes();
                let owner = without.owners(&key).next().map(|index| kept[index]);
                assert_eq!(all.owner_among(&key, left), owner);
            }
        }
    }

    fn weight() -> impl Strategy<Value = f64> {
        prop_oneof![
            3 => Just(1.0),
            1 => 0.1..10.0_f64,
            1 => (-6.0..6.0_f64).prop_map(|power| 10_f64.powf(power)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Cell by cell: one that joins takes its share from the others, and nothing else moves; if it
        /// leaves again, all is as before; if its weight changes, cells move to it or from it alone.
        /// The order in which backends are told plays no part.
        #[test]
        fn keys_move_no_further_than_they_must(
            weights in prop::collection::vec(weight(), 1..30),
            joins in weight(),
            becomes in weight(),
        ) {
            let new = weights.len() as u32;
            let with = |weight: f64| {
                let mut with = weights.clone();
                with.push(weight);
                let backends = (0..).map(addr).zip(with).collect::<Vec<_>>();
                // From last to first.
                let ring = Ring::new(backends.into_iter().rev());
                ring.owners.iter().map(|owner| new - owner).collect::<Vec<_>>()
            };
            let total: f64 = weights.iter().sum();
            let before = ring(&weights).owners;
            let (after, later) = (with(joins), with(becomes));
            let mut moved = [0, 0];
            for cell in 0..CELLS {
                if after[cell] != before[cell] {
                    prop_assert_eq!(after[cell], new, "of a join");
                    moved[0] += 1;
                }
                if after[cell] != later[cell] {
                    let winner = if becomes > joins { later[cell] } else { after[cell] };
                    prop_assert_eq!(winner, new, "of a weight");
                    moved[1] += 1;
                }
            }
            let share = |weight: f64| weight / (total + weight);
            prop_assert!(is_share(moved[0], share(joins)), "{} cells", moved[0]);
            let change = (share(joins) - share(becomes)).abs();
            prop_assert!(is_share(moved[1], change), "{} cells", moved[1]);
        }

        /// Shares are what the weights come to, and no unit makes a difference.
        #[test]
        fn proportional(weights in prop::collection::vec(weight(), 1..30), unit in -3.0..3.0_f64) {
            let plain = ring(&weights);
            let total: f64 = weights.iter().sum();
            for (cells, weight) in cells(&plain, weights.len()).into_iter().zip(&weights) {
                prop_assert!(is_share(cells, weight / total), "{cells} of {weight} in {total}");
            }
            let scaled: Vec<f64> = weights.iter().map(|weight| weight * 10_f64.powf(unit)).collect();
            let scaled = ring(&scaled);
            let pairs = plain.owners.iter().zip(&scaled.owners);
            // But for rounding where two are as good as equal.
            prop_assert!(pairs.filter(|(a, b)| a != b).count() <= 20);
        }
    }
}
