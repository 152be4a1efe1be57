//! The keys of a group's election, as they were at one revision.

use super::request::Request;
use crate::node::Node;
use crate::store::{Entry, Revision, WatchEvent};

/// The keys that an election depends on, all read at one revision.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) revision: Revision,
    pub(super) cluster_id: u64,
    /// The entry that is registered under this node's id.
    pub(super) registration: Option<Entry>,
    /// The queue: in the order of create revisions, the leader first.
    pub(super) candidates: Vec<Entry>,
    /// The requests that other candidates make way.
    pub(super) requests: Vec<Request>,
}

impl Reading {
    /// The create revision of the candidacy under this key.
    pub(super) fn candidacy(&self, key: &str) -> Option<Revision> {
        let own = self.candidates.iter().find(|entry| entry.key == key);
        own.map(|entry| entry.create_revision)
    }

    /// The candidacy under this key, behind the one just ahead of it.
    pub(super) fn with_predecessor(&self, key: &str) -> Option<[&Entry; 2]> {
        let mut pairs = self.candidates.windows(2);
        pairs
            .find(|pair| pair[1].key == key)
            .map(|pair| [&pair[0], &pair[1]])
    }

    /// Whether the election is the same in both, whatever else has been written between them.
    pub(super) fn is_same_election(&self, other: &Self) -> bool {
        let holder = |reading: &Self| {
            let registration = reading.registration.as_ref();
            registration.map(|entry| (entry.lease, entry.create_revision))
        };
        self.cluster_id == other.cluster_id
            && self.candidates == other.candidates
            && self.requests == other.requests
            && holder(self) == holder(other)
    }

    /// Whether a request names a candidacy, or comes from a leader, that this reading does not
    /// contain: it was created since.
    pub(super) fn is_outdated(&self) -> bool {
        let leader = self.candidates.first();
        self.requests.iter().any(|request| {
            let is_unknown = self.candidacy(&request.wanted.to) != Some(request.wanted.created);
            let asks_as_leader = request.wanted.priority.is_none();
            is_unknown || (asks_as_leader && !leader.is_some_and(|leader| request.is_from(leader)))
        })
    }

    /// Applies a change of a request that a watch has reported.
    pub(super) fn apply_request(&mut self, event: &WatchEvent) {
        self.requests
            .retain(|request| !request.is_under(event.key()));
        if let WatchEvent::Put(entry) = event {
            self.requests.extend(Request::parse(entry));
        }
    }
}

/// Whether an entry says that its node takes no new requests.
pub(super) fn says_draining(entry: &Entry) -> bool {
    serde_json::from_slice::<Node>(&entry.value).is_ok_and(|node| !node.is_serving())
}
