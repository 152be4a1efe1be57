//! Draws by share in constant time.

use super::weight::Share;

/// Draws an index with a probability proportional to its share in constant time: M. D. Vose, "A
/// linear algorithm for generating random numbers with a given distribution", IEEE Transactions
/// on Software Engineering 17(9), 1991. Eight bytes an index.
#[derive(Debug, Clone, Default)]
pub(super) struct AliasTable {
    columns: Box<[Column]>,
}

#[derive(Debug, Clone, Copy)]
struct Column {
    /// The probability, times 2^32, that the column stands for its own index and not for the other
    /// one. A column that stands only for its own index has itself as the other one.
    own: u32,
    other: u32,
}

impl AliasTable {
    /// A table of these shares. An index whose share is not above 0 is never drawn, unless there is
    /// no other: then all have the same probability.
    pub(super) fn new(shares: &[Share]) -> Self {
        let usable = |share: &Share| {
            let share = share.get();
            if share > 0.0 && share.is_finite() {
                share
            } else {
                0.0
            }
        };
        let total: f64 = shares.iter().map(usable).sum();
        let count = shares.len() as f64;
        let scale = |share: &Share| {
            if total > 0.0 && total.is_finite() {
                usable(share) / total * count
            } else {
                1.0
            }
        };
        let mut scaled: Vec<f64> = shares.iter().map(scale).collect();
        let mut columns: Vec<Column> = (0..shares.len() as u32)
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
        // What remains in either list is 1 apart from rounding, which is what `own` says already.
        Self {
            columns: columns.into(),
        }
    }

    /// The index that 64 random bits stand for. The table must not be empty.
    pub(super) fn draw(&self, random: u64) -> usize {
        self.draw_with_rest(random).0
    }

    /// The same, and a number from 0 to 1 made of the unused bits. It is good enough to break a tie,
    /// but not for more: with 2^16 backends it has only 16 random bits.
    pub(super) fn draw_with_rest(&self, random: u64) -> (usize, f32) {
        let scaled = (random >> 32) * self.columns.len() as u64;
        let index = (scaled >> 32) as u32;
        let rest = (scaled as u32 >> 8) as f32 * (1.0 / (1_u32 << 24) as f32);
        let column = self.columns[index as usize];
        // Without a branch, which could not be predicted.
        let own = 0_u32.wrapping_sub(u32::from((random as u32) < column.own));
        let drawn = column.other ^ ((index ^ column.other) & own);
        (drawn as usize, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(weights: &[f64]) -> AliasTable {
        let shares: Vec<_> = weights.iter().copied().map(Share::new).collect();
        AliasTable::new(&shares)
    }

    fn frequencies(weights: &[f64], draws: u64) -> Vec<f64> {
        let table = table(weights);
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
        let frequencies = frequencies(&[1.0, 2.0, 5.0], 400_000);
        for (frequency, expected) in frequencies.iter().zip([0.125, 0.25, 0.625]) {
            assert!((frequency - expected).abs() < 0.005, "{frequencies:?}");
        }
    }

    #[test]
    fn without_usable_shares_all_are_alike_and_zero_is_never_drawn() {
        for frequency in frequencies(&[0.0, 0.0, f64::NAN], 90_000) {
            assert!((frequency - 1.0 / 3.0).abs() < 0.01);
        }
        assert_eq!(frequencies(&[0.0, 1.0], 100_000)[0], 0.0);
    }

    proptest! {
        /// The probability of each index, added up over the columns, is its share.
        #[test]
        fn exact(weights in prop::collection::vec(0.0..1e6_f64, 1..60)) {
            let table = table(&weights);
            let total: f64 = weights.iter().sum();
            prop_assume!(total > 0.0);
            let count = weights.len() as f64;
            let mut probability = vec![0.0; weights.len()];
            for (index, column) in table.columns.iter().enumerate() {
                let own = if column.own == u32::MAX {
                    1.0
                } else {
                    f64::from(column.own) / 2_f64.powi(32)
                };
                probability[index] += own / count;
                probability[column.other as usize] += (1.0 - own) / count;
            }
            for (probability, weight) in probability.iter().zip(&weights) {
                prop_assert!((probability - weight / total).abs() < 1e-6);
            }
        }
    }
}
