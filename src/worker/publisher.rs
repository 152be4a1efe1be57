//! When metadata is worth a write.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::debug;

use super::Shared;
use super::session::Session;
use crate::error::ClusterError;
use crate::metrics::Sampler;
use crate::store::{Condition, Store, Txn};

/// An entry is written again at least this often while metrics are published, so that a reader
/// can tell an idle node from one whose collector is stuck.
const MAX_AGE: Duration = Duration::from_secs(30);

impl Shared {
    /// Collects every interval and writes what changed. One write at a time; one that fails is
    /// dropped, for the next sample will be newer. Never returns an error: a store that cannot be
    /// written is for the renewals to judge.
    pub(super) async fn publish(
        &self,
        store: &dyn Store,
        session: &Session,
        sampler: &mut Sampler,
    ) -> ClusterError {
        let Some(every) = self.config.interval else {
            return std::future::pending().await;
        };
        let registration = self.keys.registration(&self.config.id);
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut written: Option<Instant> = None;
        loop {
            ticks.tick().await;
            let Some(metadata) = sampler.sample(every).await else {
                continue;
            };
            self.reporter.sampled(&metadata);
            let changed = {
                let mut entry = self.entry();
                let changed = entry.metadata != metadata;
                entry.metadata = metadata;
                changed
            };
            let fresh = written.is_some_and(|written| written.elapsed() < MAX_AGE);
            if fresh && !changed {
                continue;
            }
            let lease = session.lease.id;
            let update = Txn::new()
                .when(Condition::HeldBy(registration.clone(), lease))
                .put(registration.clone(), self.fresh_entry(), Some(lease));
            match store.txn(update).await {
                Ok(Some(_)) => written = Some(Instant::now()),
                // Not registered (yet, or any more): registering writes the metrics too.
                Ok(None) => written = None,
                Err(error) => {
                    written = None;
                    debug!(group = %self.config.group, node = %self.config.id, %error, "metrics not published");
                }
            }
        }
    }
}
