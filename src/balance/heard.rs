//! Which backends have last said how many requests they have in flight.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many of the last ones a pick considers beside those that it draws.
pub(super) const HEARD: usize = 4;

/// The last backends to report their requests in flight. Where there are many proxies, what a backend
/// reported some time ago says little, and of many backends hardly any has reported just now: these have.
/// (A memory of good choices beside random ones: M. Mitzenmacher, B. Prabhakar and D. Shah, "Load
/// balancing with memory", FOCS 2002.)
///
/// Away from what every pick reads, because every report writes it.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Heard {
    /// Their places in the table as of their last report, and the time stamps of these. A place in an earlier
    /// table may be that of another backend now, which does no harm as a candidate.
    reports: [AtomicU64; HEARD],
    next: AtomicU32,
}

/// Nobody has reported.
const NONE: u64 = u64::MAX;

impl Heard {
    pub(super) fn new() -> Self {
        Self {
            reports: [const { AtomicU64::new(NONE) }; HEARD],
            next: AtomicU32::new(0),
        }
    }

    /// The backend at this place has reported. Of two at the same time one may be lost.
    pub(super) fn add(&self, place: u32, stamp: u32) {
        let next = self.next.load(Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
        let report = u64::from(place) << 32 | u64::from(stamp);
        self.reports[next as usize % HEARD].store(report, Ordering::Relaxed);
    }

    /// The places of the last ones, with the time stamps. Some may be the same.
    pub(super) fn reports(&self) -> impl Iterator<Item = (usize, u32)> {
        let reports = self.reports.iter();
        reports
            .map(|report| report.load(Ordering::Relaxed))
            .filter(|report| *report != NONE)
            .map(|report| ((report >> 32) as usize, report as u32))
    }
}
