//! Calls a collector that may block, panic or return too much.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel as tokio_channel};
use tokio::time::timeout;
use tracing::{Span, error, warn};

use super::collector::MetricsCollector;
use crate::metadata::NodeMetadata;
use crate::validate::{self, Bounds, Excess};

/// What a collector returned, or why no reader would accept it.
pub(crate) type Sample = Result<NodeMetadata, Excess>;

/// Calls a collector on request, on a thread of its own. Not on a blocking thread of the runtime: a
/// runtime waits for those when it shuts down, and a collector may hang indefinitely.
pub(crate) struct Sampler {
    collector: Arc<dyn MetricsCollector>,
    thread: Option<Thread>,
    /// The last call has not returned in time, which was logged.
    is_stuck: bool,
}

struct Thread {
    requests: Sender<()>,
    samples: Receiver<Option<Sample>>,
    /// A call has not returned yet.
    is_busy: bool,
}

impl Sampler {
    pub(crate) fn new(collector: Arc<dyn MetricsCollector>) -> Self {
        Self {
            collector,
            thread: None,
            is_stuck: false,
        }
    }

    /// Returns the next sample, if the collector returns within this time. A later sample is returned
    /// by the next call, so that a slow collector is never called twice at the same time.
    pub(crate) async fn sample(&mut self, within: Duration) -> Option<Sample> {
        let may_block = catch_unwind(AssertUnwindSafe(|| self.collector.may_block()));
        if !may_block.unwrap_or(true) {
            return collect(&*self.collector);
        }
        let thread = match &mut self.thread {
            Some(thread) => thread,
            none => none.insert(spawn(self.collector.clone())?),
        };
        if !thread.is_busy {
            if thread.requests.send(()).is_err() {
                self.thread = None;
                return None;
            }
            thread.is_busy = true;
        }
        match timeout(within, thread.samples.recv()).await {
            Ok(sample) => {
                thread.is_busy = false;
                self.is_stuck = false;
                sample.flatten()
            }
            Err(_) => {
                if !self.is_stuck {
                    self.is_stuck = true;
                    warn!(
                        ?within,
                        "the metrics collector does not return; the last metrics stay"
                    );
                }
                None
            }
        }
    }
}

fn collect(collector: &dyn MetricsCollector) -> Option<Sample> {
    match catch_unwind(AssertUnwindSafe(|| collector.collect())) {
        Ok(metadata) => Some(check(metadata)),
        Err(_) => {
            error!("the metrics collector panicked; the last metrics stay");
            None
        }
    }
}

/// On the thread that has called the collector, so that a value that is too deep goes no further.
fn check(metadata: NodeMetadata) -> Sample {
    match Bounds::default().check_value(&metadata) {
        Ok(()) => Ok(metadata),
        Err(excess) => {
            validate::take_apart(metadata);
            Err(excess)
        }
    }
}

fn spawn(collector: Arc<dyn MetricsCollector>) -> Option<Thread> {
    let (requests, requested) = channel();
    let (results, samples) = tokio_channel(1);
    let span = Span::current();
    let spawned = std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            while requested.recv().is_ok() {
                let sample = span.in_scope(|| collect(&*collector));
                if results.blocking_send(sample).is_err() {
                    return;
                }
            }
        });
    if let Err(error) = spawned {
        error!(%error, "cannot start a thread for the metrics collector");
        return None;
    }
    Some(Thread {
        requests,
        samples,
        is_busy: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct PanicsOnce(AtomicU32);

    impl MetricsCollector for PanicsOnce {
        fn collect(&self) -> NodeMetadata {
            let call = self.0.fetch_add(1, Ordering::SeqCst);
            assert_ne!(call, 0, "the first call panics");
            serde_json::json!({ "call": call })
        }
    }

    #[tokio::test]
    async fn a_panic_costs_one_sample() {
        let mut sampler = Sampler::new(Arc::new(PanicsOnce(AtomicU32::new(0))));
        let within = Duration::from_secs(10);
        assert_eq!(sampler.sample(within).await, None);
        assert_eq!(
            sampler.sample(within).await,
            Some(Ok(serde_json::json!({ "call": 1 })))
        );
    }

    /// Returns when the test lets it.
    struct Gate(Mutex<std::sync::mpsc::Receiver<()>>, AtomicU32);

    impl MetricsCollector for Gate {
        fn collect(&self) -> NodeMetadata {
            let call = self.1.fetch_add(1, Ordering::SeqCst);
            self.0.lock().unwrap().recv().unwrap();
            serde_json::json!(call)
        }
    }

    #[tokio::test]
    async fn a_block_costs_the_time_limit_and_is_not_called_again_meanwhile() {
        let (open, gate) = channel();
        let mut sampler = Sampler::new(Arc::new(Gate(Mutex::new(gate), AtomicU32::new(0))));
        for _ in 0..3 {
            assert_eq!(sampler.sample(Duration::from_millis(5)).await, None);
        }
        open.send(()).unwrap();
        let sample = sampler.sample(Duration::from_secs(10)).await;
        assert_eq!(sample, Some(Ok(serde_json::json!(0))), "called once in all");
    }

    /// So deep that writing or dropping it level by level would end the process.
    struct Abyss(bool);

    impl MetricsCollector for Abyss {
        fn collect(&self) -> NodeMetadata {
            (0..200_000).fold(NodeMetadata::Null, |inner, _| {
                NodeMetadata::Array(vec![inner])
            })
        }

        fn may_block(&self) -> bool {
            self.0
        }
    }

    #[tokio::test]
    async fn a_value_deeper_than_the_stack_is_refused() {
        for may_block in [false, true] {
            let mut sampler = Sampler::new(Arc::new(Abyss(may_block)));
            for _ in 0..2 {
                let sample = sampler.sample(Duration::from_secs(60)).await.unwrap();
                assert_eq!(sample.unwrap_err().bound, validate::Bound::Depth);
            }
        }
    }

    #[test]
    fn a_value_deeper_than_the_stack_among_several_is_refused() {
        struct Deep;

        impl MetricsCollector for Deep {
            fn collect(&self) -> NodeMetadata {
                let mut fields = serde_json::Map::new();
                fields.insert("deep".to_owned(), Abyss(true).collect());
                NodeMetadata::Object(fields)
            }
        }

        let both = crate::metrics::CompositeMetricsCollector::new()
            .with_collector(Abyss(true))
            .with_collector(Deep)
            .with_collector(Deep);
        assert!(collect(&both).unwrap().is_err());
    }
}
