//! Turns by share that are spread evenly instead of drawn at random.

use super::weight::Share;

/// 2^64 divided by the golden ratio.
pub(super) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A circle of 2^64 points that is divided among the indexes in proportion to their shares. Eight
/// bytes an index, whatever the shares.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spread {
    /// Where the part of each index ends.
    bounds: Box<[u64]>,
}

impl Spread {
    /// A circle divided in proportion to these shares, all of which must be above 0.
    pub(crate) fn new(shares: &[Share]) -> Self {
        let total: f64 = shares.iter().map(|share| share.get()).sum();
        let mut end = 0.0;
        let bounds = shares.iter().map(|share| {
            end += share.get();
            (end / total * 2_f64.powi(64)) as u64
        });
        Self {
            bounds: bounds.collect(),
        }
    }

    /// The index whose part contains a point. There must be at least one index.
    fn index_at(&self, point: u64) -> usize {
        let index = self.bounds.partition_point(|bound| *bound <= point);
        index.min(self.bounds.len() - 1)
    }

    /// The index whose turn it is. Multiples of 2^64 divided by the golden ratio are spread over the
    /// circle as evenly as a sequence can be at every length, and so are the turns of each index
    /// (V. T. Sós, "On the distribution mod 1 of the sequence nα", 1958). There must be at least one
    /// index.
    pub(crate) fn turn(&self, turn: u64) -> usize {
        self.index_at(turn.wrapping_mul(GOLDEN))
    }
}
