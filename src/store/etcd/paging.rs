//! How many entries a page of a listing has: as many as are about 1 MiB, by the size of the entries
//! that were seen before.

use std::collections::HashMap;
use std::sync::Mutex;

use etcd_client::{GetOptions, GetResponse, SortOrder, SortTarget};

use super::convert::{cluster_of, entry, revision_of};
use crate::ids::Revision;
use crate::store::types::{Entry, Listing, Page, Selector};
use crate::sync::lock;

/// The size of a page in bytes.
const PAGE_BYTES: usize = 1 << 20;
/// The assumed size of an entry in bytes before one was seen.
const ENTRY_BYTES: usize = 1 << 10;
/// The largest number of entries in a page.
const PAGE_ENTRIES: usize = 2_000;

/// The mean size of an entry under each prefix, from the last page. A process has as many prefixes as
/// groups.
#[derive(Debug, Default)]
pub(super) struct EntrySizes(Mutex<HashMap<String, usize>>);

impl EntrySizes {
    /// How many entries to request.
    pub(super) fn page_entries(&self, keys: &Selector) -> usize {
        let bytes = lock(&self.0).get(keys.as_str()).copied();
        let bytes = bytes.unwrap_or(ENTRY_BYTES);
        (PAGE_BYTES / bytes.max(1)).clamp(1, PAGE_ENTRIES)
    }

    fn learn(&self, keys: &Selector, bytes: usize) {
        if let Selector::Prefix(prefix) = keys {
            lock(&self.0).insert(prefix.clone(), bytes.max(1));
        }
    }

    /// A page of this many entries was too large. How large is unknown: a quarter is requested next.
    pub(super) fn page_was_too_large(&self, keys: &Selector, entries: usize) {
        self.learn(keys, (PAGE_BYTES / entries).saturating_mul(4));
    }

    /// Converts a page, and learns the size of its entries.
    pub(super) fn page(&self, keys: &Selector, page: &GetResponse, at: Option<Revision>) -> Page {
        let entries: Vec<Entry> = page.kvs().iter().map(entry).collect();
        if !entries.is_empty() {
            let bytes = |entry: &Entry| entry.key.len() + entry.value.len();
            let mean = entries.iter().map(bytes).sum::<usize>() / entries.len();
            self.learn(keys, mean);
        }
        // The next page starts at the first possible key after the last one.
        let next = page.kvs().last().filter(|_| page.more()).map(|last| {
            let mut next = last.key().to_vec();
            next.push(0);
            next
        });
        Page {
            listing: Listing {
                revision: at.unwrap_or(revision_of(page.header())),
                cluster_id: cluster_of(page.header()).unwrap_or_default(),
                entries,
            },
            next,
        }
    }
}

/// The options of a request for a page.
pub(super) fn page_options(
    end: Option<&[u8]>,
    revision: Option<Revision>,
    entries: usize,
) -> GetOptions {
    let mut options = GetOptions::new()
        .with_limit(entries as i64)
        .with_sort(SortTarget::Key, SortOrder::Ascend);
    if let Some(end) = end {
        options = options.with_range(end);
    }
    if let Some(revision) = revision {
        options = options.with_revision(revision);
    }
    options
}
