//! The `leader` section.

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// Which requests go to the leader, where writes do: beside everything but `GET`, `HEAD`, `OPTIONS` and
/// `TRACE`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Leader {
    /// Whether writes go to the leader: every request but `GET`, `HEAD`, `OPTIONS` and `TRACE`. Without that,
    /// the other fields would have no effect, and a server is not built with them. Default: `false`.
    pub writes: bool,
    /// Paths whose requests are always for the leader: each one, and what is below it. Default: none.
    pub paths: Vec<String>,
    /// How long reads of a client go to the leader after a write of it, if the client sends back the
    /// field `x-leader-reads-until` that it got with the response to the write. Default: 0, not at all.
    /// Range: 0 to 3,600,000 ms.
    pub read_your_writes_ms: u64,
}

impl Leader {
    /// Checks every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        for path in &self.paths {
            if !path.starts_with('/') || path.contains(['?', '#', ' ']) {
                let reason = format!("{path:?} is not a path such as /admin");
                return Err(ClusterError::config(format!("{field}.paths"), reason));
            }
        }
        let time = self.read_your_writes_ms;
        in_range(field, "read_your_writes_ms", time, 0..=3_600_000)
    }
}
