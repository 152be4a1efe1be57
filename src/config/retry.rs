//! The `retry` section.

use serde::Deserialize;

use crate::error::{ClusterError, in_range};

/// When the bundled proxy tries a request on another backend.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Retry {
    /// Statuses of a backend after which a request without side effects is tried elsewhere, before
    /// anything reaches the client: such as `[502, 503, 504]`. Default: none. Range: 400 to 599.
    pub on_status: Vec<u16>,
    /// Whether a request without side effects is tried elsewhere when a backend did not answer in
    /// time. One slow request is then several, each of which blames a backend. Default: `false`.
    pub on_timeout: bool,
    /// Requests that are sent again, as a part of all requests of the last ten seconds. More are not,
    /// so that backends that are overloaded do not get their load several times. A try that made no
    /// connection does not count, because nothing was sent. Default: 0.2. Range: 0 to 1.
    pub budget: f64,
    /// Requests a second that may be sent again in any case. Default: 3. Range: 0 to 1,000,000.
    pub least_per_second: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            on_status: Vec::new(),
            on_timeout: false,
            budget: 0.2,
            least_per_second: 3,
        }
    }
}

impl Retry {
    /// Checks the range of every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        for status in &self.on_status {
            in_range(field, "on_status", u64::from(*status), 400..=599)?;
        }
        in_range(field, "budget", self.budget, 0.0..=1.0)?;
        let least = self.least_per_second as usize;
        in_range(field, "least_per_second", least, 0..=1_000_000)
    }
}
