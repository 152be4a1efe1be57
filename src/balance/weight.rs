//! From what a node reports to a weight. Pure.

use serde::Deserialize;

use crate::error::ClusterError;
use crate::load_report::{self, LoadReport};
use crate::metadata::Found;
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::validate;

/// A queue deeper than this is no queue but a wrong number.
const MAX_QUEUE_DEPTH: f64 = 1e9;

/// A node's static weight: 0 for one that is to get nothing, 1 where it has none or a senseless one.
pub(super) fn base_weight(node: &Node) -> f64 {
    validate::weight(node.weight)
}

/// The metrics that count for routing, each checked on its own: `None` where the latest report does
/// not have it, or it never had a value that can be believed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// CPU in use, 0 to 1.
    pub cpu: Option<f64>,
    /// Memory in use, 0 to 1.
    pub memory: Option<f64>,
    /// Requests waiting, 0 or more.
    pub queue: Option<f64>,
}

impl Load {
    fn values(&self) -> [Option<f64>; 3] {
        [self.cpu, self.memory, self.queue]
    }

    pub(super) fn of(report: &LoadReport) -> Self {
        Self {
            cpu: report.cpu,
            memory: report.memory,
            queue: report.queue,
        }
    }

    /// Takes over from the node's metadata what can be believed. CPU or memory above all of it is
    /// all of it. A field that is there, but is no number or out of range otherwise, is refused
    /// alone: the last good one stays. Answers how many were refused.
    pub(super) fn observe(&mut self, node: &Node) -> u32 {
        use metadata_keys::{CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH};
        let mut refused = 0;
        let [cpu, memory, queue] =
            (node.metadata).find([CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH]);
        let fraction = |percent: f64| load_report::fraction(percent / 100.0);
        let queue_depth =
            |depth: f64| Some(depth).filter(|_| (0.0..=MAX_QUEUE_DEPTH).contains(&depth));
        let mut take = |field: &mut Option<f64>, found, read: &dyn Fn(f64) -> Option<f64>| {
            let value = match found {
                Found::Absent => {
                    *field = None;
                    return;
                }
                Found::Number(value) => read(value),
                Found::Other => None,
            };
            match value {
                Some(_) => *field = value,
                None => refused += 1,
            }
        };
        take(&mut self.cpu, cpu, &fraction);
        take(&mut self.memory, memory, &fraction);
        take(&mut self.queue, queue, &queue_depth);
        refused
    }
}

/// The stateless policy: a node's weight is its static weight times what it has left.
///
/// `weight = base * max(floor, 1 - (cpu * c + memory * m + min(queue / queue_capacity, 1) * q))`
///
/// with CPU and memory as fractions. A metric that a node does not report counts with the mean of
/// those that do, so that silence is neither rewarded nor punished; where nobody reports it, it
/// counts for nothing.
///
/// ```
/// use pingora_etcd::balance::{Headroom, Load};
/// let headroom = Headroom { cpu: 0.5, memory: 0.0, queue: 0.5, ..Headroom::default() };
/// let half_busy = Load { cpu: Some(0.5), memory: None, queue: Some(0.0) };
/// assert_eq!(headroom.weight(1.0, &half_busy, &Load::default()), 0.75);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Headroom {
    /// Share of CPU usage. Default: 0.5. Range: 0 to 10.
    pub cpu: f64,
    /// Share of memory usage. Default: 0.2. Range: 0 to 10.
    pub memory: f64,
    /// Share of the queue. Default: 0.3. Range: 0 to 10.
    pub queue: f64,
    /// The queue depth that counts as full. Default: 100. Range: above 0.
    pub queue_capacity: f64,
    /// The least that is left of a node's static weight, so that one that says it is full still
    /// gets a request now and then and can be seen to recover. Default: 0.05. Range: 0.001 to 1.
    pub floor: f64,
}

impl Default for Headroom {
    fn default() -> Self {
        Self {
            cpu: 0.5,
            memory: 0.2,
            queue: 0.3,
            queue_capacity: 100.0,
            floor: 0.05,
        }
    }
}

impl Headroom {
    /// The weight of a node with this static weight and load, `mean` being the mean of the group.
    pub fn weight(&self, base: f64, load: &Load, mean: &Load) -> f64 {
        let part = |own: Option<f64>, mean: Option<f64>| own.or(mean).unwrap_or(0.0);
        let queue = (part(load.queue, mean.queue) / self.queue_capacity).min(1.0);
        let used = part(load.cpu, mean.cpu) * self.cpu
            + part(load.memory, mean.memory) * self.memory
            + queue * self.queue;
        base * (1.0 - used).max(self.floor)
    }

    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        for (name, value, range) in [
            ("cpu", self.cpu, 0.0..=10.0),
            ("memory", self.memory, 0.0..=10.0),
            ("queue", self.queue, 0.0..=10.0),
            (
                "queue_capacity",
                self.queue_capacity,
                f64::MIN_POSITIVE..=MAX_QUEUE_DEPTH,
            ),
            ("floor", self.floor, 0.001..=1.0),
        ] {
            if !range.contains(&value) {
                return Err(ClusterError::config(
                    format!("{field}.{name}"),
                    format!(
                        "{value} is out of range, {} to {}",
                        range.start(),
                        range.end()
                    ),
                ));
            }
        }
        Ok(())
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

    /// Takes back what was added.
    pub(super) fn remove(&mut self, load: &Load) {
        for (sum, value) in self.0.iter_mut().zip(load.values()) {
            if let Some(value) = value {
                sum.0 -= value;
                // Not below none, also where a panic has interrupted this before.
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
    use proptest::prelude::*;
    use serde_json::json;

    fn node(metadata: serde_json::Value) -> Node {
        Node::new("n", "::1".parse().unwrap()).with_metadata(metadata)
    }

    #[test]
    fn absurd_fields_are_refused_alone_and_the_last_good_one_stays() {
        let mut load = Load::default();
        let good = json!({"cpu_usage_percent": 40, "memory_usage_percent": 50.5, "queue_depth": 3});
        assert_eq!(load.observe(&node(good)), 0);
        for bad in [json!(-1), json!("40"), json!(-1e300), json!([])] {
            let report = json!({"cpu_usage_percent": bad, "queue_depth": 7});
            assert_eq!(load.observe(&node(report)), 1);
            assert_eq!(load.cpu, Some(0.4));
            assert_eq!(load.queue, Some(7.0));
        }
        assert_eq!(load.observe(&node(json!({"queue_depth": 1e12}))), 1);
        assert_eq!(load.queue, Some(7.0));
        // What is not reported any more is not known any more.
        assert_eq!(load.memory, None);
        for nothing in [json!(null), json!("text"), json!({"queue_depth": null})] {
            assert_eq!(load.observe(&node(nothing)), 0);
            assert_eq!(load, Load::default());
        }
    }

    #[test]
    fn more_than_all_is_all() {
        for percent in [100.0, 100.1, 130.0, 1e300] {
            let mut load = Load::default();
            load.observe(&node(
                json!({"cpu_usage_percent": 20, "memory_usage_percent": 20}),
            ));
            let full = json!({"cpu_usage_percent": percent, "memory_usage_percent": percent});
            assert_eq!(load.observe(&node(full)), 0, "{percent}");
            assert_eq!((load.cpu, load.memory), (Some(1.0), Some(1.0)), "{percent}");
        }
    }

    #[test]
    fn silence_counts_as_the_mean() {
        let headroom = Headroom::default();
        let loads = [0.2, 0.6].map(|cpu| Load {
            cpu: Some(cpu),
            ..Load::default()
        });
        let mut sum = LoadSum::default();
        loads.iter().for_each(|load| sum.add(load));
        let mean = sum.mean();
        assert_eq!(mean.cpu, Some(0.4));
        assert_eq!(mean.memory, None);
        let silent = headroom.weight(1.0, &Load::default(), &mean);
        let average = headroom.weight(1.0, &mean, &mean);
        assert_eq!(silent, average);
    }

    #[test]
    fn out_of_range_coefficients_are_named() {
        for (headroom, name) in [
            (
                Headroom {
                    cpu: -1.0,
                    ..Headroom::default()
                },
                "x.cpu",
            ),
            (
                Headroom {
                    floor: 0.0,
                    ..Headroom::default()
                },
                "x.floor",
            ),
            (
                Headroom {
                    queue_capacity: f64::NAN,
                    ..Headroom::default()
                },
                "x.queue_capacity",
            ),
        ] {
            let error = headroom.validate("x").unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        Headroom::default().validate("x").unwrap();
    }

    proptest! {
        /// Whatever anybody reports, a weight is finite, at most the static one, and above 0 where
        /// that is.
        #[test]
        fn weights_are_sane(
            cpu in any::<f64>(), memory in any::<f64>(), queue in any::<f64>(), base in any::<f64>(),
        ) {
            let node = node(json!({"cpu_usage_percent": cpu, "memory_usage_percent": memory, "queue_depth": queue}))
                .with_weight(base);
            let mut load = Load::default();
            load.observe(&node);
            let base = base_weight(&node);
            let weight = Headroom::default().weight(base, &load, &load);
            prop_assert!((weight > 0.0) == (base > 0.0));
            prop_assert!(weight >= 0.0 && weight <= base && weight.is_finite());
        }

        /// More load never means more weight.
        #[test]
        fn monotonic(a in 0.0..1.0_f64, b in 0.0..1.0_f64) {
            let weight = |cpu| Headroom::default().weight(1.0, &Load { cpu: Some(cpu), ..Load::default() }, &Load::default());
            prop_assert!(weight(a.min(b)) >= weight(a.max(b)));
        }
    }
}
