//! Where a node stands in its group's election, according to one reading. No I/O.

use std::collections::VecDeque;

use super::reading::Reading;
use crate::store::{Entry, LeaseId, Revision};

/// What a node knows about itself, beside what it has read.
#[derive(Debug)]
pub(super) struct OwnFacts<'a> {
    pub(super) id: &'a str,
    pub(super) lease: LeaseId,
    /// The key of its candidacy under this lease.
    pub(super) candidacy_key: &'a str,
    pub(super) priority: u16,
    /// The leases that this run has had.
    pub(super) own_leases: &'a VecDeque<LeaseId>,
    /// It has read its own registration before.
    pub(super) was_registered: bool,
    /// The create revision of the candidacy that it has given up, 0 for none.
    pub(super) abandoned: Revision,
    /// The candidacy that nothing is handed over to, because its process is not registered: its key, and when it was created.
    pub(super) passed_over: Option<(&'a str, Revision)>,
    pub(super) is_draining: bool,
    /// The registered entry says of this run what it should say. Otherwise a node wrote it that has
    /// ended, under the same lease.
    pub(super) is_entry_current: bool,
}

/// Who is registered under this node's id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Registration {
    /// This node, with an entry that is current.
    Own,
    /// No other live process: the node has to write its entry.
    Replaceable,
    /// Another process, under this lease.
    Other(LeaseId),
}

impl Registration {
    pub(super) fn of(entry: Option<&Entry>, own: &OwnFacts<'_>) -> Self {
        // An entry without a lease was not written by a process that lives.
        let Some(lease) = entry.and_then(|entry| entry.lease) else {
            return Self::Replaceable;
        };
        if lease == own.lease {
            return if own.is_entry_current {
                Self::Own
            } else {
                Self::Replaceable
            };
        }
        // A process that starts takes its id over from its predecessor. A process that had the id
        // and lost it to another one must not take it back: the two would fight without end.
        if !own.was_registered || own.own_leases.contains(&lease) {
            return Self::Replaceable;
        }
        Self::Other(lease)
    }
}

/// The queue of candidates, as seen from one of them.
#[derive(Debug)]
pub(super) struct Queue<'a> {
    reading: &'a Reading,
    ahead: &'a [Entry],
    behind: &'a [Entry],
    priority: u16,
}

impl<'a> Queue<'a> {
    /// `own` is the candidacy from which the queue is seen, `priority` that of its node.
    pub(super) fn around(own: &Entry, reading: &'a Reading, priority: u16) -> Self {
        let all = reading.candidates.as_slice();
        let place = all.partition_point(|entry| entry.create_revision < own.create_revision);
        Self {
            reading,
            ahead: &all[..place],
            behind: all.get(place + 1..).unwrap_or_default(),
            priority,
        }
    }

    /// The candidate just ahead; `None` for the first in the queue.
    pub(super) fn predecessor(&self) -> Option<&'a Entry> {
        self.ahead.last()
    }

    /// The next candidate, if it has asked for leadership and has a higher priority.
    pub(super) fn successor_by_priority(&self) -> Option<&'a Entry> {
        self.behind
            .first()
            .filter(|next| self.is_outranked_by(next))
    }

    /// Whether a candidate behind is to lead next: because of its priority, or because the leader
    /// asks for it.
    pub(super) fn has_to_make_way(&self) -> bool {
        self.behind
            .iter()
            .any(|entry| self.is_outranked_by(entry) || self.is_requested_by_leader(entry))
    }

    fn is_outranked_by(&self, candidate: &Entry) -> bool {
        self.reading.requests.iter().any(|request| {
            let priority = request.wanted.priority;
            let is_higher = priority.is_some_and(|priority| priority > self.priority);
            request.is_for(candidate) && (request.is_by_operator || is_higher)
        })
    }

    fn is_requested_by_leader(&self, candidate: &Entry) -> bool {
        let Some(leader) = self.reading.candidates.first() else {
            return false;
        };
        self.reading.requests.iter().any(|request| {
            request.wanted.to == candidate.key
                && request.wanted.priority.is_none()
                && request.is_from(leader)
        })
    }
}
