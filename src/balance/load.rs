//! The load that a node reports, and its mean over a group.

use crate::load_report::{self, LoadReport};
use crate::metadata::{Found, metadata_keys};
use crate::node::Node;

/// A queue depth above this is taken for a wrong number.
pub(super) const MAX_QUEUE_DEPTH: f64 = 1e9;

/// The metrics that count for routing, each checked by itself: `None` where the latest report does
/// not contain the metric, or no valid value of it was ever reported.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Load {
    /// CPU in use, 0 to 1.
    pub cpu: Option<f64>,
    /// Memory in use, 0 to 1.
    pub memory: Option<f64>,
    /// Requests waiting, 0 or more.
    pub queue: Option<f64>,
}

impl From<&LoadReport> for Load {
    fn from(report: &LoadReport) -> Self {
        Self {
            cpu: report.utilization(),
            memory: report.memory,
            queue: report.queue,
        }
    }
}

impl Load {
    pub(super) const UNKNOWN: Self = Self {
        cpu: None,
        memory: None,
        queue: None,
    };

    fn values(&self) -> [Option<f64>; 3] {
        [self.cpu, self.memory, self.queue]
    }

    /// This load, with the values of `other` where this one has none.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.or(other.cpu),
            memory: self.memory.or(other.memory),
            queue: self.queue.or(other.queue),
        }
    }

    /// Takes over the valid metrics of the node's metadata. CPU or memory above 100 % counts as
    /// 100 %. A field that is not a number or out of range is refused by itself, and its last valid
    /// value is kept. Returns how many fields were refused.
    pub(super) fn read_metadata(&mut self, node: &Node) -> u32 {
        use metadata_keys::{CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH};
        let mut refused = 0;
        let [cpu, memory, queue] =
            (node.metadata).find([CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH]);
        let fraction = |percent: f64| load_report::fraction(percent / 100.0);
        let queue_depth =
            |depth: f64| Some(depth).filter(|_| (0.0..=MAX_QUEUE_DEPTH).contains(&depth));
        let mut read = |field: &mut Option<f64>, found, parse: &dyn Fn(f64) -> Option<f64>| {
            let value = match found {
                Found::Absent => {
                    *field = None;
                    return;
                }
                Found::Number(value) => parse(value),
                Found::Other => None,
            };
            match value {
                Some(_) => *field = value,
                None => refused += 1,
            }
        };
        read(&mut self.cpu, cpu, &fraction);
        read(&mut self.memory, memory, &fraction);
        read(&mut self.queue, queue, &queue_depth);
        refused
    }
}

/// The sum of each metric over the nodes that report it.
#[derive(Debug, Default)]
pub(super) struct LoadSum([(f64, u32); 3]);

impl LoadSum {
    pub(super) fn add(&mut self, load: &Load) {
        for (sum, value) in self.0.iter_mut().zip(load.values()) {
            if let Some(value) = value {
                sum.0 += value;
                sum.1 += 1;
            }
        }
    }

    /// Removes a load that was added.
    pub(super) fn remove(&mut self, load: &Load) {
        for (sum, value) in self.0.iter_mut().zip(load.values()) {
            if let Some(value) = value {
                sum.0 -= value;
                // A panic may have interrupted an earlier call: never below zero.
                sum.1 = sum.1.saturating_sub(1);
            }
        }
    }

    pub(super) fn mean(&self) -> Load {
        let mean = |(sum, count)| (count > 0).then(|| sum / f64::from(count));
        let [cpu, memory, queue] = self.0.map(mean);
        Load { cpu, memory, queue }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(metadata: serde_json::Value) -> Node {
        Node::new("n", "::1".parse().unwrap()).with_metadata(metadata)
    }

    #[test]
    fn invalid_fields_are_refused_one_by_one_and_keep_their_last_value() {
        let mut load = Load::default();
        let good = json!({"cpu_usage_percent": 40, "memory_usage_percent": 50.5, "queue_depth": 3});
        assert_eq!(load.read_metadata(&node(good)), 0);
        for bad in [json!(-1), json!("40"), json!(-1e300), json!([])] {
            let report = json!({"cpu_usage_percent": bad, "queue_depth": 7});
            assert_eq!(load.read_metadata(&node(report)), 1);
            assert_eq!(load.cpu, Some(0.4));
            assert_eq!(load.queue, Some(7.0));
        }
        assert_eq!(load.read_metadata(&node(json!({"queue_depth": 1e12}))), 1);
        assert_eq!(load.queue, Some(7.0));
        // A metric that is no longer reported is no longer known.
        assert_eq!(load.memory, None);
        for nothing in [json!(null), json!("text"), json!({"queue_depth": null})] {
            assert_eq!(load.read_metadata(&node(nothing)), 0);
            assert_eq!(load, Load::default());
        }
    }

    #[test]
    fn more_than_100_percent_counts_as_100_percent() {
        for percent in [100.0, 100.1, 130.0, 1e300] {
            let mut load = Load::default();
            load.read_metadata(&node(
                json!({"cpu_usage_percent": 20, "memory_usage_percent": 20}),
            ));
            let full = json!({"cpu_usage_percent": percent, "memory_usage_percent": percent});
            assert_eq!(load.read_metadata(&node(full)), 0, "{percent}");
            assert_eq!((load.cpu, load.memory), (Some(1.0), Some(1.0)), "{percent}");
        }
    }
}
