//! The forms that a load report is written in.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::message::Message;
use super::report::LoadReport;

/// The form of a load report, as a request names it in `endpoint-load-metrics-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LoadReportForm {
    /// `TEXT cpu_utilization=0.3,named_metrics.queue_depth=12`.
    #[default]
    Text,
    /// `JSON {"cpu_utilization":0.3,"named_metrics":{"queue_depth":12.0}}`.
    Json,
    /// `BIN ` and the protobuf message `xds.data.orca.v3.OrcaLoadReport` in base64.
    Bin,
}

impl LoadReportForm {
    /// Its name in headers: `TEXT`, `JSON` or `BIN`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Json => "JSON",
            Self::Bin => "BIN",
        }
    }

    /// The form with this name, in upper or lower case.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Text, Self::Json, Self::Bin]
            .into_iter()
            .find(|form| form.name().eq_ignore_ascii_case(name.trim()))
    }
}

impl fmt::Display for LoadReportForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl LoadReport {
    /// The value of the header [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER) in this form. What is no
    /// finite number is left out.
    pub fn to_header(&self, form: LoadReportForm) -> String {
        match form {
            LoadReportForm::Text => self.to_string(),
            LoadReportForm::Json => format!("JSON {}", self.json()),
            LoadReportForm::Bin => format!("BIN {}", self.to_binary_header()),
        }
    }

    /// The value of the header [`LOAD_REPORT_BINARY_HEADER`](crate::metrics::LOAD_REPORT_BINARY_HEADER): the
    /// protobuf message in base64.
    pub fn to_binary_header(&self) -> String {
        STANDARD.encode(prost::Message::encode_to_vec(&Message::from(self)))
    }

    fn json(&self) -> Value {
        let object = |values: &[(&str, Option<f64>)]| {
            let said = values
                .iter()
                .filter_map(|(name, value)| Some((*name, value.filter(|it| it.is_finite())?)));
            said.map(|(name, value)| (name.to_owned(), value.into()))
                .collect::<Map<_, _>>()
        };
        let mut report = object(&self.fields());
        let named = object(&self.named());
        if !named.is_empty() {
            report.insert("named_metrics".to_owned(), named.into());
        }
        report.into()
    }

    /// The values that the format itself names.
    fn fields(&self) -> [(&'static str, Option<f64>); 5] {
        [
            ("cpu_utilization", self.cpu),
            ("mem_utilization", self.memory),
            ("application_utilization", self.application),
            ("rps_fractional", self.rps),
            ("eps", self.eps),
        ]
    }

    /// Those that this crate names.
    pub(super) fn named(&self) -> [(&'static str, Option<f64>); 3] {
        let sampled_at = self.sampled_at.map(|millis| millis as f64);
        [
            ("queue_depth", self.queue),
            ("in_flight", self.in_flight),
            ("sampled_at", sampled_at),
        ]
    }
}

/// Writes the value of the header, in the text form.
impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TEXT ")?;
        let fields = self.fields().map(|(name, value)| ("", name, value));
        let named = self.named();
        let named = named.map(|(name, value)| ("named_metrics.", name, value));
        let mut separator = "";
        for (group, name, value) in fields.into_iter().chain(named) {
            if let Some(value) = value.filter(|value| value.is_finite()) {
                write!(f, "{separator}{group}{name}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}
