//! Publishes a node's metrics when they have changed enough to be worth a write.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::state::WorkerState;
use super::tenure::Tenure;
use crate::error::ClusterError;
use crate::metadata::{Metadata, NodeMetadata};
use crate::metrics::{Deadband, Sampler};
use crate::store::{Condition, Revision, Store, Txn};
use crate::validate::{Bounds, Excess};

type WriteFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Option<Revision>, ClusterError>> + Send + 'a>>;

/// The metrics in the store.
struct Published {
    metadata: NodeMetadata,
    at: Instant,
}

/// Collects metrics every interval, and writes those that have left the deadband around what was
/// written last, or that have become old. One write at a time; a sample that is collected during a
/// write is not queued, because the next one will be newer. A write that fails has no other
/// consequence: renewals decide whether the store works.
pub(super) async fn publish(
    state: &WorkerState,
    store: &dyn Store,
    tenure: &Tenure,
    sampler: &mut Sampler,
) -> Infallible {
    let config = &state.config;
    if config.metrics_interval == 0 {
        return std::future::pending().await;
    }
    let interval = Duration::from_secs(config.metrics_interval);
    let mut published: Option<Published> = None;
    let mut writing: Option<(NodeMetadata, WriteFuture<'_>)> = None;
    let mut due = Box::pin(sleep(Duration::ZERO));
    loop {
        let done = async {
            match &mut writing {
                Some((_, write)) => write.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            result = done => {
                let is_written = is_written(result);
                let written = writing.take().filter(|_| is_written);
                published = written.map(|(metadata, _)| Published {
                    metadata,
                    at: Instant::now(),
                });
                continue;
            }
            () = &mut due => {}
        }
        due = Box::pin(sleep(interval.mul_f64(1.0 + 0.1 * fastrand::f64())));
        // While a sample is awaited a write in progress waits, too: for an interval at most.
        let Some(sample) = sampler.sample(interval).await else {
            continue;
        };
        let accepted = sample.and_then(|metadata| accept(state, &metadata).map(|()| metadata));
        let metadata = match accepted {
            Ok(metadata) => metadata,
            Err(excess) => {
                refuse(state, &excess);
                continue;
            }
        };
        state.reporter.sampled(&metadata);
        if writing.is_none()
            && is_worth_a_write(
                published.as_ref(),
                &metadata,
                &config.deadband,
                config.max_age,
            )
        {
            writing = Some((metadata, write(state, store, tenure)));
        }
    }
}

/// Whether the metrics are in the store. If the node is not registered, nothing was written, and
/// registering will write them.
fn is_written(result: Result<Option<Revision>, ClusterError>) -> bool {
    match result {
        Ok(revision) => revision.is_some(),
        Err(error) => {
            debug!(%error, "metrics not published");
            false
        }
    }
}

/// Puts these metadata into the node's entry, unless the entry would exceed what readers accept.
fn accept(state: &WorkerState, metadata: &NodeMetadata) -> Result<(), Excess> {
    let metadata = Metadata::from(metadata.clone());
    let mut entry = state.entry().clone();
    entry.metadata = metadata.clone();
    // With the marks for draining and leaving, which will be written with these metadata, too.
    Bounds::default().check(&entry.at_its_longest().to_json())?;
    state.entry().metadata = metadata;
    Ok(())
}

/// Logs each limit once: a collector that exceeds it does so with every sample.
fn refuse(state: &WorkerState, excess: &Excess) {
    if state.refusals.count(excess) {
        let reason = tracing::field::display(excess);
        warn!(
            reason,
            "metrics are not published because no reader would accept them; the last good ones stay"
        );
    }
}

/// Whether a sample has to be written, given what was published last. A tenth of the maximum age is
/// left to chance, so that nodes which started together do not write together.
fn is_worth_a_write(
    published: Option<&Published>,
    sample: &NodeMetadata,
    deadband: &Deadband,
    max_age: Duration,
) -> bool {
    let Some(published) = published else {
        return true;
    };
    let jitter = 0.9 + 0.1 * fastrand::f64();
    deadband.is_left(&published.metadata, sample)
        || published.at.elapsed() >= max_age.mul_f64(jitter)
}

fn write<'a>(state: &WorkerState, store: &'a dyn Store, tenure: &Tenure) -> WriteFuture<'a> {
    let registration = state.keys.registration(state.id());
    let lease = tenure.lease.id;
    let update = Txn::new()
        .when(Condition::HeldBy(registration.clone(), lease))
        .put(registration, state.entry_json(), Some(lease));
    store.txn(update)
}
