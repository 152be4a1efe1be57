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
    /// Nothing is picked rather than a backend that is ejected because it fails. Default: `false`.
    pub only_working: bool,
    /// Whether the request may be a probe, or the first request of a backend. Default: if nothing is
    /// excluded.
    pub probes: Probes,
    /// Whether the request asks to become a tunnel, such as a WebSocket: the tunnels that a backend has count as its
    /// requests in flight do. Default: `false`, tunnels do not count.
    pub for_tunnel: bool,
    /// Whether some of the excluded ones can take no more requests. Then a process that uses a part of the backends
    /// ([`Adaptive::subset_in_flight`](super::Adaptive::subset_in_flight)) looks at others at once. Default: `false`.
    pub some_full: bool,
    /// The time, where the caller has read the clock already, or has a clock of its own. Default:
    /// the pick reads the clock if it needs the time, which is only where backends report their
    /// requests in flight.
    pub now: Option<Instant>,
    /// The seed of what is drawn for this pick, for a simulation that can be repeated. Default: a
    /// seed from the thread's own generator.
    pub random: Option<u64>,
}

/// Whether a request may find out whether a backend works again that has been ejected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Probes {
    /// If no backend is excluded: the request has not been tried yet, and can be sent again.
    #[default]
    FirstTry,
    /// Whatever is excluded.
    Yes,
    /// Only if no other requests come: it cannot be sent again.
    IfNoOther,
    /// Not at all: it is tried again, or nobody will hear what becomes of it.
    No,
}

impl PickOptions<'_> {
    /// Whether the request may try a backend that is new or ejected.
    pub(super) fn may_try(&self) -> bool {
        match self.probes {
            Probes::FirstTry => self.exclude.is_empty(),
            Probes::Yes | Probes::IfNoOther => true,
            Probes::No => false,
        }
    }
}
