//! What a node reports about its load: where the metrics come from, when they are worth a write, and
//! how they are sent with responses.

mod collector;
mod deadband;
mod health;
mod reporter;
mod sampler;
#[cfg(feature = "system-metrics")]
mod system;
#[cfg(feature = "tower")]
mod tower;
mod work;

pub use crate::load_report::{
    LOAD_REPORT_BINARY_HEADER, LOAD_REPORT_FORMAT_HEADER, LOAD_REPORT_HEADER, LoadReport,
    LoadReportError, LoadReportForm, MetricNames,
};
pub use collector::{CompositeMetricsCollector, MetricsCollector, NoopMetricsCollector};
pub use deadband::{Deadband, Tolerance};
pub use health::{Health, HealthCollector};
pub use reporter::{LoadReporter, RequestGuard};
pub(crate) use sampler::Sampler;
#[cfg(feature = "system-metrics")]
pub use system::SystemMetricsCollector;
#[cfg(feature = "tower")]
pub use tower::{CountedBody, LoadReportFuture, LoadReportLayer, LoadReportService};
