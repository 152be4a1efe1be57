//! The adaptive policy: what it can be told, and the arithmetic of one backend. Pure.

use std::time::{Duration, Instant};

use serde::Deserialize;

use super::member::Latencies;
use super::weight::Load;
use crate::error::ClusterError;
pub(super) use crate::error::in_range;

/// The constants of [`Policy::Adaptive`](super::Policy::Adaptive). The defaults were found, and
/// are held to their limits, with `benches/routing_quality`: change one only with figures. What is
/// said of success, of the choice between candidates and of reported requests in flight holds for
/// [`Policy::Headroom`](super::Policy::Headroom) too, and what is said of success for
/// [`Policy::Consistent`](super::Policy::Consistent).
///
/// A backend's weight is `base * exp(m + l)`, relative to the mean. `m` follows what the backends
/// report of their load, `l` what this process sees of their latency. Both are integral
/// controllers: they move weights until all backends are equally loaded, and equally quick apart
/// from their distance, instead of guessing a weight from a number.
///
/// # Metrics
///
/// A fresh report of CPU, memory and queue becomes one number,
/// `u = cpu * (1 + queue_gain * q) + (1 - success)` with `q = min(queue / queue_capacity,
/// queue_most)`, plus `memory_gain` for each tenth of memory in use above `memory_limit`. With
/// `e = clamp((mean u - u) / max(mean u, idle_load), -1, 1)`, `m` moves by
/// `metrics_gain * e + metrics_gain / 2 * (e - previous e)`, at most `step_up` up and `step_down`
/// down, and stays within `ln(metrics_range)` of 0. A backend that this process has sent nothing
/// since its last report is not moved down: whatever it is busy with is not from here.
///
/// # Trust
///
/// The load of a server that gets too much is too high in one report after another; noise is not.
/// So the mean product of consecutive errors of a backend, relative to their mean square, over all
/// backends and about `trust_memory` reports of each, tells how much of what is reported is real.
/// Twice that, between `trust_floor` and 1, is the part of each correction that is made. (The lag-1 autocorrelation, as in G. E. P. Box and G. M.
/// Jenkins, "Time series analysis", 1970.)
///
/// # Latency
///
/// Every tick, a backend with `latency_samples` or more new successes compares its excess latency
/// (the mean less the least of the last 30 to 60 s, which is mostly distance) with the weighted
/// mean of all: `l = latency_keep * l + latency_gain * e`.
///
/// # Success
///
/// Each outcome moves a backend's success rate by `success_gain` of the difference. A backend
/// whose rate is below `gate_below` of the best one is drawn only with the square of their ratio
/// as a chance, at least `gate_floor`: so one that fails, however fast, loses its traffic within
/// a few dozen requests, and is still tried now and then. If all fail alike, none is.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adaptive {
    /// How much of a difference in load one report corrects. Default: 0.2. Range: 0 to 1; with 0
    /// metrics move no weight.
    pub metrics_gain: f64,
    /// The most that one report raises the logarithm of a weight. Default: 0.4. Range: 0.01 to 3.
    pub step_up: f64,
    /// The most that one report lowers it. Default: 0.7. Range: 0.01 to 3.
    pub step_down: f64,
    /// How far metrics move a weight in all: to this many times, or this part of, its static one.
    /// Default: 8. Range: 1 to 1,000.
    pub metrics_range: f64,
    /// How much a full queue adds to CPU, relative to it. Default: 1. Range: 0 to 10.
    pub queue_gain: f64,
    /// The queue depth that counts as full. Default: 100. Range: above 0, to 1e9.
    pub queue_capacity: f64,
    /// How many full queues a queue counts as at most. Default: 3. Range: 0 to 1,000.
    pub queue_most: f64,
    /// A mean load below this is taken for this, so that an idle fleet does not fuss about small
    /// differences. Default: 0.05. Range: 0.001 to 1.
    pub idle_load: f64,
    /// The part of memory in use from which on more of it counts as load. Default: 0.9. Range: 0
    /// to 1.
    pub memory_limit: f64,
    /// How much each tenth of memory above that counts. Default: 0.5. Range: 0 to 10.
    pub memory_gain: f64,
    /// A backend with a success rate below this gets no more weight for being idle: it may be
    /// idle because it fails. Default: 0.8. Range: 0 to 1.
    pub success_limit: f64,
    /// Over how many reports of each backend it shows whether errors persist.
    /// Default: 12. Range: 1 to 1,000.
    pub trust_memory: f64,
    /// The least part of a correction that is made, however little errors persist. Default: 0.1.
    /// Range: 0 to 1; with 1 every error is believed.
    pub trust_floor: f64,
    /// How much of what was learned a tick keeps in which a backend got no request at all: what is
    /// not tried cannot show that it is better than thought. Default: 0.97. Range: 0 to 1.
    pub idle_keep: f64,
    /// After how long without a report what was learned from reports starts to fade. Default:
    /// 180,000 ms. Range: 1,000 to 86,400,000.
    pub stale_after_ms: u64,
    /// How long it then takes to fade by half. Default: 180,000 ms. Range: 1,000 to 86,400,000.
    pub stale_half_life_ms: u64,
    /// How much of a difference in latency one tick corrects. Default: 0.2. Range: 0 to 1; with
    /// 0 latencies play no part.
    pub latency_gain: f64,
    /// How much of what was learned from latencies a tick keeps. Default: 0.98. Range: 0 to 1.
    pub latency_keep: f64,
    /// How far latencies move a weight in all: to this many times, or this part of, its static
    /// one. Default: 8. Range: 1 to 1,000.
    pub latency_range: f64,
    /// How many successes it takes for a latency to count. Default: 4. Range: 1 to 1,000.
    pub latency_samples: u32,
    /// For how long the least latency seen counts as distance: for one to two of these. Default:
    /// 30,000 ms. Range: 1,000 to 3,600,000.
    pub latency_window_ms: u64,
    /// How much one outcome moves a success rate. Default: 0.05. Range: 0.001 to 0.5.
    pub success_gain: f64,
    /// The part of the best success rate below which a backend is drawn less often. Default:
    /// 0.98. Range: 0 to 1; with 0 none ever is.
    pub gate_below: f64,
    /// The least chance of such a backend when it is drawn. Default: 0.005. Range: 0.0001 to 1.
    pub gate_floor: f64,
    /// How much the request to be placed counts beside those in flight, in
    /// `(in flight + own_request) / weight`. With many proxies each has few in flight anywhere,
    /// and the greatest weight would win too often. Default: 0.5. Range: 0.01 to 1.
    pub own_request: f64,
    /// Backends without requests in flight whose weights differ by less than this part may be
    /// chosen in either order: so that with little to do all get something. Default: 0.25.
    /// Range: 0 to 1.
    pub alike: f64,
    /// While no backend reports more load than this, chance decides among idle ones whatever their
    /// weights; from twice as much on, as far as `alike` says. Default: 0.3. Range:
    /// 0 to 1.
    pub calm_load: f64,
    /// The least weight relative to the mean, times the static weight. Default: 0.1. Range: 0.001
    /// to 1.
    pub weight_min: f64,
    /// The greatest. Default: 10. Range: 1 to 1,000.
    pub weight_max: f64,
    /// How long a backend that joins later than the balancer takes to get its whole share.
    /// Default: 30,000 ms. Range: 0 to 3,600,000; with 0 it gets it at once.
    pub slow_start_ms: u64,
    /// The part of its share that it starts with. Default: 0.1. Range: 0.001 to 1.
    pub slow_start_floor: f64,
    /// The most that the others have to carry for those that start slowly, as a multiple of their
    /// own share: where many join at once, they start less slowly. Default: 1.25. Range: 1 to
    /// 100.
    pub slow_start_strain: f64,
    /// Over how much time a report of requests in flight fades. Default: 200 ms. Range: 1 to
    /// 60,000.
    pub in_flight_fade_ms: u64,
    /// How far such a report moves a backend's score, to this many times or this part of it.
    /// Default: 2. Range: 1 to 100; with 1 such reports play no part.
    pub in_flight_bound: f64,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            metrics_gain: 0.2,
            step_up: 0.4,
            step_down: 0.7,
            metrics_range: 8.0,
            queue_gain: 1.0,
            queue_capacity: 100.0,
            queue_most: 3.0,
            idle_load: 0.05,
            memory_limit: 0.9,
            memory_gain: 0.5,
            success_limit: 0.8,
            trust_memory: 12.0,
            trust_floor: 0.1,
            idle_keep: 0.97,
            own_request: 0.5,
            alike: 0.25,
            calm_load: 0.3,
            stale_after_ms: 180_000,
            stale_half_life_ms: 180_000,
            latency_gain: 0.2,
            latency_keep: 0.98,
            latency_range: 8.0,
            latency_samples: 4,
            latency_window_ms: 30_000,
            success_gain: 0.05,
            gate_below: 0.98,
            gate_floor: 0.005,
            weight_min: 0.1,
            weight_max: 10.0,
            slow_start_ms: 30_000,
            slow_start_floor: 0.1,
            slow_start_strain: 1.25,
            in_flight_fade_ms: 200,
            in_flight_bound: 2.0,
        }
    }
}

/// What stands in for CPU where nobody reports any: half busy.
const UNKNOWN_CPU: f64 = 0.5;
const MOST_MS: u64 = 86_400_000;

impl Adaptive {
    /// The constants for a selection that hears of no outcome and counts nothing in flight, such as
    /// `pingora::MetricsWeighted` in a stock load balancer. Metrics are
    /// all there is, so what they say is done faster (`metrics_gain` 0.6, steps of 1) and in full
    /// (`trust_floor` 1), but within narrower bounds (`metrics_range` 4).
    pub fn metrics_only() -> Self {
        Self {
            metrics_gain: 0.6,
            step_up: 1.0,
            step_down: 1.0,
            metrics_range: 4.0,
            trust_floor: 1.0,
            ..Self::default()
        }
    }

    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let numbers = [
            ("metrics_gain", self.metrics_gain, 0.0..=1.0),
            ("step_up", self.step_up, 0.01..=3.0),
            ("step_down", self.step_down, 0.01..=3.0),
            ("metrics_range", self.metrics_range, 1.0..=1e3),
            ("queue_gain", self.queue_gain, 0.0..=10.0),
            (
                "queue_capacity",
                self.queue_capacity,
                f64::MIN_POSITIVE..=1e9,
            ),
            ("queue_most", self.queue_most, 0.0..=1e3),
            ("idle_load", self.idle_load, 0.001..=1.0),
            ("latency_range", self.latency_range, 1.0..=1e3),
            ("alike", self.alike, 0.0..=1.0),
            ("calm_load", self.calm_load, 0.0..=1.0),
            ("memory_limit", self.memory_limit, 0.0..=1.0),
            ("memory_gain", self.memory_gain, 0.0..=10.0),
            ("trust_memory", self.trust_memory, 1.0..=1e3),
            ("trust_floor", self.trust_floor, 0.0..=1.0),
            ("idle_keep", self.idle_keep, 0.0..=1.0),
            ("own_request", self.own_request, 0.01..=1.0),
            ("success_limit", self.success_limit, 0.0..=1.0),
            ("latency_gain", self.latency_gain, 0.0..=1.0),
            ("latency_keep", self.latency_keep, 0.0..=1.0),
            (
                "latency_samples",
                f64::from(self.latency_samples),
                1.0..=1e3,
            ),
            ("success_gain", self.success_gain, 0.001..=0.5),
            ("gate_below", self.gate_below, 0.0..=1.0),
            ("gate_floor", self.gate_floor, 1e-4..=1.0),
            ("weight_min", self.weight_min, 0.001..=1.0),
            ("weight_max", self.weight_max, 1.0..=1e3),
            ("slow_start_floor", self.slow_start_floor, 0.001..=1.0),
            ("slow_start_strain", self.slow_start_strain, 1.0..=100.0),
            ("in_flight_bound", self.in_flight_bound, 1.0..=100.0),
        ];
        for (name, value, range) in numbers {
            in_range(field, name, value, range)?;
        }
        let times = [
            ("stale_after_ms", self.stale_after_ms, 1_000..=MOST_MS),
            (
                "stale_half_life_ms",
                self.stale_half_life_ms,
                1_000..=MOST_MS,
            ),
            (
                "latency_window_ms",
                self.latency_window_ms,
                1_000..=3_600_000,
            ),
            ("slow_start_ms", self.slow_start_ms, 0..=3_600_000),
            ("in_flight_fade_ms", self.in_flight_fade_ms, 1..=60_000),
        ];
        for (name, value, range) in times {
            in_range(field, name, value, range)?;
        }
        Ok(())
    }

    /// How loaded a backend is, by what it reports; `None` if it reports nothing that tells.
    pub(super) fn load(&self, load: &Load, mean: &Load, success: f32) -> Option<f64> {
        if load.cpu.is_none() && load.queue.is_none() {
            return None;
        }
        let cpu = load.cpu.or(mean.cpu).unwrap_or(UNKNOWN_CPU);
        let queue = load.queue.or(mean.queue).unwrap_or(0.0);
        let full = (queue / self.queue_capacity).min(self.queue_most);
        let memory = load.memory.or(mean.memory).unwrap_or(0.0);
        let over = (memory - self.memory_limit).max(0.0) * 10.0;
        Some(
            cpu * (1.0 + self.queue_gain * full)
                + over * self.memory_gain
                + (1.0 - f64::from(success)),
        )
    }

    /// The part of its share that a backend of this age gets.
    pub(super) fn slow_start(&self, age: Duration) -> f64 {
        let whole = self.slow_start_ms as f64 / 1e3;
        if age.as_secs_f64() >= whole {
            return 1.0;
        }
        (age.as_secs_f64() / whole).max(self.slow_start_floor)
    }
}

/// Whether what is reported can be believed: the load of a server that gets too much stays too high
/// from one report to the next, noise does not.
#[derive(Debug, Clone, Default)]
pub(super) struct Trust {
    /// Mean product of consecutive errors of a backend.
    persistent: f64,
    /// Mean square of errors.
    all: f64,
}

impl Trust {
    /// Another backend's error and the one before. So many `backends` report.
    fn heard(&mut self, config: &Adaptive, backends: usize, error: f64, previous: f64) {
        let gain = 1.0 / (backends as f64 * config.trust_memory).max(1.0);
        self.persistent += gain * (error * previous - self.persistent);
        self.all += gain * (error.mul_add(error, previous * previous) / 2.0 - self.all);
    }

    /// How much of a correction to make.
    fn level(&self, config: &Adaptive) -> f64 {
        if self.all < 1e-12 {
            return 1.0;
        }
        (2.0 * self.persistent / self.all).clamp(config.trust_floor, 1.0)
    }
}

/// What is known of one backend: the cold half, owned by the one who updates.
#[derive(Debug, Clone)]
pub(super) struct Learned {
    /// Logarithm of the weight, by metrics.
    pub(super) metrics: f64,
    /// Logarithm of the weight, by latency.
    pub(super) latency: f64,
    /// The difference that the last report was off by.
    error: f64,
    /// The load it last reported, until that is stale.
    pub(super) load: Option<f64>,
    reported: Instant,
    /// The least latencies of this window and the one before, in seconds.
    floors: [f64; 2],
    turned: Instant,
    /// The mean latency last seen, in seconds.
    pub(super) mean_latency: Option<f64>,
    /// By how much that exceeds the least, in seconds.
    pub(super) excess: Option<f64>,
    /// Whether that is new.
    pub(super) fresh: bool,
    /// When it joined; `None`: it was there before the balancer.
    pub(super) joined: Option<Instant>,
}

impl Learned {
    pub(super) fn new(joined: Option<Instant>, now: Instant) -> Self {
        Self {
            metrics: 0.0,
            latency: 0.0,
            error: 0.0,
            load: None,
            reported: now,
            floors: [f64::INFINITY; 2],
            turned: now,
            mean_latency: None,
            excess: None,
            fresh: false,
            joined,
        }
    }

    /// A fresh report, where the mean load is `mean`. `idle`: this process has sent it nothing
    /// since the report before.
    pub(super) fn report(
        &mut self,
        config: &Adaptive,
        trust: &mut Trust,
        mean: &Mean,
        success: f32,
        idle: bool,
    ) {
        let Some(load) = self.load else { return };
        let mean_load = mean.value();
        let mut error = ((mean_load - load) / mean_load.max(config.idle_load)).clamp(-1.0, 1.0);
        if f64::from(success) < config.success_limit {
            error = error.min(0.0);
        }
        // Whatever it is busy with, it is not what it got from here.
        if idle {
            error = error.max(0.0);
        }
        trust.heard(config, mean.count, error, self.error);
        let gain = config.metrics_gain * trust.level(config);
        let step = gain * error + gain / 2.0 * (error - self.error);
        let range = config.metrics_range.ln();
        self.error = error;
        self.metrics =
            (self.metrics + step.clamp(-config.step_down, config.step_up)).clamp(-range, range);
    }

    /// Takes over the load of a fresh report.
    pub(super) fn heard(&mut self, load: Option<f64>, now: Instant) {
        self.load = load;
        if load.is_some() {
            self.reported = now;
        }
    }

    /// What time alone does to it, `passed` since the last tick.
    pub(super) fn age(&mut self, config: &Adaptive, now: Instant, passed: Duration) {
        let silent = now.saturating_duration_since(self.reported);
        if silent > Duration::from_millis(config.stale_after_ms) {
            self.load = None;
            self.error = 0.0;
            let half_lives = passed.as_secs_f64() / (config.stale_half_life_ms as f64 / 1e3);
            self.metrics *= 0.5_f64.powf(half_lives);
        }
        let window = Duration::from_millis(config.latency_window_ms);
        if now.saturating_duration_since(self.turned) >= window {
            self.turned = now;
            self.floors = [f64::INFINITY, self.floors[0]];
        }
    }

    pub(super) fn latencies(&mut self, latencies: Option<Latencies>) {
        self.fresh = latencies.is_some();
        if let Some(latencies) = latencies {
            self.floors[0] = self.floors[0].min(latencies.fastest);
            let floor = self.floors[0].min(self.floors[1]);
            self.mean_latency = Some(latencies.mean);
            self.excess = Some(latencies.mean - floor);
        }
    }

    /// Compares its latency with the mean excess latency.
    pub(super) fn trim(&mut self, config: &Adaptive, mean: &Mean) {
        let mean_excess = mean.value();
        if !self.fresh || mean_excess <= 0.0 {
            return;
        }
        let Some(excess) = self.excess else { return };
        let error = ((mean_excess - excess) / mean_excess).clamp(-1.0, 1.0);
        let step = config.latency_gain * error;
        let range = config.latency_range.ln();
        self.latency = (config.latency_keep * self.latency + step).clamp(-range, range);
    }

    /// A tick without any request: what is not tried cannot show that it is better than thought.
    pub(super) fn forget(&mut self, config: &Adaptive) {
        self.metrics *= config.idle_keep;
        self.latency *= config.idle_keep;
    }
}

/// A mean with weights.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mean {
    sum: f64,
    weights: f64,
    /// Of how many.
    pub(super) count: usize,
}

impl Mean {
    pub(super) fn add(&mut self, value: f64, weight: f64) {
        self.sum += value * weight;
        self.weights += weight;
        self.count += 1;
    }

    /// Takes back what was added with weight 1.
    pub(super) fn remove(&mut self, value: f64) {
        self.sum -= value;
        self.weights -= 1.0;
        self.count -= 1;
    }

    /// 0 of nothing.
    pub(super) fn value(&self) -> f64 {
        if self.weights > 0.0 {
            self.sum / self.weights
        } else {
            0.0
        }
    }
}
