//! The load that backends report with their responses.

use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing::trace;

use crate::balance::Upstream;
use crate::config::ClusterConfig;
use crate::metrics::{
    LOAD_REPORT_BINARY_HEADER, LOAD_REPORT_FORMAT_HEADER, LOAD_REPORT_HEADER, LoadReport,
    MetricNames,
};

const HEADER: HeaderName = HeaderName::from_static(LOAD_REPORT_HEADER);
const BINARY_HEADER: HeaderName = HeaderName::from_static(LOAD_REPORT_BINARY_HEADER);
static REMOVED: [HeaderName; 2] = [HEADER, BINARY_HEADER];
const FORMAT_HEADER: HeaderName = HeaderName::from_static(LOAD_REPORT_FORMAT_HEADER);

/// What a group does with load reports.
pub(super) struct LoadReports {
    names: MetricNames,
    /// The form that backends are asked for.
    asked: Option<HeaderValue>,
    are_passed_on: bool,
}

impl LoadReports {
    /// `None` if they are not used.
    pub(super) fn new(config: &ClusterConfig) -> Option<Self> {
        let asked = config.load_report_format;
        config.load_reports.then(|| Self {
            names: config.load_report_metrics.clone(),
            asked: asked.map(|form| HeaderValue::from_static(form.name())),
            are_passed_on: config.load_reports_to_clients,
        })
    }

    /// Asks for a report with a request.
    pub(super) fn ask(&self, request: &mut HeaderMap) {
        if let Some(asked) = &self.asked {
            request.insert(FORMAT_HEADER, asked.clone());
        }
    }

    /// Takes the report in the header or the trailers of a response. Returns the fields that are not for the
    /// client.
    pub(super) fn take(
        &self,
        fields: &HeaderMap,
        upstream: Option<&Upstream>,
        now: Instant,
    ) -> &'static [HeaderName] {
        // Looking at the few names that there are costs less than looking for each of these.
        let is_report = |name: &HeaderName| {
            name.as_str().starts_with('e') && (*name == BINARY_HEADER || *name == HEADER)
        };
        if !fields.keys().any(is_report) {
            return &[];
        }
        if let Some(upstream) = upstream {
            match LoadReport::from_headers(fields, &self.names) {
                Some(Ok(report)) => upstream.report(&report, now),
                Some(Err(error)) => {
                    upstream.refuse_report();
                    trace!(node = upstream.node().id, %error, "load report refused");
                }
                None => {}
            }
        }
        if self.are_passed_on { &[] } else { &REMOVED }
    }
}
