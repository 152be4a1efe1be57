//! Removes keys that nodes have left behind under a lease which other nodes go on using.
//!
//! A node deletes its keys when it ends, but a late request of that node may be carried out
//! afterwards, and restored data may contain the keys again.

use std::convert::Infallible;

use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::lease::SharedLease;
use crate::backoff::Backoff;
use crate::error::ClusterError;
use crate::store::{Condition, LeaseId, Selector, Store, Txn};

/// How many keys one transaction removes; etcd allows 128 operations in one.
const KEYS_PER_TXN: usize = 100;

/// Searches the lease for orphaned keys whenever a sweep is due, and removes them.
pub(super) async fn remove_orphans(lease: &SharedLease, store: &dyn Store) -> Infallible {
    let mut backoff = Backoff::new();
    loop {
        let sweep = lease.users().sweep();
        let due = async {
            match sweep {
                Some(sweep) => {
                    sleep_until(sweep.next).await;
                    sweep
                }
                None => std::future::pending().await,
            }
        };
        let sweep = tokio::select! {
            biased;
            () = lease.user_left.notified() => continue,
            sweep = due => sweep,
        };
        let is_current = lease
            .tenure()
            .is_some_and(|tenure| tenure.lease.id == sweep.lease);
        if !is_current {
            lease.users().cancel_sweep(sweep.lease);
            continue;
        }
        let removed = remove_now(lease, store, sweep.lease).await;
        let now = Instant::now();
        let mut users = lease.users();
        users.forget_left(now);
        // If another node has left meanwhile, its sweep is due at once.
        let Some(sweep) = users.same_sweep(&sweep) else {
            continue;
        };
        match removed {
            Ok(()) => {
                backoff.reset();
                sweep.completed(now);
            }
            Err(error) => {
                debug!(%error, "keys of nodes that have left could not be removed yet");
                sweep.failed(now, backoff.after(&error));
            }
        }
    }
}

async fn remove_now(
    lease: &SharedLease,
    store: &dyn Store,
    id: LeaseId,
) -> Result<(), ClusterError> {
    let mut keys = store.keys_of(id).await?;
    // A node that has entered since has written nothing that was found.
    let own = lease.users().own(id);
    // An application may have keys of its own under the lease of a leader.
    keys.retain(|key| lease.layout.has(key) && !own.contains(key));
    for keys in keys.chunks(KEYS_PER_TXN) {
        delete_held(store, id, keys).await?;
    }
    Ok(())
}

/// Deletes those of the keys that are under this lease, on the condition that they still are when
/// the transaction is carried out.
pub(super) async fn delete_held(
    store: &dyn Store,
    lease: LeaseId,
    keys: &[String],
) -> Result<(), ClusterError> {
    let selectors: Vec<_> = keys.iter().cloned().map(Selector::Key).collect();
    let listings = store.list_all(&selectors).await?;
    let found = listings.into_iter().flat_map(|listing| listing.entries);
    let mut txn = Txn::new();
    for entry in found.filter(|entry| entry.lease == Some(lease)) {
        // Not on the create revision: a process that takes over the id keeps that.
        let condition = Condition::HeldBy(entry.key.clone(), lease);
        txn = txn.when(condition).delete(entry.key);
    }
    if txn.writes.is_empty() {
        return Ok(());
    }
    // If one of the keys has changed since, nothing is deleted, and the next sweep looks again.
    store.txn(txn).await.map(drop)
}
