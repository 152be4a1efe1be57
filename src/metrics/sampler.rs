//! Calls a collector without trusting it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel as tokio_channel};
use tokio::time::timeout;
use tracing::{error, warn};

use super::MetricsCollector;
use crate::metadata::NodeMetadata;
use crate::validate::{self, Bounds, Excess};

/// What a collector said, or why no reader would take it.
pub(crate) type Sample = Result<NodeMetadata, Excess>;

/// A thread that collects when asked. Not one of the runtime's: a runtime waits for its blocking
/// threads when it shuts down, and a collector may hang for ever.
pub(crate) struct Sampler {
    collector: Arc<dyn MetricsCollector>,
    thread: Option<Thread>,
    stuck: bool,
}

struct Thread {
    requests: Sender<()>,
    samples: Receiver<Option<Sample>>,
    /// An answer is still to come.
    busy: bool,
}

impl Sampler {
    pub(crate) fn new(collector: Arc<dyn MetricsCollector>) -> Self {
        Self {
            collector,
            thread: None,
            stuck: false,
        }
    }

    /// The next sample, if it comes within that time. One that comes later is the answer to the
    /// next call, so that a slow collector is called once at a time.
    pub(crate) async fn sample(&mut self, within: Duration) -> Option<Sample> {
        let may_block = catch_unwind(AssertUnwindSafe(|| self.collector.may_block()));
        if !may_block.unwrap_or(true) {
            return collect(&*self.collector);
        }
        let thread = match &mut self.thread {
            Some(thread) => thread,
            none => none.insert(spawn(self.collector.clone())?),
        };
        if !thread.busy {
            if thread.requests.send(()).is_err() {
                self.thread = None;
                return None;
            }
            thread.busy = true;
        }
        match timeout(within, thread.samples.recv()).await {
            Ok(sample) => {
                thread.busy = false;
                self.stuck = false;
                sample.flatten()
            }
            Err(_) => {
                if !self.stuck {
                    self.stuck = true;
                    warn!(
                        ?within,
                        "the metrics collector does not return; metrics stay as they are"
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
            error!("the metrics collector panicked; metrics stay as they are");
            None
        }
    }
}

/// Where it was made, so that nothing that is too deep goes any further.
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
    let (requests, asked) = channel();
    let (answers, samples) = tokio_channel(1);
    let spawned = std::thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(move || {
            while asked.recv().is_ok() {
                if answers.blocking_send(collect(&*collector)).is_err() {
                    return;
                }
            }
        });
    if let Err(error) = spawned {
        error!(%error, "no thread for the metrics collector");
        return None;
    }
    Some(Thread {
        requests,
        samples,
        busy: false,
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

    /// Returns when it is told to.
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
    async fn a_value_deeper_than_a_stack_harms_nobody() {
        for may_block in [false, true] {
            let mut sampler = Sampler::new(Arc::new(Abyss(may_block)));
            for _ in 0..2 {
                let sample = sampler.sample(Duration::from_secs(60)).await.unwrap();
                assert_eq!(sample.unwrap_err().bound, validate::Bound::Depth);
            }
        }
    }

    #[test]
    fn neither_does_one_among_several() {
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
