//! Writing what an operator says of nodes, and removing what is left of those that are gone.

use super::{Operator, refused};
use crate::error::ClusterError;
use crate::node::unix_millis;
use crate::store::{Condition, Entry, Selector, Store, Txn};
use crate::view::NodeOverride;

/// How long what was said of a node that is not there is kept: it may only be cut off from etcd.
const KEPT_FOR_MS: i64 = 7 * 24 * 3_600_000;
/// How many of the others are looked at, each time something is said.
const MOST_LOOKED_AT: usize = 100;
/// How often it is tried again because another operator has just said something of the same node.
const MOST_TRIES: u32 = 10;

impl Operator {
    /// Changes what is said of a node.
    pub(super) async fn change(
        &self,
        id: &str,
        change: impl Fn(&mut NodeOverride),
    ) -> Result<(), ClusterError> {
        let store = self.store()?;
        for _ in 0..MOST_TRIES {
            let registered = self.registered(&*store, id).await?;
            let all = self.all_overrides(&*store).await?;
            let key = self.keys.override_of(id);
            let before = all.iter().find(|entry| entry.key == key);
            let node = registered.node(id);
            // One that cannot be read, or is meant for another process, is replaced.
            let said = before.and_then(|entry| NodeOverride::parse(&entry.value).ok());
            let said = said.filter(|said| said.is_for(&node));
            let mut said = said.unwrap_or_else(|| NodeOverride::of(&node));
            said.absent_since = None;
            change(&mut said);
            // Only if the process is still the same, and nobody else has said something in between.
            let created = registered.entry.create_revision;
            let same = Condition::CreatedAt(registered.key, created);
            let txn = Txn::new().when(same).when(match before {
                Some(entry) => Condition::ChangedAt(key.clone(), entry.mod_revision),
                None => Condition::Absent(key.clone()),
            });
            let txn = match (said.is_empty(), before) {
                (true, None) => return Ok(()),
                (true, Some(_)) => txn.delete(key),
                (false, _) => txn.put(key, said.to_json(), None),
            };
            if store.txn(txn).await?.is_some() {
                let others = all
                    .iter()
                    .filter(|entry| self.keys.overridden(&entry.key) != Some(id));
                // That it fails harms nobody.
                let _ = self.forget_departed(&*store, others).await;
                return Ok(());
            }
        }
        Err(refused(
            id,
            "it, or what is said of it, changes all the time",
        ))
    }

    async fn all_overrides(&self, store: &dyn Store) -> Result<Vec<Entry>, ClusterError> {
        let prefix = Selector::Prefix(self.keys.override_prefix().to_owned());
        Ok(store.list(&prefix, None).await?.entries)
    }

    /// Removes what was said of processes that others have replaced, and of nodes that have been gone for long.
    async fn forget_departed<'e>(
        &self,
        store: &dyn Store,
        others: impl Iterator<Item = &'e Entry>,
    ) -> Result<(), ClusterError> {
        let now = unix_millis();
        for entry in others.take(MOST_LOOKED_AT) {
            let (Some(id), Ok(said)) = (
                self.keys.overridden(&entry.key),
                NodeOverride::parse(&entry.value),
            ) else {
                continue;
            };
            let registered = match self.registered(store, id).await {
                Ok(registered) => Some(registered),
                Err(ClusterError::NotRegistered { .. }) => None,
                Err(error) => return Err(error),
            };
            let since = said.absent_since;
            let absent_since = match &registered {
                // Another process has its place.
                Some(registered) if !said.is_for(&registered.node(id)) => Some(i64::MIN),
                Some(_) => None,
                None => Some(since.unwrap_or(now)),
            };
            let txn = Txn::new().when(Condition::ChangedAt(entry.key.clone(), entry.mod_revision));
            let txn = txn.when(match registered {
                Some(registered) => {
                    Condition::CreatedAt(registered.key, registered.entry.create_revision)
                }
                None => Condition::Absent(self.keys.registration(id)),
            });
            let key = entry.key.clone();
            let is_old = |since: i64| now.saturating_sub(since) > KEPT_FOR_MS;
            let txn = if absent_since.is_some_and(is_old) {
                txn.delete(key)
            } else if absent_since == since {
                continue;
            } else {
                let said = NodeOverride {
                    absent_since,
                    ..said
                };
                txn.put(key, said.to_json(), None)
            };
            store.txn(txn).await?;
        }
        Ok(())
    }
}
