//! What a node reports about itself.

mod deadband;
mod reporter;
mod sampler;
#[cfg(feature = "system-metrics")]
mod system;
#[cfg(feature = "tower")]
mod tower;

use serde_json::Value;

use crate::metadata::NodeMetadata;
use crate::validate;

pub use crate::load_report::{LOAD_REPORT_HEADER, LoadReport, LoadReportError};
pub use deadband::{Deadband, Tolerance};
pub use reporter::{LoadReporter, RequestGuard};
pub(crate) use sampler::Sampler;
#[cfg(feature = "system-metrics")]
pub use system::SystemMetricsCollector;
#[cfg(feature = "tower")]
pub use tower::{CountedBody, LoadReportFuture, LoadReportLayer, LoadReportService};

/// Where a node's metrics come from.
///
/// Called on a thread of its own, once at a time, so it may block: a collector that hangs or
/// panics stops the metrics, never the node.
///
/// ```
/// use pingora_etcd::{MetricsCollector, NodeMetadata, metadata_keys};
///
/// struct Queue(std::sync::Arc<std::sync::atomic::AtomicU32>);
///
/// impl MetricsCollector for Queue {
///     fn collect(&self) -> NodeMetadata {
///         let depth = self.0.load(std::sync::atomic::Ordering::Relaxed);
///         serde_json::json!({ metadata_keys::QUEUE_DEPTH: depth })
///     }
/// }
/// ```
pub trait MetricsCollector: Send + Sync {
    /// The metrics of this moment: a JSON object, with the keys of
    /// [`metadata_keys`](crate::metadata_keys) where they fit.
    ///
    /// Readers take an entry of 65,536 bytes, 32 levels and 1,024 values at most, all that the node
    /// says of itself included. A sample that makes it more is not published: the last good one
    /// stays, and [`ClusterNode::refused_samples`](crate::ClusterNode::refused_samples) counts it.
    fn collect(&self) -> NodeMetadata;

    /// Whether [`collect`](Self::collect) may take long or block. One that returns at once, such as
    /// a read of a few atomics, may say no: it is then called on the runtime's thread, and needs
    /// none of its own. Default: yes.
    fn may_block(&self) -> bool {
        true
    }
}

/// Reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoopMetricsCollector;

impl NoopMetricsCollector {
    /// A collector that reports nothing.
    pub fn new() -> Self {
        Self
    }
}

impl MetricsCollector for NoopMetricsCollector {
    fn collect(&self) -> NodeMetadata {
        Value::Null
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// Several collectors as one: their objects merged, a later one winning where keys meet. What is
/// no object is left out.
///
/// ```
/// use pingora_etcd::{MetricsCollector, NodeMetadata, metrics::CompositeMetricsCollector};
/// # struct Fixed(serde_json::Value);
/// # impl MetricsCollector for Fixed { fn collect(&self) -> NodeMetadata { self.0.clone() } }
/// let both = CompositeMetricsCollector::new()
///     .with_collector(Fixed(serde_json::json!({"a": 1, "b": 1})))
///     .with_collector(Fixed(serde_json::json!({"b": 2})));
/// assert_eq!(both.collect(), serde_json::json!({"a": 1, "b": 2}));
/// ```
#[derive(Default)]
pub struct CompositeMetricsCollector {
    collectors: Vec<Box<dyn MetricsCollector>>,
}

impl CompositeMetricsCollector {
    /// No collectors yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one, which overrides those before it.
    #[must_use]
    pub fn with_collector(mut self, collector: impl MetricsCollector + 'static) -> Self {
        self.collectors.push(Box::new(collector));
        self
    }
}

impl MetricsCollector for CompositeMetricsCollector {
    fn collect(&self) -> NodeMetadata {
        let mut merged = serde_json::Map::new();
        for collector in &self.collectors {
            match collector.collect() {
                Value::Object(object) => {
                    let replaced = object
                        .into_iter()
                        .filter_map(|(key, value)| merged.insert(key, value));
                    replaced.for_each(validate::take_apart);
                }
                other => validate::take_apart(other),
            }
        }
        if merged.is_empty() {
            Value::Null
        } else {
            Value::Object(merged)
        }
    }

    fn may_block(&self) -> bool {
        self.collectors
            .iter()
            .any(|collector| collector.may_block())
    }
}
