//! A worker's own word on whether it is well.

use serde_json::json;

use super::collector::MetricsCollector;
use crate::metadata::{NodeMetadata, metadata_keys};
use crate::opaque::opaque_debug;

/// How well an application is, by its own checks.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// All is well.
    Well,
    /// It works, but less well than it should, for this reason: balancers give it a quarter of its weight.
    Degraded(String),
    /// It cannot serve, for this reason: balancers leave it out, unless less than half of the nodes are well, or the
    /// part that the panic threshold of a health check says.
    Failing(String),
}

/// Publishes the health of an application with its metrics, as [`metadata_keys::HEALTH`](crate::metadata_keys::HEALTH).
/// A change is written at once. Combine it with other collectors by
/// [`CompositeMetricsCollector`](super::CompositeMetricsCollector).
///
/// ```
/// use pingora_etcd::MetricsCollector;
/// use pingora_etcd::metrics::{Health, HealthCollector};
///
/// let is_connected = || false; // to its database, for example
/// let health = HealthCollector::new(move || match is_connected() {
///     true => Health::Well,
///     false => Health::Failing("the database does not answer".to_owned()),
/// });
/// assert_eq!(health.collect()["health"], "failing");
/// ```
pub struct HealthCollector<F>(F);

impl<F: Fn() -> Health + Send + Sync> HealthCollector<F> {
    /// Asks this function, at each sample of the metrics. It may block.
    pub fn new(check: F) -> Self {
        Self(check)
    }
}

impl<F: Fn() -> Health + Send + Sync> MetricsCollector for HealthCollector<F> {
    fn collect(&self) -> NodeMetadata {
        let (health, reason) = match (self.0)() {
            // Also when it was not before, so that nobody has to remember.
            Health::Well => return json!({ metadata_keys::HEALTH: "well" }),
            Health::Degraded(reason) => ("degraded", reason),
            Health::Failing(reason) => ("failing", reason),
        };
        json!({ metadata_keys::HEALTH: health, metadata_keys::HEALTH_REASON: reason })
    }
}

opaque_debug!(HealthCollector<F>);
