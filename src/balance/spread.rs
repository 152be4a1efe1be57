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

    /// Where the part of an index begins, and where it ends.
    fn part(&self, index: usize) -> (u64, u64) {
        let begin = index.checked_sub(1).map_or(0, |before| self.bounds[before]);
        (begin, self.bounds[index])
    }

    /// Who is next when the one whose turn it is does not want it. Its part of the circle is stretched over the parts of
    /// all others, so that each of them gets of these turns what it gets of all, and as evenly. It is the same one again
    /// only where it has the whole circle. There must be at least two indexes.
    pub(crate) fn passed_on(&self, turn: u64) -> usize {
        self.next_to(turn.wrapping_mul(GOLDEN))
    }

    fn next_to(&self, point: u64) -> usize {
        let (begin, end) = self.part(self.index_at(point));
        let length = end.saturating_sub(begin).max(1);
        let (others, offset) = (
            u64::MAX - length,
            point.saturating_sub(begin).min(length - 1),
        );
        let offset = u128::from(offset) * u128::from(others) / u128::from(length);
        let offset = u64::try_from(offset).unwrap_or(u64::MAX);
        self.index_at(if offset < begin {
            offset
        } else {
            offset.saturating_add(length)
        })
    }

    /// The index whose turn it is. Multiples of 2^64 divided by the golden ratio are spread over the
    /// circle as evenly as a sequence can be at every length, and so are the turns of each index
    /// (V. T. Sós, "On the distribution mod 1 of the sequence nα", 1958). There must be at least one
    /// index.
    pub(crate) fn turn(&self, turn: u64) -> usize {
        self.index_at(turn.wrapping_mul(GOLDEN))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spread(shares: &[f64]) -> Spread {
        let shares: Vec<_> = shares.iter().copied().map(Share::new).collect();
        Spread::new(&shares)
    }

    proptest! {
        #[test]
        fn a_turn_is_passed_on_to_another_one(
            shares in prop::collection::vec(1e-6_f64..1e6, 2..40),
            point: u64,
        ) {
            let spread = spread(&shares);
            for point in [point, 0, u64::MAX, spread.bounds[0], spread.bounds[0] - 1] {
                let (own, next) = (spread.index_at(point), spread.next_to(point));
                prop_assert!(next < shares.len());
                prop_assert!(next != own, "{own} at {point} of {shares:?}");
            }
        }
    }

    #[test]
    fn each_other_one_gets_of_the_turns_that_are_passed_on_what_it_gets_of_all() {
        let shares = [4.0, 1.0, 2.0, 3.0];
        let spread = spread(&shares);
        for passing in 0..shares.len() {
            let mut got = [0.0; 4];
            for turn in (0..40_000).filter(|turn| spread.turn(*turn) == passing) {
                got[spread.passed_on(turn)] += 1.0;
            }
            let passed_on: f64 = got.iter().sum();
            assert_eq!(got[passing], 0.0);
            for (other, share) in shares.iter().enumerate().filter(|it| it.0 != passing) {
                let expected = passed_on * share / (10.0 - shares[passing]);
                assert!((got[other] - expected).abs() < 5.0, "{passing}: {got:?}");
            }
        }
    }

    #[test]
    fn parts_without_a_length_and_a_whole_circle_break_nothing() {
        let tiny = spread(&[1e-300, 1.0, 1e-300]);
        for point in [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
            assert!(tiny.next_to(point) < 3);
        }
    }
}
