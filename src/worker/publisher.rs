//! When metadata is worth a write.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::Shared;
use super::session::Tenure;
use crate::error::ClusterError;
use crate::metadata::{Metadata, NodeMetadata};
use crate::metrics::Sampler;
use crate::store::{Condition, Revision, Store, Txn};
use crate::validate::{Bound, Bounds, Excess};

type Writing<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Revision>, ClusterError>> + Send + 'a>>;

/// How many samples of a collector were not published, because no reader would have taken the
/// entry with them, and which limit they exceeded first. The last good sample stays in the entry
/// each time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedSamples {
    /// The entry would have had more than 65,536 bytes.
    pub too_long: u64,
    /// It would have had more than 32 levels.
    pub too_deep: u64,
    /// It would have had more than 1,024 values.
    pub too_many_values: u64,
}

impl RefusedSamples {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.too_long + self.too_deep + self.too_many_values
    }
}

/// The same while it is being counted.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    bytes: AtomicU64,
    depth: AtomicU64,
    values: AtomicU64,
}

impl Refusals {
    /// Answers whether it is the first of its kind.
    fn count(&self, excess: &Excess) -> bool {
        let count = match excess.bound {
            Bound::Bytes => &self.bytes,
            Bound::Depth => &self.depth,
            Bound::Values => &self.values,
        };
        count.fetch_add(1, Ordering::Relaxed) == 0
    }

    pub(super) fn so_far(&self) -> RefusedSamples {
        RefusedSamples {
            too_long: self.bytes.load(Ordering::Relaxed),
            too_deep: self.depth.load(Ordering::Relaxed),
            too_many_values: self.values.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    /// Collects every interval, and writes what has left the deadband of what was written last, or
    /// has become old. One write at a time; what is collected while it is under way is not queued,
    /// for the next sample will be newer. Never returns: a store that cannot be written is for the
    /// renewals to judge.
    pub(super) async fn publish(&self, store: &dyn Store, tenure: &Tenure, sampler: &mut Sampler) {
        let Some(every) = self.config.interval else {
            return std::future::pending().await;
        };
        let mut written: Option<(NodeMetadata, Instant)> = None;
        let mut writing: Option<(NodeMetadata, Writing<'_>)> = None;
        let mut due = Box::pin(sleep(Duration::ZERO));
        loop {
            let done = async {
                match &mut writing {
                    Some((_, writing)) => writing.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                result = done => {
                    let metadata = writing.take().map(|(metadata, _)| metadata);
                    written = match result {
                        Ok(Some(_)) => metadata.map(|metadata| (metadata, Instant::now())),
                        // Not registered (yet, or any more): registering writes the metrics too.
                        Ok(None) => None,
                        Err(error) => {
                            debug!(group = %self.config.group, node = %self.config.id, %error, "metrics not published");
                            None
                        }
                    };
                    continue;
                }
                () = &mut due => {}
            }
            due = Box::pin(sleep(every.mul_f64(1.0 + 0.1 * fastrand::f64())));
            // While a sample is awaited the write under way waits too: at most an interval.
            let Some(sample) = sampler.sample(every).await else {
                continue;
            };
            let taken = sample.and_then(|metadata| self.take_over(&metadata).map(|()| metadata));
            let metadata = match taken {
                Ok(metadata) => metadata,
                Err(excess) => {
                    self.refuse(&excess);
                    continue;
                }
            };
            self.reporter.sampled(&metadata);
            if writing.is_none() && self.is_worth_a_write(written.as_ref(), &metadata) {
                writing = Some((metadata, self.write_metrics(store, tenure)));
            }
        }
    }

    /// Lets the entry have these metadata, unless it would be more than readers take.
    fn take_over(&self, metadata: &NodeMetadata) -> Result<(), Excess> {
        let metadata = Metadata::from(metadata.clone());
        let mut entry = self.entry().clone();
        entry.metadata = metadata.clone();
        // Whatever is going to be said with them: draining and leaving have to fit too.
        Bounds::default().check(&entry.at_its_longest().to_json())?;
        self.entry().metadata = metadata;
        Ok(())
    }

    /// Once for each limit: a collector that returns too much does it with every sample.
    fn refuse(&self, excess: &Excess) {
        if self.refused.count(excess) {
            let reason = tracing::field::display(excess);
            warn!(
                group = %self.config.group, node = %self.config.id, reason,
                "metrics are not published, for no reader would take them; the last good ones stay"
            );
        }
    }

    fn is_worth_a_write(
        &self,
        written: Option<&(NodeMetadata, Instant)>,
        now: &NodeMetadata,
    ) -> bool {
        let Some((metadata, at)) = written else {
            return true;
        };
        let jitter = 0.9 + 0.1 * fastrand::f64();
        self.config.deadband.is_left(metadata, now)
            || at.elapsed() >= self.config.max_age.mul_f64(jitter)
    }

    fn write_metrics<'a>(&self, store: &'a dyn Store, tenure: &Tenure) -> Writing<'a> {
        let registration = self.keys.registration(&self.config.id);
        let lease = tenure.lease.id;
        let update = Txn::new()
            .when(Condition::HeldBy(registration.clone(), lease))
            .put(registration, self.fresh_entry(), Some(lease));
        store.txn(update)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_told_once_and_counted_each_time() {
        let refused = Refusals::default();
        let deep = (0..130).fold(NodeMetadata::Null, |inner, _| {
            NodeMetadata::Array(vec![inner])
        });
        let long = NodeMetadata::from("x".repeat(70_000));
        for (value, told) in [(&deep, true), (&long, true), (&deep, false), (&long, false)] {
            let excess = Bounds::default().check_value(value).unwrap_err();
            assert_eq!(refused.count(&excess), told, "{excess}");
        }
        let counted = refused.so_far();
        assert_eq!((counted.too_deep, counted.too_long), (2, 2));
        assert_eq!(counted.total(), 4);
    }
}
