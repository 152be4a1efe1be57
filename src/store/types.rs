//! The values that a store works with: leases, entries, transactions and watch events.

use std::time::Duration;

use crate::ids::{LeaseId, Revision};

/// A lease as the store granted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives without a renewal. May be longer than requested.
    pub ttl: Duration,
}

/// A key with its value and history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// The revision that created it.
    pub create_revision: Revision,
    /// The revision that last changed it.
    pub mod_revision: Revision,
    /// The lease that it is deleted with.
    pub lease: Option<LeaseId>,
}

impl Entry {
    /// Which registration it belongs to; see [`Node::incarnation`](crate::Node::incarnation).
    pub(crate) fn incarnation(&self) -> i64 {
        // Without a lease it is never positive, whatever revision a store reports.
        let without_lease = -self.create_revision.saturating_abs();
        self.lease.map_or(without_lease, |lease| lease.0)
    }
}

/// Selects the keys that a call applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// This key.
    Key(String),
    /// Every key that starts with this prefix.
    Prefix(String),
}

impl Selector {
    /// Whether `key` is selected.
    pub fn matches(&self, key: &str) -> bool {
        match self {
            Self::Key(own) => own == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }

    /// The key, or the prefix.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Key(text) | Self::Prefix(text) => text,
        }
    }
}

/// The result of [`Store::list`](super::Store::list).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// The revision the entries were read at.
    pub revision: Revision,
    /// The cluster that this revision belongs to. Changes when data is restored into a new cluster,
    /// where the same revision means something else.
    pub cluster_id: u64,
    /// The entries, ordered by key.
    pub entries: Vec<Entry>,
}

/// One page of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The entries of this page, and the revision they were read at.
    pub listing: Listing,
    /// The start of the next page; `None` after the last one.
    pub next: Option<Vec<u8>>,
}

/// The state of the connection to a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStatus {
    /// The endpoint of the current connection, if there is one.
    pub endpoint: Option<String>,
    /// How long the store takes to answer on this connection: a mean of the last answers, watch and lease streams
    /// included.
    pub round_trip: Option<Duration>,
    /// Whether calls are sent.
    pub circuit: Circuit,
}

/// Whether calls to a store are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Circuit {
    /// Calls are sent.
    #[default]
    Closed,
    /// After too many failures in a row, calls fail at once until the next trial call is due.
    Open {
        /// The number of failures in a row.
        failures: u32,
    },
    /// One trial call is in progress; the others fail at once.
    HalfOpen {
        /// The number of failures in a row before it.
        failures: u32,
    },
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    Absent(String),
    /// The key exists under this lease.
    HeldBy(String, LeaseId),
    /// The key exists and was created at this revision.
    CreatedAt(String, Revision),
    /// The key exists and was last changed at this revision.
    ChangedAt(String, Revision),
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The lease that it is deleted with.
        lease: Option<LeaseId>,
    },
    /// Deletes a key, if it exists.
    Delete {
        /// The key.
        key: String,
    },
}

/// Writes that take effect together, in one revision, if every condition holds. A key may be
/// written at most once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// The conditions, all of which must hold.
    pub conditions: Vec<Condition>,
    /// The writes.
    pub writes: Vec<Write>,
}

impl Txn {
    /// A transaction without conditions and writes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Adds a put, under a lease or without one.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>, lease: Option<LeaseId>) -> Self {
        self.writes.push(Write::Put {
            key: key.into(),
            value,
            lease,
        });
        self
    }

    /// Adds a delete.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.writes.push(Write::Delete { key: key.into() });
        self
    }

    /// The lease of the first put that has one.
    pub(super) fn lease(&self) -> Option<LeaseId> {
        self.writes.iter().find_map(|write| match write {
            Write::Put { lease, .. } => *lease,
            Write::Delete { .. } => None,
        })
    }

    /// Every key in the conditions and writes, ordered and each once.
    pub(super) fn keys(&self) -> Vec<String> {
        let conditions = self.conditions.iter().map(|condition| match condition {
            Condition::Absent(key)
            | Condition::HeldBy(key, _)
            | Condition::CreatedAt(key, _)
            | Condition::ChangedAt(key, _) => key,
        });
        let writes = self.writes.iter().map(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => key,
        });
        let mut keys: Vec<_> = conditions.chain(writes).cloned().collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

/// One change that a watch reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was created or changed.
    Put(Entry),
    /// A key was deleted.
    Delete {
        /// The key.
        key: String,
        /// The revision that deleted it.
        revision: Revision,
    },
}

impl WatchEvent {
    /// The revision of the change.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// The key that was changed.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Keys to watch, and the first revision to report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchRange {
    /// The keys.
    pub keys: Selector,
    /// Changes from this revision on are reported. With 0 the watch reports changes from the moment
    /// it is open; read the state before them once it is open.
    pub from: Revision,
}
