//! The one seam to the coordination store.
//!
//! [`Store`] has the few operations that registration, election and discovery need, with etcd's
//! meaning: every transaction that changes something takes the next revision of the whole store;
//! a key remembers the revision it was created and last modified at, and the lease it hangs on; a
//! lease that ends takes its keys with it in one revision; a watch from a revision tells each
//! change once and in order.
//!
//! Two implementations pass one conformance suite: [`EtcdStore`] and [`MemoryStore`].

mod clock;
mod etcd;
mod memory;
mod options;
mod security;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::AbortHandle;

use crate::error::ClusterError;
use crate::sync::lock;

pub use crate::ids::{LeaseId, Revision};
pub use clock::{BootClock, Clock, TokioClock};
pub use etcd::EtcdStore;
#[cfg(any(test, feature = "test-util"))]
pub use memory::Backup;
pub use memory::{Fault, MemoryStore};
pub use options::EtcdOptions;
pub use security::{Credentials, Password, TlsOptions};

/// A lease as it was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its identity.
    pub id: LeaseId,
    /// How long it lives without a renewal. May be longer than what was asked for.
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
    /// The lease that it ends with.
    pub lease: Option<LeaseId>,
}

/// Which keys a call is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// This key.
    Key(String),
    /// Every key that starts with this.
    Prefix(String),
}

impl Selector {
    /// Whether `key` is one of them.
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

/// The answer to [`Store::list`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// The revision the entries were read at.
    pub revision: Revision,
    /// Which history that revision belongs to: another one after data was restored into a new
    /// cluster.
    pub cluster_id: u64,
    /// In the order of their keys.
    pub entries: Vec<Entry>,
}

/// A part of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The entries of this page, and what they were read at.
    pub listing: Listing,
    /// Where the next page starts; `None` after the last one.
    pub next: Option<Vec<u8>>,
}

/// How it stands with a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStatus {
    /// The endpoint that is connected to, if any.
    pub endpoint: Option<String>,
    /// Whether calls are tried.
    pub circuit: Circuit,
}

/// Whether calls to a store are tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Circuit {
    /// They are.
    #[default]
    Closed,
    /// After so many failures in a row they fail at once, until the next one is let through to see.
    Open {
        /// How many have failed.
        failures: u32,
    },
    /// One is being tried, the others fail at once.
    HalfOpen {
        /// How many have failed before.
        failures: u32,
    },
}

/// What must hold for a transaction to be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    Absent(String),
    /// The key exists under this lease.
    HeldBy(String, LeaseId),
    /// The key exists and was created by this revision.
    CreatedAt(String, Revision),
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put {
        /// The key.
        key: String,
        /// Its new value.
        value: Vec<u8>,
        /// The lease it shall end with.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if it is there.
    Delete {
        /// The key.
        key: String,
    },
}

/// Changes that take effect together, in one revision, if every condition holds. A key may be
/// written once at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// What must hold.
    pub conditions: Vec<Condition>,
    /// What is then done.
    pub writes: Vec<Write>,
}

impl Txn {
    /// A transaction that does nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Adds a put under a lease.
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

    fn lease(&self) -> Option<LeaseId> {
        self.writes.iter().find_map(|write| match write {
            Write::Put { lease, .. } => *lease,
            Write::Delete { .. } => None,
        })
    }
}

/// One change that a watch tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A key was created or changed.
    Put(Entry),
    /// A key is gone.
    Delete {
        /// The key.
        key: String,
        /// The revision that removed it.
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

    /// The key concerned.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Keys to watch, and the first revision to tell of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchRange {
    /// The keys.
    pub keys: Selector,
    /// Changes from this revision on are told; with 0 those from now on, and then what was before
    /// has to be read once the watch is open.
    pub from: Revision,
}

/// A watch in progress.
#[async_trait]
pub trait Watcher: Send {
    /// Waits for the next changes. Within each range of the watch every change is told once, in
    /// the order of revisions; changes of different ranges may be told in either order.
    ///
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// [`Compacted`](ClusterError::Compacted) when changes are gone for good: list again.
    /// Anything else ends this watch only: open another from [`position`](Self::position).
    async fn next(&mut self) -> Result<Vec<WatchEvent>, ClusterError>;

    /// The ranges, with the revisions from which a new watch would tell everything that this one
    /// has not.
    fn position(&self) -> &[WatchRange];
}

/// Renews one lease, one renewal at a time.
#[async_trait]
pub trait LeaseKeeper: Send {
    /// Renews the lease and waits for the answer, `within` or, where answers were measured to take
    /// longer, as long as those take. Answers with the time to live that the lease has, counted from
    /// the instant before this call, from which a caller has to count: that is less than what was
    /// granted if the answer is one to an earlier renewal.
    ///
    /// # Errors
    ///
    /// [`LeaseNotFound`](ClusterError::LeaseNotFound) when it is gone, and every key with it; also when
    /// another cluster answers than the one that granted it, as after data was restored: a leader of the
    /// former one must not go on for as long as it can renew in this one.
    async fn renew(&mut self, within: Duration) -> Result<Duration, ClusterError>;

    /// Waits for the answer to a renewal that was given up because it took too long: it renews the
    /// lease all the same. For ever where there is none to wait for. Answers as
    /// [`renew`](Self::renew) does; dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// As [`renew`](Self::renew).
    async fn late(&mut self) -> Result<Duration, ClusterError> {
        std::future::pending().await
    }
}

/// What coordination needs of a store. See the [module](self) for what it has to mean.
///
/// Every call is bounded in time by the implementation, except [`Watcher::next`].
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// What the deadlines of its leases are to be counted by.
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(BootClock)
    }

    /// Starts a task that keeps a lease alive, whatever becomes of the future that asked for it. By
    /// default on the runtime of the caller.
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) -> AbortHandle {
        tokio::spawn(task).abort_handle()
    }

    /// Grants a lease that lives `ttl` without a renewal, or longer.
    async fn grant(&self, ttl: Duration) -> Result<Lease, ClusterError>;

    /// A keeper for a lease that was granted. Does no I/O yet.
    fn keeper(&self, lease: Lease) -> Box<dyn LeaseKeeper>;

    /// Ends a lease and every key under it, in one revision.
    async fn revoke(&self, lease: LeaseId) -> Result<(), ClusterError>;

    /// The keys under a lease.
    ///
    /// # Errors
    ///
    /// [`LeaseNotFound`](ClusterError::LeaseNotFound) when it is gone, and every key with it.
    async fn keys_of(&self, lease: LeaseId) -> Result<Vec<String>, ClusterError>;

    /// Carries out `txn` if its conditions hold and answers with its revision; `None` if one did
    /// not hold.
    async fn txn(&self, txn: Txn) -> Result<Option<Revision>, ClusterError>;

    /// Lists keys as they were at revision `at`, or as they are now.
    async fn list(&self, keys: &Selector, at: Option<Revision>) -> Result<Listing, ClusterError>;

    /// Lists a part of the keys: the first one without `start`, then from where the page before said.
    /// Ask for the later ones at the first one's revision. The store decides how much a page is.
    async fn list_page(
        &self,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        // All that is left, by default.
        debug_assert!(start.is_none());
        let listing = self.list(keys, at).await?;
        Ok(Page {
            listing,
            next: None,
        })
    }

    /// Lists keys as any one member has them, which may be out of date: for want of anything better,
    /// while there is no quorum.
    async fn list_stale(&self, keys: &Selector) -> Result<Listing, ClusterError> {
        self.list(keys, None).await
    }

    /// How it stands with the store, for a status page.
    fn status(&self) -> StoreStatus {
        StoreStatus::default()
    }

    /// Lists several selections as they are at one revision, the newest. By default one after
    /// another; a store that can reads them at once.
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

/// A store that is opened when it is first needed, or was given.
#[derive(Debug)]
pub(crate) struct LazyStore {
    options: EtcdOptions,
    store: Mutex<Option<Arc<dyn Store>>>,
}

impl LazyStore {
    pub(crate) fn new(options: EtcdOptions, given: Option<Arc<dyn Store>>) -> Self {
        Self {
            options,
            store: Mutex::new(given),
        }
    }

    pub(crate) fn get(&self) -> Result<Arc<dyn Store>, ClusterError> {
        let mut store = lock(&self.store);
        if let Some(store) = &*store {
            return Ok(store.clone());
        }
        // Not the files again: they were judged at the start, and one that is missing by now may be
        // back before long.
        self.options.check_values()?;
        let opened = opened(&self.options);
        *store = Some(opened.clone());
        Ok(opened)
    }
}

/// The store that the options name: `memory://name`, or an etcd cluster. Connects to nothing yet.
/// Files are judged here and now; those that are missing later are tried again for ever.
///
/// # Errors
///
/// [`InvalidEndpoint`](ClusterError::InvalidEndpoint) or
/// [`InvalidConfig`](ClusterError::InvalidConfig), which name what is wrong.
pub fn open(options: &EtcdOptions) -> Result<Arc<dyn Store>, ClusterError> {
    options.validate()?;
    Ok(opened(options))
}

fn opened(options: &EtcdOptions) -> Arc<dyn Store> {
    match options.memory_name() {
        Some(name) => Arc::new(MemoryStore::named(name)),
        None => Arc::new(EtcdStore::with(options.clone())),
    }
}
