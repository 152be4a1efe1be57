//! Where a node's metrics come from: the trait, and collectors that combine others or report nothing.

use std::sync::Arc;

use serde_json::Value;

use crate::metadata::NodeMetadata;
use crate::opaque::opaque_debug;
use crate::validate;

/// Where a node's metrics come from.
///
/// It is called on a thread of its own, and not again before it has returned, so it may block. A
/// collector that hangs or panics stops the metrics, never the node.
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
    /// Readers accept an entry of 65,536 bytes, 32 levels and 1,024 values at most, with everything
    /// that the node says about itself. A sample that exceeds this is not published: the last good
    /// one stays, and [`ClusterNode::refused_samples`](crate::ClusterNode::refused_samples) counts
    /// it.
    fn collect(&self) -> NodeMetadata;

    /// Whether [`collect`](Self::collect) may take long or block. A collector that returns at once,
    /// because it reads only a few atomics for example, may return false: it is then called on the
    /// runtime's thread. Default: true.
    fn may_block(&self) -> bool {
        true
    }
}

impl<T: MetricsCollector + ?Sized> MetricsCollector for Arc<T> {
    fn collect(&self) -> NodeMetadata {
        (**self).collect()
    }

    fn may_block(&self) -> bool {
        (**self).may_block()
    }
}

impl<T: MetricsCollector + ?Sized> MetricsCollector for Box<T> {
    fn collect(&self) -> NodeMetadata {
        (**self).collect()
    }

    fn may_block(&self) -> bool {
        (**self).may_block()
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

/// Several collectors as one. Their objects are merged; where keys are the same, the later collector
/// wins. A value that is not an object is left out.
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
    /// A collector without parts, which reports nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a collector, which overrides those before it.
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
        self.collectors.iter().any(MetricsCollector::may_block)
    }
}

opaque_debug!(CompositeMetricsCollector);
