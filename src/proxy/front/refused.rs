//! Requests that the proxy never sees.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::statistics::FrontStatistics;

/// A request that the proxy never sees, because it is not whole or none at all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RefusedRequest {
    pub(crate) client: Option<IpAddr>,
    pub(crate) is_over_tls: bool,
    /// What it was answered.
    pub(crate) status: u16,
    /// Since it began.
    pub(crate) lasted: Duration,
}

/// Who is told of such requests.
pub(crate) type TellRefused = Arc<dyn Fn(RefusedRequest) + Send + Sync>;

/// Where such requests are counted, and who is told.
#[derive(Clone)]
pub(super) struct Refusals {
    pub(super) statistics: Arc<FrontStatistics>,
    pub(super) tell: Option<TellRefused>,
}
