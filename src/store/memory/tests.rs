//! Tests of the in-memory store beyond the conformance suite.

use std::time::Duration;

use super::MemoryStore;
use crate::error::ClusterError;
use crate::store::Store;

/// The leases of a backup exist in the cluster that it is restored into, for their whole TTL, but
/// their holders must not renew them: their position in the former cluster does not count here.
#[tokio::test(start_paused = true)]
async fn a_lease_of_another_cluster_is_not_renewed() {
    let store = MemoryStore::default();
    let lease = store.grant(Duration::from_secs(5)).await.unwrap();
    let mut keeper = store.keeper(lease);
    let mut renew = async || keeper.renew(Duration::from_secs(1)).await;
    assert_eq!(renew().await, Ok(lease.ttl));
    let backup = store.backup();
    // The same cluster, with a higher revision.
    store.restore(&backup, Some(1_000));
    assert_eq!(renew().await, Ok(lease.ttl));
    store.restore(&backup, None);
    let gone = ClusterError::LeaseNotFound { lease: lease.id };
    assert_eq!(renew().await, Err(gone));
    assert_eq!(store.leases(), [lease.id]);
    let new = store.grant(Duration::from_secs(5)).await.unwrap();
    let renewed = store.keeper(new).renew(Duration::from_secs(1)).await;
    assert_eq!(renewed, Ok(new.ttl));
}
