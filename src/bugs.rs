//! Bugs on order: the simulation is given each of them and has to notice.
//!
//! With the feature `test-util` only, and even then none is there until a test asks for it, on the
//! thread that asks. Without the feature every question is answered with `false` at compile time.

/// A mistake that coordination over leases invites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Bug {
    DeadlineFromReceipt,
    NoMargin,
    FlagInsteadOfClock,
    LeaseGoneIgnored,
    UnconditionalDelete,
    UnconditionalRegistration,
    PrefixWithoutSlash,
    ClaimFromWrite,
    ClaimWhenPredecessorGoes,
    TermEndsAfterResigning,
    AbandonedCandidacyLeads,
    SupersededFightsBack,
    HistoryNotChecked,
    NoRelistAfterCompaction,
    ResumeFromNow,
    NoResetAfterRelist,
    SharedLeaseRevoked,
    OrphanedKeysStay,
    OthersDeletedForTransfer,
    TransferWithoutCondition,
    TransferById,
    TransferToFormerLife,
    LeaderById,
    LeaderOutlivesRegistration,
    DrainingStaysCandidate,
    ShutdownWithoutBudget,
}

#[cfg(any(test, feature = "test-util"))]
mod on_order {
    use super::Bug;
    use std::cell::Cell;

    impl Bug {
        /// Every one.
        pub const ALL: [Self; 26] = [
            Self::DeadlineFromReceipt,
            Self::NoMargin,
            Self::FlagInsteadOfClock,
            Self::LeaseGoneIgnored,
            Self::UnconditionalDelete,
            Self::UnconditionalRegistration,
            Self::PrefixWithoutSlash,
            Self::ClaimFromWrite,
            Self::ClaimWhenPredecessorGoes,
            Self::TermEndsAfterResigning,
            Self::AbandonedCandidacyLeads,
            Self::SupersededFightsBack,
            Self::HistoryNotChecked,
            Self::NoRelistAfterCompaction,
            Self::ResumeFromNow,
            Self::NoResetAfterRelist,
            Self::SharedLeaseRevoked,
            Self::OrphanedKeysStay,
            Self::OthersDeletedForTransfer,
            Self::TransferWithoutCondition,
            Self::TransferById,
            Self::TransferToFormerLife,
            Self::LeaderById,
            Self::LeaderOutlivesRegistration,
            Self::DrainingStaysCandidate,
            Self::ShutdownWithoutBudget,
        ];
    }

    thread_local! {
        static ORDERED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Puts this bug into everything that runs on this thread from now on, or takes it out.
    pub fn order(bug: Option<Bug>) {
        ORDERED.set(bug);
    }

    pub(crate) fn has(bug: Bug) -> bool {
        ORDERED.get() == Some(bug)
    }
}

#[cfg(any(test, feature = "test-util"))]
pub(crate) use on_order::has;
#[cfg(any(test, feature = "test-util"))]
pub use on_order::order;

#[cfg(not(any(test, feature = "test-util")))]
pub(crate) const fn has(_: Bug) -> bool {
    false
}
