//! What requests find out about a backend, and what follows for the next ones.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{Endpoint, EndpointState, Latencies};
use crate::balance::fleet::{Failure, SuccessRates};

/// The most that a success rate is when a backend is ejected.
const EJECTED_SUCCESS: f32 = 0.5;
/// For how many ticks an ejection is recent.
const RECENT_TICKS: u8 = 2;
/// So few requests were answered without work that it is as if there had been none.
const FORGOTTEN: f32 = 1e-3;
/// Longer latencies count as one hour, so that 2^22 of them can be added up.
const MAX_LATENCY_NANOS: u64 = 3_600_000_000_000;

impl EndpointState {
    /// Takes the turn of the first request; `false` if that is not to come now.
    pub(in crate::balance) fn take_first(&self) -> bool {
        !self.is_ejected() && self.is_due.swap(false, Ordering::Relaxed)
    }

    /// Takes the turn of a probe; `false` if none is due, or none can be paid for.
    pub(in crate::balance) fn take_probe(&self) -> bool {
        if !self.is_ejected() || !self.is_due.load(Ordering::Relaxed) || !self.fleet.pay_probe() {
            return false;
        }
        let is_taken = self.is_due.swap(false, Ordering::Relaxed);
        match is_taken {
            true => self.is_probed.store(true, Ordering::Relaxed),
            false => self.fleet.repay_probe(),
        }
        is_taken
    }

    /// The probe whose turn was taken may follow, or not.
    #[cfg(feature = "pingora")]
    pub(in crate::balance) fn offer_probe(&self) {
        self.is_offered.store(true, Ordering::Relaxed);
        // If it does not, it has cost nothing, and the next one has a turn of its own.
        self.fleet.repay_probe();
        self.is_probed.store(false, Ordering::Relaxed);
    }

    /// Whether the request that begins is the probe that was offered.
    #[cfg(feature = "pingora")]
    pub(in crate::balance) fn take_offered_probe(&self) -> bool {
        let is_offered = self.is_offered.load(Ordering::Relaxed)
            && self.is_offered.swap(false, Ordering::Relaxed)
            && self.is_ejected();
        if is_offered {
            self.fleet.pay_probe();
            self.is_probed.store(true, Ordering::Relaxed);
        }
        is_offered
    }

    /// A probe has ended without an outcome: the next request is one instead.
    pub(in crate::balance) fn probe_says_nothing(&self) {
        self.fleet.repay_probe();
        self.probe_ends(true);
    }

    fn probe_ends(&self, is_due_again: bool) {
        self.is_probed.store(false, Ordering::Relaxed);
        if is_due_again && self.is_ejected() {
            self.is_due.store(true, Ordering::Relaxed);
        }
    }

    /// A probe has succeeded.
    pub(in crate::balance) fn probe_succeeds(&self) {
        self.add_probed_success();
        // One success says little: the next request tries it again.
        self.probe_ends(true);
    }

    /// A probe seems to succeed. Until that is certain, the next one comes with a tick: few are lost to a backend whose
    /// responses break off.
    pub(in crate::balance) fn probe_begins_to_answer(&self) {
        self.add_probed_success();
        self.has_begun_well.store(true, Ordering::Relaxed);
        self.probe_ends(false);
    }

    /// A probe that had begun well has ended well.
    pub(in crate::balance) fn begun_probe_succeeds(&self) {
        self.has_begun_well.store(false, Ordering::Relaxed);
        self.probe_ends(true);
    }

    /// Whether a probe has begun well since this was asked last, and none has failed.
    pub(in crate::balance) fn take_begun_well(&self) -> bool {
        self.has_begun_well.swap(false, Ordering::Relaxed)
    }

    fn add_probed_success(&self) {
        self.fleet.repay_probe();
        self.unmeasured.fetch_add(1, Ordering::Relaxed);
        self.add_success();
        if self.is_ejected() && self.fleet.readmits(self.success()) {
            self.readmit();
            let node = self.node();
            info!(node = node.id, addr = %self.addr, "a backend that failed works again");
        }
    }

    /// A probe has failed.
    pub(in crate::balance) fn probe_fails(&self, failure: Failure) {
        self.add_failure(failure);
        self.probe_ends(false);
    }

    /// A probe has failed after its response had begun.
    pub(in crate::balance) fn begun_probe_fails(&self, failure: Failure) {
        if !self.is_ejected() {
            return self.failed(failure);
        }
        // It was lost, and the next one comes after a pause.
        self.fleet.pay_probe();
        self.has_begun_well.store(false, Ordering::Relaxed);
        self.is_due.store(false, Ordering::Relaxed);
        self.add_failure(failure);
    }

    fn add_success(&self) {
        self.fleet.add_news();
        let success = self.success.get();
        // A backend that is gone stays gone, whatever becomes of its last requests.
        if !(0.0..1.0).contains(&success) {
            return;
        }
        let is_ejected = self.is_ejected();
        self.success
            .set(self.fleet.after_success(success, is_ejected));
        let faultless = self.faultless.get();
        self.faultless
            .set(self.fleet.after_success(faultless, is_ejected));
    }

    fn add_failure(&self, failure: Failure) {
        self.unmeasured.fetch_add(1, Ordering::Relaxed);
        self.fleet.add_news();
        let before = self.success.get();
        if before < 0.0 {
            return;
        }
        let is_ejected = self.is_ejected();
        let after = |rate: f32| self.fleet.after_failure(rate, is_ejected);
        // Two failures at the same time may count as one; the next one corrects that.
        let success = match failure {
            Failure::Unreachable => after(after(before)),
            Failure::Fault | Failure::Overload => after(before),
        };
        self.success.set(success);
        if success < self.lowest_success.get() {
            self.lowest_success.set(success);
        }
        let faultless = self.faultless.get();
        self.faultless.set(match failure {
            Failure::Unreachable => after(after(faultless)),
            Failure::Fault => after(faultless),
            Failure::Overload => faultless,
        });
    }

    /// It works, and how fast is not known.
    fn works(&self) {
        // What was in flight when it was ejected says nothing about now.
        if !self.is_ejected() {
            self.add_success();
        }
    }

    /// It answered without its usual work.
    pub(in crate::balance) fn answered(&self) {
        self.works();
        self.unmeasured.fetch_add(1, Ordering::Relaxed);
    }

    /// The same after this time, under a policy that compares requests in flight.
    pub(in crate::balance) fn answered_after(self: &Arc<Self>, took: Duration, now: Instant) {
        self.answered();
        let fleet = &self.fleet;
        let refusing = fleet.after_success(self.refusing.get(), false);
        self.refusing.set(refusing);
        // What all of them refuse alike attracts nothing. The rest is how much less it has in flight than others.
        let excess = refusing - fleet.usual_refusing();
        if fleet.is_ejecting() && excess > 0.0 {
            fleet.lingering().keep(self.clone(), took, excess, now);
        }
    }

    pub(in crate::balance) fn readmit_at_least(&self, success: f32) {
        self.success.set(self.success.get().max(success));
        self.readmit();
    }

    pub(in crate::balance) fn readmit(&self) {
        self.is_due.store(false, Ordering::Relaxed);
        self.faultless.set(self.success.get());
        self.is_ejected.store(false, Ordering::Relaxed);
    }

    fn eject(&self) {
        if !self.is_ejected.swap(true, Ordering::Relaxed) {
            // What it has to make up for with probes.
            self.success.set(self.success.get().min(EJECTED_SUCCESS));
            self.faultless.set(self.success.get());
            self.is_due.store(false, Ordering::Relaxed);
            self.fleet.set_ejected(true);
            let node = self.node();
            warn!(
                node = node.id,
                addr = %self.addr,
                "a backend fails: it gets nothing but a few probes until it works again"
            );
        }
    }

    /// Ejects a backend that gets no requests any more because too many have failed: without probes, it could never
    /// show that it works again.
    pub(in crate::balance) fn eject_if_avoided(&self) {
        let has_failed = self.fleet.is_ejecting() && self.fleet.has_failed(self.success.get());
        if has_failed && !self.is_ejected() && self.fleet.take_ejection() {
            self.eject();
        }
    }

    pub(in crate::balance) fn succeeded(&self, latency: Duration) {
        self.works();
        let refusing = self.refusing.get();
        if refusing > 0.0 {
            let moved = self.fleet.after_failure(refusing, false);
            self.refusing
                .set(if moved < FORGOTTEN { 0.0 } else { moved });
        }
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let nanos = nanos.min(MAX_LATENCY_NANOS);
        self.latency_sum.fetch_add(nanos, Ordering::Relaxed);
        if nanos < self.lowest_latency.load(Ordering::Relaxed) {
            self.lowest_latency.fetch_min(nanos, Ordering::Relaxed);
        }
        self.successes.fetch_add(1, Ordering::Relaxed);
    }

    pub(in crate::balance) fn failed(&self, failure: Failure) {
        if self.is_ejected() {
            self.unmeasured.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.add_failure(failure);
        let rates = SuccessRates {
            success: self.success.get(),
            faultless: self.faultless.get(),
        };
        if rates.success < 0.0 {
            return;
        }
        // Whoever refuses connections is not there, however many they are.
        let is_ejected = self.fleet.is_ejecting()
            && self.fleet.ejects(rates, failure)
            && (failure == Failure::Unreachable || self.fleet.take_ejection());
        if is_ejected {
            let ticks = match failure {
                Failure::Unreachable => 0,
                Failure::Fault | Failure::Overload => RECENT_TICKS,
            };
            self.was_ejected.store(ticks, Ordering::Relaxed);
            self.eject();
        }
        if is_ejected || self.fleet.acceptance(rates.success) < 1.0 {
            self.fleet.set_some_fail();
        }
    }
}

impl Endpoint {
    /// Takes the latencies of the successes so far; `None`, and nothing is taken, if there are fewer
    /// than `at_least`.
    pub(in crate::balance) fn take_latencies(&self, at_least: u32) -> Option<Latencies> {
        let state = &self.state;
        if state.successes.load(Ordering::Relaxed) < at_least {
            return None;
        }
        // A request that ends between these is counted in part now and in part next time.
        let count = state.successes.swap(0, Ordering::Relaxed);
        let sum = state.latency_sum.swap(0, Ordering::Relaxed);
        let lowest = state.lowest_latency.swap(u64::MAX, Ordering::Relaxed);
        let mean = sum as f64 / f64::from(count) / 1e9;
        Some(Latencies {
            mean,
            lowest: (lowest as f64 / 1e9).min(mean),
        })
    }

    /// A number that every outcome changes, until latencies are taken.
    pub(in crate::balance) fn outcomes(&self) -> u32 {
        let unmeasured = self.state.unmeasured.load(Ordering::Relaxed);
        let successes = self.state.successes.load(Ordering::Relaxed);
        successes.wrapping_add(unmeasured)
    }

    /// Whether this process has had any request there since [`outcomes`](Self::outcomes) was this.
    pub(in crate::balance) fn is_active_since(&self, outcomes: u32) -> bool {
        self.in_flight() > 0 || self.outcomes() != outcomes
    }
}
