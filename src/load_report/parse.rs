//! Reads load reports.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::HeaderMap;
use prost::Message as _;
use serde_json::Value;

use super::message::Message;
use super::names::{Meaning, MetricNames, Place};
use super::report::{LOAD_REPORT_BINARY_HEADER, LOAD_REPORT_HEADER, LoadReport, LoadReportError};

/// Longer headers are refused: no useful report is this long.
const MAX_LENGTH: usize = 4096;

/// gRPC leaves the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl LoadReport {
    /// Parses the value of the header [`LOAD_REPORT_HEADER`]. The text form costs no allocation.
    ///
    /// # Errors
    ///
    /// [`LoadReportError`] if the header does not have the form of a report. An invalid value is only
    /// counted in [`refused`](Self::refused).
    pub fn parse(value: impl AsRef<[u8]>) -> Result<Self, LoadReportError> {
        Self::parse_with(value, &MetricNames::default())
    }

    /// The same, with other names for some of the values.
    ///
    /// # Errors
    ///
    /// As for [`parse`](Self::parse).
    pub fn parse_with(
        value: impl AsRef<[u8]>,
        names: &MetricNames,
    ) -> Result<Self, LoadReportError> {
        let value = text(value.as_ref())?.trim_start();
        let mut report = Reader::new(names);
        if let Some(text) = value.strip_prefix("TEXT ") {
            report.read_text(text);
        } else if let Some(json) = value.strip_prefix("JSON ") {
            report.read_json(json)?;
        } else if let Some(binary) = value.strip_prefix("BIN ") {
            report.read_binary(binary)?;
        } else {
            return Err(LoadReportError::Format);
        }
        Ok(report.report)
    }

    /// The report in the header or the trailers of a response: in [`LOAD_REPORT_BINARY_HEADER`], or else
    /// in [`LOAD_REPORT_HEADER`]. `None` if there is none.
    ///
    /// # Errors
    ///
    /// As for [`parse`](Self::parse).
    pub fn from_headers(
        headers: &HeaderMap,
        names: &MetricNames,
    ) -> Option<Result<Self, LoadReportError>> {
        if let Some(binary) = headers.get(LOAD_REPORT_BINARY_HEADER) {
            let mut report = Reader::new(names);
            let read = text(binary.as_bytes()).and_then(|binary| report.read_binary(binary));
            return Some(read.map(|()| report.report));
        }
        let value = headers.get(LOAD_REPORT_HEADER)?;
        Some(Self::parse_with(value.as_bytes(), names))
    }
}

fn text(value: &[u8]) -> Result<&str, LoadReportError> {
    if value.len() > MAX_LENGTH {
        return Err(LoadReportError::TooLong(value.len()));
    }
    std::str::from_utf8(value).map_err(|_| LoadReportError::Format)
}

/// A number, also as text.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    }
}

/// A report while it is read.
struct Reader<'a> {
    names: &'a MetricNames,
    report: LoadReport,
}

impl<'a> Reader<'a> {
    fn new(names: &'a MetricNames) -> Self {
        Self {
            names,
            report: LoadReport::new(),
        }
    }

    fn read_text(&mut self, text: &str) {
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            match part.split_once('=').or_else(|| part.split_once(':')) {
                Some((name, number)) => {
                    let (place, name) = Place::of(name.trim());
                    self.take(place, name, number.trim().parse().ok());
                }
                None => self.report.refused += 1,
            }
        }
    }

    fn read_json(&mut self, json: &str) -> Result<(), LoadReportError> {
        let object: serde_json::Map<String, Value> =
            serde_json::from_str(json).map_err(|error| LoadReportError::Json(error.to_string()))?;
        for (name, value) in &object {
            let place = match name.as_str() {
                "named_metrics" | "namedMetrics" => Place::Named,
                "utilization" => Place::Utilization,
                name => {
                    // protobuf writes null for what is not there.
                    if !value.is_null() {
                        let (place, name) = Place::of(name);
                        self.take(place, name, number(value));
                    }
                    continue;
                }
            };
            match value {
                Value::Object(values) => {
                    for (name, value) in values {
                        self.take(place, name, number(value));
                    }
                }
                Value::Null => {}
                _ => self.report.refused += 1,
            }
        }
        Ok(())
    }

    fn read_binary(&mut self, base64: &str) -> Result<(), LoadReportError> {
        let refused = |error: String| LoadReportError::Binary(error);
        let bytes = BASE64.decode(base64.trim());
        let bytes = bytes.map_err(|error| refused(error.to_string()))?;
        let message = Message::decode(&*bytes).map_err(|error| refused(error.to_string()))?;
        let fields = [
            ("cpu_utilization", message.cpu_utilization),
            ("mem_utilization", message.mem_utilization),
            ("application_utilization", message.application_utilization),
            ("rps_fractional", message.rps_fractional),
            ("eps", message.eps),
        ];
        for (name, value) in fields {
            if value != 0.0 {
                self.take(Place::Field, name, Some(value));
            }
        }
        for (name, value) in &message.named_metrics {
            self.take(Place::Named, name, Some(*value));
        }
        for (name, value) in &message.utilization {
            self.take(Place::Utilization, name, Some(*value));
        }
        Ok(())
    }

    fn take(&mut self, place: Place, name: &str, value: Option<f64>) {
        let Some(meaning) = self.names.meaning(place, name) else {
            return;
        };
        let report = &mut self.report;
        match meaning {
            Meaning::Cpu => report.cpu = report.checked_fraction(value),
            Meaning::Memory => report.memory = report.checked_fraction(value),
            Meaning::Application => report.application = report.checked_fraction(value),
            Meaning::Queue => report.queue = report.checked_count(value),
            Meaning::InFlight => report.in_flight = report.checked_count(value),
            Meaning::Rps => report.rps = report.checked_count(value),
            Meaning::Eps => report.eps = report.checked_count(value),
            Meaning::SampledAt => {
                // In milliseconds since 1970, which lasts for three thousand years.
                report.sampled_at = report.checked(value, 1e14).map(|millis| millis as u64);
            }
        }
    }
}
