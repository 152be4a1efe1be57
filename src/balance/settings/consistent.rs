//! The constants of the policy `consistent`.

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// The constants of [`Policy::Consistent`](super::Policy::Consistent).
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Consistent {
    /// How many requests in flight a backend may have, as a multiple of its fair share of all
    /// requests in flight. Beyond that its keys go to the next owner, so that one hot key does not
    /// overload one backend. Default: 1.25. Range: 1.01 to 1,000.
    pub balance_factor: f64,
    /// How many requests in flight a backend may have in any case, so that keys stay with their
    /// backend while there is little traffic. Default: 8. Range: 1 to 1,000,000.
    pub slack: usize,
}

impl Default for Consistent {
    fn default() -> Self {
        Self {
            balance_factor: 1.25,
            slack: 8,
        }
    }
}

impl Consistent {
    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        in_range(field, "balance_factor", self.balance_factor, 1.01..=1e3)?;
        in_range(field, "slack", self.slack, 1..=1_000_000)
    }
}
