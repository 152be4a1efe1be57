//! Load reports that come with responses, in the ORCA format.

use std::fmt::{self, Write as _};

use super::weight::Load;

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
/// A value that is no number, not finite or out of its range is left out alone, and counted.
///
/// ```
/// use pingora_etcd::balance::LoadReport;
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
    /// Memory in use, 0 to 1.
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
        let value = value.trim();
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
            // The format lets CPU exceed 1; full is full.
            "cpu_utilization" => self.cpu = self.checked(value, MAX_COUNT).map(|cpu| cpu.min(1.0)),
            "application_utilization" => {
                *application = self.checked(value, MAX_COUNT).map(|cpu| cpu.min(1.0));
            }
            "mem_utilization" => self.memory = self.checked(value, 1.0),
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

    /// Whether it says anything of the kind that is sampled.
    pub(super) fn has_load(&self) -> bool {
        self.cpu.is_some() || self.memory.is_some() || self.queue.is_some()
    }

    pub(super) fn load(&self) -> Load {
        Load {
            cpu: self.cpu,
            memory: self.memory,
            queue: self.queue,
        }
    }
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
