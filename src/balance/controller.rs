//! What is learned about one backend: two integral controllers, one for the load it reports and one
//! for its latency. Pure.

use std::time::{Duration, Instant};

use super::endpoint::Latencies;
use super::learned::{LearnedWeight, Lesson, millis_between};
use super::mean::Mean;
use super::settings::Adaptive;

/// What was learned has faded when the logarithm of a weight is less than this.
const FADED: f64 = 0.01;

/// How much of the reported differences in load is real: the load of a server that gets too much
/// stays too high from one report to the next, noise does not.
#[derive(Debug, Clone, Default)]
pub(super) struct Trust {
    /// Mean product of consecutive errors of a backend.
    mean_product: f64,
    /// Mean square of the errors.
    mean_square: f64,
}

impl Trust {
    /// Takes over a backend's error and its previous one. `backends` is the number of backends that
    /// report.
    fn observe(&mut self, settings: &Adaptive, backends: usize, error: f64, previous: f64) {
        let gain = 1.0 / (backends as f64 * settings.trust_memory).max(1.0);
        self.mean_product += gain * (error * previous - self.mean_product);
        let square = error.mul_add(error, previous * previous) / 2.0;
        self.mean_square += gain * (square - self.mean_square);
    }

    /// The part of each correction to apply.
    fn level(&self, settings: &Adaptive) -> f64 {
        if self.mean_square < 1e-12 {
            return 1.0;
        }
        (2.0 * self.mean_product / self.mean_square).clamp(settings.trust_floor, 1.0)
    }
}

/// What one backend has reported, beside the number itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReportContext {
    /// The backend's success rate.
    pub(super) success: f32,
    /// This process has sent it nothing since its previous report.
    pub(super) is_idle: bool,
    /// How many backends report of which this process corrects the weights.
    pub(super) backends: usize,
}

/// The two controllers of one backend.
#[derive(Debug, Clone)]
pub(super) struct Controller {
    /// Logarithm of the weight, by metrics.
    metrics: f64,
    /// Logarithm of the weight, by latency.
    latency: f64,
    /// The relative error of the last report.
    error: f64,
    /// The load it last reported, until that is stale.
    load: Option<f64>,
    reported_at: Instant,
    /// The lowest latencies of this window and of the one before, in seconds.
    lowest_latencies: [f64; 2],
    window_start: Instant,
    /// The last mean latency, in seconds.
    mean_latency: Option<f64>,
    /// The last mean latency minus the lowest one, in seconds.
    excess_latency: Option<f64>,
    /// Whether the latencies are from the last tick.
    has_new_latency: bool,
    /// When the backend joined; `None` if it was there before the balancer.
    joined_at: Option<Instant>,
}

impl Controller {
    pub(super) fn new(joined_at: Option<Instant>, now: Instant) -> Self {
        Self {
            metrics: 0.0,
            latency: 0.0,
            error: 0.0,
            load: None,
            reported_at: now,
            lowest_latencies: [f64::INFINITY; 2],
            window_start: now,
            mean_latency: None,
            excess_latency: None,
            has_new_latency: false,
            joined_at,
        }
    }

    /// The factor on the static weight that follows from metrics and latency.
    pub(super) fn factor(&self) -> f64 {
        (self.metrics + self.latency).exp()
    }

    /// Logarithm of the weight, by metrics.
    pub(super) fn metrics(&self) -> f64 {
        self.metrics
    }

    /// The load it last reported, until that is stale.
    pub(super) fn load(&self) -> Option<f64> {
        self.load
    }

    /// The mean latency minus the lowest one, in seconds.
    pub(super) fn excess_latency(&self) -> Option<f64> {
        self.excess_latency
    }

    /// The mean latency of the last tick, in seconds.
    pub(super) fn new_mean_latency(&self) -> Option<f64> {
        self.mean_latency.filter(|_| self.has_new_latency)
    }

    /// The part of its share that the backend gets at its age.
    pub(super) fn slow_start(&self, settings: &Adaptive, now: Instant) -> f64 {
        match self.joined_at {
            Some(joined_at) => settings.slow_start(now.saturating_duration_since(joined_at)),
            None => 1.0,
        }
    }

    /// The backend starts slowly from now on.
    pub(super) fn start(&mut self, now: Instant) {
        self.joined_at = Some(now);
    }

    /// Takes over the load of a new report.
    pub(super) fn set_load(&mut self, load: Option<f64>, now: Instant) {
        self.load = load;
        if load.is_some() {
            self.reported_at = now;
        }
    }

    /// Corrects the weight after a new report; `mean` is the mean load of all backends.
    pub(super) fn correct_by_load(
        &mut self,
        settings: &Adaptive,
        trust: &mut Trust,
        mean: &Mean,
        context: ReportContext,
    ) {
        let Some(load) = self.load else { return };
        let mean_load = mean.value();
        let mut error = ((mean_load - load) / mean_load.max(settings.idle_load)).clamp(-1.0, 1.0);
        if f64::from(context.success) < settings.success_limit {
            error = error.min(0.0);
        }
        // Its load does not come from this process.
        if context.is_idle {
            error = error.max(0.0);
        }
        trust.observe(settings, context.backends, error, self.error);
        let gain = settings.metrics_gain * trust.level(settings);
        let step = gain * error + gain / 2.0 * (error - self.error);
        let range = settings.metrics_range.ln();
        self.error = error;
        self.metrics =
            (self.metrics + step.clamp(-settings.step_down, settings.step_up)).clamp(-range, range);
    }

    /// Lets stale reports fade, and starts a new window of latencies when it is time; `passed` is
    /// the time since the last tick.
    pub(super) fn age(&mut self, settings: &Adaptive, now: Instant, passed: Duration) {
        let silence = now.saturating_duration_since(self.reported_at);
        let stale_after = Duration::from_millis(settings.stale_after_ms);
        if silence > stale_after {
            self.load = None;
            self.error = 0.0;
            let passed = passed.min(silence - stale_after);
            let half_lives = passed.as_secs_f64() / (settings.stale_half_life_ms as f64 / 1e3);
            self.metrics *= 0.5_f64.powf(half_lives);
        }
        let window = Duration::from_millis(settings.latency_window_ms);
        if now.saturating_duration_since(self.window_start) >= window {
            self.window_start = now;
            self.lowest_latencies = [f64::INFINITY, self.lowest_latencies[0]];
        }
    }

    /// When the load it last reported is stale, unless it reports again.
    pub(super) fn stale_at(&self, settings: &Adaptive) -> Option<Instant> {
        let valid = Duration::from_millis(settings.stale_after_ms);
        self.load.and_then(|_| self.reported_at.checked_add(valid))
    }

    /// Takes over the latencies of a tick, if there were enough successes.
    pub(super) fn set_latencies(&mut self, latencies: Option<Latencies>) {
        self.has_new_latency = latencies.is_some();
        if let Some(latencies) = latencies {
            self.lowest_latencies[0] = self.lowest_latencies[0].min(latencies.lowest);
            let lowest = self.lowest_latencies[0].min(self.lowest_latencies[1]);
            self.mean_latency = Some(latencies.mean);
            self.excess_latency = Some(latencies.mean - lowest);
        }
    }

    /// Corrects the weight by its excess latency; `mean` is the mean excess latency of all backends, and `shared`
    /// how much of their load comes from others, 0 to 1.
    pub(super) fn correct_by_latency(&mut self, settings: &Adaptive, shared: f64, mean: &Mean) {
        let mean_excess = mean.value();
        let scale = mean_excess.max(settings.idle_latency_ms / 1e3);
        if !self.has_new_latency || scale <= 0.0 {
            return;
        }
        let Some(excess) = self.excess_latency else {
            return;
        };
        let error = ((mean_excess - excess) / scale).clamp(-1.0, 1.0);
        let step = settings.latency_gain_at(shared) * error;
        let range = settings.latency_range.ln();
        self.latency = (settings.latency_keep * self.latency + step).clamp(-range, range);
    }

    /// Sets the factor on the static weight, whatever metrics and latency have said.
    pub(super) fn hold(&mut self, settings: &Adaptive, factor: f64) {
        let range = settings.metrics_range.ln();
        self.metrics = (factor.ln() - self.latency).clamp(-range, range);
    }

    /// Begins with what a former process has learned.
    pub(super) fn learn(&mut self, lesson: &Lesson) {
        self.metrics = lesson.metrics;
        self.latency = lesson.latency;
        // As the window before: what was wrong about it is forgotten with the first own one.
        if let Some(lowest) = lesson.lowest_latency {
            self.lowest_latencies[1] = lowest;
        }
        self.joined_at = lesson.joined_at;
    }

    /// Begins with this factor on the static weight, which later reports and latencies correct.
    pub(super) fn begin_with(&mut self, factor: f64) {
        self.metrics = factor.ln();
    }

    /// What another process can begin with.
    pub(super) fn learned(&self, now: Instant) -> LearnedWeight {
        let lowest = self.lowest_latencies[0].min(self.lowest_latencies[1]);
        LearnedWeight {
            metrics: self.metrics,
            metrics_age_ms: millis_between(self.reported_at, now),
            latency: self.latency,
            lowest_latency: Some(lowest).filter(|lowest| lowest.is_finite()),
            joined_ms: self.joined_at.map(|joined| millis_between(joined, now)),
        }
    }

    /// Moves the mean of `metrics` over all backends back to 0; no-op without a recent report.
    pub(super) fn center(&mut self, mean_metrics: f64) {
        if self.load.is_some() {
            self.metrics -= mean_metrics;
        }
    }

    /// Forgets a part, after some time without any request: a backend that is not tried cannot show
    /// that it is better than assumed.
    pub(super) fn forget_a_part(&mut self, settings: &Adaptive, passed: Duration) {
        // Once a second; the first tick has nothing before it.
        let times = passed.as_secs_f64().round().max(1.0);
        let kept = settings.idle_keep.powf(times);
        self.metrics *= kept;
        self.latency *= kept;
    }

    /// Whether weights change without any report or request: what was learned fades while no requests come, and
    /// when there are no reports any more.
    pub(super) fn is_fading(&self, counts_requests: bool) -> bool {
        let is_kept = self.load.is_some() && !counts_requests;
        self.latency.abs() > FADED || (self.metrics.abs() > FADED && !is_kept)
    }
}
