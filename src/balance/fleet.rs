//! What requests have found out about all backends together, for the pick to read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use super::atomic::AtomicF32;
use super::settings::Adaptive;

/// State of all backends of a balancer together. Every pick reads it; it is written rarely.
#[derive(Debug)]
pub(super) struct Fleet {
    /// Bits of [`SOME_FAIL`] and [`SOME_REPORT_IN_FLIGHT`]; 0 selects the fast path of a pick.
    mode: AtomicU8,
    /// The best success rate of any backend, as of the last tick.
    best_success: AtomicF32,
    /// Reported requests in flight per unit of weight: a moving mean over all backends.
    reported_in_flight: AtomicF32,
    /// How much one outcome moves a success rate.
    success_gain: AtomicF32,
    /// The part of the best success rate below which a backend is drawn less often.
    gate_below: AtomicF32,
    /// The lowest probability with which such a backend is accepted.
    gate_floor: AtomicF32,
    /// The time over which a report of requests in flight fades, in seconds.
    in_flight_fade: AtomicF32,
    /// The factor by which such a report moves a score at most.
    in_flight_bound: AtomicF32,
    /// What the time stamps of reports count from: the time of the first report.
    epoch: OnceLock<Instant>,
    /// How many values in reports, and whole reports, were refused.
    refused: AtomicU64,
}

/// The success rate of some backend is low.
const SOME_FAIL: u8 = 1;
/// Some backend reports how many requests it has in flight.
const SOME_REPORT_IN_FLIGHT: u8 = 2;

impl Fleet {
    pub(super) fn new(settings: &Adaptive) -> Self {
        Self {
            mode: AtomicU8::new(0),
            best_success: AtomicF32::new(1.0),
            reported_in_flight: AtomicF32::new(0.0),
            success_gain: AtomicF32::new(settings.success_gain as f32),
            gate_below: AtomicF32::new(settings.gate_below as f32),
            gate_floor: AtomicF32::new(settings.gate_floor as f32),
            in_flight_fade: AtomicF32::new(settings.in_flight_fade_ms as f32 / 1e3),
            in_flight_bound: AtomicF32::new(settings.in_flight_bound as f32),
            epoch: OnceLock::new(),
            refused: AtomicU64::new(0),
        }
    }

    /// Uses other constants from now on.
    pub(super) fn change(&self, settings: &Adaptive) {
        self.success_gain.set(settings.success_gain as f32);
        self.gate_below.set(settings.gate_below as f32);
        self.gate_floor.set(settings.gate_floor as f32);
        let fade = settings.in_flight_fade_ms as f32 / 1e3;
        self.in_flight_fade.set(fade);
        self.in_flight_bound.set(settings.in_flight_bound as f32);
    }

    /// Whether a pick depends on nothing but weights and its own counts of requests in flight.
    pub(super) fn is_quiet(&self) -> bool {
        self.mode.load(Ordering::Relaxed) == 0
    }

    pub(super) fn some_fail(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & SOME_FAIL != 0
    }

    pub(super) fn some_report_in_flight(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & SOME_REPORT_IN_FLIGHT != 0
    }

    fn set_mode(&self, bit: u8) {
        // Every pick reads it: write only if that changes something.
        if self.mode.load(Ordering::Relaxed) & bit == 0 {
            self.mode.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// From now on picks check success rates, because one has become low.
    pub(super) fn set_some_fail(&self) {
        self.set_mode(SOME_FAIL);
    }

    /// Takes over the best and the worst success rate of all backends, as of now.
    pub(super) fn set_success_rates(&self, best: f32, worst: f32) {
        self.best_success.set(best);
        if self.acceptance(worst) < 1.0 {
            self.set_some_fail();
        } else {
            self.mode.fetch_and(!SOME_FAIL, Ordering::Relaxed);
        }
    }

    /// No backend reports requests in flight any more.
    pub(super) fn clear_in_flight_reports(&self) {
        self.mode
            .fetch_and(!SOME_REPORT_IN_FLIGHT, Ordering::Relaxed);
    }

    /// The success rate after a success.
    pub(super) fn after_success(&self, success: f32) -> f32 {
        let next = success + self.success_gain.get() * (1.0 - success);
        // So close to 1 that the formula would never reach it.
        if next > 0.9999 { 1.0 } else { next }
    }

    /// The success rate after a failure.
    pub(super) fn after_failure(&self, success: f32) -> f32 {
        success * (1.0 - self.success_gain.get())
    }

    /// The probability with which a backend with this success rate is accepted when it is drawn: its
    /// rate relative to the best one, squared. Where all rates are close to 0, all backends are
    /// alike. A rate below 0 stands for a backend that is gone.
    pub(super) fn acceptance(&self, success: f32) -> f32 {
        const NEGLIGIBLE: f32 = 0.02;
        if success < 0.0 {
            return 0.0;
        }
        let relative = (success + NEGLIGIBLE) / (self.best_success.get() + NEGLIGIBLE);
        if relative >= self.gate_below.get() {
            return 1.0;
        }
        (relative * relative).clamp(self.gate_floor.get(), 1.0)
    }

    /// Takes over a backend's report of requests in flight, per unit of its weight.
    pub(super) fn add_in_flight_report(&self, per_weight: f32) {
        let mean = &self.reported_in_flight;
        if self.some_report_in_flight() {
            // Of two reports at the same time one may be lost.
            mean.set(mean.get() + (per_weight - mean.get()) / 32.0);
        } else {
            mean.set(per_weight);
            self.set_mode(SOME_REPORT_IN_FLIGHT);
        }
    }

    /// The factor by which the reports of requests in flight change a backend's score: below 1 if it
    /// has fewer requests in flight for its weight than the mean of all. `report` is the last report
    /// of the backend itself, per unit of its weight, and its age in ms.
    pub(super) fn in_flight_factor(&self, report: Option<(f32, u32)>) -> f32 {
        let mean = self.reported_in_flight.get();
        let per_weight = match report {
            None => mean,
            Some((reported, age)) => {
                let kept = (age as f32 / -1e3 / self.in_flight_fade.get()).exp();
                reported * kept + mean * (1.0 - kept)
            }
        };
        let bound = self.in_flight_bound.get();
        ((per_weight + 1.0) / (mean + 1.0)).clamp(1.0 / bound, bound)
    }

    pub(super) fn count_refused(&self, values: u64) {
        self.refused.fetch_add(values, Ordering::Relaxed);
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The time in ms since the first call. It wraps after 49 days; ages are differences, and much
    /// shorter.
    pub(super) fn millis(&self, now: Instant) -> u32 {
        let epoch = self.epoch.get_or_init(|| now);
        now.saturating_duration_since(*epoch).as_millis() as u32
    }

    /// The age in ms of a time stamp from [`millis`](Self::millis); 0 for a stamp later than `now`,
    /// which another thread has just made.
    pub(super) fn age(&self, stamp: u32, now: Instant) -> u32 {
        let age = self.millis(now).wrapping_sub(stamp);
        if age > u32::MAX / 2 { 0 } else { age }
    }
}
