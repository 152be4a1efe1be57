//! The guard of a request.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::endpoint::{EndpointState, in_flight_with_guard};
use super::fleet::Failure;
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
    in_flight: Option<Arc<()>>,
    is_probe: bool,
    /// It was a probe whose response has begun: whether it succeeds is open.
    has_begun: bool,
    is_tunnel: bool,
}

impl Upstream {
    pub(super) fn new(
        state: Arc<EndpointState>,
        in_flight: Option<Arc<()>>,
        is_probe: bool,
    ) -> Self {
        Self {
            state,
            in_flight,
            is_probe,
            has_begun: false,
            is_tunnel: false,
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
    pub fn succeeded(mut self, latency: Duration) {
        self.begun_well();
        match self.take_probe() {
            true => self.state.probe_succeeds(),
            false => self.state.succeeded(latency),
        }
    }

    /// Reports that the backend works, but answered without doing what it usually does, such as with 401 or 404. The
    /// request ended at `now`, and `took` so long since it was sent to the backend. How fast that was says nothing, and
    /// does not attract requests: if the backend does so for more of its requests than others, picks take the request
    /// as if it were in flight until the usual latency of successes is over. [`in_flight`](Self::in_flight) and limits
    /// do not.
    pub fn answered(mut self, took: Duration, now: Instant) {
        self.begun_well();
        match (self.take_probe(), &self.in_flight) {
            (true, _) => self.state.probe_succeeds(),
            (false, None) => self.state.answered_after(took, now),
            // The share of each is limited by the number of all, to which such requests do not belong.
            (false, Some(_)) => self.state.answered(),
        }
    }

    /// Whether the backend had failed, and this request finds out whether it works again. If it fails,
    /// send it to another backend if you can.
    pub fn is_probe(&self) -> bool {
        self.is_probe
    }

    /// If this is a probe, the backend seems to work, though the request goes on: the response has begun, and may last for
    /// hours. The outcome is reported at its end, and if that is a failure, it is one of a probe. Until then at most one
    /// other is tried each second.
    pub fn begins_to_answer(&mut self) {
        if self.take_probe() {
            self.has_begun = true;
            self.state.probe_begins_to_answer();
        }
    }

    /// What has begun has not failed.
    fn begun_well(&mut self) {
        if std::mem::take(&mut self.has_begun) {
            self.state.begun_probe_succeeds();
        }
    }

    /// The request has become a tunnel, such as a WebSocket, which may be silent for hours: it is no work for the
    /// backend that other requests should make way for. It still counts in [`in_flight`](Self::in_flight), and for
    /// requests [that become tunnels](super::PickOptions::for_tunnel) themselves.
    pub fn becomes_tunnel(&mut self) {
        self.begun_well();
        if !std::mem::replace(&mut self.is_tunnel, true) {
            self.state.begin_tunnel(self.in_flight.is_some());
        }
    }

    /// Reports that the backend failed the request: a time-out, a 5xx response, or one that broke off.
    /// Do not call it for a client that went away: drop the guard instead.
    pub fn failed(self) {
        self.fails(Failure::Fault);
    }

    /// Reports that no connection to the backend could be made. It counts twice: whoever refuses a
    /// connection is probably not there.
    pub fn unreachable(self) {
        self.fails(Failure::Unreachable);
    }

    /// Reports that the backend has too much to do, as it says with 429. It gets less, and only if
    /// hardly anything succeeds, nothing.
    pub fn overloaded(self) {
        self.fails(Failure::Overload);
    }

    fn fails(mut self, failure: Failure) {
        match (self.take_probe(), std::mem::take(&mut self.has_begun)) {
            (true, _) => self.state.probe_fails(failure),
            (false, true) => self.state.begun_probe_fails(failure),
            (false, false) => self.state.failed(failure),
        }
    }

    fn take_probe(&mut self) -> bool {
        std::mem::take(&mut self.is_probe)
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

impl Drop for Upstream {
    fn drop(&mut self) {
        if self.is_tunnel {
            self.state.end_tunnel(self.in_flight.is_some());
        }
        if self.is_probe {
            self.state.probe_says_nothing();
        }
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
