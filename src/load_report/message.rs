//! The binary form: the protobuf message `xds.data.orca.v3.OrcaLoadReport`.

use std::collections::HashMap;

use super::report::LoadReport;

/// The fields of the message that are read or written, with the numbers that they have in it. The others
/// are skipped.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Message {
    #[prost(double, tag = "1")]
    pub(super) cpu_utilization: f64,
    #[prost(double, tag = "2")]
    pub(super) mem_utilization: f64,
    #[prost(map = "string, double", tag = "5")]
    pub(super) utilization: HashMap<String, f64>,
    #[prost(double, tag = "6")]
    pub(super) rps_fractional: f64,
    #[prost(double, tag = "7")]
    pub(super) eps: f64,
    #[prost(map = "string, double", tag = "8")]
    pub(super) named_metrics: HashMap<String, f64>,
    #[prost(double, tag = "9")]
    pub(super) application_utilization: f64,
}

impl From<&LoadReport> for Message {
    fn from(report: &LoadReport) -> Self {
        let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
        let field = |value| finite(value).unwrap_or(0.0);
        let named = report.named().into_iter();
        Self {
            cpu_utilization: field(report.cpu),
            mem_utilization: field(report.memory),
            utilization: HashMap::new(),
            rps_fractional: field(report.rps),
            eps: field(report.eps),
            named_metrics: named
                .filter_map(|(name, value)| Some((name.to_owned(), finite(value)?)))
                .collect(),
            application_utilization: field(report.application),
        }
    }
}
