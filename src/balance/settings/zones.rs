//! The constants that decide how much traffic leaves a zone.

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// How much traffic leaves the balancer's own zone.
///
/// Backends in other zones count with a part of their weight, the *spill*. It is `least_spill` while
/// the own zone has room, and grows every tick by `gain` times the pressure, which is the greater of
///
/// - by how much the load that backends in the own zone report exceeds `load_limit` and the load in
///   other zones;
/// - by how much their mean latency, smoothed, exceeds `stretch_limit` times the lowest one of the
///   last minutes, and the lowest one plus [`Adaptive::idle_latency_ms`](super::Adaptive::idle_latency_ms),
///   relative to the greater of the two.
///
/// Where the pressure is negative the spill shrinks. It is at least `1 - spare * h`, where `h` is
/// the part of the own zone's weight whose backends work: so without a working backend in the own
/// zone, all zones are alike.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Zones {
    /// The part of their weight that backends in other zones have in any case: enough for a sudden
    /// queue in the own zone to reach them. Default: 0.02. Range: 0 to 1; with 1 zones play no part.
    pub least_spill: f64,
    /// The load up to which traffic stays in the own zone, as [`Adaptive`](super::Adaptive)
    /// calculates it: about CPU in use, 0 to 1. Default: 0.8. Range: 0.1 to 4.
    pub load_limit: f64,
    /// The mean latency up to which traffic stays in the own zone, as a multiple of its lowest mean
    /// latency; a rise by less than `idle_latency_ms` of [`Adaptive`](super::Adaptive) is never too much. Default: 2.
    /// Range: 1.1 to 100.
    pub stretch_limit: f64,
    /// How fast the spill follows the pressure. Default: 0.3. Range: 0.001 to 10.
    pub gain: f64,
    /// How much traffic a backend in the own zone can take, as a multiple of its share, when others
    /// in the zone fail. Default: 1.4. Range: 1 to 100.
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
    /// Checks the range of every field. Errors name the field as a part of `field`.
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
