//! What a node does in the election, decided from one reading. No I/O.

use super::reading::{Reading, says_draining};
use super::session::Registered;
use super::standing::{OwnFacts, Queue, Registration};
use crate::store::{Entry, LeaseId, Revision};

#[cfg(test)]
mod tests;

/// The next thing that a node does in the election. The first five write, and are followed by
/// another reading; the others wait for a change that matters.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Write what is missing: the registration, the candidacy, or both.
    Enter { register: bool, campaign: bool },
    /// Write that the node drains, and delete its candidacy (created then), if there is one.
    AnnounceDraining { candidacy: Option<Revision> },
    /// Delete a candidacy that must never lead: the node has given it up, or another node created
    /// it under the shared lease.
    Withdraw { candidacy: Revision },
    /// Delete the candidacy and queue again: a candidate behind is to lead next.
    MakeWay { candidacy: Revision },
    /// End the term and delete the candidacy: the next one has asked with a higher priority.
    HandOver { epoch: Revision, to: Entry },
    /// Leave the election to another process that has registered the same id, and wait until its
    /// registration is gone. A candidacy that is left (created then) is deleted first.
    StandBack {
        by: LeaseId,
        candidacy: Option<Revision>,
    },
    /// First in the queue: begin the term or go on with it.
    Lead { epoch: Revision },
    /// Wait behind the candidate with this key.
    Follow { ahead: String },
    /// Registered and draining: nothing is left to do.
    StayDrained,
}

impl Action {
    /// The term in which the node leads.
    pub(super) fn term(&self) -> Option<Revision> {
        match self {
            Self::Lead { epoch } => Some(*epoch),
            _ => None,
        }
    }

    /// How a node is registered that takes this action, given whether it has a candidacy.
    pub(super) fn registered(&self, has_candidacy: bool) -> Registered {
        match self {
            Self::StayDrained => Registered::Draining,
            Self::AnnounceDraining { .. } => Registered::NoCandidate,
            _ if has_candidacy => Registered::Candidate,
            _ => Registered::NoCandidate,
        }
    }

    /// Whether a term may go on until the action is carried out.
    pub(super) fn keeps_term(&self) -> bool {
        matches!(self, Self::Lead { .. } | Self::HandOver { .. })
    }
}

/// Decides what to do about this reading.
pub(super) fn decide(reading: &Reading, own: &OwnFacts<'_>) -> Action {
    let candidacy = reading
        .candidates
        .iter()
        .find(|entry| entry.key == own.candidacy_key);
    let created = candidacy.map(|entry| entry.create_revision);
    let is_registered = match Registration::of(reading.registration.as_ref(), own) {
        Registration::Other(by) => {
            return Action::StandBack {
                by,
                candidacy: created,
            };
        }
        Registration::Own => true,
        Registration::Replaceable => false,
    };
    if own.is_draining {
        let is_announced = reading.registration.as_ref().is_some_and(says_draining);
        return decide_draining(is_registered, is_announced, created);
    }
    let Some(candidacy) = candidacy else {
        return Action::Enter {
            register: !is_registered,
            campaign: true,
        };
    };
    let is_abandoned = candidacy.create_revision == own.abandoned;
    // Readers would take the other node for the candidate.
    let is_of_another_node = candidacy.value != own.id.as_bytes();
    if is_abandoned || is_of_another_node {
        return Action::Withdraw {
            candidacy: candidacy.create_revision,
        };
    }
    if !is_registered {
        return Action::Enter {
            register: true,
            campaign: false,
        };
    }
    let queue = Queue::around(candidacy, reading, own.priority);
    decide_in_queue(candidacy, &queue, own.passed_over)
}

fn decide_draining(is_registered: bool, is_announced: bool, candidacy: Option<Revision>) -> Action {
    if !is_registered {
        // The entry says that the node drains.
        return Action::Enter {
            register: true,
            campaign: false,
        };
    }
    if is_announced && candidacy.is_none() {
        return Action::StayDrained;
    }
    Action::AnnounceDraining { candidacy }
}

/// For a node that is registered and a candidate.
fn decide_in_queue(
    candidacy: &Entry,
    queue: &Queue<'_>,
    passed_over: Option<(&str, Revision)>,
) -> Action {
    let created = candidacy.create_revision;
    let is_able = |next: &&Entry| passed_over != Some((&next.key, next.create_revision));
    let successor = queue.successor_by_priority().filter(is_able);
    match (queue.predecessor(), successor) {
        (None, Some(next)) => Action::HandOver {
            epoch: created,
            to: next.clone(),
        },
        (None, None) => Action::Lead { epoch: created },
        (Some(_), _) if queue.has_to_make_way() => Action::MakeWay { candidacy: created },
        (Some(ahead), _) => Action::Follow {
            ahead: ahead.key.clone(),
        },
    }
}
