//! Following what operators say of the nodes of a group.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::sleep;
use tracing::{debug, warn};

use super::handle::ServiceDiscovery;
use super::overrides_file::OverridesFile;
use crate::backoff::Backoff;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::store::{Entry, Selector, Store, WatchEvent, WatchRange};
use crate::supervise::say;
use crate::view::NodeOverride;

/// How long until it is tried again without the right to read them.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);

/// What operators say, by node id.
pub(crate) type Overrides = HashMap<String, NodeOverride>;

impl ServiceDiscovery {
    /// Follows what operators say of nodes, and gives each state of it to `take`, and whether it is the current one. While
    /// the store is away, the last one stays; it begins with that of a file beside the snapshot file, if there is one, which
    /// may be old. An etcd user who may not read it goes on without.
    #[cfg_attr(not(feature = "pingora"), allow(dead_code))]
    pub(crate) async fn follow_overrides(
        &self,
        mut take: impl FnMut(&Overrides, bool),
    ) -> Infallible {
        let mut backoff = Backoff::new();
        let mut is_told = false;
        // Whoever runs the discovery is told of settings that are wrong.
        let settings = self.source.settings.as_ref().ok();
        let Some(settings) = settings.filter(|settings| settings.keys.are_ours()) else {
            return std::future::pending().await;
        };
        let mut file = OverridesFile::new(settings, &self.source.group);
        if let Some(overrides) = file.read().await {
            take(&overrides, false);
        }
        let is_heard = AtomicBool::new(false);
        let mut take = |overrides: &Overrides| {
            is_heard.store(true, Ordering::Relaxed);
            take(overrides, true);
            file.keep(overrides);
        };
        loop {
            let error = match self.try_follow_overrides(&mut take, &mut backoff).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            if !error.is_missing_permission() {
                debug!(%error, "overrides of operators cannot be followed");
                sleep(backoff.after(&error)).await;
                continue;
            }
            if !is_heard.load(Ordering::Relaxed) {
                // What a former process has heard may have ended since.
                take(&Overrides::new());
            }
            if !std::mem::replace(&mut is_told, true) {
                say(|| {
                    warn!(%error, "this etcd user may not read what operators say of nodes (drain, weight); it has no effect here");
                });
            }
            sleep(REFUSED_AGAIN).await;
        }
    }

    async fn try_follow_overrides(
        &self,
        take: &mut impl FnMut(&Overrides),
        backoff: &mut Backoff,
    ) -> Result<Infallible, ClusterError> {
        let settings = self.source.settings.as_ref().map_err(Clone::clone)?;
        let keys = &settings.keys;
        let store = self.source.store.get()?;
        let prefix = Selector::Prefix(keys.override_prefix().to_owned());
        let listing = store.list(&prefix, None).await?;
        let mut all = Overrides::new();
        for entry in &listing.entries {
            insert(&mut all, keys, entry);
        }
        take(&all);
        let range = WatchRange {
            keys: prefix,
            from: listing.revision + 1,
        };
        let mut watcher = Store::watch(&*store, vec![range]).await?;
        backoff.reset();
        loop {
            let events = watcher.next().await?;
            for event in &events {
                match event {
                    WatchEvent::Put(entry) => insert(&mut all, keys, entry),
                    WatchEvent::Delete { key, .. } => {
                        if let Some(id) = keys.overridden(key) {
                            all.remove(id);
                        }
                    }
                }
            }
            if !events.is_empty() {
                take(&all);
            }
        }
    }
}

/// Takes over an entry. One that cannot be read says nothing.
fn insert(all: &mut Overrides, keys: &GroupKeys, entry: &Entry) {
    let Some(id) = keys.overridden(&entry.key) else {
        return;
    };
    match NodeOverride::parse(&entry.value) {
        Ok(said) => drop(all.insert(id.to_owned(), said)),
        Err(reason) => {
            all.remove(id);
            say(|| {
                warn!(
                    key = entry.key,
                    reason, "what an operator says of a node cannot be read"
                );
            });
        }
    }
}
