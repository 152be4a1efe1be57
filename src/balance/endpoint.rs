//! One backend as all threads share it: what requests write, and what picks read.

mod outcomes;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tracing::info;

use super::atomic::AtomicF32;
use super::fleet::Fleet;
use super::learned::Lesson;
use super::lingering::Backend;
use super::weight::{Share, Weight};
use crate::load_report::LoadReport;
use crate::node::Node;

/// A backend: one registration of a node at one address. It lives as long as that registration,
/// across updates and tables, and what was learned about it ends with it.
///
/// Requests hold on to its [`EndpointState`], whose only other owner is this. So the number of
/// requests in flight is the number of owners minus one: exact, for one atomic operation at each
/// end of a request instead of two.
#[derive(Debug)]
pub(crate) struct Endpoint {
    state: Arc<EndpointState>,
}

/// The part of a backend that a request holds on to. Only an [`Endpoint`] and the guards of requests
/// may own one.
///
/// An `Arc` puts its counts in front of the value. They and the outcomes, which come first here, are
/// what every request writes. The other fields keep them away from those of the next backend: on
/// another cache line, and not on the adjacent one, which processors fetch along.
#[derive(Debug)]
#[repr(C)]
pub(super) struct EndpointState {
    /// The success rate, 0 to 1; below 0 once the registration is gone.
    success: AtomicF32,
    /// The same, without the requests for which it said that it is overloaded.
    faultless: AtomicF32,
    /// The part of the requests that it answered without doing its work, 0 to 1.
    refusing: AtomicF32,
    /// Successes since the latencies were last taken.
    successes: AtomicU32,
    /// Outcomes without a latency: failures, answers without work, and probes; wraps.
    unmeasured: AtomicU32,
    /// The lowest success rate since the last tick.
    lowest_success: AtomicF32,
    /// For how many ticks it counts as ejected recently: for answers, and not because it refuses connections.
    was_ejected: AtomicU8,
    /// How many of the requests in flight have become tunnels.
    tunnels: AtomicU32,
    /// How many of the requests in flight have been answered, sooner than usual.
    lingering: AtomicU32,
    /// Sum of the latencies of these successes, in nanoseconds.
    latency_sum: AtomicU64,
    /// The lowest latency of these successes, in nanoseconds.
    lowest_latency: AtomicU64,
    /// The last report of requests in flight: the bits of an `f32`, and a time stamp in ms.
    in_flight_report: AtomicU64,
    /// Its place in the last table.
    place: AtomicU32,
    /// The bits of an `f64`.
    weight: AtomicU64,
    /// The weight before it is reduced for its zone, relative to the mean of all: what its own counts are compared
    /// with. Above 0.
    capacity: AtomicF32,
    /// The part of it that was not learned: the static weight, a quarter of it for a node that is degraded.
    base: AtomicF32,
    /// The probability of acceptance that is part of its share: below 1 for a backend that fails.
    acceptance: AtomicF32,
    /// The probability with which it is taken in its turn while it has nothing in flight.
    calm: AtomicF32,
    /// It failed, and gets nothing but probes.
    is_ejected: AtomicBool,
    /// 0 for a backend outside the subset that this process uses; for the others, what its weight is multiplied by.
    subset_part: AtomicF32,
    subset_share: AtomicF32,
    /// A request is to try it: the first one, or a probe.
    is_due: AtomicBool,
    /// A probe is under way.
    is_probed: AtomicBool,
    has_begun_well: AtomicBool,
    /// The turn of a probe was taken, for a request that has not begun.
    #[cfg(feature = "pingora")]
    is_offered: AtomicBool,
    fleet: Arc<Fleet>,
    addr: SocketAddr,
    node: ArcSwap<Node>,
    /// Whether `load_report` is new.
    has_load_report: AtomicBool,
    /// Allocated with the first report: most backends never send one.
    load_report: OnceLock<Box<Mutex<LoadReport>>>,
    /// The `Endpoint` was dropped, and is no owner any more.
    orphaned: AtomicBool,
}

/// The backend that holds an address, whether it is used or not.
#[cfg(any(test, feature = "pingora"))]
pub(crate) struct Holder {
    pub(crate) endpoint: Arc<Endpoint>,
    /// It takes traffic, and health checks say nothing against it.
    pub(crate) is_used: bool,
    /// Its static weight, as it registered it or an operator has said.
    pub(crate) static_weight: f64,
}

/// There is no report of requests in flight.
const NO_REPORT: u64 = u64::MAX;

impl EndpointState {
    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The node, as it last registered.
    pub(super) fn node(&self) -> Arc<Node> {
        self.node.load_full()
    }

    /// Above 0, whatever the node reports, unless its static weight is 0.
    pub(super) fn weight(&self) -> Weight {
        Weight::new(f64::from_bits(self.weight.load(Ordering::Relaxed)))
    }

    pub(super) fn success(&self) -> f32 {
        self.success.get()
    }

    /// Whether it gets nothing but probes.
    pub(super) fn is_ejected(&self) -> bool {
        self.is_ejected.load(Ordering::Relaxed)
    }

    /// The probability with which it is accepted when it is drawn.
    pub(super) fn acceptance_now(&self) -> f32 {
        match self.is_ejected() {
            true => 0.0,
            false => self.fleet.acceptance(self.success.get()),
        }
    }

    /// One of the requests in flight has become a tunnel; `is_counted` means that the policy counts it among all.
    pub(super) fn begin_tunnel(&self, is_counted: bool) {
        self.tunnels.fetch_add(1, Ordering::Relaxed);
        self.fleet.begin_tunnel(is_counted);
    }

    /// A tunnel has ended.
    pub(super) fn end_tunnel(&self, is_counted: bool) {
        self.tunnels.fetch_sub(1, Ordering::Relaxed);
        self.fleet.end_tunnel(is_counted);
    }

    pub(super) fn tunnels(&self) -> u32 {
        self.tunnels.load(Ordering::Relaxed)
    }

    /// Counts a report that could not be parsed.
    pub(super) fn refuse_report(&self) {
        self.fleet.count_refused(1);
    }

    pub(super) fn report(&self, report: &LoadReport, now: Instant) {
        let report = &report.sane();
        self.fleet.add_news();
        if report.refused > 0 {
            self.fleet.count_refused(report.refused.into());
        }
        if let Some(in_flight) = report.in_flight {
            let in_flight = in_flight as f32;
            let stamped = u64::from(in_flight.to_bits()) << 32 | u64::from(self.fleet.millis(now));
            self.in_flight_report.store(stamped, Ordering::Relaxed);
            self.fleet
                .add_in_flight_report(in_flight / self.capacity.get());
            self.fleet.hear(self.place.load(Ordering::Relaxed), now);
        }
        if report.has_load() {
            let stored = self
                .load_report
                .get_or_init(|| Box::new(Mutex::new(*report)));
            let mut stored = match stored.try_lock() {
                Ok(stored) => stored,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Another request is storing a report that is just as good.
                Err(TryLockError::WouldBlock) => return,
            };
            *stored = *report;
            self.has_load_report.store(true, Ordering::Relaxed);
        }
    }

    /// The factor by which its own reports of requests in flight change its score.
    pub(super) fn in_flight_factor(&self, now: Instant) -> f32 {
        let report = match self.in_flight_report.load(Ordering::Relaxed) {
            NO_REPORT => None,
            stamped => {
                let reported = f32::from_bits((stamped >> 32) as u32);
                let age = self.fleet.age(stamped as u32, now);
                Some((reported / self.capacity.get(), age))
            }
        };
        self.fleet.in_flight_factor(report)
    }
}

/// Requests in flight, as the guard of one of them sees it.
pub(super) fn in_flight_with_guard(state: &Arc<EndpointState>) -> u32 {
    let endpoints = usize::from(!state.is_orphaned());
    let guards = Arc::strong_count(state).saturating_sub(endpoints) as u32;
    guards.saturating_sub(state.lingering.load(Ordering::Relaxed))
}

impl Backend for EndpointState {
    fn is_orphaned(&self) -> bool {
        self.orphaned.load(Ordering::Relaxed)
    }

    fn is_lingering(&self) -> bool {
        self.lingering.load(Ordering::Relaxed) > 0
    }

    fn begin_lingering(&self) {
        self.lingering.fetch_add(1, Ordering::Relaxed);
    }

    fn end_lingering(&self) {
        self.lingering.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.state.orphaned.store(true, Ordering::Relaxed);
        let backend: Arc<dyn Backend> = self.state.clone();
        self.state.fleet.lingering().forget(&backend);
    }
}

/// The latencies of successes since they were last taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Latencies {
    /// In seconds.
    pub(super) mean: f64,
    /// In seconds.
    pub(super) lowest: f64,
}

impl Endpoint {
    pub(super) fn new(node: &Arc<Node>, addr: SocketAddr, fleet: &Arc<Fleet>) -> Self {
        Self {
            state: Arc::new(EndpointState {
                success: AtomicF32::new(1.0),
                faultless: AtomicF32::new(1.0),
                is_ejected: AtomicBool::new(false),
                subset_part: AtomicF32::new(1.0),
                subset_share: AtomicF32::new(1.0),
                is_due: AtomicBool::new(false),
                is_probed: AtomicBool::new(false),
                has_begun_well: AtomicBool::new(false),
                #[cfg(feature = "pingora")]
                is_offered: AtomicBool::new(false),
                refusing: AtomicF32::new(0.0),
                successes: AtomicU32::new(0),
                unmeasured: AtomicU32::new(0),
                lowest_success: AtomicF32::new(1.0),
                was_ejected: AtomicU8::new(0),
                tunnels: AtomicU32::new(0),
                lingering: AtomicU32::new(0),
                latency_sum: AtomicU64::new(0),
                lowest_latency: AtomicU64::new(u64::MAX),
                in_flight_report: AtomicU64::new(NO_REPORT),
                place: AtomicU32::new(u32::MAX),
                weight: AtomicU64::new(1_f64.to_bits()),
                capacity: AtomicF32::new(1.0),
                base: AtomicF32::new(1.0),
                acceptance: AtomicF32::new(1.0),
                calm: AtomicF32::new(1.0),
                fleet: fleet.clone(),
                addr,
                node: ArcSwap::new(node.clone()),
                has_load_report: AtomicBool::new(false),
                load_report: OnceLock::new(),
                orphaned: AtomicBool::new(false),
            }),
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.state.addr
    }

    pub(crate) fn node(&self) -> Arc<Node> {
        self.state.node()
    }

    pub(super) fn set_node(&self, node: Arc<Node>) {
        self.state.node.store(node);
    }

    pub(super) fn weight(&self) -> Weight {
        self.state.weight()
    }

    /// What it gets while nothing else does.
    #[cfg(feature = "pingora")]
    pub(crate) fn share_at_last(&self) -> Share {
        Share::new(self.state.weight().get())
    }

    pub(crate) fn share(&self) -> Share {
        Share::new(self.state.weight().get() * f64::from(self.acceptance()))
    }

    pub(super) fn acceptance(&self) -> f32 {
        self.state.acceptance.get()
    }

    pub(super) fn calm(&self) -> f32 {
        self.state.calm.get()
    }

    pub(super) fn set_calm(&self, calm: f32) {
        self.state.calm.set(calm);
    }

    /// The part of its weight that was not learned.
    pub(super) fn base(&self) -> f32 {
        self.state.base.get()
    }

    pub(super) fn set_base(&self, base: f64) {
        self.state.base.set(base as f32);
    }

    /// Whether this process uses other backends, which are part of its subset.
    pub(super) fn is_outside(&self) -> bool {
        self.state.subset_part.get() == 0.0
    }

    /// What its weight is multiplied by where it is compared with others, because of the processes that leave it out, and
    /// what its share is multiplied by; 0 and anything if this process does so.
    pub(super) fn set_subset_part(&self, part: f64, of_share: f64) {
        self.state.subset_part.set(part as f32);
        self.state.subset_share.set(of_share as f32);
    }

    /// The same for the weight of a backend that gets requests in spite of being left out.
    pub(super) fn subset_part(&self) -> f64 {
        match self.is_outside() {
            true => 1.0,
            false => self.state.subset_part.get().into(),
        }
    }

    /// Its share of what this process sends to all that are used alike.
    pub(super) fn subset_share(&self) -> f64 {
        self.share().get() * f64::from(self.state.subset_share.get())
    }

    /// Sets how much it can take, where all can take this `mean`; the part of that which counts because of its zone;
    /// and its probability of acceptance.
    pub(super) fn set_weight(&self, capacity: Weight, mean: f64, zone_part: f64, acceptance: f32) {
        let weight = (capacity.get() * zone_part).to_bits();
        self.state.weight.store(weight, Ordering::Relaxed);
        // A backend that gets no more traffic still works on the requests it has: their count is
        // compared with what it could take before.
        let capacity = (capacity.get() / mean) as f32;
        if capacity.is_finite() && capacity > 0.0 {
            self.state.capacity.set(capacity);
        }
        self.state.acceptance.set(acceptance);
    }

    /// Its place in the last table.
    pub(super) fn place(&self) -> u32 {
        self.state.place.load(Ordering::Relaxed)
    }

    /// Sets its place in the table that will be published.
    pub(super) fn set_place(&self, place: u32) {
        self.state.place.store(place, Ordering::Relaxed);
    }

    pub(super) fn state(&self) -> &EndpointState {
        &self.state
    }

    /// Requests in flight, tunnels included.
    pub(super) fn in_flight(&self) -> u32 {
        let guards = (Arc::strong_count(&self.state) - 1) as u32;
        guards.saturating_sub(self.state.lingering.load(Ordering::Relaxed))
    }

    /// The requests that it works on: those in flight that have not become tunnels.
    pub(super) fn busy(&self) -> u32 {
        self.in_flight().saturating_sub(self.state.tunnels())
    }

    pub(super) fn success(&self) -> f32 {
        self.state.success()
    }

    /// The part of the requests that it answered without doing its work, 0 to 1.
    pub(super) fn refusing(&self) -> f32 {
        self.state.refusing.get()
    }

    /// Takes the load that it last reported in a response.
    pub(super) fn take_load_report(&self) -> Option<LoadReport> {
        // With thousands of backends, most of which report nothing, locks alone would cost too much.
        if !self.state.has_load_report.load(Ordering::Relaxed) {
            return None;
        }
        self.state.has_load_report.store(false, Ordering::Relaxed);
        let report = self.state.load_report.get()?.lock();
        Some(*report.unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether it has reported its requests in flight within `max_age`.
    pub(super) fn reports_in_flight(&self, max_age: Duration, now: Instant) -> bool {
        let stamped = self.state.in_flight_report.load(Ordering::Relaxed);
        if stamped == NO_REPORT {
            return false;
        }
        let age = self.state.fleet.age(stamped as u32, now);
        let is_recent = u128::from(age) <= max_age.as_millis();
        if !is_recent {
            // Otherwise it would look new again after the time stamps have wrapped.
            let _ = self.state.in_flight_report.compare_exchange(
                stamped,
                NO_REPORT,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        is_recent
    }

    /// Counts a request as in flight until the returned value is dropped.
    pub(super) fn enter(&self) -> Arc<EndpointState> {
        self.state.clone()
    }

    /// Keeps requests away from it, though it is still in the table: its registration is gone.
    pub(super) fn retire(&self) {
        self.state.success.set(-1.0);
        self.state.is_due.store(false, Ordering::Relaxed);
        self.state.fleet.set_some_fail();
    }

    /// Undoes [`retire`](Self::retire), with the success rate it had before.
    pub(super) fn revive(&self, success: f32) {
        self.state.success.set(success);
        self.state.fleet.set_some_fail();
        if self.is_ejected() {
            self.state.fleet.set_ejected(true);
        }
    }

    /// Begins with what a former process has learned of it.
    pub(super) fn learn(&self, lesson: &Lesson) {
        let state = &self.state;
        state.success.set(lesson.success);
        state.faultless.set(lesson.success);
        state.is_ejected.store(lesson.is_ejected, Ordering::Relaxed);
        // It is not new.
        state.is_due.store(false, Ordering::Relaxed);
        if lesson.is_ejected {
            state.fleet.set_ejected(true);
        }
        if lesson.success < 1.0 {
            state.fleet.set_some_fail();
        }
    }

    /// Whether it gets nothing but probes.
    pub(crate) fn is_ejected(&self) -> bool {
        self.state.is_ejected()
    }

    /// The probability with which it is accepted when it is drawn, as of now.
    pub(super) fn acceptance_now(&self) -> f32 {
        self.state.acceptance_now()
    }

    /// Whether a request is to try it.
    pub(super) fn is_due(&self) -> bool {
        self.state.is_due.load(Ordering::Relaxed)
    }

    /// Asks for a request that tries it, or for none any more.
    pub(super) fn set_due(&self, is_due: bool) {
        self.state.is_due.store(is_due, Ordering::Relaxed);
    }

    /// Whether a probe is under way.
    pub(super) fn is_probed(&self) -> bool {
        self.state.is_probed.load(Ordering::Relaxed)
    }

    /// Uses it again, with at least this success rate.
    pub(super) fn readmit_at_least(&self, success: f32) {
        self.state.readmit_at_least(success);
    }

    /// The lowest success rate since this was last asked, and whether it was ejected for its answers since then or in the
    /// time before: what begins to fail just before a tick is seen of some only after it.
    pub(super) fn take_failures(&self) -> (f32, bool) {
        let state = &self.state;
        let lowest = state.lowest_success.get();
        state.lowest_success.set(state.success.get());
        let ticks = state.was_ejected.load(Ordering::Relaxed);
        if ticks > 0 {
            state.was_ejected.store(ticks - 1, Ordering::Relaxed);
        }
        (lowest, ticks > 0)
    }

    /// Uses it again, if it was ejected, and with this success rate, because all others have failed as it has.
    pub(super) fn forgive(&self, success: f32) {
        let state = &self.state;
        let (was_ejected, faultless) = (self.is_ejected(), state.faultless.get());
        state.success.set(success);
        state.lowest_success.set(success);
        state.readmit();
        state.faultless.set(faultless.max(success));
        if was_ejected {
            let node = self.node();
            info!(node = node.id, addr = %self.addr(), "a backend that failed is used again: so did the others");
        }
    }

    /// Uses it again if the others have become no better than it is, or if nobody cares.
    pub(super) fn readmit_if_alike(&self) {
        let fleet = &self.state.fleet;
        if self.is_ejected() && (fleet.readmits(self.success()) || !fleet.is_ejecting()) {
            self.state.readmit();
        }
    }

    /// Ejects it if it gets no requests any more because too many have failed.
    pub(super) fn eject_if_avoided(&self) {
        self.state.eject_if_avoided();
    }

    /// A reader of its requests in flight.
    pub(super) fn counter(&self) -> InFlightCounter {
        InFlightCounter(Arc::downgrade(&self.state))
    }
}

/// Reads a backend's requests in flight with one pointer less to follow than through the
/// [`Endpoint`].
#[derive(Debug)]
pub(super) struct InFlightCounter(Weak<EndpointState>);

impl InFlightCounter {
    pub(super) fn get(&self) -> usize {
        self.0.strong_count().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_requests_write_is_far_from_the_next_backend() {
        // With the two counts of the `Arc`: one cache line and the adjacent one.
        assert!(size_of::<EndpointState>() + 2 * size_of::<usize>() >= 128);
    }
}
