//! What is counted of the access log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What has become of the lines of the access log.
#[derive(Debug, Clone, Default)]
pub struct AccessLogStatistics(Arc<AtomicU64>);

impl AccessLogStatistics {
    /// How many lines were lost since the start, because there was no room for them or they could not be written.
    pub fn lost(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, lines: u64) {
        self.0.fetch_add(lines, Ordering::Relaxed);
    }
}
