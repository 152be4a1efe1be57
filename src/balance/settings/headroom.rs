//! The policy `headroom`: its constants and its weight.

use serde::Deserialize;

use crate::balance::load::{Load, MAX_QUEUE_DEPTH};
use crate::error::{ClusterError, in_range};

/// The constants of [`Policy::Headroom`](super::Policy::Headroom): a node's weight is its static
/// weight times the capacity it has left.
///
/// `weight = base * max(floor, 1 - (cpu * c + memory * m + min(queue / queue_capacity, 1) * q))`
///
/// with CPU and memory as fractions. A metric that a node does not report counts with the mean of
/// the nodes that report it, so that silence is neither rewarded nor punished. A metric that no node
/// reports is ignored.
///
/// ```
/// use pingora_etcd::balance::{Headroom, Load};
/// let mut headroom = Headroom::default();
/// (headroom.cpu, headroom.memory, headroom.queue) = (0.5, 0.0, 0.5);
/// let mut half_busy = Load::default();
/// (half_busy.cpu, half_busy.queue) = (Some(0.5), Some(0.0));
/// assert_eq!(headroom.weight(1.0, &half_busy, &Load::default()), 0.75);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Headroom {
    /// Coefficient of CPU usage. Default: 0.5. Range: 0 to 10.
    pub cpu: f64,
    /// Coefficient of memory usage. Default: 0.2. Range: 0 to 10.
    pub memory: f64,
    /// Coefficient of the queue. Default: 0.3. Range: 0 to 10.
    pub queue: f64,
    /// The queue depth that counts as full. Default: 100. Range: above 0, to 1e9.
    pub queue_capacity: f64,
    /// The smallest part of its static weight that a node keeps, so that a node that reports to be
    /// full still gets a request now and then and can be seen to recover. Default: 0.05. Range:
    /// 0.001 to 1.
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
    /// The weight of a node with this static weight and load; `mean` is the mean load of the group.
    pub fn weight(&self, base: f64, load: &Load, mean: &Load) -> f64 {
        let part = |own: Option<f64>, mean: Option<f64>| own.or(mean).unwrap_or(0.0);
        let queue = (part(load.queue, mean.queue) / self.queue_capacity).min(1.0);
        let used = part(load.cpu, mean.cpu) * self.cpu
            + part(load.memory, mean.memory) * self.memory
            + queue * self.queue;
        base * (1.0 - used).max(self.floor)
    }

    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let capacities = f64::MIN_POSITIVE..=MAX_QUEUE_DEPTH;
        in_range(field, "cpu", self.cpu, 0.0..=10.0)?;
        in_range(field, "memory", self.memory, 0.0..=10.0)?;
        in_range(field, "queue", self.queue, 0.0..=10.0)?;
        in_range(field, "queue_capacity", self.queue_capacity, capacities)?;
        in_range(field, "floor", self.floor, 0.001..=1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::load::LoadSum;
    use crate::balance::weight::BaseWeight;
    use crate::node::Node;
    use proptest::prelude::*;
    use serde_json::json;

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
    fn coefficients_out_of_range_are_named() {
        for (name, value) in [
            ("cpu", json!(-1)),
            ("floor", json!(0)),
            ("queue_capacity", json!(0)),
        ] {
            let headroom: Headroom = serde_json::from_value(json!({ name: value })).unwrap();
            let error = headroom.validate("x").unwrap_err().to_string();
            assert!(error.contains(&format!("x.{name}")), "{error}");
        }
        let not_a_number = Headroom {
            queue_capacity: f64::NAN,
            ..Headroom::default()
        };
        assert!(not_a_number.validate("x").is_err());
        Headroom::default().validate("x").unwrap();
    }

    proptest! {
        /// Whatever a node reports, its weight is finite, at most its static weight, and above 0
        /// where that is.
        #[test]
        fn weights_are_sane(
            cpu in any::<f64>(), memory in any::<f64>(), queue in any::<f64>(), base in any::<f64>(),
        ) {
            let metadata =
                json!({"cpu_usage_percent": cpu, "memory_usage_percent": memory, "queue_depth": queue});
            let node = Node::new("n", "::1".parse().unwrap())
                .with_metadata(metadata)
                .with_weight(base);
            let mut load = Load::default();
            load.read_metadata(&node);
            let base = BaseWeight::new(node.weight).get();
            let weight = Headroom::default().weight(base, &load, &load);
            prop_assert!((weight > 0.0) == (base > 0.0));
            prop_assert!(weight >= 0.0 && weight <= base && weight.is_finite());
        }

        /// More load never results in more weight.
        #[test]
        fn monotonic(a in 0.0..1.0_f64, b in 0.0..1.0_f64) {
            let weight = |cpu| {
                let load = Load { cpu: Some(cpu), ..Load::default() };
                Headroom::default().weight(1.0, &load, &Load::default())
            };
            prop_assert!(weight(a.min(b)) >= weight(a.max(b)));
        }
    }
}
