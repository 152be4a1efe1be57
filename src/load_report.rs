//! Load reports in response headers, in the ORCA format: reading, checking and writing them.

use std::fmt::{self, Write as _};

use crate::metadata::{NodeMetadata, metadata_keys};

/// The response header that carries a report.
pub const LOAD_REPORT_HEADER: &str = "endpoint-load-metrics";
/// The header of the same report as a base64 protobuf message. It is not read, but removed, too.
#[cfg(feature = "pingora")]
pub(crate) const BINARY_HEADER: &str = "endpoint-load-metrics-bin";

/// Longer headers are refused: no useful report is this long.
const MAX_LENGTH: usize = 4096;
/// A count of requests above this is not plausible.
const MAX_COUNT: f64 = 1e9;

/// What a backend reports about its load with a response: the header `endpoint-load-metrics`, in the
/// Open Request Cost Aggregation format of Envoy and gRPC (`xds.data.orca.v3`).
///
/// These values are read, in the text and the JSON form: `cpu_utilization` (or, if it is above 0,
/// `application_utilization`, which has precedence in the format), `mem_utilization`,
/// `named_metrics.queue_depth`, `named_metrics.in_flight` and `named_metrics.sampled_at`. All others
/// are ignored. CPU and memory above 1 count as 1. A value that is not a number, not finite,
/// negative or too great for a count is left out and counted; the others are used.
///
/// ```
/// use pingora_etcd::metrics::LoadReport;
/// let text = "TEXT cpu_utilization=0.3,mem_utilization=0.5,named_metrics.queue_depth=12";
/// let report = LoadReport::parse(text).unwrap();
/// assert_eq!(report.cpu, Some(0.3));
/// assert_eq!(report.queue, Some(12.0));
///
/// let json = r#"JSON {"cpu_utilization": 0.3, "named_metrics": {"in_flight": 7}}"#;
/// assert_eq!(LoadReport::parse(json).unwrap().in_flight, Some(7.0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct LoadReport {
    /// CPU in use, from 0 (none) to 1 (all); more counts as 1.
    pub cpu: Option<f64>,
    /// Memory in use, from 0 (none) to 1 (all); more counts as 1.
    pub memory: Option<f64>,
    /// Number of requests that wait, 0 or more.
    pub queue: Option<f64>,
    /// Number of requests in progress, from all clients of the backend, 0 or more.
    pub in_flight: Option<f64>,
    /// When CPU, memory and queue were sampled, by the backend's clock: Unix time in milliseconds. It
    /// distinguishes a new sample from one that is sent again.
    pub sampled_at: Option<u64>,
    /// Number of values that were refused.
    pub refused: u32,
}

/// Why a header is not a report at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadReportError {
    /// It starts neither with `TEXT ` nor with `JSON `.
    #[error("a load report starts with TEXT or JSON")]
    Format,
    /// `JSON ` is not followed by a JSON object.
    #[error("the JSON of a load report is not an object: {0}")]
    Json(String),
    /// It is longer than 4,096 bytes.
    #[error("a load report of {0} bytes is longer than 4096")]
    TooLong(usize),
}

impl LoadReport {
    /// A report without values.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a report of the metrics that a node publishes: CPU, memory and queue depth, in the units
    /// of a report. Invalid values are refused as in [`parse`](Self::parse).
    pub fn from_metadata(metadata: &NodeMetadata) -> Self {
        use metadata_keys::{CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH};
        let mut report = Self::default();
        let value = |key| metadata.get(key).filter(|value| !value.is_null());
        let mut fraction_of = |key| {
            let percent = value(key)?.as_f64();
            report.checked_fraction(percent.map(|percent| percent / 100.0))
        };
        let (cpu, memory) = (
            fraction_of(CPU_USAGE_PERCENT),
            fraction_of(MEMORY_USAGE_PERCENT),
        );
        let queue = value(QUEUE_DEPTH).and_then(|depth| report.checked(depth.as_f64(), MAX_COUNT));
        Self {
            cpu,
            memory,
            queue,
            ..report
        }
    }

    /// Parses the value of the header. The text form costs no allocation.
    ///
    /// # Errors
    ///
    /// [`LoadReportError`] if the header does not have the form of a report. An invalid value is only
    /// counted in [`refused`](Self::refused).
    pub fn parse(value: impl AsRef<[u8]>) -> Result<Self, LoadReportError> {
        let value = value.as_ref();
        if value.len() > MAX_LENGTH {
            return Err(LoadReportError::TooLong(value.len()));
        }
        let value = std::str::from_utf8(value).map_err(|_| LoadReportError::Format)?;
        let value = value.trim_start();
        let mut report = Self::default();
        let mut application = None;
        if let Some(text) = value.strip_prefix("TEXT ") {
            for part in text.split(',').filter(|part| !part.trim().is_empty()) {
                match part.split_once('=').or_else(|| part.split_once(':')) {
                    Some((name, number)) => {
                        let number = number.trim().parse().ok();
                        report.set(name.trim(), number, &mut application);
                    }
                    None => report.refused += 1,
                }
            }
        } else if let Some(json) = value.strip_prefix("JSON ") {
            let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(json)
                .map_err(|error| LoadReportError::Json(error.to_string()))?;
            for (name, value) in &object {
                match value {
                    serde_json::Value::Object(named) if name == "named_metrics" => {
                        for (name, value) in named {
                            report.set_named(name, value.as_f64());
                        }
                    }
                    value => report.set(name, value.as_f64(), &mut application),
                }
            }
        } else {
            return Err(LoadReportError::Format);
        }
        if let Some(application) = application.filter(|value| *value > 0.0) {
            report.cpu = Some(application);
        }
        Ok(report)
    }

    fn set(&mut self, name: &str, value: Option<f64>, application: &mut Option<f64>) {
        match name {
            "cpu_utilization" => self.cpu = self.checked_fraction(value),
            "application_utilization" => *application = self.checked_fraction(value),
            "mem_utilization" => self.memory = self.checked_fraction(value),
            _ => {
                if let Some(name) = name.strip_prefix("named_metrics.") {
                    self.set_named(name, value);
                }
            }
        }
    }

    fn set_named(&mut self, name: &str, value: Option<f64>) {
        match name {
            "queue_depth" => self.queue = self.checked(value, MAX_COUNT),
            "in_flight" => self.in_flight = self.checked(value, MAX_COUNT),
            "sampled_at" => {
                // In milliseconds since 1970, which lasts for three thousand years.
                self.sampled_at = self.checked(value, 1e14).map(|millis| millis as u64);
            }
            _ => {}
        }
    }

    fn checked(&mut self, value: Option<f64>, max: f64) -> Option<f64> {
        let value = value.filter(|value| (0.0..=max).contains(value));
        self.refused += u32::from(value.is_none());
        value
    }

    fn checked_fraction(&mut self, value: Option<f64>) -> Option<f64> {
        let value = value.and_then(fraction);
        self.refused += u32::from(value.is_none());
        value
    }

    /// The same report without the values that are out of range, for a report that was not parsed.
    #[cfg(any(test, feature = "balance"))]
    pub(crate) fn sane(&self) -> Self {
        let mut sane = Self {
            refused: self.refused,
            sampled_at: self.sampled_at,
            ..Self::default()
        };
        let mut fraction =
            |value: Option<f64>| value.and_then(|value| sane.checked_fraction(Some(value)));
        let (cpu, memory) = (fraction(self.cpu), fraction(self.memory));
        let mut count = |value: Option<f64>| {
            let value = value?;
            sane.checked(Some(value), MAX_COUNT)
        };
        let (queue, in_flight) = (count(self.queue), count(self.in_flight));
        Self {
            cpu,
            memory,
            queue,
            in_flight,
            ..sane
        }
    }

    /// Whether the report contains a sampled value.
    #[cfg(feature = "balance")]
    pub(crate) fn has_load(&self) -> bool {
        self.cpu.is_some() || self.memory.is_some() || self.queue.is_some()
    }
}

/// A fraction of a resource. Some formats, and some ways of counting cores, produce values above 1,
/// which count as 1. `None` if the value is not a fraction at all.
pub(crate) fn fraction(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then(|| value.min(1.0))
}

/// Writes the value of the header, in the text form.
impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TEXT ")?;
        let mut first = true;
        for (name, value) in [
            ("cpu_utilization", self.cpu),
            ("mem_utilization", self.memory),
            ("named_metrics.queue_depth", self.queue),
            ("named_metrics.in_flight", self.in_flight),
            (
                "named_metrics.sampled_at",
                self.sampled_at.map(|millis| millis as f64),
            ),
        ] {
            let Some(value) = value.filter(|value| value.is_finite()) else {
                continue;
            };
            if !first {
                f.write_char(',')?;
            }
            first = false;
            write!(f, "{name}={value}")?;
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
    fn both_forms_of_the_format_are_read() {
        let text = "TEXT cpu_utilization=0.3,mem_utilization=0.5,application_utilization=0.7,\
                    rps_fractional=10,eps=0.1,named_metrics.queue_depth=12";
        let report = LoadReport::parse(text).unwrap();
        assert_eq!(report.cpu, Some(0.7), "the application knows better");
        assert_eq!((report.memory, report.queue), (Some(0.5), Some(12.0)));
        assert_eq!((report.in_flight, report.refused), (None, 0));

        let json = r#"JSON {"cpu_utilization": 0.3, "mem_utilization": 0.5, "eps": 1,
            "application_utilization": 0, "request_cost": {"a": 1},
            "named_metrics": {"in_flight": 7, "sampled_at": 1700000000000}}"#;
        let report = LoadReport::parse(json).unwrap();
        assert_eq!(report.cpu, Some(0.3), "0 means not set in this format");
        assert_eq!(report.in_flight, Some(7.0));
        assert_eq!(report.sampled_at, Some(1_700_000_000_000));
    }

    #[test]
    fn an_invalid_value_is_refused_and_the_others_are_used() {
        let text = "TEXT cpu_utilization=NaN,mem_utilization=-0.5,named_metrics.queue_depth=-1,\
                    named_metrics.in_flight=3,nonsense";
        let report = LoadReport::parse(text).unwrap();
        let expected = LoadReport {
            in_flight: Some(3.0),
            refused: 4,
            ..LoadReport::new()
        };
        assert_eq!(report, expected);
        for (value, error) in [
            ("cpu_utilization=1".as_bytes(), LoadReportError::Format),
            (b"TEXT \xff", LoadReportError::Format),
            (&[b' '; 5000], LoadReportError::TooLong(5000)),
        ] {
            assert_eq!(LoadReport::parse(value), Err(error));
        }
        assert!(matches!(
            LoadReport::parse("JSON [1]"),
            Err(LoadReportError::Json(_))
        ));
    }

    #[test]
    fn more_than_1_counts_as_1() {
        let parsed = [
            "TEXT cpu_utilization=1.7,mem_utilization=1.2",
            "TEXT application_utilization=4e9,mem_utilization=1",
            r#"JSON {"cpu_utilization": 1.001, "mem_utilization": 1e300}"#,
        ]
        .map(|text| LoadReport::parse(text).unwrap());
        let metadata = json!({"cpu_usage_percent": 130, "memory_usage_percent": 101.5});
        let by_hand = LoadReport {
            cpu: Some(1.3),
            memory: Some(7.0),
            ..LoadReport::new()
        };
        let others = [LoadReport::from_metadata(&metadata), by_hand.sane()];
        for report in parsed.into_iter().chain(others) {
            let values = (report.cpu, report.memory, report.refused);
            assert_eq!(values, (Some(1.0), Some(1.0), 0), "{report:?}");
        }
    }

    #[test]
    fn metadata_becomes_a_report() {
        let metadata =
            json!({"cpu_usage_percent": 45.0, "memory_usage_percent": -1, "queue_depth": 3});
        let report = LoadReport::from_metadata(&metadata);
        assert_eq!(
            (report.cpu, report.memory, report.queue),
            (Some(0.45), None, Some(3.0))
        );
        assert_eq!(report.refused, 1);
    }

    proptest! {
        /// A value is either refused or within its range.
        #[test]
        fn any_bytes(prefix in "(TEXT |JSON |)", rest in any::<Vec<u8>>()) {
            let mut value = prefix.into_bytes();
            value.extend(rest);
            if let Ok(report) = LoadReport::parse(&value) {
                prop_assert!(report.cpu.is_none_or(|cpu| (0.0..=1.0).contains(&cpu)));
                prop_assert!(report.queue.is_none_or(|queue| (0.0..=1e9).contains(&queue)));
            }
        }

        #[test]
        fn any_numbers(cpu in any::<f64>(), memory in any::<f64>(), in_flight in any::<f64>()) {
            let text = format!("TEXT cpu_utilization={cpu},mem_utilization={memory},named_metrics.in_flight={in_flight}");
            let report = LoadReport::parse(&text).unwrap();
            for value in [report.cpu, report.memory, report.in_flight].into_iter().flatten() {
                prop_assert!((0.0..=1e9).contains(&value));
            }
        }

        /// A report that is written and parsed is the same.
        #[test]
        fn round_trip(cpu in 0.0..=1.0_f64, queue in 0..1000_u32, in_flight in 0..1000_u32, at in 0..2_000_000_000_000_u64) {
            let report = LoadReport {
                cpu: Some(cpu),
                queue: Some(queue.into()),
                in_flight: Some(in_flight.into()),
                sampled_at: Some(at),
                ..LoadReport::new()
            };
            prop_assert_eq!(LoadReport::parse(report.to_string()).unwrap(), report);
        }
    }
}
