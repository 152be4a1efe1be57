//! Reading a whole group from the store.

use super::group::Group;
use super::staged::Staged;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::store::{Entry, Revision, Selector, Store};

/// What a listing was read at.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ReadAt {
    pub(super) revision: Revision,
    pub(super) cluster_id: u64,
}

/// The keys of a group: registrations and, where there is an election, candidates.
pub(super) fn selectors(keys: &GroupKeys) -> Vec<Selector> {
    let prefixes = [keys.registry_prefix(), keys.election_prefix()];
    let prefixes = prefixes.into_iter().filter(|prefix| !prefix.is_empty());
    prefixes
        .map(|prefix| Selector::Prefix(prefix.to_owned()))
        .collect()
}

/// A key that never exists: reading it is the cheapest way to learn the store's cluster and revision,
/// and needs no right beyond that to read the registrations.
pub(super) fn no_key(keys: &GroupKeys) -> Selector {
    Selector::Key(keys.registry_prefix().to_owned())
}

/// Reads the group at one revision, page by page, so that it is never held twice.
pub(super) async fn list(
    store: &dyn Store,
    keys: &GroupKeys,
    group: &Group,
    staged: &mut Staged,
) -> Result<ReadAt, ClusterError> {
    let stages: [fn(&Group, &mut Staged, &[Entry]); 2] = [Group::stage, Group::stage_candidates];
    let mut read_at: Option<ReadAt> = None;
    for (keys, stage) in selectors(keys).iter().zip(stages) {
        let mut start = None;
        loop {
            let at = read_at.map(|first| first.revision);
            let page = store.list_page(keys, start, at).await?;
            let listing = &page.listing;
            let first = read_at.get_or_insert(ReadAt {
                revision: listing.revision,
                cluster_id: listing.cluster_id,
            });
            if first.cluster_id != listing.cluster_id {
                // Another cluster answers now, and its revisions mean something else.
                return Err(ClusterError::Compacted { oldest: None });
            }
            stage(group, staged, &listing.entries);
            start = page.next;
            if start.is_none() {
                break;
            }
        }
    }
    Ok(read_at.unwrap_or_default())
}
