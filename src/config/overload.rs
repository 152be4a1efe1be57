//! The `overload` section.

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// What the bundled proxy does when there are more requests than backends can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Overload {
    /// Requests in flight in all, of one group. Those that have become tunnels, such as WebSockets, count, here and
    /// below, as connections do in HAProxy and nginx. Default: 0, any number. Range: 0 to 10,000,000.
    pub max_in_flight: usize,
    /// Requests in flight at one backend, of this process. Default: 0, any number. Range: 0 to
    /// 1,000,000.
    pub max_in_flight_per_node: usize,
    /// Requests of a group that may wait until one of those ends; more get 503 at once. Default: 100. Range: 0 to
    /// 1,000,000.
    pub queue: usize,
    /// How long they wait; then 503. Default: 1,000 ms. Range: 1 to 60,000.
    pub queue_timeout_ms: u64,
    /// A backend that answers 429 or 503 with `Retry-After` is given nothing for as long as it says, but
    /// for at most this time, only while there are others, and for 429 not while it serves most other clients: then it means this one.
    /// Default: 10,000 ms. Range: 0 (not at all)
    /// to 600,000.
    pub retry_after_most_ms: u64,
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            max_in_flight: 0,
            max_in_flight_per_node: 0,
            queue: 100,
            queue_timeout_ms: 1_000,
            retry_after_most_ms: 10_000,
        }
    }
}

impl Overload {
    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let check = |name, value, range| in_range(field, name, value, range);
        check("max_in_flight", self.max_in_flight, 0..=10_000_000)?;
        let per_node = self.max_in_flight_per_node;
        check("max_in_flight_per_node", per_node, 0..=1_000_000)?;
        check("queue", self.queue, 0..=1_000_000)?;
        let check = |name, value, range| in_range(field, name, value, range);
        check("queue_timeout_ms", self.queue_timeout_ms, 1..=60_000)?;
        check("retry_after_most_ms", self.retry_after_most_ms, 0..=600_000)
    }
}
