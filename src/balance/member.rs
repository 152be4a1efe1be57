//! One registration as everything that routes shares it: what requests write, and what they read.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use super::adaptive::Adaptive;
#[cfg(feature = "pingora")]
use super::weight::base_weight;
use crate::load_report::LoadReport;
use crate::node::Node;

/// An `f32` that several threads read and write.
#[derive(Debug)]
pub(super) struct AtomicF32(AtomicU32);

impl AtomicF32 {
    pub(super) fn new(value: f32) -> Self {
        Self(AtomicU32::new(value.to_bits()))
    }

    pub(super) fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// What requests tell the pick about the fleet as a whole. Read by every pick, written seldom.
#[derive(Debug)]
pub(super) struct Signals {
    /// Bits of [`GATED`] and [`REPORTING`]; 0 is the short way through a pick.
    mode: AtomicU8,
    /// The best success rate of any backend, as of the last tick.
    best: AtomicF32,
    /// Reported in flight per unit of weight, over the fleet.
    fleet: AtomicF32,
    /// How fast one outcome moves a success rate.
    gain: f32,
    /// A success rate below this part of the best one is gated.
    threshold: f32,
    /// The least chance of a gated backend.
    floor: f32,
    /// Over how much time a report of requests in flight fades.
    fade: f32,
    /// How far such a report moves a score, either way.
    bound: f32,
    /// What times in reports count from: the first of them.
    epoch: OnceLock<Instant>,
    /// Values in reports, and whole reports, that were refused.
    refused: AtomicU64,
}

/// Some backend's success is low.
const GATED: u8 = 1;
/// Some backend says how many requests it has in flight.
const REPORTING: u8 = 2;

impl Signals {
    pub(super) fn new(config: &Adaptive) -> Self {
        Self {
            mode: AtomicU8::new(0),
            best: AtomicF32::new(1.0),
            fleet: AtomicF32::new(0.0),
            gain: config.success_gain as f32,
            threshold: config.gate_below as f32,
            floor: config.gate_floor as f32,
            fade: config.in_flight_fade_ms as f32 / 1e3,
            bound: config.in_flight_bound as f32,
            epoch: OnceLock::new(),
            refused: AtomicU64::new(0),
        }
    }

    /// Whether a pick has to look at nothing but weights and its own counts.
    pub(super) fn quiet(&self) -> bool {
        self.mode.load(Ordering::Relaxed) == 0
    }

    pub(super) fn gated(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & GATED != 0
    }

    pub(super) fn reporting(&self) -> bool {
        self.mode.load(Ordering::Relaxed) & REPORTING != 0
    }

    fn raise(&self, bit: u8) {
        // Every pick reads it: written only where that changes something.
        if self.mode.load(Ordering::Relaxed) & bit == 0 {
            self.mode.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// What the success rates come to, as of now.
    pub(super) fn settle(&self, best: f32, worst: f32) {
        self.best.set(best);
        if self.chance(worst) < 1.0 {
            self.raise(GATED);
        } else {
            self.mode.fetch_and(!GATED, Ordering::Relaxed);
        }
    }

    /// Nobody reports requests in flight any more.
    pub(super) fn no_reports(&self) {
        self.mode.fetch_and(!REPORTING, Ordering::Relaxed);
    }

    /// A success rate relative to the best. Where all are next to nothing, all are alike.
    fn relative(&self, success: f32) -> f32 {
        const NOTHING: f32 = 0.02;
        (success + NOTHING) / (self.best.get() + NOTHING)
    }

    /// The chance of a backend with this success rate when it is drawn: its rate relative to the
    /// best, squared.
    pub(super) fn chance(&self, success: f32) -> f32 {
        if success < 0.0 {
            return 0.0;
        }
        let relative = self.relative(success);
        if relative >= self.threshold {
            return 1.0;
        }
        (relative * relative).clamp(self.floor, 1.0)
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn millis(&self, now: Instant) -> u32 {
        // Wraps after 49 days; ages are differences, and far shorter.
        let epoch = self.epoch.get_or_init(|| now);
        now.saturating_duration_since(*epoch).as_millis() as u32
    }
}

/// A registration: one incarnation of a node at one address. Lives as long as that, across
/// updates and tables, and whatever was learned about it ends with it.
///
/// Shared by everything that routes. What requests hold on to is the [`Live`] part, which has this
/// as its only other owner: so the number of requests in flight is the number of its owners less
/// one, exactly and for one atomic operation at each end of a request instead of two.
#[derive(Debug)]
pub(crate) struct Member {
    live: Arc<Live>,
}

/// What a request holds on to. Only a guard may own one beside its [`Member`].
///
/// An `Arc` puts its counts in front; they and the outcomes, which come first here, are what
/// every request writes. The rest keeps them away from the next registration's: on another cache
/// line, and not on the adjacent one, which processors fetch along.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Live {
    success: AtomicF32,
    /// Since the controller last took them.
    successes: AtomicU32,
    /// Ever; wraps.
    failures: AtomicU32,
    /// Their latencies in nanoseconds.
    latency: AtomicU64,
    fastest: AtomicU64,
    /// The bits of what it said of its requests in flight, and when, in ms.
    reported: AtomicU64,
    /// The bits of an `f64`.
    weight: AtomicU64,
    /// Its weight, wherever it is: what its own counts compare with. Above 0.
    capacity: AtomicF32,
    /// The part of its weight that it is drawn with: less than 1 for one that fails.
    gate: AtomicF32,
    signals: Arc<Signals>,
    addr: SocketAddr,
    node: ArcSwap<Node>,
    sampled: AtomicBool,
    /// Made when the first one comes: most backends never send any.
    sample: OnceLock<Box<Mutex<LoadReport>>>,
    /// The member is gone: it owns nothing of this any more.
    orphaned: AtomicBool,
}

/// No report of requests in flight.
const UNREPORTED: u64 = u64::MAX;

impl Live {
    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// As it is now.
    pub(super) fn node(&self) -> Arc<Node> {
        self.node.load_full()
    }

    /// Above 0, whatever the node reports, unless its static weight is 0.
    pub(super) fn weight(&self) -> f64 {
        f64::from_bits(self.weight.load(Ordering::Relaxed))
    }

    pub(super) fn success(&self) -> f32 {
        self.success.get()
    }

    pub(super) fn succeeded(&self, latency: Duration) {
        let success = self.success.get();
        if success < 1.0 {
            let next = success + self.signals.gain * (1.0 - success);
            // So near to 1 that nothing would ever get it there.
            self.success.set(if next > 0.9999 { 1.0 } else { next });
        }
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        // An hour is long enough, and 2^22 of them fit.
        let nanos = nanos.min(3_600_000_000_000);
        self.latency.fetch_add(nanos, Ordering::Relaxed);
        if nanos < self.fastest.load(Ordering::Relaxed) {
            self.fastest.fetch_min(nanos, Ordering::Relaxed);
        }
        self.successes.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed(&self) {
        // Two at once may count as one; the next tells.
        let success = self.success.get() * (1.0 - self.signals.gain);
        self.success.set(success);
        self.failures.fetch_add(1, Ordering::Relaxed);
        if self.signals.chance(success) < 1.0 {
            self.signals.raise(GATED);
        }
    }

    pub(super) fn refuse_report(&self) {
        self.signals.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn report(&self, report: &LoadReport, now: Instant) {
        let report = &report.sane();
        if report.refused > 0 {
            let refused = &self.signals.refused;
            refused.fetch_add(report.refused.into(), Ordering::Relaxed);
        }
        if let Some(in_flight) = report.in_flight {
            let in_flight = in_flight as f32;
            let stamped =
                u64::from(in_flight.to_bits()) << 32 | u64::from(self.signals.millis(now));
            self.reported.store(stamped, Ordering::Relaxed);
            let fleet = &self.signals.fleet;
            let unit = in_flight / self.capacity.get();
            if self.signals.reporting() {
                // One of two at once may be lost.
                fleet.set(fleet.get() + (unit - fleet.get()) / 32.0);
            } else {
                fleet.set(unit);
                self.signals.raise(REPORTING);
            }
        }
        if report.has_load() {
            let sample = self.sample.get_or_init(|| Box::new(Mutex::new(*report)));
            let mut sample = match sample.try_lock() {
                Ok(sample) => sample,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // Another request is about to leave one that is as good.
                Err(TryLockError::WouldBlock) => return,
            };
            *sample = *report;
            self.sampled.store(true, Ordering::Relaxed);
        }
    }

    /// What this backend's own count of requests in flight does to its score: less than 1 if it
    /// has fewer than the fleet for its weight.
    pub(super) fn busyness(&self, now: Instant) -> f32 {
        let signals = &self.signals;
        let fleet = signals.fleet.get();
        let weight = self.capacity.get();
        let unit = match self.reported.load(Ordering::Relaxed) {
            UNREPORTED => fleet,
            stamped => {
                let age = signals.millis(now).wrapping_sub(stamped as u32);
                // What is stamped later than `now` was stamped by another thread just now.
                let age = if age > u32::MAX / 2 { 0 } else { age };
                let kept = (age as f32 / -1e3 / signals.fade).exp();
                let reported = f32::from_bits((stamped >> 32) as u32) / weight;
                reported * kept + fleet * (1.0 - kept)
            }
        };
        ((unit + 1.0) / (fleet + 1.0)).clamp(1.0 / signals.bound, signals.bound)
    }
}

/// Requests in flight, as a guard sees it.
pub(super) fn in_flight_of(live: &Arc<Live>) -> u32 {
    let of_member = usize::from(!live.orphaned.load(Ordering::Relaxed));
    Arc::strong_count(live).saturating_sub(of_member) as u32
}

impl Drop for Member {
    fn drop(&mut self) {
        self.live.orphaned.store(true, Ordering::Relaxed);
    }
}

/// The latencies of successes since they were last taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Latencies {
    /// In seconds.
    pub(super) mean: f64,
    /// In seconds.
    pub(super) fastest: f64,
}

impl Member {
    pub(super) fn new(node: &Arc<Node>, addr: SocketAddr, signals: &Arc<Signals>) -> Self {
        Self {
            live: Arc::new(Live {
                success: AtomicF32::new(1.0),
                successes: AtomicU32::new(0),
                failures: AtomicU32::new(0),
                latency: AtomicU64::new(0),
                fastest: AtomicU64::new(u64::MAX),
                reported: AtomicU64::new(UNREPORTED),
                weight: AtomicU64::new(1_f64.to_bits()),
                capacity: AtomicF32::new(1.0),
                gate: AtomicF32::new(1.0),
                signals: signals.clone(),
                addr,
                node: ArcSwap::new(node.clone()),
                sampled: AtomicBool::new(false),
                sample: OnceLock::new(),
                orphaned: AtomicBool::new(false),
            }),
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.live.addr
    }

    pub(crate) fn node(&self) -> Arc<Node> {
        self.live.node()
    }

    pub(super) fn set_node(&self, node: Arc<Node>) {
        self.live.node.store(node);
    }

    /// Whether it is to be sent anything.
    #[cfg(feature = "pingora")]
    pub(crate) fn is_serving(&self) -> bool {
        let node = self.live.node.load();
        node.is_serving() && base_weight(&node) > 0.0
    }

    pub(crate) fn weight(&self) -> f64 {
        self.live.weight()
    }

    /// In proportion to what it is drawn: 0 or more.
    pub(crate) fn share(&self) -> f64 {
        self.live.weight() * f64::from(self.live.gate.get())
    }

    pub(super) fn gate(&self) -> f32 {
        self.live.gate.get()
    }

    /// What it can take, the part of that which counts for its zone, and its chance when drawn.
    pub(super) fn set_weight(&self, capacity: f64, part: f64, gate: f32) {
        let weight = (capacity * part).to_bits();
        self.live.weight.store(weight, Ordering::Relaxed);
        // One that is to get no more still works on what it has: by what it could take before.
        if capacity > 0.0 {
            self.live.capacity.set(capacity as f32);
        }
        self.live.gate.set(gate);
    }

    pub(super) fn live(&self) -> &Live {
        &self.live
    }

    pub(super) fn in_flight(&self) -> u32 {
        (Arc::strong_count(&self.live) - 1) as u32
    }

    pub(super) fn success(&self) -> f32 {
        self.live.success()
    }

    /// What requests have found out about its latency; `None`, and nothing taken, while fewer
    /// than so many have succeeded.
    pub(super) fn take_latencies(&self, at_least: u32) -> Option<Latencies> {
        let live = &self.live;
        if live.successes.load(Ordering::Relaxed) < at_least {
            return None;
        }
        // A request that ends between these is counted in part now and in part next time.
        let count = live.successes.swap(0, Ordering::Relaxed);
        let sum = live.latency.swap(0, Ordering::Relaxed);
        let fastest = live.fastest.swap(u64::MAX, Ordering::Relaxed);
        let mean = sum as f64 / f64::from(count) / 1e9;
        Some(Latencies {
            mean,
            fastest: (fastest as f64 / 1e9).min(mean),
        })
    }

    /// A number that every outcome changes, until latencies are taken.
    pub(super) fn outcomes(&self) -> u32 {
        let failures = self.live.failures.load(Ordering::Relaxed);
        let successes = self.live.successes.load(Ordering::Relaxed);
        successes.wrapping_add(failures)
    }

    /// Whether it has or had anything to do for this process since that number was such.
    pub(super) fn is_active(&self, outcomes: u32) -> bool {
        self.in_flight() > 0 || self.outcomes() != outcomes
    }

    /// What it last said of its load in a response.
    pub(super) fn take_sample(&self) -> Option<LoadReport> {
        // With thousands of backends, and most of them silent, locks alone would cost too much.
        if !self.live.sampled.load(Ordering::Relaxed) {
            return None;
        }
        self.live.sampled.store(false, Ordering::Relaxed);
        let sample = self.live.sample.get()?.lock();
        Some(*sample.unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether it has said how many requests it has in flight, so lately.
    pub(super) fn reported_since(&self, at_most: Duration, now: Instant) -> bool {
        let stamped = self.live.reported.load(Ordering::Relaxed);
        if stamped == UNREPORTED {
            return false;
        }
        let age = self.live.signals.millis(now).wrapping_sub(stamped as u32);
        // What was stamped while this tick was due is later than `now`.
        let fresh = age > u32::MAX / 2 || u128::from(age) <= at_most.as_millis();
        if !fresh {
            // Else it would look new after the time has wrapped.
            let _ = self.live.reported.compare_exchange(
                stamped,
                UNREPORTED,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        fresh
    }

    /// Counts a request in; dropping the answer counts it out.
    pub(super) fn enter(&self) -> Arc<Live> {
        self.live.clone()
    }

    /// It is gone: nobody is sent there any more, though it is in the table still.
    pub(super) fn retire(&self) {
        self.live.success.set(-1.0);
        self.live.signals.raise(GATED);
    }

    /// It is back, with the successes and failures that it had before it was retired.
    pub(super) fn revive(&self, success: f32) {
        self.live.success.set(success);
    }

    /// For reading the count without going through the member.
    pub(super) fn counter(&self) -> Counter {
        Counter(Arc::downgrade(&self.live))
    }
}

/// Reads a member's requests in flight with one step less.
#[derive(Debug)]
pub(super) struct Counter(Weak<Live>);

impl Counter {
    pub(super) fn in_flight(&self) -> usize {
        self.0.strong_count().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_requests_write_is_far_from_the_next_registrations() {
        // With the two counts of the `Arc`: a line and the one fetched along with it.
        assert!(size_of::<Live>() + 2 * size_of::<usize>() >= 128);
    }
}
