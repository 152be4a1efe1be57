//! The names of the policies.

use serde::Deserialize;

/// How a backend is chosen.
///
/// A node whose static weight is 0 gets no traffic under any policy, like one that drains: it is
/// not among the backends. If no other node is left, nothing is picked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Policy {
    /// One after the other. Where static weights differ, in proportion to them and evenly spread.
    /// Metrics play no part.
    RoundRobin,
    /// At random, in proportion to static weights. Metrics play no part.
    Random,
    /// By a hash of the request's key, so that a key stays with its backend while others come and
    /// go. Metrics play no part.
    ///
    /// Each backend gets a share of the keys in proportion to its static weight, whatever the unit
    /// of the weights. Shares deviate from that by chance: by 1 % for ten equal backends, 2 % for
    /// 100, 6 % for 1,000. The hashes are divided into 131,072 cells with one owner each, so a
    /// backend whose share is smaller than a cell owns one cell or none. When a backend joins,
    /// leaves or changes its weight, only keys that move to it or away from it change their
    /// backend, which is the smallest possible number. This takes 512 KiB for each balancer and
    /// another 512 KiB once per process, and some milliseconds for each such change; nothing while
    /// there is no change.
    Consistent,
    /// By [`Headroom`](super::Headroom) weights and requests in flight.
    Headroom,
    /// By weights that follow metrics, latencies and failures ([`Adaptive`](super::Adaptive)), and
    /// requests in flight.
    #[default]
    Adaptive,
}
