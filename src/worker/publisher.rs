//! When metadata is worth a write.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::debug;

use super::Shared;
use super::session::Tenure;
use crate::error::ClusterError;
use crate::metrics::Sampler;
use crate::node::NodeMetadata;
use crate::store::{Condition, Revision, Store, Txn};

type Writing<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Revision>, ClusterError>> + Send + 'a>>;

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
            let Some(metadata) = sampler.sample(every).await else {
                continue;
            };
            self.reporter.sampled(&metadata);
            self.entry().metadata = metadata.clone().into();
            if writing.is_none() && self.is_worth_a_write(written.as_ref(), &metadata) {
                writing = Some((metadata, self.write_metrics(store, tenure)));
            }
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
