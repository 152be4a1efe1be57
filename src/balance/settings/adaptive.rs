//! The constants of the policy `adaptive`, and the formulas that depend on nothing else.

use std::time::Duration;

use serde::Deserialize;

use crate::balance::load::Load;
use crate::error::{ClusterError, in_range};

/// The constants of [`Policy::Adaptive`](super::Policy::Adaptive). The defaults were found with
/// `benches/routing_quality`, which also checks their limits: change one only after measuring. The
/// constants of success, of the choice between candidates and of reported requests in flight apply
/// to [`Policy::Headroom`](super::Policy::Headroom) too, those of success also to
/// [`Policy::Consistent`](super::Policy::Consistent).
///
/// A backend's weight is `base * exp(m + l)`, relative to the mean. `m` follows the load that
/// backends report, `l` the latencies that this process measures. Both are integral controllers:
/// they move weights until all backends are equally loaded, and equally fast apart from their
/// distance, instead of guessing a weight from a number.
///
/// # Metrics
///
/// A new report of CPU, memory and queue becomes one number,
/// `u = cpu * (1 + queue_gain * q) + (1 - success)` with `q = min(queue / queue_capacity,
/// queue_most)`, plus `memory_gain` for each tenth of memory in use above `memory_limit`. With
/// `e = clamp((mean u - u) / max(mean u, idle_load), -1, 1)`, `m` moves by
/// `metrics_gain * e + metrics_gain / 2 * (e - previous e)`, at most `step_up` up and `step_down`
/// down, and stays within `ln(metrics_range)` of 0. A backend to which this process has sent
/// nothing since its last report is not moved down: its load does not come from this process.
///
/// # Trust
///
/// The load of a server that gets too much is too high in one report after another; noise is not.
/// So the mean product of consecutive errors of a backend, relative to their mean square, over all
/// backends and about `trust_memory` reports of each, shows how much of the reported differences is
/// real. Twice that, between `trust_floor` and 1, is the part of each correction that is applied.
/// (The lag-1 autocorrelation, as in G. E. P. Box and G. M. Jenkins, "Time series analysis", 1970.)
///
/// # Latency
///
/// Every tick, a backend with `latency_samples` or more new successes compares its excess latency
/// (the mean minus the lowest of the last 30 to 60 s, which is mostly distance) with the weighted
/// mean of all: `l = latency_keep * l + latency_gain * e`, with `e` relative to that mean, or to `idle_latency_ms`
/// if that is more: backends that are all fast differ by chance alone. Where most backends report to be
/// busy (above `calm_load`), though this process has less than half a request in flight at each, there are probably
/// many processes like it. Then the gain is up to twice as high, and half of the samples are enough: the noise of
/// each process is averaged out in the traffic of all.
///
/// # Subset
///
/// Of many processes before many backends, each sends a few requests a second to each backend: too few to learn from, and
/// too few for requests in flight to say anything. So where most backends report to be busy, and this process would have
/// fewer than `subset_in_flight` requests in flight at each, it uses a part of them: as many as it has that many requests
/// for, and `subset_least` at least, unless that is more than half of all. Which ones, a hash of the process and the
/// address decides, among those in its zone as among the others, with chances in proportion to static weights (those
/// below the mean count as the mean), and with weights divided by these chances: so static weights hold for all
/// processes together. Where there are few processes, chance would leave some backends to none: while more than a tenth of
/// those that are left out report less than half of the usual load, more are used, up to all; then it is tried again
/// after ten minutes, and more rarely each time. The place of one that is ejected is taken by the next one. Once there is more
/// to send, more are used within a second, and until then others are candidates where the best one has four
/// requests in flight. Each process draws anew when it starts. Requests that have to go to a certain backend, such as the leader, and those that no
/// backend of the subset can take, go to others. A balancer that is alone before backends that are busy with something
/// else takes itself for one of many: set `subset_in_flight` to 0 there. (Subsets, as in
/// B. Beyer and others, "Site reliability engineering", 2016, chapter 20; chosen by the sequential Poisson
/// sampling of E. Ohlsson, Journal of Official Statistics 14, 1998.)
///
/// # Success
///
/// Each outcome moves a backend's success rate by `success_gain` of the difference; a connection that
/// could not be made counts twice. A backend whose rate is below `gate_below` of the best one is
/// accepted, when drawn, only with a probability of the square of their ratio.
///
/// Below `eject_below` of the median of those that work (of two, the better one) it is *ejected*: it
/// gets nothing but probes. What it lacks has to be more than chance explains, 5 standard deviations of
/// the median. One that refuses connections is compared with the best one instead, since most may do so;
/// answers by which a backend says that it is overloaded eject it only below 0.3 of the best one: fewer
/// requests may be all that it needs. The first probe comes after 1 to 2 s; each one that fails doubles
/// the pause, up to `probe_most_ms`. After a probe that succeeds the next request is one, too, until the
/// rate, of which each moves 0.25, has come to 0.95 of the median, after about ten. A probe that fails
/// costs the balancer a request, and those may be `probe_part` of all, however many backends are
/// ejected. If all backends fail alike, none is avoided.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Adaptive {
    /// The part of a difference in load that one report corrects. Default: 0.2. Range: 0 to 1; with
    /// 0 metrics move no weight.
    pub metrics_gain: f64,
    /// The most that one report raises the logarithm of a weight. Default: 0.4. Range: 0.01 to 3.
    pub step_up: f64,
    /// The most that one report lowers the logarithm of a weight. Default: 0.7. Range: 0.01 to 3.
    pub step_down: f64,
    /// How far metrics can move a weight in total: the static weight is multiplied or divided by at
    /// most this. Default: 8. Range: 1 to 1,000.
    pub metrics_range: f64,
    /// How much a full queue adds to CPU, relative to CPU. Default: 1. Range: 0 to 10.
    pub queue_gain: f64,
    /// The queue depth that counts as full. Default: 100. Range: above 0, to 1e9.
    pub queue_capacity: f64,
    /// The greatest number of full queues that a queue counts as. Default: 3. Range: 0 to 1,000.
    pub queue_most: f64,
    /// A mean load below this is replaced by this, so that an idle fleet does not react to small
    /// differences. Default: 0.05. Range: 0.001 to 1.
    pub idle_load: f64,
    /// The part of memory in use above which memory counts as load. Default: 0.9. Range: 0 to 1.
    pub memory_limit: f64,
    /// The load for each tenth of memory in use above `memory_limit`. Default: 0.5. Range: 0 to 10.
    pub memory_gain: f64,
    /// A backend with a success rate below this gets no more weight for being idle: it may be
    /// idle because it fails. Default: 0.8. Range: 0 to 1.
    pub success_limit: f64,
    /// The number of reports of each backend over which it is measured whether errors persist.
    /// Default: 12. Range: 1 to 1,000.
    pub trust_memory: f64,
    /// The smallest part of a correction that is applied, however little errors persist. Default:
    /// 0.1. Range: 0 to 1; with 1 every correction is applied in full.
    pub trust_floor: f64,
    /// The part of what was learned that is kept in each tick in which a backend got no request: a
    /// backend that is not tried cannot show that it is better than assumed. Default: 0.97. Range: 0
    /// to 1.
    pub idle_keep: f64,
    /// The time without a report after which the effect of earlier reports starts to fade. Default:
    /// 180,000 ms. Range: 1,000 to 86,400,000.
    pub stale_after_ms: u64,
    /// The time in which that effect then fades by half. Default: 180,000 ms. Range: 1,000 to
    /// 86,400,000.
    pub stale_half_life_ms: u64,
    /// The part of a difference in latency that one tick corrects; up to twice that, where most of the load
    /// comes from other processes. Default: 0.2. Range: 0 to 1; with 0 latencies play no part.
    pub latency_gain: f64,
    /// A mean excess latency below this is replaced by this, so that small differences between backends that are all
    /// fast move weights little, unless they last: one pause of a few milliseconds is a large part of the mean of such
    /// backends. And no traffic leaves a zone because its mean latency has risen by less than this. Default: 2 ms.
    /// Range: 0 to 10,000.
    pub idle_latency_ms: f64,
    /// The part of what was learned from latencies that a tick keeps. Default: 0.98. Range: 0 to 1.
    pub latency_keep: f64,
    /// How far latencies can move a weight in total: the static weight is multiplied or divided by
    /// at most this. Default: 8. Range: 1 to 1,000.
    pub latency_range: f64,
    /// The number of successes from which on a mean latency counts; down to half of that, where most of the load
    /// comes from other processes. Default: 4. Range: 1 to 1,000.
    pub latency_samples: u32,
    /// The lowest latency of one to two windows of this length counts as distance. Default:
    /// 30,000 ms. Range: 1,000 to 3,600,000.
    pub latency_window_ms: u64,
    /// How much one outcome moves a success rate. Default: 0.05. Range: 0.001 to 0.5.
    pub success_gain: f64,
    /// The part of the best success rate below which a backend is drawn less often. Default:
    /// 0.98. Range: 0 to 1; with 0 no backend is.
    pub gate_below: f64,
    /// The part of the median success rate below which a backend is ejected: it gets nothing but probes.
    /// Default: 0.85. Range: 0 to 1; with 0 none is.
    pub eject_below: f64,
    /// The part of all requests that may be lost to probes. Default: 0.01. Range: 0.0001 to 0.5.
    pub probe_part: f64,
    /// The longest pause between two probes of a backend, and up to a second; the first one comes after
    /// 1 to 2 s, and each that fails doubles the pause. Default: 5,000 ms. Range: 1,000 to 3,600,000.
    pub probe_most_ms: u64,
    /// How much the request to be placed counts beside those in flight, in
    /// `(in flight + own_request) / weight`. With many proxies each of them has few requests in
    /// flight anywhere, and the greatest weight would win too often. Default: 0.5. Range: 0.01 to 1.
    pub own_request: f64,
    /// Chance decides between backends without requests in flight whose weights differ by less than
    /// this part, so that all of them get something while there is little traffic. Where static weights
    /// differ, a backend keeps its turn, unless what was learned of another one is better by this part.
    /// Default: 0.25. Range: 0 to 1.
    pub alike: f64,
    /// A backend without requests in flight is taken in its turn, which follows from the weights, while
    /// it reports no more load than this, whatever others report; one that does not report, while half
    /// of those that do report no more. From twice this load on, backends that come by chance are
    /// compared with it. Default: 0.2. Range: 0 to 1.
    pub calm_load: f64,
    /// How many requests of this process should be in flight at each backend on average. Where it would have fewer,
    /// because backends are busy with what others send, it uses a part of the backends only, which it then knows
    /// well. Default: 0.65. Range: 0 to 100; with 0 it always uses all.
    pub subset_in_flight: f64,
    /// The number of backends that it uses then at least. Default: 12. Range: 2 to 1,000,000.
    pub subset_least: u32,
    /// The lowest weight relative to the mean, times the static weight. Default: 0.1. Range: 0.001
    /// to 1.
    pub weight_min: f64,
    /// The greatest weight relative to the mean, times the static weight. Default: 10. Range: 1 to
    /// 1,000.
    pub weight_max: f64,
    /// The time that a backend which joins later than the balancer takes to get its whole share.
    /// Default: 30,000 ms. Range: 0 to 3,600,000; with 0 it gets its share at once.
    pub slow_start_ms: u64,
    /// The part of its share that such a backend starts with. Default: 0.1. Range: 0.001 to 1.
    pub slow_start_floor: f64,
    /// The most that the other backends carry for those that start slowly, as a multiple of their
    /// own share: where many join at once, or there are few others, they start less slowly. Default: 1.1. Range: 1 to
    /// 100.
    pub slow_start_strain: f64,
    /// The time over which a report of requests in flight fades. For twice this time, the last four backends to
    /// report are candidates of a pick, beside those that it draws, if more than half of those that get requests
    /// report. Default: 200 ms. Range: 1 to 60,000.
    pub in_flight_fade_ms: u64,
    /// How far such a report can move a backend's score: it is multiplied or divided by at most
    /// this. Default: 2. Range: 1 to 100; with 1 such reports play no part.
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
            calm_load: 0.2,
            subset_in_flight: 0.65,
            subset_least: 12,
            stale_after_ms: 180_000,
            stale_half_life_ms: 180_000,
            latency_gain: 0.2,
            idle_latency_ms: 2.0,
            latency_keep: 0.98,
            latency_range: 8.0,
            latency_samples: 4,
            latency_window_ms: 30_000,
            success_gain: 0.05,
            gate_below: 0.98,
            eject_below: 0.85,
            probe_part: 0.01,
            probe_most_ms: 5_000,
            weight_min: 0.1,
            weight_max: 10.0,
            slow_start_ms: 30_000,
            slow_start_floor: 0.1,
            slow_start_strain: 1.1,
            in_flight_fade_ms: 200,
            in_flight_bound: 2.0,
        }
    }
}

/// The CPU usage to assume where no backend reports any: half busy.
const UNKNOWN_CPU: f64 = 0.5;
const DAY_MS: u64 = 86_400_000;
const HOUR_MS: u64 = 3_600_000;

impl Adaptive {
    /// The constants for a selection that is not informed of outcomes and does not count requests
    /// in flight, such as `pingora::MetricsWeighted` in a stock load balancer. Metrics are all that
    /// it has, so weights follow them faster (`metrics_gain` 0.6, steps of 1) and in full
    /// (`trust_floor` 1), but within narrower bounds (`metrics_range` 4), and a queue, which is long as
    /// soon as there is too much, counts less (`queue_gain` 0.4).
    pub fn metrics_only() -> Self {
        Self {
            metrics_gain: 0.6,
            step_up: 1.0,
            step_down: 1.0,
            metrics_range: 4.0,
            queue_gain: 0.4,
            trust_floor: 1.0,
            ..Self::default()
        }
    }

    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let queue_capacities = f64::MIN_POSITIVE..=1e9;
        let number = |name, value, range| in_range(field, name, value, range);
        number("metrics_gain", self.metrics_gain, 0.0..=1.0)?;
        number("step_up", self.step_up, 0.01..=3.0)?;
        number("step_down", self.step_down, 0.01..=3.0)?;
        number("metrics_range", self.metrics_range, 1.0..=1e3)?;
        number("queue_gain", self.queue_gain, 0.0..=10.0)?;
        number("queue_capacity", self.queue_capacity, queue_capacities)?;
        number("queue_most", self.queue_most, 0.0..=1e3)?;
        number("idle_load", self.idle_load, 0.001..=1.0)?;
        number("alike", self.alike, 0.0..=1.0)?;
        number("calm_load", self.calm_load, 0.0..=1.0)?;
        number("subset_in_flight", self.subset_in_flight, 0.0..=100.0)?;
        in_range(field, "subset_least", self.subset_least, 2..=1_000_000)?;
        number("latency_range", self.latency_range, 1.0..=1e3)?;
        number("memory_limit", self.memory_limit, 0.0..=1.0)?;
        number("memory_gain", self.memory_gain, 0.0..=10.0)?;
        number("trust_memory", self.trust_memory, 1.0..=1e3)?;
        number("trust_floor", self.trust_floor, 0.0..=1.0)?;
        number("idle_keep", self.idle_keep, 0.0..=1.0)?;
        number("own_request", self.own_request, 0.01..=1.0)?;
        number("success_limit", self.success_limit, 0.0..=1.0)?;
        number("latency_gain", self.latency_gain, 0.0..=1.0)?;
        number("idle_latency_ms", self.idle_latency_ms, 0.0..=1e4)?;
        number("latency_keep", self.latency_keep, 0.0..=1.0)?;
        number("success_gain", self.success_gain, 0.001..=0.5)?;
        number("gate_below", self.gate_below, 0.0..=1.0)?;
        number("eject_below", self.eject_below, 0.0..=1.0)?;
        number("probe_part", self.probe_part, 1e-4..=0.5)?;
        number("weight_min", self.weight_min, 0.001..=1.0)?;
        number("weight_max", self.weight_max, 1.0..=1e3)?;
        number("slow_start_floor", self.slow_start_floor, 0.001..=1.0)?;
        number("slow_start_strain", self.slow_start_strain, 1.0..=100.0)?;
        number("in_flight_bound", self.in_flight_bound, 1.0..=100.0)?;
        in_range(field, "latency_samples", self.latency_samples, 1..=1_000)?;
        let millis = |name, value, range| in_range(field, name, value, range);
        millis("stale_after_ms", self.stale_after_ms, 1_000..=DAY_MS)?;
        millis(
            "stale_half_life_ms",
            self.stale_half_life_ms,
            1_000..=DAY_MS,
        )?;
        millis("latency_window_ms", self.latency_window_ms, 1_000..=HOUR_MS)?;
        millis("probe_most_ms", self.probe_most_ms, 1_000..=HOUR_MS)?;
        millis("slow_start_ms", self.slow_start_ms, 0..=HOUR_MS)?;
        millis("in_flight_fade_ms", self.in_flight_fade_ms, 1..=60_000)
    }

    /// How loaded a backend is, as one number; `None` if it reports neither CPU nor a queue. `mean`
    /// is the mean load of the group, `success` the backend's success rate.
    pub(in crate::balance) fn load(&self, load: &Load, mean: &Load, success: f32) -> Option<f64> {
        if load.cpu.is_none() && load.queue.is_none() {
            return None;
        }
        let cpu = load.cpu.or(mean.cpu).unwrap_or(UNKNOWN_CPU);
        let queue = load.queue.or(mean.queue).unwrap_or(0.0);
        let full_queues = (queue / self.queue_capacity).min(self.queue_most);
        let memory = load.memory.or(mean.memory).unwrap_or(0.0);
        let excess_tenths = (memory - self.memory_limit).max(0.0) * 10.0;
        Some(
            cpu * (1.0 + self.queue_gain * full_queues)
                + excess_tenths * self.memory_gain
                + (1.0 - f64::from(success)),
        )
    }

    /// How much a backend has to do, as far as it says so: without its CPU, its queue alone shows whether it is idle.
    pub(in crate::balance) fn known_load(&self, load: &Load) -> Option<f64> {
        match (load.cpu, load.queue) {
            (None, Some(queue)) => Some((queue / self.queue_capacity).min(self.queue_most)),
            _ => self.load(load, &Load::default(), 1.0),
        }
    }

    /// The part of a difference in latency that one tick corrects, where this much of the load comes from others.
    pub(in crate::balance) fn latency_gain_at(&self, shared: f64) -> f64 {
        self.latency_gain * (1.0 + shared)
    }

    /// The number of successes from which on a mean latency counts, likewise.
    pub(in crate::balance) fn latency_samples_at(&self, shared: f64) -> u32 {
        let samples = f64::from(self.latency_samples) * (1.0 - shared / 2.0);
        samples.round().max(1.0) as u32
    }

    /// Whether a backend with this load has little to do: 1 up to the calm load, 0 from twice that on.
    pub(in crate::balance) fn calm(&self, load: f64) -> f64 {
        (2.0 - load / self.calm_load.max(1e-9)).clamp(0.0, 1.0)
    }

    /// The part of its share that a backend gets this long after it joined.
    pub(in crate::balance) fn slow_start(&self, age: Duration) -> f64 {
        let whole = self.slow_start_ms as f64 / 1e3;
        if age.as_secs_f64() >= whole {
            return 1.0;
        }
        (age.as_secs_f64() / whole).max(self.slow_start_floor)
    }
}
