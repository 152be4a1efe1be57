//! What a store has to do: the traits [`Store`], [`Watcher`] and [`LeaseKeeper`].

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::AbortHandle;

use super::clock::{BootClock, Clock};
use super::types::{Lease, Listing, Page, Selector, StoreStatus, Txn, WatchEvent, WatchRange};
use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};

/// A watch in progress.
#[async_trait]
pub trait Watcher: Send {
    /// Waits for the next changes. Within each range of the watch every change is reported once, in
    /// the order of revisions; changes of different ranges may come in either order.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// [`Compacted`](ClusterError::Compacted) if changes are no longer kept: list again.
    /// Any other error ends this watch only: open another one from [`position`](Self::position).
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError>;

    /// The ranges, with the revisions from which a new watch would report everything that this one
    /// has not reported.
    fn position(&self) -> &[WatchRange];
}

/// Renews one lease, one renewal at a time.
#[async_trait]
pub trait LeaseKeeper: Send {
    /// Renews the lease and waits for the answer, for `within`, or longer if answers were measured
    /// to take longer. Returns the remaining time to live, counted from the instant before this
    /// call; the caller must count from there. It is less than the granted one if the answer belongs
    /// to an earlier renewal.
    ///
    /// # Errors
    ///
    /// [`LeaseNotFound`](ClusterError::LeaseNotFound) if the lease is gone, and every key with it.
    /// Also if the answer comes from another cluster than the one that granted the lease, as after
    /// data was restored: a leader of the former cluster must not stay one by renewals in this one.
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError>;

    /// Waits for the answer to a renewal that timed out: it renews the lease nevertheless. Waits
    /// indefinitely if there is none. Returns what [`renew`](Self::renew) returns; dropping the
    /// future loses nothing.
    ///
    /// # Errors
    ///
    /// As [`renew`](Self::renew).
    async fn late(&mut self) -> Result<Duration, ClusterError> {
        std::future::pending().await
    }
}

/// The operations that coordination needs from a store. The [module](super) says what they have to
/// mean.
///
/// The implementation bounds every call in time, except [`Watcher::next`].
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// The clock that deadlines of its leases are measured with.
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(BootClock)
    }

    /// Starts a task that keeps a lease alive, independent of the future that starts it. By default
    /// on the runtime of the caller.
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) -> AbortHandle {
        tokio::spawn(task).abort_handle()
    }

    /// Grants a lease that lives `ttl` without a renewal, or longer.
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError>;

    /// A keeper for a granted lease. Does no I/O yet.
    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper>;

    /// Ends a lease and deletes every key under it, in one revision.
    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError>;

    /// The keys under a lease.
    ///
    /// # Errors
    ///
    /// [`LeaseNotFound`](ClusterError::LeaseNotFound) if it is gone, and every key with it.
    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError>;

    /// Executes `txn` if its conditions hold, and returns its revision; `None` if a condition did
    /// not hold.
    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError>;

    /// Lists keys as they were at revision `at`, or as they are now.
    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError>;

    /// Lists one page of the keys: the first one without `start`, then from [`Page::next`] of the
    /// page before. Request the later pages at the revision of the first one. The store decides how
    /// large a page is; by default one page holds everything.
    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        debug_assert!(start.is_none());
        let listing = self.list(keys, at).await?;
        Ok(Page {
            listing,
            next: None,
        })
    }

    /// Lists keys as any one member has them, which may be out of date. For use while there is no
    /// quorum, when nothing better is available.
    async fn list_stale(&self, keys: &Selector) -> Result<Listing, ClusterError> {
        self.list(keys, None).await
    }

    /// The state of the connection, for a status page.
    fn status(&self) -> StoreStatus {
        StoreStatus::default()
    }

    /// Lists several selections at one revision, the newest. By default one after another; a store
    /// that can reads them in one request.
    async fn list_all(&self, all: &[Selector]) -> Result<Vec<Listing>, ClusterError> {
        let mut listings: Vec<Listing> = Vec::with_capacity(all.len());
        for keys in all {
            let at = listings.first().map(|first| first.revision);
            listings.push(self.list(keys, at).await?);
        }
        Ok(listings)
    }

    /// Opens one watch over several ranges. Returns once the store has accepted all of them.
    async fn watch(&self, ranges: Vec<WatchRange>) -> Result<Box<dyn Watcher>, ClusterError>;
}
