//! Finding the leader for a request.

use std::time::Duration;

use super::context::RequestContext;
use crate::pingora::{LeaderRoute, LeaderUpstream};

/// How long to wait for another leader before one that could not be reached is tried again.
const RETRY_SAME_AFTER: Duration = Duration::from_millis(200);

/// Finds the leader, waiting for at most `max_wait` from the start of the request. The error is the
/// reason why there is none.
pub(super) async fn find_leader(
    route: &LeaderRoute,
    max_wait: Duration,
    context: &RequestContext,
) -> Result<LeaderUpstream, &'static str> {
    let remaining = || max_wait.saturating_sub(context.started.elapsed());
    // A leader that could not be reached may have crashed: its successor has another term. Or it
    // may be back in a moment.
    let patience = match context.failed_epoch {
        Some(_) => remaining().min(RETRY_SAME_AFTER),
        None => remaining(),
    };
    let other = route
        .wait_for_other_than(context.failed_epoch, patience)
        .await;
    if let Some(leader) = other.or_else(|| route.leader()) {
        return Ok(leader);
    }
    let leader = route.wait(remaining()).await;
    leader.ok_or("there is no leader")
}
