//! When a node with a priority asks for leadership, and when it takes the request back. No I/O.

use std::time::Duration;

use tokio::time::Instant;

/// How far a node has come with a take-over by priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takeover {
    /// The node has no priority, no right to read requests, or is not a candidate.
    Idle,
    /// The node compares its priority with the leader's at this instant.
    CompareAt(Instant),
    /// The node has asked for leadership, and takes the request back at this instant.
    RequestedUntil(Instant),
}

/// What a take-over depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) leads: bool,
    pub(super) is_candidate: bool,
    /// A request of this node is in the store.
    pub(super) has_request: bool,
    pub(super) now: Instant,
}

/// The next step of a take-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing is due.
    Wait,
    /// Compare priorities with the leader now, and ask for leadership if the own one is higher.
    Compare,
    /// Compare priorities later.
    CompareLater,
    /// Delete the request, which was fulfilled or not fulfilled in time. Compare again later.
    DeleteRequest,
    /// The node is not a candidate: there is nothing to compare.
    Stop,
}

impl Takeover {
    /// Compares at a time around `after` from now, so that nodes of one priority do not do it at the
    /// same instant.
    pub(super) fn compare_after(after: Duration) -> Self {
        let jitter = after.mul_f64(0.1 * fastrand::f64());
        Self::CompareAt(Instant::now() + after + jitter)
    }

    /// When the next step is due, even if nothing changes.
    pub(super) fn due(self) -> Option<Instant> {
        match self {
            Self::Idle => None,
            Self::CompareAt(due) | Self::RequestedUntil(due) => Some(due),
        }
    }

    pub(super) fn step(self, facts: Facts) -> Step {
        let is_early = self.due().is_some_and(|due| facts.now < due);
        match self {
            Self::RequestedUntil(_) if facts.has_request && !facts.leads && is_early => Step::Wait,
            _ if facts.has_request => Step::DeleteRequest,
            Self::CompareAt(_) if is_early => Step::Wait,
            Self::CompareAt(_) if facts.leads => Step::CompareLater,
            Self::CompareAt(_) => Step::Compare,
            Self::Idle | Self::RequestedUntil(_) if facts.is_candidate => Step::CompareLater,
            Self::Idle | Self::RequestedUntil(_) => Step::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_state_has_its_steps() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let idle = Takeover::Idle;
        let (compare, compare_later) = (Takeover::CompareAt(now), Takeover::CompareAt(later));
        let (overdue, requested) = (
            Takeover::RequestedUntil(now),
            Takeover::RequestedUntil(later),
        );
        // The state, whether it leads, is a candidate and has a request, and the step.
        for (takeover, leads, is_candidate, has_request, step) in [
            (idle, false, false, false, Step::Stop),
            (idle, false, true, false, Step::CompareLater),
            (idle, true, true, false, Step::CompareLater),
            (idle, true, true, true, Step::DeleteRequest),
            (compare_later, false, true, false, Step::Wait),
            (compare_later, false, true, true, Step::DeleteRequest),
            (compare, false, true, false, Step::Compare),
            (compare, false, true, true, Step::DeleteRequest),
            (compare, true, true, false, Step::CompareLater),
            (requested, false, true, true, Step::Wait),
            (requested, true, true, true, Step::DeleteRequest),
            (requested, false, true, false, Step::CompareLater),
            (requested, false, false, false, Step::Stop),
            (overdue, false, true, true, Step::DeleteRequest),
        ] {
            let facts = Facts {
                leads,
                is_candidate,
                has_request,
                now,
            };
            assert_eq!(takeover.step(facts), step, "{takeover:?}, {facts:?}");
        }
    }
}
