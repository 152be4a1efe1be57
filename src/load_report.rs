//! Load reports that go with responses, in the ORCA format.

use std::fmt::{self, Write as _};

use crate::metadata::{NodeMetadata, metadata_keys};

/// The response header that carries a report.
pub const LOAD_REPORT_HEADER: &str = "endpoint-load-metrics";
/// The same as a base64 protobuf message. It is not read, but nothing for clients either.
#[cfg(feature = "pingora")]
pub(crate) const BINARY_HEADER: &str = "endpoint-load-metrics-bin";

/// Longer headers are refused: a report has no use for so much.
const MAX_LENGTH: usize = 4096;
/// Above that a count of requests is no count.
const MAX_COUNT: f64 = 1e9;

/// What a backend says of its load, with a response: the header `endpoint-load-metrics`, as the
/// Open Request Cost Aggregation format that Envoy and gRPC use (`xds.data.orca.v3`) has it.
///
/// Read are `cpu_utilization` (or, if it is above 0, `application_utilization`, which the format
/// says comes first), `mem_utilization`, `named_metrics.queue_depth`, `named_metrics.in_flight`
/// and `named_metrics.sampled_at`, in the text and the JSON form. Everything else is left alone.
/// CPU and memory above 1 count as 1: full is full. A value that is no number, not finite, negative
/// or too great for a count is left out alone, and counted.
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
    /// CPU in use: 0 is none, 1 is all of it; more counts as 1.
    pub cpu: Option<f64>,
    /// Memory in use, 0 to 1; more counts as 1.
    pub memory: Option<f64>,
    /// Requests waiting, 0 or more.
    pub queue: Option<f64>,
    /// Requests the backend is working on, of all its clients, 0 or more.
    pub in_flight: Option<f64>,
    /// When CPU, memory and queue were sampled, by the backend's clock: Unix time in ms. Tells a
    /// fresh sample from one that is sent again.
    pub sampled_at: Option<u64>,
    /// Values that were refused.
    pub refused: u32,
}

/// Why a header is no report at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadReportError {
    /// Neither `TEXT ` nor `JSON ` comes first.
    #[error("a load report starts with TEXT or JSON")]
    Format,
    /// What follows `JSON ` is no JSON object.
    #[error("a load report's JSON is no object: {0}")]
    Json(String),
    /// It is longer than 4,096 bytes.
    #[error("a load report of {0} bytes is longer than 4096")]
    TooLong(usize),
}

impl LoadReport {
    /// A report that says nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a node publishes, as a report: CPU, memory and queue depth, with the units that a
    /// report has. Values that make no sense are refused as in [`parse`](Self::parse).
    pub fn from_metadata(metadata: &NodeMetadata) -> Self {
        use metadata_keys::{CPU_USAGE_PERCENT, MEMORY_USAGE_PERCENT, QUEUE_DEPTH};
        let mut report = Self::default();
        let found = |key| metadata.get(key).filter(|value| !value.is_null());
        let mut part = |key| {
            let percent = found(key)?.as_f64();
            report.checked_part(percent.map(|percent| percent / 100.0))
        };
        let (cpu, memory) = (part(CPU_USAGE_PERCENT), part(MEMORY_USAGE_PERCENT));
        let queue = found(QUEUE_DEPTH).and_then(|depth| report.checked(depth.as_f64(), MAX_COUNT));
        Self {
            cpu,
            memory,
            queue,
            ..report
        }
    }

    /// Reads the value of the header. Costs no allocation in the text form.
    ///
    /// # Errors
    ///
    /// [`LoadReportError`] if the value has not the form of a report; a part that makes no sense
    /// is [`refused`](Self::refused) alone.
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
                        report.take(name.trim(), number, &mut application);
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
                            report.take_named(name, value.as_f64());
                        }
                    }
                    value => report.take(name, value.as_f64(), &mut application),
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

    fn take(&mut self, name: &str, value: Option<f64>, application: &mut Option<f64>) {
        match name {
            "cpu_utilization" => self.cpu = self.checked_part(value),
            "application_utilization" => *application = self.checked_part(value),
            "mem_utilization" => self.memory = self.checked_part(value),
            _ => {
                if let Some(name) = name.strip_prefix("named_metrics.") {
                    self.take_named(name, value);
                }
            }
        }
    }

    fn take_named(&mut self, name: &str, value: Option<f64>) {
        match name {
            "queue_depth" => self.queue = self.checked(value, MAX_COUNT),
            "in_flight" => self.in_flight = self.checked(value, MAX_COUNT),
            "sampled_at" => {
                // Milliseconds since 1970, for some thousand years.
                self.sampled_at = self.checked(value, 1e14).map(|millis| millis as u64);
            }
            _ => {}
        }
    }

    fn checked(&mut self, value: Option<f64>, most: f64) -> Option<f64> {
        let value = value.filter(|value| (0.0..=most).contains(value));
        self.refused += u32::from(value.is_none());
        value
    }

    fn checked_part(&mut self, value: Option<f64>) -> Option<f64> {
        let value = value.and_then(fraction);
        self.refused += u32::from(value.is_none());
        value
    }

    /// The same without what is out of range: whoever puts one together by hand may be wrong.
    pub(crate) fn sane(&self) -> Self {
        let mut sane = Self {
            refused: self.refused,
            sampled_at: self.sampled_at,
            ..Self::default()
        };
        let mut part = |value: Option<f64>| value.and_then(|value| sane.checked_part(Some(value)));
        let (cpu, memory) = (part(self.cpu), part(self.memory));
        let mut check = |value: Option<f64>, most| {
            let value = value?;
            sane.checked(Some(value), most)
        };
        let (queue, in_flight) = (
            check(self.queue, MAX_COUNT),
            check(self.in_flight, MAX_COUNT),
        );
        Self {
            cpu,
            memory,
            queue,
            in_flight,
            ..sane
        }
    }

    /// Whether it says anything of the kind that is sampled.
    pub(crate) fn has_load(&self) -> bool {
        self.cpu.is_some() || self.memory.is_some() || self.queue.is_some()
    }
}

/// A part in use. There are formats, and ways of counting cores, in which it exceeds 1: full is full.
/// `None` if it is no part of anything.
pub(crate) fn fraction(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then(|| value.min(1.0))
}

/// The header's value, in the text form.
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
        assert_eq!(report.cpu, Some(0.3), "0 is the format's word for not set");
        assert_eq!(report.in_flight, Some(7.0));
        assert_eq!(report.sampled_at, Some(1_700_000_000_000));
    }

    #[test]
    fn what_makes_no_sense_is_refused_alone() {
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
    fn more_than_all_is_all() {
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
            let told = (report.cpu, report.memory, report.refused);
            assert_eq!(told, (Some(1.0), Some(1.0), 0), "{report:?}");
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
        /// Whatever comes, it is either refused or within range.
        #[test]
        fn anything_at_all(prefix in "(TEXT |JSON |)", rest in any::<Vec<u8>>()) {
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

        /// What is written is read as the same.
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
