//! The result of one run.

/// The result of one run.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub requests: u64,
    /// In seconds.
    pub p50: f64,
    pub p99: f64,
    /// Share of requests that failed.
    pub errors: f64,
    /// Share of requests that went to each server that fails, while any does.
    pub faulty: f64,
    /// Share of requests that went to servers that are going to fail.
    pub before: f64,
    /// Share of requests that went to servers that had failed, from 10 s after they worked again.
    pub returned: f64,
    /// p99 of the last server in its first 30 s.
    pub joined_p99: f64,
    /// How much the servers' utilisation varies over time: mean over servers of standard deviation
    /// by mean of one-second windows.
    pub variation: f64,
    /// Share of requests that stayed in their zone.
    pub near: f64,
}

/// This quantile of the values; 0 if there are none.
pub fn quantile(values: &mut [f32], quantile: f64) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = ((values.len() - 1) as f64 * quantile) as usize;
    let (_, value, _) = values.select_nth_unstable_by(rank, f32::total_cmp);
    f64::from(*value)
}
