//! Which entry of the group was written last, to recognise the store's history by.

use xxhash_rust::xxh3::xxh3_64;

use crate::store::{Entry, Revision};

/// The entry that was written last. A store that had another entry under this key at this revision
/// has another history: it was restored from a backup, say. The value is part of the comparison,
/// because processes that write at regular intervals soon write the same key at the same revision
/// again.
#[derive(Debug)]
pub(super) struct LastWrite {
    key: String,
    revision: Revision,
    value_hash: u64,
}

impl LastWrite {
    pub(super) fn of(entry: &Entry) -> Self {
        Self {
            key: entry.key.clone(),
            revision: entry.mod_revision,
            value_hash: xxh3_64(&entry.value),
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether the store had this entry.
    pub(super) fn is(&self, entry: &Entry) -> bool {
        self.revision == entry.mod_revision && self.value_hash == xxh3_64(&entry.value)
    }
}
