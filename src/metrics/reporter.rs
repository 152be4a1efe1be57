//! Makes load reports: from the last sample of metrics, and from the requests that are counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use http::HeaderValue;

use super::work::Work;
use crate::load_report::{LoadReport, LoadReportForm};
use crate::metadata::NodeMetadata;

/// Reports in responses how loaded this process is: it makes the value of the header
/// [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER) from the metrics of a node and a count
/// of requests in flight. Balancers then learn the load from every response, without a write to etcd.
///
/// Where requests are counted, a report also contains what Envoy's and gRPC's weighted round robin compute
/// weights from: `rps_fractional` and `eps`, the requests and the failures a second, over the last
/// seconds; and with [`set_capacity`](Self::set_capacity) `application_utilization`.
///
/// [`ClusterNode::load_reporter`](crate::ClusterNode::load_reporter) returns one that has the last
/// sample of the node's collector. With the feature `tower`, `layer` does everything that a server
/// has to do. Clones share the count.
///
/// ```
/// use pingora_etcd::metrics::{LoadReport, LoadReporter};
/// let reporter = LoadReporter::new();
/// reporter.sampled(&serde_json::json!({ "cpu_usage_percent": 30.0 }));
///
/// let request = reporter.enter(); // when it arrives; keep the guard until it is answered
/// let header = reporter.header_value();
/// let report = LoadReport::parse(&header).unwrap();
/// assert_eq!(report.cpu, Some(0.3));
/// assert_eq!(report.in_flight, Some(1.0));
/// drop(request);
/// ```
#[derive(Debug, Clone, Default)]
pub struct LoadReporter {
    state: Arc<ReporterState>,
}

#[derive(Debug, Default)]
struct ReporterState {
    sample: ArcSwap<LoadReport>,
    work: Work,
    is_counting: AtomicBool,
}

/// Counts a request as in flight until it is dropped. See [`LoadReporter::enter`].
#[derive(Debug)]
pub struct RequestGuard {
    state: Arc<ReporterState>,
    has_failed: bool,
}

impl RequestGuard {
    /// Counts this request as one that failed by the fault of this server, as a 5xx response does.
    pub fn fail(&mut self) {
        self.has_failed = true;
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.state.work.end(self.has_failed);
    }
}

impl LoadReporter {
    /// A reporter that reports the requests in flight only, until it has a sample.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the metrics to report, which were sampled now.
    pub fn sampled(&self, metadata: &NodeMetadata) {
        let mut sample = LoadReport::from_metadata(metadata);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        sample.sampled_at = since
            .ok()
            .and_then(|since| u64::try_from(since.as_millis()).ok());
        self.state.sample.store(Arc::new(sample));
    }

    /// Counts a request as in flight until the guard is dropped.
    pub fn enter(&self) -> RequestGuard {
        self.counts_requests();
        self.state.work.begin();
        RequestGuard {
            state: self.state.clone(),
            has_failed: false,
        }
    }

    /// Sets how many requests this process can work on at once. From then on reports say in
    /// `application_utilization` how much of that was in use over the last seconds, from 0 to 1, which
    /// has precedence over the CPU; 0 ends that. Each request then takes a lock twice.
    pub fn set_capacity(&self, requests: u32) {
        self.state.work.set_capacity(requests, Instant::now());
    }

    /// Declares that every request is counted from now on, so that none in flight means that there
    /// are none. The layer does this when it is made, and [`enter`](Self::enter) when it is first
    /// called.
    pub fn counts_requests(&self) {
        // Read first: a write with every request would move the cache line between cores.
        if !self.is_counting() {
            self.state.is_counting.store(true, Ordering::Relaxed);
        }
    }

    /// Whether requests are counted; see [`counts_requests`](Self::counts_requests).
    pub fn is_counting(&self) -> bool {
        self.state.is_counting.load(Ordering::Relaxed)
    }

    /// The number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.state.work.in_flight()
    }

    /// The report of this moment.
    pub fn report(&self) -> LoadReport {
        let rates = if self.is_counting() {
            self.state.work.rates(Instant::now())
        } else {
            Default::default()
        };
        LoadReport {
            in_flight: Some(self.in_flight() as f64),
            rps: rates.rps,
            eps: rates.eps,
            application: rates.utilization,
            refused: 0,
            ..**self.state.sample.load()
        }
    }

    /// The value of the header [`LOAD_REPORT_HEADER`](crate::metrics::LOAD_REPORT_HEADER). Costs an
    /// allocation and a few hundred nanoseconds.
    pub fn header_value(&self) -> HeaderValue {
        self.header_value_as(LoadReportForm::Text)
    }

    /// The same in another form: in the one that a request asks for with the header
    /// [`LOAD_REPORT_FORMAT_HEADER`](crate::metrics::LOAD_REPORT_FORMAT_HEADER).
    pub fn header_value_as(&self, form: LoadReportForm) -> HeaderValue {
        // Each form of a report is always a valid header value.
        HeaderValue::try_from(self.report().to_header(form))
            .unwrap_or_else(|_| HeaderValue::from_static("TEXT "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_and_the_last_sample_is_reported() {
        let reporter = LoadReporter::new();
        assert_eq!(reporter.header_value(), "TEXT named_metrics.in_flight=0");
        let guards = [reporter.enter(), reporter.clone().enter()];
        reporter.sampled(&serde_json::json!({"cpu_usage_percent": 40, "queue_depth": 3}));
        let report = LoadReport::parse(reporter.header_value()).unwrap();
        assert_eq!(report.in_flight, Some(2.0));
        assert_eq!((report.cpu, report.queue), (Some(0.4), Some(3.0)));
        assert!(report.sampled_at.is_some());
        drop(guards);
        assert_eq!(reporter.in_flight(), 0);
    }
}
