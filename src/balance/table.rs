//! The published pick table: immutable, replaced as a whole.

use std::sync::Arc;

use super::Policy;
use super::member::{Counter, Member};
use super::ring::Ring;

/// A backend as a pick sees it.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) member: Arc<Member>,
    pub(super) counter: Counter,
    /// Relative to the mean weight, as of this table.
    pub(super) inverse_weight: f32,
    /// The chance, for its success rate, that is part of how often it is drawn.
    pub(super) gate: f32,
}

/// Backends to pick from, drained ones not among them.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) slots: Box<[Slot]>,
    pub(super) alias: AliasTable,
    /// Only for the policy that needs it.
    pub(super) ring: Ring,
    /// Backends without requests in flight whose weights differ by less than this part are chosen
    /// by chance.
    pub(super) alike: f32,
    /// How many draws give so many different backends on average as are wanted as candidates; 0: all
    /// of them are wanted.
    pub(super) draws: usize,
    /// Whether all weights are equal.
    pub(super) uniform: bool,
    pub(super) spread: Spread,
    /// What it was built of, where that seldom changes.
    shares: Box<[f64]>,
}

impl Table {
    pub(super) fn new(
        members: Vec<Arc<Member>>,
        policy: Policy,
        candidates: usize,
        alike: f32,
    ) -> Self {
        let shares: Vec<f64> = members.iter().map(|member| member.share()).collect();
        let weights = members.iter().map(|member| member.weight());
        let mean = weights.sum::<f64>() / members.len().max(1) as f64;
        let mut table = Self {
            alias: AliasTable::new(&shares),
            alike,
            draws: draws(shares.len(), candidates),
            uniform: shares.windows(2).all(|pair| pair[0] == pair[1]),
            ..Self::default()
        };
        match policy {
            Policy::Consistent => {
                let addrs = members.iter().map(|member| member.addr());
                table.ring = Ring::new(addrs.zip(shares.iter().copied()));
            }
            Policy::RoundRobin => table.spread = Spread::new(&shares),
            _ => {}
        }
        if policy.is_static() {
            table.shares = shares.into();
        }
        table.slots = members
            .into_iter()
            .map(|member| Slot {
                counter: member.counter(),
                inverse_weight: (mean / member.weight()) as f32,
                gate: member.gate(),
                member,
            })
            .collect();
        table
    }

    /// Whether a table of these would be the same, under a policy whose shares seldom change.
    pub(super) fn is_of<'a>(&self, members: impl Iterator<Item = &'a Arc<Member>>) -> bool {
        let built = self.slots.iter().zip(&self.shares);
        built
            .map(|(slot, share)| (Arc::as_ptr(&slot.member), *share))
            .eq(members.map(|member| (Arc::as_ptr(member), member.share())))
    }
}

/// How many draws out of `count` it takes for `wanted` different ones, on average.
fn draws(count: usize, wanted: usize) -> usize {
    if count <= wanted {
        return 0;
    }
    let missed = 1.0 - 1.0 / count as f64;
    let different = |draws: i32| count as f64 * (1.0 - missed.powi(draws));
    let enough = (1..64).find(|draws| different(*draws) >= wanted as f64 - 0.5);
    enough.unwrap_or(64) as usize
}

/// Draws an index with a probability proportional to its weight in constant time: M. D. Vose, "A
/// linear algorithm for generating random numbers with a given distribution", IEEE Transactions
/// on Software Engineering 17(9), 1991. Eight bytes an index.
#[derive(Debug, Clone, Default)]
pub(super) struct AliasTable {
    columns: Box<[Column]>,
}

#[derive(Debug, Clone, Copy)]
struct Column {
    /// Of 2^32: how often the column's own index is meant, and not the other one. A column that is
    /// all its own has itself as the other one.
    own: u32,
    other: u32,
}

impl AliasTable {
    /// A table over these weights. What is not above 0 is never drawn, unless nothing is: then
    /// all are drawn alike.
    pub(super) fn new(weights: &[f64]) -> Self {
        let usable = |weight: f64| {
            if weight > 0.0 && weight.is_finite() {
                weight
            } else {
                0.0
            }
        };
        let total: f64 = weights.iter().copied().map(usable).sum();
        let count = weights.len() as f64;
        let scaled = |weight: f64| {
            if total > 0.0 && total.is_finite() {
                usable(weight) / total * count
            } else {
                1.0
            }
        };
        let mut scaled: Vec<f64> = weights.iter().copied().map(scaled).collect();
        let mut columns: Vec<Column> = (0..weights.len() as u32)
            .map(|index| Column {
                own: u32::MAX,
                other: index,
            })
            .collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) =
            (0..scaled.len()).partition(|index| scaled[*index] < 1.0);
        while let (Some(less), Some(more)) = (small.pop(), large.last().copied()) {
            columns[less] = Column {
                own: (scaled[less] * 2_f64.powi(32)) as u32,
                other: more as u32,
            };
            scaled[more] -= 1.0 - scaled[less];
            if scaled[more] < 1.0 {
                large.pop();
                small.push(more);
            }
        }
        // What is left over in either list is 1 but for rounding, which `own` says already.
        Self {
            columns: columns.into(),
        }
    }

    /// The index that 64 random bits stand for. The table must not be empty.
    pub(super) fn draw(&self, random: u64) -> usize {
        self.draw_with_rest(random).0
    }

    /// The same with what it leaves of the bits, 0 to 1: not to be asked for more than chance
    /// enough to break a tie, for with 2^16 backends there are 16 bits of it.
    pub(super) fn draw_with_rest(&self, random: u64) -> (usize, f32) {
        let scaled = (random >> 32) * self.columns.len() as u64;
        let index = (scaled >> 32) as u32;
        let rest = (scaled as u32 >> 8) as f32 * (1.0 / (1_u32 << 24) as f32);
        let column = self.columns[index as usize];
        // No branch: nobody could predict it.
        let own = 0_u32.wrapping_sub(u32::from((random as u32) < column.own));
        let drawn = column.other ^ ((index ^ column.other) & own);
        (drawn as usize, rest)
    }
}

/// A circle of 2^64 points, of which each index has a part as long as its weight: for turns that
/// are spread evenly instead of drawn at random. Eight bytes an index, whatever the weights.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spread {
    /// Where each part ends.
    bounds: Box<[u64]>,
}

impl Spread {
    /// A circle with parts of these lengths, all of which have to be above 0.
    pub(crate) fn new(weights: &[f64]) -> Self {
        let total: f64 = weights.iter().sum();
        let mut end = 0.0;
        let bounds = weights.iter().map(|weight| {
            end += weight;
            (end / total * 2_f64.powi(64)) as u64
        });
        Self {
            bounds: bounds.collect(),
        }
    }

    /// Whose part a point is in. There must be at least one index.
    pub(crate) fn at(&self, point: u64) -> usize {
        let index = self.bounds.partition_point(|bound| *bound <= point);
        index.min(self.bounds.len() - 1)
    }

    /// Whose turn it is. Multiples of 2^64 divided by the golden ratio are spread over the circle
    /// as evenly as a sequence can be at every length, so each index's turns are too (V. T. Sós,
    /// "On the distribution mod 1 of the sequence nα", 1958).
    pub(crate) fn turn(&self, turn: u64) -> usize {
        self.at(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shares(weights: &[f64], draws: u64) -> Vec<f64> {
        let table = AliasTable::new(weights);
        let mut rng = fastrand::Rng::with_seed(7);
        let mut counts = vec![0_u64; weights.len()];
        for _ in 0..draws {
            counts[table.draw(rng.u64(..))] += 1;
        }
        counts
            .iter()
            .map(|count| *count as f64 / draws as f64)
            .collect()
    }

    #[test]
    fn draws_are_proportional() {
        let shares = shares(&[1.0, 2.0, 5.0], 400_000);
        for (share, expected) in shares.iter().zip([0.125, 0.25, 0.625]) {
            assert!((share - expected).abs() < 0.005, "{shares:?}");
        }
    }

    #[test]
    fn nothing_usable_means_all_alike_and_zero_means_never() {
        for share in shares(&[0.0, 0.0, f64::NAN], 90_000) {
            assert!((share - 1.0 / 3.0).abs() < 0.01);
        }
        assert_eq!(shares(&[0.0, 1.0], 100_000)[0], 0.0);
    }

    #[test]
    fn a_few_draws_more_make_up_for_repetition() {
        assert_eq!(draws(5, 5), 0);
        assert_eq!(draws(6, 5), 8);
        assert_eq!(draws(10, 5), 6);
        assert_eq!(draws(1_000, 5), 5);
        assert_eq!(draws(1_000, 1), 1);
    }

    proptest! {
        /// The chance of each index, added up over the columns, is its share of the weights.
        #[test]
        fn exact(weights in prop::collection::vec(0.0..1e6_f64, 1..60)) {
            let table = AliasTable::new(&weights);
            let total: f64 = weights.iter().sum();
            prop_assume!(total > 0.0);
            let mut chance = vec![0.0; weights.len()];
            for (index, column) in table.columns.iter().enumerate() {
                let own = if column.own == u32::MAX { 1.0 } else { f64::from(column.own) / 2_f64.powi(32) };
                chance[index] += own / weights.len() as f64;
                chance[column.other as usize] += (1.0 - own) / weights.len() as f64;
            }
            for (chance, weight) in chance.iter().zip(&weights) {
                prop_assert!((chance - weight / total).abs() < 1e-6);
            }
        }
    }
}
