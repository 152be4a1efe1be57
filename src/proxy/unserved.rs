//! Why a request was given to no backend.

/// Why a request was given to no backend, or to no other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unserved {
    /// The group has none.
    NoBackend,
    /// All that there are have been tried.
    AllTried,
    /// Each has as many requests as it may have, for too long.
    BackendsFull,
    /// So many requests are in flight as may be in all, for too long.
    TooMany,
    /// There was no leader for too long.
    NoLeader,
    /// The leader has as many requests as it may have, for too long.
    LeaderFull,
    /// So many requests wait for a leader that no other may.
    TooManyWait,
}

impl Unserved {
    pub(super) const ALL: [Self; 7] = [
        Self::NoBackend,
        Self::AllTried,
        Self::BackendsFull,
        Self::TooMany,
        Self::NoLeader,
        Self::LeaderFull,
        Self::TooManyWait,
    ];

    /// As clients and the access log have it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NoBackend => "no backend is registered",
            Self::AllTried => "every backend has been tried",
            Self::BackendsFull => "every backend has as many requests as it may have",
            Self::TooMany => "too many requests are being served",
            Self::NoLeader => "there is no leader",
            Self::LeaderFull => "the leader has as many requests as it may have",
            Self::TooManyWait => "too many requests wait for a leader",
        }
    }

    /// As metrics have it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoBackend => "no_backend",
            Self::AllTried => "all_tried",
            Self::BackendsFull => "backends_full",
            Self::TooMany => "too_many",
            Self::NoLeader => "no_leader",
            Self::LeaderFull => "leader_full",
            Self::TooManyWait => "too_many_wait",
        }
    }
}
