//! Opening the store that the options name, at once or when it is first needed.

use std::sync::{Arc, Mutex};

use super::etcd::{EtcdOptions, EtcdStore};
use super::memory::MemoryStore;
use super::traits::Store;
use crate::error::ClusterError;
use crate::sync::lock;

/// A store that was given, or that is opened when it is first needed.
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
        // Files were checked when the node or discovery was built. One that is missing now may be
        // back soon, and is read again for each connection.
        self.options.check_values()?;
        let opened = opened(&self.options);
        *store = Some(opened.clone());
        Ok(opened)
    }
}

/// Opens the store that the options name: `memory://name`, or an etcd cluster. Does not connect yet.
/// Files are checked now; one that is missing later is retried without limit.
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
