//! Units and constants that everything shares.

/// Simulated time.
pub type Seconds = f64;
/// The position of a request in the list of those under way.
pub type RequestId = u32;

/// Mean work of a request, in core seconds.
pub const MEAN_WORK: Seconds = 0.010;
