//! What a backend reports.

use crate::metadata::{NodeMetadata, metadata_keys};

/// The response header that carries a report: `TEXT `, `JSON ` or `BIN ` and the report in that form.
pub const LOAD_REPORT_HEADER: &str = "endpoint-load-metrics";
/// The response header, or the trailer of a gRPC call, that carries a report as a protobuf message, in
/// base64.
pub const LOAD_REPORT_BINARY_HEADER: &str = "endpoint-load-metrics-bin";
/// The request header that asks a server for a report, in the form that it names: `TEXT`, `JSON` or `BIN`.
pub const LOAD_REPORT_FORMAT_HEADER: &str = "endpoint-load-metrics-format";

/// A count of requests, or a rate, above this is not plausible.
const MAX_COUNT: f64 = 1e9;

/// What a backend reports about its load with a response: the header `endpoint-load-metrics`, in the
/// Open Request Cost Aggregation format of Envoy and gRPC (`xds.data.orca.v3`).
///
/// These values are read, in the text, the JSON and the binary form: `cpu_utilization`,
/// `application_utilization`, `mem_utilization`, `rps_fractional`, `eps`, `named_metrics.queue_depth`,
/// `named_metrics.in_flight` and `named_metrics.sampled_at`; [`MetricNames`](crate::metrics::MetricNames) are other names for some of
/// them. All others are ignored. In JSON, names may also be as protobuf writes them (`cpuUtilization`),
/// and numbers may be texts. Utilisation above 1 counts as 1. A value that is not a number, not finite,
/// negative or too great for a count is left out and counted; the others are used. The binary form does
/// not distinguish 0 from a value that is not there: there, 0 counts as not there.
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
/// assert_eq!(report.to_string(), text);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct LoadReport {
    /// CPU in use, from 0 (none) to 1 (all); more counts as 1.
    pub cpu: Option<f64>,
    /// Memory in use, from 0 (none) to 1 (all); more counts as 1.
    pub memory: Option<f64>,
    /// How much of what it can do the application does, from 0 to 1 (all); more counts as 1. Above 0, it
    /// has precedence over [`cpu`](Self::cpu), as the format says.
    pub application: Option<f64>,
    /// Number of requests that wait, 0 or more.
    pub queue: Option<f64>,
    /// Number of requests in progress, from all clients of the backend, 0 or more.
    pub in_flight: Option<f64>,
    /// When CPU, memory and queue were sampled, by the backend's clock: Unix time in milliseconds. It
    /// distinguishes a new sample from one that is sent again.
    pub sampled_at: Option<u64>,
    /// Requests a second that it answers, from all clients. Weights are not computed from it here, but by
    /// Envoy and gRPC.
    pub rps: Option<f64>,
    /// Those of them that fail, a second.
    pub eps: Option<f64>,
    /// Number of values that were refused.
    pub refused: u32,
}

/// Why a header is not a report at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadReportError {
    /// It starts neither with `TEXT ` nor with `JSON ` nor with `BIN `.
    #[error("a load report starts with TEXT, JSON or BIN")]
    Format,
    /// The binary form is not base64, or not the message in it.
    #[error("a binary load report cannot be read: {0}")]
    Binary(String),
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

    pub(super) fn checked(&mut self, value: Option<f64>, max: f64) -> Option<f64> {
        let value = value.filter(|value| (0.0..=max).contains(value));
        self.refused += u32::from(value.is_none());
        value
    }

    pub(super) fn checked_count(&mut self, value: Option<f64>) -> Option<f64> {
        self.checked(value, MAX_COUNT)
    }

    pub(super) fn checked_fraction(&mut self, value: Option<f64>) -> Option<f64> {
        let value = value.and_then(fraction);
        self.refused += u32::from(value.is_none());
        value
    }

    /// How loaded it is, from 0 to 1: what the application says of itself if that is above 0, else the CPU.
    pub fn utilization(&self) -> Option<f64> {
        self.application.filter(|part| *part > 0.0).or(self.cpu)
    }

    /// The same report without the values that are out of range, for a report that was not parsed.
    #[cfg(any(test, feature = "balance"))]
    pub(crate) fn sane(&self) -> Self {
        let mut sane = *self;
        for value in [&mut sane.cpu, &mut sane.memory, &mut sane.application] {
            if let Some(given) = *value {
                *value = fraction(given);
                sane.refused += u32::from(value.is_none());
            }
        }
        let counts = [
            &mut sane.queue,
            &mut sane.in_flight,
            &mut sane.rps,
            &mut sane.eps,
        ];
        for value in counts {
            if let Some(given) = *value {
                *value = count(given);
                sane.refused += u32::from(value.is_none());
            }
        }
        sane
    }

    /// Whether the report contains a sampled value.
    #[cfg(feature = "balance")]
    pub(crate) fn has_load(&self) -> bool {
        let sampled = [self.cpu, self.application, self.memory, self.queue];
        sampled.iter().any(Option::is_some)
    }
}

/// A fraction of a resource. Some formats, and some ways of counting cores, produce values above 1,
/// which count as 1. `None` if the value is not a fraction at all.
pub(crate) fn fraction(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then(|| value.min(1.0))
}

/// A count, or a rate. `None` if it is not plausible.
#[cfg(any(test, feature = "balance"))]
fn count(value: f64) -> Option<f64> {
    (0.0..=MAX_COUNT).contains(&value).then_some(value)
}
