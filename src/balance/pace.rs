//! How often work that changes or time bring is done.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use super::balancer::TICK;

/// The shortest time from one update to the next. The first of several changes takes effect at once,
/// the next ones together after this time: with many nodes, each of which reports every few seconds,
/// an update for each change would cost too much.
const MIN_PAUSE: Duration = Duration::from_millis(20);
/// From one update to the next at least this many times as long as an update took: 2 % of a core.
const PAUSE_FACTOR: u32 = 50;

/// How long to wait until the next update, when the last one took `cost`.
pub(crate) fn pause_after(cost: Duration) -> Duration {
    MIN_PAUSE.max(cost * PAUSE_FACTOR)
}

/// Calls `tick` as often as weights need it.
pub(crate) async fn every_tick(tick: impl Fn(Instant)) -> Infallible {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // It may be later than it should be, as after a stop of the process.
        tick(tokio::time::Instant::now().into_std());
    }
}
