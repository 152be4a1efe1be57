//! What a request can ask of a pick.

use std::net::SocketAddr;
use std::time::Instant;

/// What a request asks of a pick beyond the policy.
#[derive(Debug, Clone, Copy, Default)]
pub struct PickOptions<'a> {
    /// What [`Policy::Consistent`](super::Policy::Consistent) hashes. Default: empty.
    pub key: &'a [u8],
    /// Backends not to pick, because they have been tried. If no other is left, nothing is picked.
    pub exclude: &'a [SocketAddr],
    /// The time, where the caller has read the clock already, or has a clock of its own. Default:
    /// the pick reads the clock if it needs the time, which is only where backends report their
    /// requests in flight.
    pub now: Option<Instant>,
    /// The seed of what is drawn for this pick, for a simulation that can be repeated. Default: a
    /// seed from the thread's own generator.
    pub random: Option<u64>,
}
