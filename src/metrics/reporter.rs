use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use http::HeaderValue;

use crate::load_report::LoadReport;
use crate::metadata::NodeMetadata;

/// Says in responses how loaded this process is: makes the value of the header
/// [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER), from the metrics of a node and from a count
/// of requests in flight. So balancers hear of the load with every answer, without a write to etcd.
///
/// [`ClusterNode::load_reporter`](crate::ClusterNode::load_reporter) has one that knows what the
/// node's collector said last. With the feature `tower`, its `layer` does all that a
/// server has to do. Clones share the count.
///
/// ```
/// use pingora_etcd::metrics::{LoadReport, LoadReporter};
/// let reporter = LoadReporter::new();
/// reporter.sampled(&serde_json::json!({ "cpu_usage_percent": 30.0 }));
///
/// let request = reporter.enter(); // when it comes; keep it until it is answered
/// let header = reporter.header_value();
/// let report = LoadReport::parse(&header).unwrap();
/// assert_eq!(report.cpu, Some(0.3));
/// assert_eq!(report.in_flight, Some(1.0));
/// drop(request);
/// ```
#[derive(Debug, Clone, Default)]
pub struct LoadReporter {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    sample: ArcSwap<LoadReport>,
    /// Every request in flight owns it.
    in_flight: Arc<()>,
    is_counting: AtomicBool,
}

/// A request that is counted as in flight until this is dropped. See [`LoadReporter::enter`].
#[derive(Debug)]
pub struct RequestGuard {
    _in_flight: Arc<()>,
}

impl LoadReporter {
    /// A reporter that knows of requests in flight only, until it is given a sample.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over what a collector says now.
    pub fn sampled(&self, metadata: &NodeMetadata) {
        let mut sample = LoadReport::from_metadata(metadata);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        sample.sampled_at = since
            .ok()
            .and_then(|since| u64::try_from(since.as_millis()).ok());
        self.shared.sample.store(Arc::new(sample));
    }

    /// Counts a request in; dropping the guard counts it out.
    pub fn enter(&self) -> RequestGuard {
        self.counts_requests();
        RequestGuard {
            _in_flight: self.shared.in_flight.clone(),
        }
    }

    /// Says that every request is counted from now on, also before the first one comes. The layer
    /// says so when it is made, [`enter`](Self::enter) when it is first called.
    pub fn counts_requests(&self) {
        // Read first: a write on each request would go from core to core.
        if !self.is_counting() {
            self.shared.is_counting.store(true, Ordering::Relaxed);
        }
    }

    /// Whether requests are counted, so that none in flight means that there are none.
    pub fn is_counting(&self) -> bool {
        self.shared.is_counting.load(Ordering::Relaxed)
    }

    /// Requests that are counted in.
    pub fn in_flight(&self) -> usize {
        Arc::strong_count(&self.shared.in_flight) - 1
    }

    /// What there is to report.
    pub fn report(&self) -> LoadReport {
        LoadReport {
            in_flight: Some(self.in_flight() as f64),
            refused: 0,
            ..**self.shared.sample.load()
        }
    }

    /// The value of the header [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER). Costs an
    /// allocation and some hundred nanoseconds.
    pub fn header_value(&self) -> HeaderValue {
        // Digits and letters are always a header's value.
        HeaderValue::try_from(self.report().to_string())
            .unwrap_or_else(|_| HeaderValue::from_static("TEXT "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_and_the_last_sample_is_told() {
        let reporter = LoadReporter::new();
        assert_eq!(reporter.header_value(), "TEXT named_metrics.in_flight=0");
        let guards = [reporter.enter(), reporter.clone().enter()];
        reporter.sampled(&serde_json::json!({"cpu_usage_percent": 40, "queue_depth": 3}));
        let told = LoadReport::parse(reporter.header_value()).unwrap();
        assert_eq!(told.in_flight, Some(2.0));
        assert_eq!((told.cpu, told.queue), (Some(0.4), Some(3.0)));
        assert!(told.sampled_at.is_some());
        drop(guards);
        assert_eq!(reporter.in_flight(), 0);
    }
}
