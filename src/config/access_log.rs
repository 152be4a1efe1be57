//! The `access_log` section.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// A line for each request. Lines are written by a thread of their own; a request never waits for
/// it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AccessLog {
    /// The file, which is appended to, and opened again at SIGUSR1; `-` for standard output.
    pub file: PathBuf,
    /// How a line looks. Default: `json`.
    #[serde(default)]
    pub format: LogFormat,
    /// The part of requests that have a line; those that failed always have one: with a status of 500 or more, with a
    /// response that broke off, with a call of gRPC that was not served.
    /// Default: 1. Range: 0 to 1.
    #[serde(default = "default_sample")]
    pub sample: f64,
    /// Lines that wait to be written. More are dropped and counted, and the next line says how many.
    /// Default: 10,000. Range: 1 to 1,000,000.
    #[serde(default = "default_queue")]
    pub queue: usize,
}

/// How a line of the access log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LogFormat {
    /// A JSON object with everything that is known.
    #[default]
    Json,
    /// The combined log format of nginx and Apache, with node and durations after it.
    Combined,
}

fn default_sample() -> f64 {
    1.0
}

fn default_queue() -> usize {
    10_000
}

impl AccessLog {
    /// A line of JSON for each request, in this file; `-` is standard output.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            format: LogFormat::default(),
            sample: default_sample(),
            queue: default_queue(),
        }
    }

    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        in_range(field, "sample", self.sample, 0.0..=1.0)?;
        in_range(field, "queue", self.queue, 1..=1_000_000)
    }
}
