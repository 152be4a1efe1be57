//! Zones: near backends first, the others by as much as the near ones are under pressure. Pure.

use serde::Deserialize;

use super::adaptive::{Mean, in_range};
use crate::error::ClusterError;

/// How much traffic leaves the balancer's own zone.
///
/// Backends elsewhere count with a part of their weight, the *spill*. It is `least_spill` while the
/// own zone has room, and grows every tick by `gain` times the pressure, the greater of
///
/// - by how much the load that near backends report exceeds `load_limit`, and the load elsewhere;
/// - by how much the mean latency of the near ones, smoothed, exceeds `stretch_limit` times the least of the
///   last minutes, relative to that.
///
/// Where that is negative it shrinks. It is at least `1 - spare * h`, `h` being the part of the near
/// weight that is well: so without a near backend that works, all zones are alike.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Zones {
    /// The part of their weight that backends elsewhere have in any case: enough for a sudden
    /// queue here to reach them. Default: 0.02. Range: 0 to 1; with 1 zones play no part.
    pub least_spill: f64,
    /// How loaded the near ones may be, as [`Adaptive`](super::Adaptive) reckons it: about CPU in
    /// use, 0 to 1. Default: 0.8. Range: 0.1 to 4.
    pub load_limit: f64,
    /// How many times its best mean latency the zone's latency may be. Default: 2. Range: 1.1 to
    /// 100.
    pub stretch_limit: f64,
    /// How fast the spill follows the pressure. Default: 0.3. Range: 0.001 to 10.
    pub gain: f64,
    /// How much more than its share a near backend can take when others near it fail. Default:
    /// 1.4. Range: 1 to 100.
    pub spare: f64,
}

impl Default for Zones {
    fn default() -> Self {
        Self {
            least_spill: 0.02,
            load_limit: 0.8,
            stretch_limit: 2.0,
            gain: 0.3,
            spare: 1.4,
        }
    }
}

impl Zones {
    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        in_range(field, "least_spill", self.least_spill, 0.0..=1.0)?;
        in_range(field, "load_limit", self.load_limit, 0.1..=4.0)?;
        in_range(field, "stretch_limit", self.stretch_limit, 1.1..=100.0)?;
        in_range(field, "gain", self.gain, 0.001..=10.0)?;
        in_range(field, "spare", self.spare, 1.0..=100.0)
    }
}

/// Where a balancer is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere in particular: all zones are alike.
    #[default]
    Anywhere,
    /// In this zone.
    Zone(String),
    /// Where the node with this id is.
    Beside(String),
}

/// Half of the minutes over which the best latency is remembered, in ticks.
const WINDOW: u32 = 120;
/// How much a tick moves the smoothed latency.
const SMOOTHING: f64 = 0.1;
/// The most that one tick changes the spill.
const STEP: f64 = 0.2;

/// What one tick found out about the near ones or those elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Side {
    /// Reported.
    pub(super) load: Mean,
    /// In seconds.
    pub(super) latency: Mean,
}

/// How much of the weight elsewhere counts.
#[derive(Debug, Clone)]
pub(super) struct Spill {
    level: f64,
    /// Of the near ones, smoothed, in seconds.
    latency: Option<f64>,
    /// The least mean latencies of this window and the one before.
    best: [f64; 2],
    ticks: u32,
}

impl Default for Spill {
    fn default() -> Self {
        Self {
            level: 0.0,
            latency: None,
            best: [f64::INFINITY; 2],
            ticks: 0,
        }
    }
}

impl Spill {
    /// The part of its weight that a backend elsewhere has, where so much of the near weight is
    /// well, 0 to 1.
    pub(super) fn level(&self, config: &Zones, well: f64) -> f64 {
        let forced = 1.0 - config.spare * well;
        self.level.max(forced).clamp(config.least_spill, 1.0)
    }

    pub(super) fn tick(&mut self, config: &Zones, near: &Side, far: &Side) {
        self.ticks += 1;
        if self.ticks.is_multiple_of(WINDOW) {
            self.best = [f64::INFINITY, self.best[0]];
        }
        let mut pressure = f64::NEG_INFINITY;
        if near.load.count > 0 {
            let limit = config.load_limit.max(far.load.value());
            pressure = (near.load.value() - limit) / config.load_limit;
        }
        if near.latency.count > 0 {
            // Smoothed: the least of many noisy means would be far below what is usual.
            let new = near.latency.value();
            let latency = self
                .latency
                .map_or(new, |old| old + SMOOTHING * (new - old));
            self.latency = Some(latency);
            self.best[0] = self.best[0].min(latency);
            let best = self.best[0].min(self.best[1]);
            let limit = (config.stretch_limit * best).max(1e-9);
            pressure = pressure.max((latency - limit) / limit);
        }
        if pressure.is_finite() {
            let step = (config.gain * pressure).clamp(-STEP, STEP);
            self.level = (self.level + step).clamp(config.least_spill, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(load: f64, latency: f64) -> Side {
        let mut side = Side::default();
        side.load.add(load, 1.0);
        side.latency.add(latency, 1.0);
        side
    }

    #[test]
    fn pressure_spills_and_relief_comes_back() {
        let config = Zones::default();
        let calm = side(0.5, 0.01);
        for hot in [side(1.0, 0.01), side(0.5, 0.05)] {
            let mut spill = Spill::default();
            spill.tick(&config, &calm, &calm);
            assert_eq!(spill.level(&config, 1.0), config.least_spill);
            for _ in 0..10 {
                spill.tick(&config, &hot, &calm);
            }
            assert!(spill.level(&config, 1.0) > 0.3, "{spill:?}");
            for _ in 0..120 {
                spill.tick(&config, &calm, &calm);
            }
            assert_eq!(spill.level(&config, 1.0), config.least_spill);
        }
    }

    #[test]
    fn hotter_elsewhere_is_no_way_out() {
        let config = Zones::default();
        let mut spill = Spill::default();
        for _ in 0..100 {
            spill.tick(&config, &side(0.9, 0.01), &side(0.95, 0.01));
        }
        assert_eq!(spill.level(&config, 1.0), config.least_spill);
    }

    #[test]
    fn without_a_near_one_that_is_well_all_are_alike() {
        let (config, spill) = (Zones::default(), Spill::default());
        assert_eq!(spill.level(&config, 0.0), 1.0);
        assert!((spill.level(&config, 0.5) - 0.3).abs() < 1e-9);
        assert_eq!(
            spill.level(&config, 0.8),
            config.least_spill,
            "the others can take it"
        );
    }
}
