//! Counts the samples of metrics that were not published, by the limit that they exceeded.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::validate::{Bound, Excess};

/// How many samples of a collector were not published because the node's entry would have exceeded
/// a limit of its readers, by the first limit that was exceeded. The last good sample stays in the
/// entry each time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedSamples {
    /// The entry would have had more than 65,536 bytes.
    pub too_long: u64,
    /// It would have had more than 32 levels.
    pub too_deep: u64,
    /// It would have had more than 1,024 values.
    pub too_many_values: u64,
}

impl RefusedSamples {
    /// The sum of all counts.
    pub fn total(&self) -> u64 {
        self.too_long + self.too_deep + self.too_many_values
    }
}

/// The counters behind [`RefusedSamples`].
#[derive(Debug, Default)]
pub(super) struct Refusals {
    bytes: AtomicU64,
    depth: AtomicU64,
    values: AtomicU64,
}

impl Refusals {
    /// Counts a refused sample. Returns whether it is the first one that exceeded this limit.
    pub(super) fn count(&self, excess: &Excess) -> bool {
        let count = match excess.bound {
            Bound::Bytes => &self.bytes,
            Bound::Depth => &self.depth,
            Bound::Values => &self.values,
        };
        count.fetch_add(1, Ordering::Relaxed) == 0
    }

    pub(super) fn counts(&self) -> RefusedSamples {
        RefusedSamples {
            too_long: self.bytes.load(Ordering::Relaxed),
            too_deep: self.depth.load(Ordering::Relaxed),
            too_many_values: self.values.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::NodeMetadata;
    use crate::validate::Bounds;

    #[test]
    fn each_limit_is_first_exceeded_once_and_counted_each_time() {
        let refusals = Refusals::default();
        let deep = (0..130).fold(NodeMetadata::Null, |inner, _| {
            NodeMetadata::Array(vec![inner])
        });
        let long = NodeMetadata::from("x".repeat(70_000));
        for (value, is_first) in [(&deep, true), (&long, true), (&deep, false), (&long, false)] {
            let excess = Bounds::default().check_value(value).unwrap_err();
            assert_eq!(refusals.count(&excess), is_first, "{excess}");
        }
        let counts = refusals.counts();
        assert_eq!((counts.too_deep, counts.too_long), (2, 2));
        assert_eq!(counts.total(), 4);
    }
}
