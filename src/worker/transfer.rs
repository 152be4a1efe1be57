//! A transfer of leadership that the application has requested: when it is carried out, and when it
//! fails. No I/O.

use std::time::Duration;

use tokio::time::Instant;

use super::command::Reply;
use super::reading::Reading;
use crate::error::ClusterError;
use crate::store::{Entry, Revision};

/// How long candidates are given to make way.
pub(super) const MAKE_WAY_WITHIN: Duration = Duration::from_secs(2);

/// A transfer under way: the candidates ahead of the target have been asked to make way.
#[derive(Debug)]
pub(super) struct Transfer {
    /// The id of the node that is to lead.
    pub(super) target: String,
    /// The key of its candidacy, and the revision that created it.
    pub(super) candidacy: String,
    pub(super) created: Revision,
    /// When to give up.
    pub(super) until: Instant,
    pub(super) reply: Reply,
}

/// What a transfer depends on, beside the reading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// The key of the leader's own candidacy.
    pub(super) own_candidacy: &'a str,
    /// The node is first in the queue.
    pub(super) leads: bool,
    /// The fencing token of its term at this instant, if it has one.
    pub(super) term: Option<Revision>,
    pub(super) now: Instant,
}

/// The next step of a transfer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The target is next in the queue: hand over to it.
    HandOver { epoch: Revision, to: Entry },
    /// Fail, because this node does not lead.
    NotLeader,
    /// Fail, because the target is no longer a candidate.
    TargetLeft,
    /// Fail, because the candidate with this id has not made way in time.
    NotMadeWay { ahead: String },
    /// Candidates ahead of the target may still make way, or the term may begin again.
    Wait,
}

impl Transfer {
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        now >= self.until
    }

    pub(super) fn step(&self, reading: &Reading, facts: Facts<'_>) -> Step {
        if !facts.leads {
            return Step::NotLeader;
        }
        let mut candidates = reading.candidates.iter();
        let target = candidates
            .find(|entry| entry.key == self.candidacy && entry.create_revision == self.created);
        let Some(target) = target else {
            return Step::TargetLeft;
        };
        let ahead = reading
            .candidates
            .iter()
            .find(|entry| entry.key != facts.own_candidacy && entry.create_revision < self.created);
        match (ahead, facts.term) {
            (None, Some(epoch)) => Step::HandOver {
                epoch,
                to: target.clone(),
            },
            _ if !self.is_overdue(facts.now) => Step::Wait,
            (Some(ahead), _) => Step::NotMadeWay {
                ahead: String::from_utf8_lossy(&ahead.value).into_owned(),
            },
            (None, None) => Step::NotLeader,
        }
    }
}

pub(super) fn refused(target: &str, reason: impl Into<String>) -> ClusterError {
    ClusterError::TransferRefused {
        target: target.to_owned(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LeaseId;

    fn candidate(id: &str, created: Revision) -> Entry {
        Entry {
            key: format!("e/{id}"),
            value: id.as_bytes().to_vec(),
            create_revision: created,
            mod_revision: created,
            lease: Some(LeaseId(created)),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_hands_over_fails_or_waits() {
        let transfer = Transfer {
            target: "target".to_owned(),
            candidacy: "e/target".to_owned(),
            created: 8,
            until: Instant::now() + MAKE_WAY_WITHIN,
            reply: Reply::new().0,
        };
        let (own, between) = (candidate("own", 2), candidate("between", 4));
        let target = candidate("target", 8);
        let restarted = candidate("target", 9);
        let hand_over = || Step::HandOver {
            epoch: 2,
            to: target.clone(),
        };
        let not_made_way = Step::NotMadeWay {
            ahead: "between".to_owned(),
        };
        let (early, late) = (Instant::now(), transfer.until);
        let next = [own.clone(), target.clone()];
        let blocked = [own.clone(), between, target.clone()];
        let left = [own.clone(), restarted];
        // The candidates, whether this node leads, its term, the time, and the step.
        for (candidates, leads, term, now, step) in [
            (&next[..], true, Some(2), early, hand_over()),
            (&next, true, Some(2), late, hand_over()),
            (&next, true, None, early, Step::Wait),
            (&next, true, None, late, Step::NotLeader),
            (&next, false, None, early, Step::NotLeader),
            (&blocked, true, Some(2), early, Step::Wait),
            (&blocked, true, Some(2), late, not_made_way),
            (&left, true, Some(2), early, Step::TargetLeft),
            (&next[..1], true, Some(2), early, Step::TargetLeft),
        ] {
            let reading = Reading {
                candidates: candidates.to_vec(),
                ..Reading::default()
            };
            let facts = Facts {
                own_candidacy: "e/own",
                leads,
                term,
                now,
            };
            assert_eq!(transfer.step(&reading, facts), step, "{facts:?}");
        }
    }
}
