//! Decides which changes of metrics are worth a write.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::ClusterError;
use crate::metadata::{NodeMetadata, metadata_keys};

/// How far a metric may be from the value that was last written without being written again: by
/// `absolute`, or by the fraction `relative` of the written value, whichever is more.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Tolerance {
    /// In the metric's own unit, 0 or more.
    pub absolute: f64,
    /// As a fraction of the value that was last written, 0 to 1: 0.1 is a tenth.
    pub relative: f64,
}

impl Tolerance {
    /// Every change is written.
    pub const NONE: Self = Self {
        absolute: 0.0,
        relative: 0.0,
    };

    /// By this much in the metric's own unit.
    pub const fn absolute(by: f64) -> Self {
        Self {
            absolute: by,
            relative: 0.0,
        }
    }

    /// By this much in the metric's own unit, or by this fraction of the value that was last written,
    /// whichever is more.
    pub const fn either(absolute: f64, relative: f64) -> Self {
        Self { absolute, relative }
    }

    fn is_exceeded(self, written: f64, now: f64) -> bool {
        let allowed = self.absolute.max(self.relative * written.abs());
        (now - written).abs() > allowed
    }

    fn is_valid(self) -> bool {
        self.absolute.is_finite() && self.absolute >= 0.0 && (0.0..=1.0).contains(&self.relative)
    }
}

/// Which changes of metrics are worth a write: those that leave the band around what was last
/// written. A load that hovers then costs no writes; one that moves is written at once.
///
/// The defaults for the standard keys are: 2 points for CPU and memory in percent; 1 or 10 % for
/// queue depth, connections and requests per second; 0.1 or 10 % for the load average; 10 % for the
/// available memory in bytes. For any other number: 10 %. A value that is not a number is written
/// when it changes at all, and so is a key that is added or removed.
///
/// ```
/// use pingora_etcd::metrics::{Deadband, Tolerance};
/// let deadband = Deadband::default().with("temperature", Tolerance::absolute(0.5));
/// let written = serde_json::json!({ "cpu_usage_percent": 40.0, "temperature": 20.0 });
/// let moved = |cpu: f64, temperature: f64| {
///     let now = serde_json::json!({ "cpu_usage_percent": cpu, "temperature": temperature });
///     deadband.is_left(&written, &now)
/// };
/// assert!(!moved(42.0, 20.4));
/// assert!(moved(42.1, 20.0));
/// assert!(moved(40.0, 20.6));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Deadband {
    metrics: BTreeMap<String, Tolerance>,
    others: Tolerance,
}

impl Default for Deadband {
    fn default() -> Self {
        let points = Tolerance::absolute(2.0);
        let count = Tolerance::either(1.0, 0.1);
        let tenth = Tolerance::either(0.0, 0.1);
        Self {
            metrics: [
                (metadata_keys::CPU_USAGE_PERCENT, points),
                (metadata_keys::MEMORY_USAGE_PERCENT, points),
                (metadata_keys::QUEUE_DEPTH, count),
                (metadata_keys::ACTIVE_CONNECTIONS, count),
                (metadata_keys::REQUESTS_PER_SECOND, count),
                (metadata_keys::LOAD_AVG_1M, Tolerance::either(0.1, 0.1)),
            ]
            .map(|(key, tolerance)| (key.to_owned(), tolerance))
            .into(),
            others: tenth,
        }
    }
}

impl Deadband {
    /// Every change is written, as `photon-etcd-cluster` writes every sample.
    pub fn none() -> Self {
        Self {
            metrics: BTreeMap::new(),
            others: Tolerance::NONE,
        }
    }

    /// Sets the tolerance of one metric.
    #[must_use]
    pub fn with(mut self, metric: impl Into<String>, tolerance: Tolerance) -> Self {
        self.metrics.insert(metric.into(), tolerance);
        self
    }

    /// Sets the tolerance of every metric without a tolerance of its own.
    #[must_use]
    pub fn with_others(mut self, tolerance: Tolerance) -> Self {
        self.others = tolerance;
        self
    }

    /// Whether `now` is worth a write after `written` was written last.
    pub fn is_left(&self, written: &NodeMetadata, now: &NodeMetadata) -> bool {
        let (Value::Object(written), Value::Object(now)) = (written, now) else {
            return written != now;
        };
        written.len() != now.len()
            || now.iter().any(|(key, now)| {
                let Some(written) = written.get(key) else {
                    return true;
                };
                match (written.as_f64(), now.as_f64()) {
                    (Some(written), Some(now)) => {
                        let tolerance = self.metrics.get(key).copied().unwrap_or(self.others);
                        tolerance.is_exceeded(written, now)
                    }
                    _ => written != now,
                }
            })
    }

    pub(crate) fn validate(&self) -> Result<(), ClusterError> {
        let others = ("others".to_owned(), self.others);
        let own = self.metrics.clone().into_iter();
        for (metric, tolerance) in own.chain([others]) {
            if !tolerance.is_valid() {
                return Err(ClusterError::config(
                    format!("deadband.{metric}"),
                    format!("{tolerance:?} is out of range: absolute 0 or more, relative 0 to 1"),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_defaults() {
        let left = |written: Value, now: Value| Deadband::default().is_left(&written, &now);
        for (key, written, inside, outside) in [
            (metadata_keys::CPU_USAGE_PERCENT, 50.0, 52.0, 52.1),
            (metadata_keys::MEMORY_USAGE_PERCENT, 50.0, 48.0, 47.9),
            (metadata_keys::QUEUE_DEPTH, 3.0, 4.0, 5.0),
            (metadata_keys::QUEUE_DEPTH, 100.0, 110.0, 111.0),
            (metadata_keys::LOAD_AVG_1M, 0.5, 0.59, 0.61),
            (metadata_keys::MEMORY_AVAILABLE_BYTES, 1e9, 1.09e9, 1.11e9),
            ("own", 10.0, 10.9, 11.1),
        ] {
            assert!(
                !left(json!({ key: written }), json!({ key: inside })),
                "{key}"
            );
            assert!(
                left(json!({ key: written }), json!({ key: outside })),
                "{key}"
            );
        }
        assert!(left(json!({"a": "x"}), json!({"a": "y"})));
        assert!(
            left(json!({"a": 1}), json!({"b": 1})),
            "one key is added and one removed"
        );
        assert!(left(json!({"a": 1}), json!({})));
        assert!(left(Value::Null, json!({})));
        assert!(!left(Value::Null, Value::Null));
        assert!(
            left(json!({"a": 0}), json!({"a": 1e-9})),
            "any change from 0"
        );
    }

    #[test]
    fn an_invalid_tolerance_is_refused_by_the_name_of_its_metric() {
        for tolerance in [
            Tolerance::absolute(-1.0),
            Tolerance::absolute(f64::NAN),
            Tolerance::either(0.0, 1.5),
        ] {
            let error = Deadband::default().with("m", tolerance).validate();
            let error = error.unwrap_err().to_string();
            assert!(error.contains("deadband.m"), "{error}");
        }
        Deadband::default().validate().unwrap();
        Deadband::none().validate().unwrap();
    }

    proptest! {
        #[test]
        fn without_a_band_every_change_is_written(a in any::<f64>(), b in any::<f64>()) {
            let (a, b) = (json!({"x": a}), json!({"x": b}));
            prop_assert_eq!(Deadband::none().is_left(&a, &b), a != b && a["x"].as_f64() != b["x"].as_f64());
        }

        #[test]
        fn what_readers_see_is_never_further_off_than_the_band(values in proptest::collection::vec(0.0..100.0f64, 1..200)) {
            let deadband = Deadband::default();
            let sample = |value: f64| json!({ metadata_keys::CPU_USAGE_PERCENT: value });
            let mut written = values[0];
            for value in values {
                if deadband.is_left(&sample(written), &sample(value)) {
                    written = value;
                }
                prop_assert!((written - value).abs() <= 2.0);
            }
        }
    }
}
