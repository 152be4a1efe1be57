//! Whether the store still has the history that the view was built from.

use super::group::Group;
use super::listing::no_key;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::store::{Selector, Store, WatchRange};

/// Whether the store continues the history that has been seen. A store that was restored from a
/// backup may be another cluster, or its revisions may be behind those of the view: a watch would
/// wait in silence until it catches up. Or it has caught up with other changes: then the key that was
/// written last in the view was not written at that revision.
pub(super) async fn continues(
    store: &dyn Store,
    keys: &GroupKeys,
    group: &Group,
    cluster_id: u64,
    seen: &[WatchRange],
) -> Result<bool, ClusterError> {
    let now = store.list(&no_key(keys), None).await?;
    if now.cluster_id != cluster_id || seen.iter().any(|range| range.from > now.revision + 1) {
        return Ok(false);
    }
    let Some(last) = group.last_write() else {
        return Ok(true);
    };
    let range = seen.iter().find(|range| range.keys.matches(last.key()));
    let at = range.map(|range| range.from - 1);
    let Some(at) = at.filter(|at| *at >= last.revision()) else {
        return Ok(true);
    };
    let key = Selector::Key(last.key().to_owned());
    let then = store.list(&key, Some(at)).await?;
    Ok(then.entries.first().is_some_and(|entry| last.is(entry)))
}
