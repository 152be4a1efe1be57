//! The `health_check` section.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::route::{Pattern, check_header};
use crate::error::{ClusterError, in_range};

/// How nodes are asked whether they are well. A node that joins is asked before it gets requests, unless no other
/// one is well.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct HealthCheck {
    /// What is asked. Default: `http`.
    pub kind: CheckKind,
    /// The path of the request, for `http`. Default: `/`.
    pub path: String,
    /// The host of the request, for `http` and `grpc`. Default: the node's address.
    pub host: Option<String>,
    /// The method, for `http`. Default: `GET`.
    pub method: String,
    /// More fields of the request, for `http`. Default: none.
    pub headers: BTreeMap<String, String>,
    /// Statuses of a node that is well, for `http`: `200`, or `200-299`. Default: `[200-299]`.
    pub status: Vec<StatusRange>,
    /// A regular expression that a part of the response's first 65,536 bytes has to match, for `http`. Default:
    /// none.
    pub body: Option<Pattern>,
    /// The service, for `grpc`. Default: none, the server as a whole.
    pub service: String,
    /// From one check of a node to the next, more or less a tenth. Default: 5,000 ms. Range: 100 to 3,600,000.
    pub interval_ms: u64,
    /// The same while the node is down. Default: 1,000 ms. Range: 100 to 3,600,000.
    pub down_interval_ms: u64,
    /// How long a check may take. Default: 2,000 ms. Range: 10 to 600,000.
    pub timeout_ms: u64,
    /// How many checks in a row have to pass until a node that is down is well. Default: 2. Range: 1 to 100.
    pub rise: u32,
    /// How many checks in a row have to fail until a node that is well is down. Default: 3. Range: 1 to 100.
    pub fall: u32,
    /// Checks at one time. Default: 50. Range: 1 to 10,000.
    pub at_once: usize,
    /// If a smaller part of the nodes that were checked is well, all are used. Default: 0.5. Range: 0 (only if none
    /// is) to 1.
    pub panic_threshold: f64,
}

/// What a node is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CheckKind {
    /// Whether it accepts a connection; with TLS to backends, also a handshake.
    Tcp,
    /// A request.
    #[default]
    Http,
    /// `grpc.health.v1.Health/Check`, over HTTP/2. The status has to be `SERVING`.
    Grpc,
}

/// A status, or a range of them: `200` or `200-299`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "StatusText")]
pub struct StatusRange(u16, u16);

#[derive(Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(
    untagged,
    expecting = "a status such as 200 or a range such as 200-299 is expected"
)]
enum StatusText {
    One(u16),
    Text(String),
}

impl TryFrom<StatusText> for StatusRange {
    type Error = String;

    fn try_from(text: StatusText) -> Result<Self, String> {
        let parsed = match &text {
            StatusText::One(status) => Some((*status, *status)),
            StatusText::Text(text) => {
                let (from, to) = text.split_once('-').unwrap_or((text, text));
                from.trim().parse().ok().zip(to.trim().parse().ok())
            }
        };
        let range = parsed.and_then(|(from, to)| Self::new(from, to));
        range.ok_or_else(|| {
            "a status is a number such as 200, or a range such as 200-299, from 100 to 599"
                .to_owned()
        })
    }
}

impl StatusRange {
    /// The statuses from this one to that one. `None` if one is not from 100 to 599, or the second is less than the
    /// first.
    pub fn new(from: u16, to: u16) -> Option<Self> {
        let is_valid = (100..=599).contains(&from) && (from..=599).contains(&to);
        is_valid.then_some(Self(from, to))
    }

    /// Whether a status is in the range.
    pub fn contains(self, status: u16) -> bool {
        (self.0..=self.1).contains(&status)
    }
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            kind: CheckKind::Http,
            path: "/".to_owned(),
            host: None,
            method: "GET".to_owned(),
            headers: BTreeMap::new(),
            status: vec![StatusRange(200, 299)],
            body: None,
            service: String::new(),
            interval_ms: 5_000,
            down_interval_ms: 1_000,
            timeout_ms: 2_000,
            rise: 2,
            fall: 3,
            at_once: 50,
            panic_threshold: 0.5,
        }
    }
}

impl HealthCheck {
    /// Checks every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        const HOUR: u64 = 3_600_000;
        let error = |name: &str, reason: String| {
            Err(ClusterError::config(format!("{field}.{name}"), reason))
        };
        if !self.path.starts_with('/') || self.path.parse::<http::Uri>().is_err() {
            return error(
                "path",
                format!("{:?} is not a path such as /health", self.path),
            );
        }
        if let Some(host) = &self.host
            && (host.is_empty() || host.parse::<http::uri::Authority>().is_err())
        {
            return error(
                "host",
                format!("{host:?} is not a host such as example.com"),
            );
        }
        if http::Method::from_bytes(self.method.as_bytes()).is_err() {
            return error("method", format!("{:?} is not a method", self.method));
        }
        for (name, value) in &self.headers {
            check_header(&format!("{field}.headers"), name, value)?;
        }
        if self.status.is_empty() {
            return error("status", "is empty".to_owned());
        }
        // One byte of the message says how long the name is.
        if self.service.len() > 127 {
            return error("service", "is longer than 127 bytes".to_owned());
        }
        let of_http = [
            ("path", self.path != "/"),
            ("method", self.method != "GET"),
            ("headers", !self.headers.is_empty()),
            ("body", self.body.is_some()),
            ("status", self.status != Self::default().status),
        ];
        let has_no_effect =
            |name: &str, kind: &str| error(name, format!("has an effect only with kind: {kind}"));
        if self.kind != CheckKind::Http
            && let Some((name, _)) = of_http.iter().find(|(_, is_given)| *is_given)
        {
            return has_no_effect(name, "http");
        }
        if self.kind == CheckKind::Tcp && self.host.is_some() {
            return has_no_effect("host", "http or kind: grpc");
        }
        if self.kind != CheckKind::Grpc && !self.service.is_empty() {
            return has_no_effect("service", "grpc");
        }
        let millis = |name, value, range| in_range(field, name, value, range);
        millis("interval_ms", self.interval_ms, 100..=HOUR)?;
        millis("down_interval_ms", self.down_interval_ms, 100..=HOUR)?;
        millis("timeout_ms", self.timeout_ms, 10..=600_000)?;
        in_range(field, "rise", u64::from(self.rise), 1..=100)?;
        in_range(field, "fall", u64::from(self.fall), 1..=100)?;
        in_range(field, "at_once", self.at_once, 1..=10_000)?;
        in_range(field, "panic_threshold", self.panic_threshold, 0.0..=1.0)
    }
}
