//! A request under `handover/{group}/`: which candidacy is to lead next.

use serde::{Deserialize, Serialize};

use crate::store::{Entry, LeaseId, Revision};

/// A request that other candidates make way for one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// The lease of the node that makes the request.
    pub(super) from: LeaseId,
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
            wanted: serde_json::from_slice(&entry.value).ok()?,
        })
    }

    pub(super) fn is_from(&self, candidate: &Entry) -> bool {
        candidate.lease == Some(self.from)
    }
}

impl Wanted {
    pub(super) fn to_json(&self) -> Vec<u8> {
        // Serializing strings and numbers cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}
