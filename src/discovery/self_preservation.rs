//! When nodes are kept although their leases are gone: the settings, and the decision.

use std::time::Duration;

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// When nodes are kept although their leases are gone.
///
/// Leases expire by the hundred when the store was away for longer than their time to live, or lost
/// its data, while the nodes themselves go on serving. So when more than `part` of the nodes, and at
/// least `at_least` nodes, vanish within `within_ms`, or are missing from a new listing, all of them
/// stay in the view as *suspects* for `hold_ms`. Requests are still sent to suspects, as far as their
/// outcomes and health checks allow. A suspect that registers again is an ordinary node; a suspect
/// never leads. A node does not count if it was draining when it vanished, or had announced that it
/// was leaving, as the nodes of this crate do when they are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SelfPreservation {
    /// Whether suspects are kept at all. Default: true.
    pub enabled: bool,
    /// The part of the nodes that has to be exceeded. Default: 0.3. Range: 0.01 to 1.
    pub part: f64,
    /// The least number of vanished nodes. In a smaller group every node is removed at once.
    /// Default: 3. Range: 1 to 1,000,000.
    pub at_least: usize,
    /// The period within which nodes vanish together, in milliseconds: about the time to live of
    /// their leases. Default: 10,000. Range: 100 to 3,600,000.
    pub within_ms: u64,
    /// How long suspects are kept, in milliseconds. Default: 30,000. Range: 100 to 86,400,000.
    pub hold_ms: u64,
}

impl Default for SelfPreservation {
    fn default() -> Self {
        Self {
            enabled: true,
            part: 0.3,
            at_least: 3,
            within_ms: 10_000,
            hold_ms: 30_000,
        }
    }
}

impl SelfPreservation {
    /// Keeps no suspects: a node is removed with its lease.
    pub fn off() -> Self {
        Self {
            enabled: false,
            ..Self::default()
        }
    }

    /// Checks every field. Errors name them as parts of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) with the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let whole = |value: u64| value as f64;
        for (name, value, range) in [
            ("part", self.part, 0.01..=1.0),
            ("at_least", self.at_least as f64, 1.0..=1e6),
            ("within_ms", whole(self.within_ms), 100.0..=3.6e6),
            ("hold_ms", whole(self.hold_ms), 100.0..=8.64e7),
        ] {
            in_range(field, name, value, range)?;
        }
        Ok(())
    }

    /// Whether this is a mass loss, not churn.
    pub(super) fn is_mass_loss(&self, lost: usize, nodes: usize) -> bool {
        self.enabled && lost >= self.at_least && lost as f64 > self.part * nodes as f64
    }

    pub(super) fn within(&self) -> Duration {
        Duration::from_millis(self.within_ms)
    }

    pub(super) fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }
}
