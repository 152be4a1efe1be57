//! Entries that are not used: counted by reason, and logged once each.

use tracing::warn;

use super::admission::{Refusal, shortened};
use super::log_once::LogOnce;
use crate::store::Entry;

/// How many entries were rejected since the start, by reason. Registrations are logged once for each
/// key and reason, up to a limit of 10,000 lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RejectedEntries {
    /// Entries that could not be parsed, or whose id was not the id in their key.
    pub malformed: u64,
    /// Entries that exceeded the [`EntryLimits`](super::EntryLimits).
    pub too_large: u64,
    /// Entries with an address or a port that is not allowed, or that nobody can connect to:
    /// unspecified, multicast, broadcast, link-local (IPv6), port 0.
    pub not_allowed: u64,
    /// Entries that were accepted although their `weight` is invalid (negative, or not a number);
    /// it counts as 1. Not part of the [`total`](Self::total).
    pub weights: u64,
}

impl RejectedEntries {
    /// All entries that were skipped.
    pub fn total(&self) -> u64 {
        self.malformed + self.too_large + self.not_allowed
    }

    fn add(&mut self, other: &Self) {
        self.malformed += other.malformed;
        self.too_large += other.too_large;
        self.not_allowed += other.not_allowed;
        self.weights += other.weights;
    }
}

/// Counts and logs rejected entries.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    counts: RejectedEntries,
    logged: LogOnce,
}

impl Rejections {
    pub(super) fn counts(&self) -> RejectedEntries {
        self.counts
    }

    /// Goes on from the counts of an earlier run.
    pub(super) fn continue_from(&mut self, counts: RejectedEntries) {
        self.counts = counts;
    }

    #[cfg(any(test, feature = "test-util"))]
    pub(super) fn logged_lines(&self) -> usize {
        self.logged.len()
    }

    pub(super) fn count(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Malformed(_) => self.counts.malformed += 1,
            Refusal::TooLarge(_) => self.counts.too_large += 1,
            Refusal::NotAllowed(_) => self.counts.not_allowed += 1,
            Refusal::Unwanted | Refusal::Unresolved => {}
        }
    }

    /// Counts an entry that is skipped, and logs it unless that was done before, here or in
    /// `earlier`.
    pub(super) fn skip(&mut self, earlier: Option<&Self>, entry: &Entry, refusal: &Refusal) {
        self.count(refusal);
        let reason = refusal.reason();
        let is_said = !matches!(refusal, Refusal::Unwanted | Refusal::Unresolved);
        if is_said && self.is_first(earlier, entry, reason) {
            // The reason that a parser gives may repeat the value.
            let (key, revision) = (shortened(&entry.key), entry.mod_revision);
            warn!(key, revision, reason = shortened(reason), "entry skipped");
        }
    }

    /// The same for an entry that is accepted although its weight is invalid.
    pub(super) fn ignore_weight(&mut self, earlier: Option<&Self>, entry: &Entry, reason: &str) {
        self.counts.weights += 1;
        if self.is_first(earlier, entry, reason) {
            let (key, revision) = (shortened(&entry.key), entry.mod_revision);
            warn!(
                key,
                revision, reason, "entry accepted without an invalid field"
            );
        }
    }

    fn is_first(&mut self, earlier: Option<&Self>, entry: &Entry, reason: &str) -> bool {
        let none = LogOnce::default();
        let earlier = earlier.map_or(&none, |earlier| &earlier.logged);
        self.logged.is_first(earlier, &entry.key, reason)
    }

    /// Adds the rejections of a listing.
    pub(super) fn add(&mut self, listed: Self) {
        self.counts.add(&listed.counts);
        self.add_logged(listed);
    }

    /// Adds what was logged during a listing that failed: its entries will be listed, and counted,
    /// again.
    pub(super) fn add_logged(&mut self, listed: Self) {
        self.logged.extend(listed.logged);
    }
}
