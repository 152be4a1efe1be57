//! Load reports in response headers, in the ORCA format: reading, checking and writing them.

mod form;
mod message;
mod names;
mod parse;
mod report;

pub use form::LoadReportForm;
pub use names::MetricNames;
#[cfg(feature = "balance")]
pub(crate) use report::fraction;
pub use report::{
    LOAD_REPORT_BINARY_HEADER, LOAD_REPORT_FORMAT_HEADER, LOAD_REPORT_HEADER, LoadReport,
    LoadReportError,
};

#[cfg(test)]
mod tests;
