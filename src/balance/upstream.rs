//! The guard of a request.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::endpoint::{EndpointState, in_flight_with_guard};
use crate::load_report::{LoadReport, LoadReportError};
use crate::node::Node;

/// A backend that was picked. The request counts as in flight there until this is dropped, so a
/// request that is cancelled or never sent leaks nothing. In a Pingora proxy it lives in the
/// request's context.
///
/// Report how the request ended with [`succeeded`](Self::succeeded) or [`failed`](Self::failed).
/// Dropping the guard without a report says nothing about the backend: do so for a request that was
/// cancelled, or whose client went away.
pub struct Upstream {
    state: Arc<EndpointState>,
    /// Counts the request among all of the balancer, for the policy that needs their number.
    _in_flight: Option<Arc<()>>,
}

impl Upstream {
    pub(super) fn new(state: Arc<EndpointState>, in_flight: Option<Arc<()>>) -> Self {
        Self {
            state,
            _in_flight: in_flight,
        }
    }

    /// Where to send the request.
    pub fn addr(&self) -> SocketAddr {
        self.state.addr()
    }

    /// The node, as it is now.
    pub fn node(&self) -> Arc<Node> {
        self.state.node()
    }

    /// The weight of the backend relative to the others, as it is now.
    pub fn weight(&self) -> f64 {
        self.state.weight().get()
    }

    /// How many requests of this process the backend is working on, including this one.
    pub fn in_flight(&self) -> u32 {
        in_flight_with_guard(&self.state)
    }

    /// Reports that the backend answered, `latency` after the request was sent to it: time spent on
    /// earlier tries at other backends does not count. The policies that learn from outcomes use it.
    pub fn succeeded(self, latency: Duration) {
        self.state.succeeded(latency);
    }

    /// Reports that the backend works, but answered without doing what it usually does, such as with
    /// 401 or 404. How fast it did so says nothing, and does not attract requests.
    pub fn answered(self) {
        self.state.answered();
    }

    /// Reports that the backend failed the request: no connection, a time-out, a 5xx response, or 429,
    /// by which it says that it has too much to do. Do not call it for a client that went away: drop
    /// the guard instead.
    pub fn failed(self) {
        self.state.failed();
    }

    /// Takes over the load that the backend reported with its response at `now`. Weights follow with
    /// the next [`tick`](super::Balancer::tick). A report of requests in flight counts from the next
    /// pick on.
    pub fn report(&self, report: &LoadReport, now: Instant) {
        self.state.report(report, now);
    }

    /// Counts a report that could not be read, in [`refused_metrics`](super::Balancer::refused_metrics).
    pub fn refuse_report(&self) {
        self.state.refuse_report();
    }

    /// The same as [`report`](Self::report), with the value of the response header
    /// [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER).
    ///
    /// # Errors
    ///
    /// [`LoadReportError`] if it is not a report; that is counted in
    /// [`refused_metrics`](super::Balancer::refused_metrics).
    pub fn report_header(&self, value: &[u8], now: Instant) -> Result<(), LoadReportError> {
        let report = LoadReport::parse(value).inspect_err(|_| self.refuse_report())?;
        self.report(&report, now);
        Ok(())
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("node", &self.node().id)
            .field("addr", &self.addr())
            .finish()
    }
}
