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

type Stage = fn(&Group, &mut Staged, &[Entry]);

/// The keys of a group, and what is made of them: registrations and, where there is an election, candidates.
fn stages(keys: &GroupKeys) -> impl Iterator<Item = (&str, Stage)> {
    let registrations = keys
        .registry_prefixes()
        .map(|prefix| (prefix, Group::stage as Stage));
    let candidates = [(keys.election_prefix(), Group::stage_candidates as Stage)];
    let all = registrations.chain(candidates);
    all.filter(|(prefix, _)| !prefix.is_empty())
}

/// All keys of a group.
pub(super) fn selectors(keys: &GroupKeys) -> Vec<Selector> {
    let prefixes = stages(keys).map(|(prefix, _)| prefix.to_owned());
    prefixes.map(Selector::Prefix).collect()
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
    let mut read_at: Option<ReadAt> = None;
    for (prefix, stage) in stages(keys) {
        let keys = Selector::Prefix(prefix.to_owned());
        let mut start = None;
        loop {
            let at = read_at.map(|first| first.revision);
            let page = store.list_page(&keys, start, at).await?;
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
