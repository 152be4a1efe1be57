//! What the process that succeeds another one begins with. Pure.

use std::time::{Duration, Instant};

use super::kept::Kept;
use crate::node::Node;

/// How long a weight is kept after its process has left.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// The factor by which a successor differs from the mean at most: its predecessor may have been restarted because
/// something was wrong with it.
const MOST_FACTOR: f64 = 3.0;

/// What was learned of the weights of nodes whose processes have left, by node id. A process that is started again
/// under the same id is mostly as strong as the one before, so it begins with its weight, and not with the mean of
/// all. Nothing else is taken over: it may fail for other reasons, or not at all.
#[derive(Debug)]
pub(super) struct Successors {
    by_id: Kept<String, Left>,
    /// The mean factor on the static weights of those that work.
    mean: f64,
}

#[derive(Debug)]
struct Left {
    /// What it had registered.
    static_weight: Option<f64>,
    /// The factor on that, relative to the mean of all.
    factor: f64,
}

impl Default for Successors {
    fn default() -> Self {
        Self {
            by_id: Kept::new(KEPT_FOR),
            mean: 1.0,
        }
    }
}

impl Successors {
    pub(super) fn set_mean(&mut self, mean: f64) {
        if mean > 0.0 {
            self.mean = mean;
        }
    }

    /// Keeps what was learned of a process that leaves, if anything was: the factor on its static weight.
    pub(super) fn keep(&mut self, node: &Node, factor: Option<f64>, now: Instant) {
        let Some(factor) = factor else { return };
        let left = Left {
            static_weight: node.weight,
            factor: (factor / self.mean).clamp(1.0 / MOST_FACTOR, MOST_FACTOR),
        };
        self.by_id.insert(node.id.clone(), left, now);
    }

    /// The factor that the process of a node begins with. It is kept, because this one may end before it is used.
    pub(super) fn get(&mut self, node: &Node, now: Instant) -> Option<f64> {
        let left = self.by_id.get(&*node.id, now)?;
        // Whoever says that it is stronger now is another one.
        (left.static_weight == node.weight).then_some(left.factor * self.mean)
    }

    pub(super) fn remove_expired(&mut self, now: Instant) {
        self.by_id.remove_expired(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: usize) -> Node {
        Node::new(format!("n{id}"), "10.0.0.1".parse().unwrap())
    }

    #[test]
    fn what_is_kept_is_limited_in_value_and_time() {
        let (mut successors, start) = (Successors::default(), Instant::now());
        successors.keep(&node(0), Some(0.01), start);
        assert_eq!(successors.get(&node(0), start), Some(1.0 / 3.0));
        successors.keep(&node(0), Some(100.0), start);
        successors.keep(&node(0), None, start);
        assert_eq!(successors.get(&node(0), start), Some(3.0));
        assert_eq!(
            successors.get(&node(0), start),
            Some(3.0),
            "also for the next one"
        );
        assert_eq!(successors.get(&node(0).with_weight(2.0), start), None);
        assert_eq!(successors.get(&node(1), start), None);
        assert_eq!(successors.get(&node(0), start + KEPT_FOR), None);
    }
}
