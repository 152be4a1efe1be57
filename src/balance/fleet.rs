//! What requests have found out about all backends together, for the pick to read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use super::atomic::AtomicF32;
use super::heard::Heard;
use super::lingering::Lingering;
use super::pick::Probes;
use super::settings::Adaptive;

/// How a backend has failed a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// It answered wrongly, too late or not to the end.
    Fault,
    /// No connection could be made: it is probably not there.
    Unreachable,
    /// It said that it has too much to do.
    Overload,
}

/// The success rates of one backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct SuccessRates {
    pub(super) success: f32,
    /// Without the requests for which it said that it is overloaded.
    pub(super) faultless: f32,
}

/// State of all backends of a balancer together. Every pick reads it; it is written rarely.
#[derive(Debug)]
pub(super) struct Fleet {
    /// Bits of [`SOME_FAIL`], [`SOME_REPORT_IN_FLIGHT`], [`SOME_TUNNELS`], [`SOME_ON_TRIAL`], [`SOME_EJECTED`],
    /// [`MOST_REPORT_IN_FLIGHT`] and [`NEWS`]; without the first three a pick is fast.
    mode: AtomicU8,
    /// The best success rate of any backend, as of the last tick.
    best_success: AtomicF32,
    /// Reported requests in flight per unit of weight: a moving mean over all backends.
    reported_in_flight: AtomicF32,
    /// How much one outcome moves a success rate.
    success_gain: AtomicF32,
    /// The part of the best success rate below which a backend is drawn less often.
    gate_below: AtomicF32,
    /// The part of the median success rate below which a backend that fails is ejected.
    eject_below: AtomicF32,
    /// The success rate below which it is ejected, as of the last tick.
    eject_limit: AtomicF32,
    /// The success rate from which on it is used again, as of the last tick.
    readmit_limit: AtomicF32,
    /// How many more backends may be ejected before the next tick.
    may_eject: AtomicU32,
    /// Requests that may be lost to probes, in [`UNITS`] of a request.
    probe_credit: AtomicU32,
    /// What each request adds to it.
    probe_part: AtomicU32,
    /// The last pick went to a new backend.
    was_new: AtomicBool,
    /// Any request may be a probe, because no other ones come.
    probes_with_any: AtomicBool,
    /// The policy in use heeds outcomes.
    is_ejecting: AtomicBool,
    /// The time over which a report of requests in flight fades, in seconds.
    in_flight_fade: AtomicF32,
    /// The factor by which such a report moves a score at most.
    in_flight_bound: AtomicF32,
    /// What the time stamps of reports count from: the time of the first report.
    epoch: OnceLock<Instant>,
    /// Where the turns of this process begin, so that several processes do not begin at the same backend.
    first_turn: OnceLock<u64>,
    /// How many values in reports, and whole reports, were refused.
    refused: AtomicU64,
    heard: Heard,
    /// How many of the requests that the policy counts have become tunnels.
    tunnels: AtomicU32,
    /// The part of the requests that backends answer without doing their work, as of the last tick.
    usual_refusing: AtomicF32,
    /// The part of the weight of all that is not ejected, as of the last tick; above 0.
    working_part: AtomicF32,
    lingering: Lingering,
}

/// The success rate of some backend is low.
const SOME_FAIL: u8 = 1;
/// Some backend reports how many requests it has in flight.
const SOME_REPORT_IN_FLIGHT: u8 = 2;
/// More than half of those do that get requests.
const MOST_REPORT_IN_FLIGHT: u8 = 16;
/// A request has had an outcome since the last tick, or a backend has reported something.
const NEWS: u8 = 32;
/// Some backend is new or ejected, and is to be tried.
const SOME_ON_TRIAL: u8 = 4;
/// Some backend is ejected.
const SOME_EJECTED: u8 = 8;
/// Some request in flight has become a tunnel.
const SOME_TUNNELS: u8 = 64;

/// A report of requests in flight is news for this many times the time over which it fades.
const NEWS_FADES: f32 = 2.0;
/// A report of requests in flight counts in the mean of all up to so many times that mean.
const MOST_ABOVE_MEAN: f32 = 4.0;
/// The units of a request that may be lost to a probe.
const UNITS: u32 = 10_000;
/// The most requests that may be lost to probes at once.
const MOST_CREDIT: u32 = 2 * UNITS;
/// How many standard deviations of its success rate a backend has to be below the median, so that
/// chance alone does not eject it. Where 30 % of all requests fail, 66 requests a second bring a backend below four
/// of them once in nine minutes, and below five once in some hours.
const EJECT_DEVIATIONS: f32 = 5.0;
/// The same, for being used again.
const READMIT_DEVIATIONS: f32 = 2.0;
/// The part of the best success rate below which a backend is ejected whatever most do, and also one
/// that is only overloaded: until then less of the traffic may be all that it needs.
const EJECT_ALWAYS_BELOW: f32 = 0.3;
/// The part of the median success rate from which on a backend that was ejected is used again.
const READMIT_FROM: f32 = 0.95;
/// With a smaller part that works, nothing is shared out by it.
const LEAST_WORKING: f32 = 0.01;
/// How much the outcome of a probe moves a success rate.
const PROBE_GAIN: f32 = 0.25;

fn probe_part(settings: &Adaptive) -> u32 {
    (settings.probe_part * f64::from(UNITS)).round() as u32
}

impl Fleet {
    pub(super) fn new(settings: &Adaptive) -> Self {
        Self {
            mode: AtomicU8::new(0),
            best_success: AtomicF32::new(1.0),
            reported_in_flight: AtomicF32::new(0.0),
            success_gain: AtomicF32::new(settings.success_gain as f32),
            gate_below: AtomicF32::new(settings.gate_below as f32),
            eject_below: AtomicF32::new(settings.eject_below as f32),
            eject_limit: AtomicF32::new(settings.eject_below as f32),
            readmit_limit: AtomicF32::new(READMIT_FROM),
            may_eject: AtomicU32::new(1),
            probe_credit: AtomicU32::new(UNITS),
            probe_part: AtomicU32::new(probe_part(settings)),
            was_new: AtomicBool::new(false),
            probes_with_any: AtomicBool::new(false),
            is_ejecting: AtomicBool::new(false),
            in_flight_fade: AtomicF32::new(settings.in_flight_fade_ms as f32 / 1e3),
            in_flight_bound: AtomicF32::new(settings.in_flight_bound as f32),
            epoch: OnceLock::new(),
            first_turn: OnceLock::new(),
            refused: AtomicU64::new(0),
            heard: Heard::new(),
            tunnels: AtomicU32::new(0),
            usual_refusing: AtomicF32::new(0.0),
            working_part: AtomicF32::new(1.0),
            lingering: Lingering::new(),
        }
    }

    /// Where the turns of this process begin: a number that chance gives to each process.
    pub(super) fn first_turn(&self, random: &mut fastrand::Rng) -> u64 {
        *self.first_turn.get_or_init(|| random.u64(..) >> 1)
    }

    /// The same, once there has been a turn.
    pub(super) fn seed(&self) -> Option<u64> {
        self.first_turn.get().copied()
    }

    /// Uses other constants from now on.
    pub(super) fn change(&self, settings: &Adaptive) {
        self.success_gain.set(settings.success_gain as f32);
        self.gate_below.set(settings.gate_below as f32);
        self.eject_below.set(settings.eject_below as f32);
        self.probe_part
            .store(probe_part(settings), Ordering::Relaxed);
        let fade = settings.in_flight_fade_ms as f32 / 1e3;
        self.in_flight_fade.set(fade);
        self.in_flight_bound.set(settings.in_flight_bound as f32);
    }

    /// Whether a pick depends on nothing but weights and its own counts of requests in flight.
    pub(super) fn is_quiet(&self) -> bool {
        let mode = self.mode.load(Ordering::Relaxed);
        mode & (SOME_FAIL | SOME_REPORT_IN_FLIGHT | SOME_TUNNELS) == 0
    }

    /// Whether a pick may have to try a backend that is new or ejected.
    pub(super) fn some_on_trial(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & SOME_ON_TRIAL != 0
    }

    /// Picks look for backends that are to be tried from now on, or no more.
    pub(super) fn set_on_trial(&self, is_any: bool) {
        self.set(SOME_ON_TRIAL, is_any);
    }

    /// Whether some backend is ejected.
    pub(super) fn some_ejected(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & SOME_EJECTED != 0
    }

    /// Some backend is ejected from now on, or none.
    pub(super) fn set_ejected(&self, is_any: bool) {
        self.set(SOME_EJECTED, is_any);
    }

    /// Some request in flight has become a tunnel, or none has.
    pub(super) fn set_tunnels(&self, is_any: bool) {
        self.set(SOME_TUNNELS, is_any);
    }

    /// A tunnel has begun.
    pub(super) fn begin_tunnel(&self, is_counted: bool) {
        self.tunnels
            .fetch_add(u32::from(is_counted), Ordering::Relaxed);
        self.set_tunnels(true);
    }

    /// A tunnel has ended.
    pub(super) fn end_tunnel(&self, is_counted: bool) {
        self.tunnels
            .fetch_sub(u32::from(is_counted), Ordering::Relaxed);
    }

    /// How many tunnels there are among the requests that the policy counts.
    pub(super) fn tunnels(&self) -> u32 {
        self.tunnels.load(Ordering::Relaxed)
    }

    /// The part of the requests that backends answer without doing their work, as of the last tick.
    pub(super) fn usual_refusing(&self) -> f32 {
        self.usual_refusing.get()
    }

    pub(super) fn set_usual_refusing(&self, part: f32) {
        self.usual_refusing.set(part);
    }

    /// The part of the weight of all that is not ejected, as of the last tick.
    pub(super) fn working_part(&self) -> f32 {
        self.working_part.get()
    }

    pub(super) fn set_working_part(&self, part: f32) {
        self.working_part.set(part.max(LEAST_WORKING));
    }

    /// The requests that were answered too soon.
    pub(super) fn lingering(&self) -> &Lingering {
        &self.lingering
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

    fn set(&self, bit: u8, is_set: bool) {
        match is_set {
            true => self.set_mode(bit),
            false if self.mode.load(Ordering::Relaxed) & bit != 0 => {
                self.mode.fetch_and(!bit, Ordering::Relaxed);
            }
            false => {}
        }
    }

    /// A request had an outcome, or a response a report.
    pub(super) fn add_news(&self) {
        self.set_mode(NEWS);
    }

    /// Whether there was any since this was last asked.
    pub(super) fn take_news(&self) -> bool {
        // News that comes between the two is for the next time.
        self.mode.load(Ordering::Relaxed) & NEWS != 0
            && self.mode.fetch_and(!NEWS, Ordering::Relaxed) & NEWS != 0
    }

    /// From now on picks check success rates, because one has become low.
    pub(super) fn set_some_fail(&self) {
        self.set_mode(SOME_FAIL);
    }

    /// The standard deviation of a moving mean of outcomes.
    pub(super) fn deviation(&self, rate: f32) -> f32 {
        let gain = self.success_gain.get();
        let variance = rate * (1.0 - rate) * gain / (2.0 - gain);
        variance.max(0.0).sqrt()
    }

    /// Takes over the best success rate of all backends, and the median and the worst one of those that
    /// are not ejected, as of now.
    pub(super) fn set_success_rates(&self, best: f32, median: f32, worst: f32) {
        self.best_success.set(best);
        let deviation = self.deviation(median);
        let limit =
            |part: f32, deviations: f32| (median * part).min(median - deviations * deviation);
        let eject_below = self.eject_below.get();
        self.eject_limit.set(limit(eject_below, EJECT_DEVIATIONS));
        self.readmit_limit
            .set(limit(READMIT_FROM, READMIT_DEVIATIONS));
        if self.acceptance(worst) < 1.0 {
            self.set_some_fail();
        } else {
            self.mode.fetch_and(!SOME_FAIL, Ordering::Relaxed);
        }
    }

    /// Whether a backend is ejected with these success rates.
    pub(super) fn ejects(&self, rates: SuccessRates, failure: Failure) -> bool {
        let (best, eject_below) = (self.best_success.get(), self.eject_below.get());
        let is_absent = failure == Failure::Unreachable && rates.faultless < best * eject_below;
        self.has_failed(rates.success)
            || (self.is_any_good() && is_absent)
            || rates.faultless < self.eject_limit.get()
    }

    /// Whether a backend with this success rate is ejected whatever the others do, as long as any of them is good.
    pub(super) fn has_failed(&self, success: f32) -> bool {
        let limit = self.best_success.get() * EJECT_ALWAYS_BELOW;
        self.is_any_good() && self.eject_below.get() > 0.0 && success < limit
    }

    /// Where most fail, those are none to compare with; where all do, none is ejected.
    fn is_any_good(&self) -> bool {
        self.best_success.get() > EJECT_ALWAYS_BELOW
    }

    /// Lets so many of those that work be ejected before the next tick, which finds out how well the others do: if all
    /// begin to fail at the same time, none should be.
    pub(super) fn allow_ejections(&self, most: u32) {
        self.may_eject.store(most, Ordering::Relaxed);
    }

    /// Whether a success rate is so far below that of the others that a backend may be ejected for it; or below the one
    /// that was set for all of them.
    pub(super) fn is_poor(&self, success: f32, was_set: Option<f32>) -> bool {
        let eject_below = self.eject_below.get();
        let limit = match was_set {
            Some(rate) => rate * eject_below,
            None => (self.best_success.get() * eject_below).min(self.eject_limit.get()),
        };
        success < limit
    }

    /// Whether one more backend may be ejected; if so, that counts.
    pub(super) fn take_ejection(&self) -> bool {
        let take = |left: u32| left.checked_sub(1);
        self.may_eject
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    /// Whether a backend that was ejected is used again with this success rate.
    pub(super) fn readmits(&self, success: f32) -> bool {
        success >= self.readmit_limit.get()
    }

    /// Counts a request while some backend is ejected. Returns whether it may be a probe.
    pub(super) fn may_probe(&self, probes: Probes) -> bool {
        let part = self.probe_part.load(Ordering::Relaxed);
        let earn = |credit: u32| Some(credit.saturating_add(part).min(MOST_CREDIT));
        let _ = self
            .probe_credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
        match probes {
            Probes::FirstTry | Probes::Yes => true,
            Probes::IfNoOther => self.probes_with_any.load(Ordering::Relaxed),
            Probes::No => false,
        }
    }

    /// Whether a probe could be paid for now.
    pub(super) fn can_probe(&self) -> bool {
        self.probe_credit.load(Ordering::Relaxed) >= UNITS
    }

    /// Whether any request may be a probe, also one that cannot be sent again.
    pub(super) fn set_probes_with_any(&self, with_any: bool) {
        self.probes_with_any.store(with_any, Ordering::Relaxed);
    }

    /// Whether there may be a probe now; if so, that is paid for.
    pub(super) fn pay_probe(&self) -> bool {
        let pay = |credit: u32| credit.checked_sub(UNITS);
        self.probe_credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay)
            .is_ok()
    }

    /// A probe has cost nothing: it succeeded, or says nothing.
    pub(super) fn repay_probe(&self) {
        let repay = |credit: u32| Some(credit.saturating_add(UNITS).min(MOST_CREDIT));
        let _ = self
            .probe_credit
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, repay);
    }

    /// Whether the policy in use heeds outcomes; if not, none is ejected.
    pub(super) fn is_ejecting(&self) -> bool {
        self.is_ejecting.load(Ordering::Relaxed)
    }

    pub(super) fn set_ejecting(&self, is_ejecting: bool) {
        self.is_ejecting.store(is_ejecting, Ordering::Relaxed);
    }

    /// Whether the next pick may go to a new backend: at most every second one does.
    pub(super) fn allows_new(&self) -> bool {
        !self.was_new.load(Ordering::Relaxed)
    }

    /// Whether a pick went to a new backend.
    pub(super) fn set_was_new(&self, was_new: bool) {
        self.was_new.store(was_new, Ordering::Relaxed);
    }

    /// No backend reports requests in flight any more.
    pub(super) fn clear_in_flight_reports(&self) {
        self.set(SOME_REPORT_IN_FLIGHT, false);
        self.set(MOST_REPORT_IN_FLIGHT, false);
    }

    /// Whether most of the backends that get requests report how many they have in flight.
    pub(super) fn set_most_report_in_flight(&self, is_most: bool) {
        self.set(MOST_REPORT_IN_FLIGHT, is_most);
    }

    /// A rate, as of success, after a success.
    pub(super) fn after_success(&self, success: f32, is_ejected: bool) -> f32 {
        let next = success + self.gain(is_ejected) * (1.0 - success);
        // So close to 1 that the formula would never reach it.
        if next > 0.9999 { 1.0 } else { next }
    }

    /// The same after a failure.
    pub(super) fn after_failure(&self, success: f32, is_ejected: bool) -> f32 {
        success * (1.0 - self.gain(is_ejected))
    }

    /// How much an outcome moves a success rate: more, where there are only probes.
    fn gain(&self, is_ejected: bool) -> f32 {
        match is_ejected {
            true => PROBE_GAIN,
            false => self.success_gain.get(),
        }
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
        (relative * relative).min(1.0)
    }

    /// Takes over a backend's report of requests in flight, per unit of its weight.
    pub(super) fn add_in_flight_report(&self, per_weight: f32) {
        let mean = &self.reported_in_flight;
        // One that is wrong by orders of magnitude would make all others look idle for hundreds of reports.
        let believed = per_weight.min(MOST_ABOVE_MEAN * (mean.get() + 1.0));
        if self.some_report_in_flight() {
            // Of two reports at the same time one may be lost.
            mean.set(mean.get() + (believed - mean.get()) / 32.0);
        } else {
            mean.set(believed);
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

    /// Takes notice of a backend, by its place in the table, that reports its requests in flight.
    pub(super) fn hear(&self, place: u32, now: Instant) {
        self.heard.add(place, self.millis(now));
    }

    /// The places of the last backends that have reported their requests in flight, as long as that is news; none if
    /// few report, which would be preferred for that alone, or if such reports are to play no part.
    pub(super) fn heard(&self, now: Instant) -> impl Iterator<Item = usize> {
        let is_wanted = self.mode.load(Ordering::Relaxed) & MOST_REPORT_IN_FLIGHT != 0
            && self.in_flight_bound.get() > 1.0;
        let longest = (self.in_flight_fade.get() * NEWS_FADES * 1e3) as u32;
        let reports = is_wanted.then(|| self.heard.reports());
        reports
            .into_iter()
            .flatten()
            .filter(move |(_, stamp)| self.age(*stamp, now) <= longest)
            .map(|(place, _)| place)
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
