//! The ring of consistent hashing: which backend a key belongs to.

use std::net::SocketAddr;
use std::sync::LazyLock;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::weight::Share;

/// How many bits of a key's hash select its cell.
const CELL_BITS: u32 = 17;
/// The number of cells of the ring, whatever the number of backends and their shares.
const CELLS: usize = 1 << CELL_BITS;
const LAST_CELL: u32 = CELLS as u32 - 1;
/// How often a backend's order of cells is mixed. With two rounds some orders are too similar.
const ROUNDS: usize = 3;

/// Consistent hashing. The hashes are divided into 131,072 cells of equal length, and each cell
/// belongs to one backend. Weighted rendezvous hashing decides which one (C. Schindelhauer and G.
/// Schomaker, "Weighted distributed hash tables", SPAA 2005): each backend arrives at each cell at a
/// time that follows from its address and the cell, divided by its share, and the earliest one wins.
///
/// So keys move as little as possible, by construction. The arrival times of a backend depend on no
/// other: one that joins takes cells, and none changes hands between two others; one that leaves
/// gives its cells away, and no others move; a share that changes moves cells to or from its backend
/// only. And the unit of shares plays no part, because only the order of the times does.
///
/// Times are distributed exponentially, so that on average a backend owns cells in proportion to its
/// share. They deviate from that by chance: a share `p` by about `0.7 * sqrt(p / 131,072)`. That is
/// 1 % of its share for one of ten equal backends, 2 % of 100, 6 % of 1,000 and 20 % of 10,000. A
/// backend whose share is much smaller than one cell owns one cell or none.
///
/// A backend visits all cells in an order of its own, a permutation as in Maglev (D. E. Eisenbud and
/// others, NSDI 2016), and the time of its k-th cell is about the mean of the k-th smallest of as
/// many exponential times as there are cells (A. Rényi, "On the theory of order statistics", 1953).
/// So cells can be visited in the order of time, and visits that cannot win are left out: there are
/// about `cells * (1 + ln backends)` instead of `cells * backends`.
///
/// Memory: 512 KiB and 48 bytes a backend. While it is built, 1 MiB more; and 512 KiB once in a
/// process.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// The owner of each cell. Empty if there are no backends.
    owners: Box<[u32]>,
    visitors: Box<[Visitor]>,
}

/// When a backend with share 1 arrives at the cells that it visits, from the first on.
static UNIT_TIMES: LazyLock<Box<[f32]>> = LazyLock::new(|| {
    let mut time = 0.0;
    // Sums in the same order everywhere, and no logarithms: all processes agree to the last bit.
    let times = (0..=CELLS).map(|rank| {
        let this = time as f32;
        time += 1.0 / (CELLS - rank).max(1) as f64;
        this
    });
    times.collect()
});

/// A backend as it visits the cells.
#[derive(Debug)]
struct Visitor {
    /// Its position in the table.
    index: u32,
    /// Where its order of cells begins.
    offset: u32,
    /// Odd, so that multiplying by them can be undone.
    factors: [u32; ROUNDS],
    inverses: [u32; ROUNDS],
    /// The inverse of its share: its times are the unit times multiplied by this.
    slowness: f64,
    /// A fixed part, 0 to 1, of the way from one cell to the next that is added to each time: so that
    /// a backend with a tiny share gets its first cell as often as it should, instead of always or
    /// never.
    phase: f64,
}

impl Visitor {
    /// `None` for a backend that gets nothing.
    fn new(index: u32, [first, second]: [u64; 2], share: Share) -> Option<Self> {
        let share = share.get();
        if !(share > 0.0 && share.is_finite()) {
            return None;
        }
        let bits = |round: usize| (first >> (round as u32 * CELL_BITS)) as u32 & LAST_CELL;
        let factors = std::array::from_fn(|round| bits(round) | 1);
        Some(Self {
            index,
            offset: second as u32 & LAST_CELL,
            factors,
            inverses: factors.map(inverse),
            slowness: share.recip(),
            phase: (second >> 32) as f64 / 2_f64.powi(32),
        })
    }

    /// The cell that it visits after `rank` others.
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
            // A shift by half of the bits or more: doing it twice undoes it.
            cell ^= cell >> CELL_BITS.div_ceil(2);
            cell = cell.wrapping_mul(*inverse) & LAST_CELL;
        }
        cell.wrapping_sub(self.offset) & LAST_CELL
    }

    /// When it arrives at a cell, given the unit times of this cell and of the next one. At least 0,
    /// so that the bits have the order of the times, and never less than at the cell before.
    fn time(&self, [this, next]: [f32; 2]) -> f32 {
        let (this, next) = (f64::from(this), f64::from(next));
        ((this + self.phase * (next - this)) * self.slowness) as f32
    }
}

/// The number that undoes multiplying by an odd number, in the bits of a cell. Each step doubles the
/// number of correct bits, which is 3 at the start.
fn inverse(factor: u32) -> u32 {
    let mut inverse = factor;
    for _ in 0..4 {
        inverse = inverse.wrapping_mul(2_u32.wrapping_sub(factor.wrapping_mul(inverse)));
    }
    inverse & LAST_CELL
}

/// The visitor that arrives first at a cell; of two that arrive at the same time, the first in order.
fn winner<'a>(
    visitors: impl Iterator<Item = &'a Visitor>,
    unit_times: &[f32],
    cell: u32,
) -> Option<u32> {
    let times = visitors.map(|visitor| {
        let rank = visitor.rank(cell) as usize;
        let time = visitor.time([unit_times[rank], unit_times[rank + 1]]);
        (time, visitor.index)
    });
    let first = times.min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(first.1)
}

impl Ring {
    /// A ring for backends at these addresses with these shares. One whose share is not above 0 owns
    /// nothing.
    pub(super) fn new(backends: impl Iterator<Item = (SocketAddr, Share)>) -> Self {
        let mut total = 0.0;
        let mut visitors = Vec::new();
        for (index, (addr, share)) in (0..).zip(backends) {
            // By address, not by id: what a backend has stored for a key is in its process.
            let name = addr.to_string();
            let hashes = [0, 1].map(|seed| xxh3_64_with_seed(name.as_bytes(), seed));
            if let Some(visitor) = Visitor::new(index, hashes, share) {
                total += share.get();
                visitors.push((hashes, visitor));
            }
        }
        // Of two that arrive at the same time the first wins: make that independent of their order.
        visitors.sort_unstable_by_key(|(hashes, _)| *hashes);
        let visitors: Box<[Visitor]> = visitors.into_iter().map(|(_, visitor)| visitor).collect();
        Self {
            owners: owners(&visitors, total),
            visitors,
        }
    }

    fn cell(key: &[u8]) -> u32 {
        (xxh3_64_with_seed(key, 0) >> (u64::BITS - CELL_BITS)) as u32
    }

    /// The owner of `key`, then those of the cells after it: other backends by chance, in proportion
    /// to their shares. Each may come repeatedly, and one with a small share never.
    pub(super) fn owners(&self, key: &[u8]) -> impl Iterator<Item = usize> {
        let start = (Self::cell(key) as usize).min(self.owners.len());
        let (before, after) = self.owners.split_at(start);
        after.iter().chain(before).map(|owner| *owner as usize)
    }

    /// The owner of `key` if there were only those backends for which `is_wanted` holds. Costs time
    /// in proportion to the number of backends.
    pub(super) fn owner_among(
        &self,
        key: &[u8],
        is_wanted: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let wanted = self.visitors.iter();
        let wanted = wanted.filter(|visitor| is_wanted(visitor.index as usize));
        winner(wanted, &UNIT_TIMES, Self::cell(key)).map(|index| index as usize)
    }
}

/// The owner of each cell. `total` is the sum of the shares.
///
/// Cells are visited roughly in the order of time: a stretch of time for one backend after the
/// other, then the next stretch. After a stretch the first arrival at a cell is final. In the time in
/// which all backends together visit each cell once on average, all cells but one in e get an owner.
/// After `ln backends` of such stretches it costs less to compute the winner of each of the few
/// remaining cells. Where the change takes place affects the cost only, not the result.
fn owners(visitors: &[Visitor], total: f64) -> Box<[u32]> {
    const NOBODY: u64 = u64::MAX;
    let unit_times = &**UNIT_TIMES;
    if visitors.is_empty() {
        return Box::default();
    }
    // Time and position among the visitors in one number: the least is found without a branch, which
    // could not be predicted.
    let mut first = vec![NOBODY; CELLS];
    let mut ranks = vec![0; visitors.len()];
    let stretches = (visitors.len() as f64).ln().round() as u32;
    for stretch in 1..=stretches {
        let end = (f64::from(stretch) / total) as f32;
        for ((position, visitor), rank) in (0..).zip(visitors).zip(&mut ranks) {
            for pair in unit_times[*rank as usize..].windows(2) {
                let time = visitor.time([pair[0], pair[1]]);
                if time > end {
                    break;
                }
                let cell = visitor.cell(*rank) as usize;
                first[cell] = first[cell].min(u64::from(time.to_bits()) << 32 | position);
                *rank += 1;
            }
        }
    }
    let owners = (0..).zip(first).map(|(cell, first)| match first {
        NOBODY => winner(visitors.iter(), unit_times, cell).unwrap_or_default(),
        // The lower half is the position.
        first => visitors[first as u32 as usize].index,
    });
    owners.collect()
}

#[cfg(test)]
mod tests;
