//! Which zone a balancer is in, and how much of its traffic leaves that zone. Pure.

use super::mean::Mean;
use super::settings::Zones;

/// How a balancer knows its zone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum ZoneSource {
    /// It has none: all zones are alike.
    #[default]
    None,
    /// It was given the zone's name.
    Name(String),
    /// It is in the zone that the node with this id registered.
    OfNode(String),
}

/// The number of ticks after which the lowest latency starts a new window; two windows count.
const WINDOW_TICKS: u32 = 120;
/// How much a tick moves the smoothed latency.
const SMOOTHING: f64 = 0.1;
/// The most that one tick changes the spill.
const MAX_STEP: f64 = 0.2;
/// The part of a weight that a backend in another zone keeps at least: a weight above 0 stays
/// above 0.
const MIN_SPILL: f64 = 1e-6;

/// What one tick measured of the own zone, or of all others.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ZoneSample {
    /// Mean of the reported loads.
    pub(super) load: Mean,
    /// Mean of the latencies, in seconds.
    pub(super) latency: Mean,
}

/// The part of the weight of other zones that counts.
#[derive(Debug, Clone)]
pub(super) struct Spill {
    level: f64,
    /// Smoothed mean latency in the own zone, in seconds.
    latency: Option<f64>,
    /// The lowest smoothed latencies of this window and of the one before.
    lowest: [f64; 2],
    ticks: u32,
}

/// A mean latency counts as at most so many times what is no pressure yet.
const MOST_BEYOND: f64 = 2.0;

impl Default for Spill {
    fn default() -> Self {
        Self {
            level: 0.0,
            latency: None,
            lowest: [f64::INFINITY; 2],
            ticks: 0,
        }
    }
}

impl Spill {
    /// The part of its weight that a backend in another zone has, when backends with this part of
    /// the own zone's weight, 0 to 1, work.
    pub(super) fn level(&self, settings: &Zones, working: f64) -> f64 {
        let forced = 1.0 - settings.spare * working;
        let level = self.level.max(forced).clamp(settings.least_spill, 1.0);
        level.max(MIN_SPILL)
    }

    /// Takes over a tick. A rise of the latency by less than `idle_latency`, in seconds, is no pressure.
    pub(super) fn tick(
        &mut self,
        settings: &Zones,
        idle_latency: f64,
        own: &ZoneSample,
        others: &ZoneSample,
    ) {
        self.ticks += 1;
        if self.ticks.is_multiple_of(WINDOW_TICKS) {
            self.lowest = [f64::INFINITY, self.lowest[0]];
        }
        let mut pressure = f64::NEG_INFINITY;
        if own.load.count() > 0 {
            let limit = settings.load_limit.max(others.load.value());
            pressure = (own.load.value() - limit) / settings.load_limit;
        }
        if own.latency.count() > 0 {
            // Smoothed, because the lowest of many noisy means would be far below the usual one.
            // One request that takes minutes, of a few, is no pressure of the zone.
            let lowest = self.lowest[0].min(self.lowest[1]);
            let limit = |lowest: f64| {
                (settings.stretch_limit * lowest)
                    .max(lowest + idle_latency)
                    .max(1e-9)
            };
            let new = own.latency.value().min(MOST_BEYOND * limit(lowest));
            let latency = self
                .latency
                .map_or(new, |old| old + SMOOTHING * (new - old));
            self.latency = Some(latency);
            self.lowest[0] = self.lowest[0].min(latency);
            let lowest = self.lowest[0].min(self.lowest[1]);
            let limit = limit(lowest);
            pressure = pressure.max((latency - limit) / limit);
        }
        if pressure.is_finite() {
            let step = (settings.gain * pressure).clamp(-MAX_STEP, MAX_STEP);
            self.level = (self.level + step).clamp(settings.least_spill, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: f64 = 0.002;

    fn sample(load: f64, latency: f64) -> ZoneSample {
        let mut sample = ZoneSample::default();
        sample.load.add(load, 1.0);
        sample.latency.add(latency, 1.0);
        sample
    }

    #[test]
    fn pressure_lets_traffic_out_and_relief_brings_it_back() {
        let settings = Zones::default();
        let calm = sample(0.5, 0.01);
        for hot in [sample(1.0, 0.01), sample(0.5, 0.05)] {
            let mut spill = Spill::default();
            spill.tick(&settings, IDLE, &calm, &calm);
            assert_eq!(spill.level(&settings, 1.0), settings.least_spill);
            for _ in 0..10 {
                spill.tick(&settings, IDLE, &hot, &calm);
            }
            assert!(spill.level(&settings, 1.0) > 0.3, "{spill:?}");
            for _ in 0..120 {
                spill.tick(&settings, IDLE, &calm, &calm);
            }
            assert_eq!(spill.level(&settings, 1.0), settings.least_spill);
        }
    }

    #[test]
    fn nothing_leaves_for_less_than_a_zone_is_away() {
        let settings = Zones::default();
        let spill_after = |latency: f64| {
            let mut spill = Spill::default();
            for _ in 0..10 {
                spill.tick(&settings, IDLE, &sample(0.5, 0.000_3), &sample(0.5, 0.001));
            }
            for _ in 0..60 {
                spill.tick(&settings, IDLE, &sample(0.5, latency), &sample(0.5, 0.001));
            }
            spill.level(&settings, 1.0)
        };
        assert_eq!(spill_after(0.002), settings.least_spill);
        assert!(spill_after(0.01) > 0.3);
    }

    #[test]
    fn nothing_leaves_for_zones_with_more_load() {
        let settings = Zones::default();
        let mut spill = Spill::default();
        for _ in 0..100 {
            spill.tick(&settings, IDLE, &sample(0.9, 0.01), &sample(0.95, 0.01));
        }
        assert_eq!(spill.level(&settings, 1.0), settings.least_spill);
    }

    #[test]
    fn without_a_working_backend_in_the_own_zone_all_zones_are_alike() {
        let (settings, spill) = (Zones::default(), Spill::default());
        assert_eq!(spill.level(&settings, 0.0), 1.0);
        assert!((spill.level(&settings, 0.5) - 0.3).abs() < 1e-9);
        assert_eq!(
            spill.level(&settings, 0.8),
            settings.least_spill,
            "the working backends can take it"
        );
    }
}
