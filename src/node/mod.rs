//! A registered node: what is stored under its registry key.

mod entry;
mod fields;
mod state;

use std::time::{SystemTime, UNIX_EPOCH};

pub use entry::Node;
pub use state::{HealthStatus, NodeState};

/// The time of entries: milliseconds since 1970, by this machine's clock.
pub(crate) fn unix_millis() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}
