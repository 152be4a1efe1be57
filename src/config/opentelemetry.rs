//! The `opentelemetry` section.

use http::Uri;
use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// A span for each request, sent to a collector by OTLP over gRPC (feature `opentelemetry`). The variable
/// `OTEL_EXPORTER_OTLP_HEADERS` may give headers such as a key of the collector, and `OTEL_RESOURCE_ATTRIBUTES` more about
/// this process.
///
/// Spans are sent by a thread of its own; a request never waits for it. Those for which there is no room are dropped:
/// 2,048 wait at most.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct OpenTelemetry {
    /// The collector, such as `http://127.0.0.1:4317`; with `https://` by the CAs of the system.
    pub endpoint: String,
    /// The part of requests that have a span. Whether a request that comes from a trusted proxy with a
    /// `traceparent` has one is said there. Default: 1. Range: 0 to 1.
    #[serde(default = "default_sample")]
    pub sample: f64,
    /// The name of this service in traces. Default: `pingora-etcd`.
    #[serde(default = "default_service_name")]
    pub service_name: String,
}

pub(super) fn default_sample() -> f64 {
    1.0
}

pub(super) fn default_service_name() -> String {
    "pingora-etcd".to_owned()
}

impl OpenTelemetry {
    /// Checks every field. Errors name it as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and what is allowed.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        if cfg!(not(feature = "opentelemetry")) {
            let reason = "this program is built without the feature opentelemetry";
            return Err(ClusterError::config(field, reason));
        }
        if self.endpoint.contains('@') {
            let reason = "has a user or a password, which is not sent; give headers by OTEL_EXPORTER_OTLP_HEADERS";
            return Err(ClusterError::config(format!("{field}.endpoint"), reason));
        }
        let uri = self.endpoint.parse::<Uri>().ok();
        let is_valid = uri.is_some_and(|uri| {
            let has_scheme = matches!(uri.scheme_str(), Some("http" | "https"));
            has_scheme && uri.host().is_some_and(|host| !host.is_empty())
        });
        if !is_valid {
            let reason = format!(
                "{:?} is no address of a collector, such as http://127.0.0.1:4317",
                self.endpoint
            );
            return Err(ClusterError::config(format!("{field}.endpoint"), reason));
        }
        if self.service_name.trim().is_empty() {
            let field = format!("{field}.service_name");
            return Err(ClusterError::config(field, "must not be empty"));
        }
        in_range(field, "sample", self.sample, 0.0..=1.0)
    }
}

#[cfg(all(test, feature = "opentelemetry"))]
mod tests {
    use super::*;

    #[test]
    fn wrong_values_are_refused_by_name() {
        let validated = |yaml: &str| {
            let config: OpenTelemetry = serde_saphyr::from_str(yaml).unwrap();
            config.validate("cluster.opentelemetry")
        };
        validated("{ endpoint: 'https://collector:4317', sample: 0.5 }").unwrap();
        for (yaml, field) in [
            ("{ endpoint: '127.0.0.1:4317' }", "endpoint"),
            ("{ endpoint: 'ftp://a:1' }", "endpoint"),
            ("{ endpoint: '' }", "endpoint"),
            ("{ endpoint: 'http://user:secret@a:1' }", "endpoint"),
            ("{ endpoint: 'http://a:1', sample: 1.5 }", "sample"),
            ("{ endpoint: 'http://a:1', sample: .nan }", "sample"),
            (
                "{ endpoint: 'http://a:1', service_name: ' ' }",
                "service_name",
            ),
        ] {
            let error = validated(yaml).unwrap_err().to_string();
            let named = format!("cluster.opentelemetry.{field}");
            assert!(
                error.contains(&named) && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
