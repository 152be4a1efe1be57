//! The interface to the coordination store.
//!
//! [`Store`] has the few operations that registration, election and discovery need, with etcd's
//! meaning: every transaction that changes something takes the next revision of the whole store;
//! a key remembers the revisions that created and last modified it, and the lease it is under; the
//! end of a lease deletes its keys in one revision; a watch from a revision reports each change once
//! and in order.
//!
//! Two implementations pass one conformance suite: [`EtcdStore`] and [`MemoryStore`].

mod clock;
mod etcd;
mod lazy;
mod memory;
mod traits;
mod types;

pub use crate::ids::{LeaseId, Revision};
pub use clock::{BootClock, Clock, TokioClock};
pub use etcd::{Credentials, EtcdOptions, EtcdStore, Password, TlsOptions};
pub(crate) use lazy::LazyStore;
pub use lazy::open;
#[cfg(any(test, feature = "test-util"))]
pub use memory::Backup;
pub use memory::{Fault, MemoryStore};
pub use traits::{LeaseKeeper, Store, Watcher};
pub use types::{
    Circuit, Condition, Entry, Lease, Listing, Page, Selector, StoreStatus, Txn, WatchEvent,
    WatchRange, Write,
};
