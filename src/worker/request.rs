//! A request under `handover/{group}/`: which candidacy is to lead next.

use serde::{Deserialize, Serialize};

use crate::keys::OPERATOR;
use crate::store::{Entry, LeaseId, Revision};

/// A request that other candidates make way for one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The lease of the node that makes the request.
    pub(super) from: LeaseId,
    /// An operator makes it, from outside.
    pub(super) is_by_operator: bool,
    /// What it asks for.
    pub(super) wanted: Wanted,
}

/// The candidacy that is to lead next: the value of a request, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wanted {
    /// Its election key.
    pub(super) to: String,
    /// The revision that created that key.
    pub(super) created: Revision,
    /// The priority of a candidate that asks for itself; `None` if the leader asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) priority: Option<u16>,
}

impl Request {
    /// Reads an entry under `handover/{group}/`. `None` if the value is not a request, or the entry
    /// has no lease.
    pub(super) fn parse(entry: &Entry) -> Option<Self> {
        Some(Self {
            from: entry.lease?,
            is_by_operator: name_of(&entry.key) == OPERATOR,
            wanted: serde_json::from_slice(&entry.value).ok()?,
        })
    }

    pub(super) fn is_from(&self, candidate: &Entry) -> bool {
        candidate.lease == Some(self.from)
    }

    /// Whether this candidacy is to lead because of its priority: its node says so, or an operator.
    pub(super) fn is_for(&self, candidate: &Entry) -> bool {
        let is_this_one = self.wanted.created == candidate.create_revision;
        self.wanted.to == candidate.key
            && (self.is_from(candidate) || self.is_by_operator && is_this_one)
    }

    /// Whether it is the one under this key.
    pub(super) fn is_under(&self, key: &str) -> bool {
        match name_of(key) {
            OPERATOR => self.is_by_operator,
            lease => !self.is_by_operator && self.from.to_string() == lease,
        }
    }
}

fn name_of(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or_default()
}

/// What an operator asks for: that the candidacy under this key, created then, leads next, whatever the
/// priorities of nodes are.
pub(crate) fn operators_request(candidacy: &str, created: Revision) -> Vec<u8> {
    let wanted = Wanted {
        to: candidacy.to_owned(),
        created,
        priority: Some(u16::MAX),
    };
    wanted.to_json()
}

impl Wanted {
    pub(super) fn to_json(&self) -> Vec<u8> {
        // Serializing strings and numbers cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}
