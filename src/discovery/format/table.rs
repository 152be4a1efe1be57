//! How entries of other registries are read.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::ClusterError;

/// How the entries of a registry are read: where in the value of an entry there is what. The presets are such tables.
///
/// Places are JSON pointers (RFC 6901), such as `/metadata/weight` or `/nodes/0/address`. What is not there is left
/// out; only an entry without an address is refused.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EntryTable {
    /// Whether the value is nothing but the address, `host:port` or a URL, instead of JSON. Default: false.
    pub text: bool,
    /// Whether keys may have more segments after the prefix than one. In the id of the node a slash is `%2F` then.
    /// Default: false.
    pub nested: bool,
    /// What an entry has to say to be for this group; others are left out. Default: nothing.
    pub require: Vec<Equals>,
    /// Where the address is; the first place that has one counts. Several addresses in one place are tried in their
    /// order: the first one that has the scheme, and is allowed. Required for JSON.
    pub address: Vec<AddressAt>,
    /// Where the name of the scheme is, if addresses do not begin with it: `http`, `https`, `grpc` or `grpcs`. Entries
    /// with another word are left out. Default: none; where none is named, `scheme` of the registry says it.
    pub scheme: Option<String>,
    /// Where the static weight is. Default: none, all are equal.
    pub weight: Option<WeightAt>,
    /// Where the zone is. Default: none.
    pub zone: Option<String>,
    /// Where labels are: a text, a list of texts, or an object, of which each field is `name=value`. Default: none.
    pub tags: Vec<String>,
    /// What is taken as metadata of the node. Default: nothing.
    pub metadata: Option<String>,
    /// Metrics by the names that balancers know (`cpu_usage_percent`, `memory_usage_percent`, `queue_depth`). Default:
    /// none.
    pub metrics: BTreeMap<String, MetricAt>,
    /// What an entry says that takes no new requests. Default: nothing.
    pub drain: Vec<Equals>,
}

/// A place with one of these values; a number, `true` and `false` also as text.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Equals {
    /// The place.
    pub at: String,
    /// The values.
    pub is: Vec<Scalar>,
}

/// A simple value.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
#[non_exhaustive]
pub enum Scalar {
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// Where an address is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
#[non_exhaustive]
pub enum AddressAt {
    /// A place with `host:port` or a URL, or with a list of them; or `key`, for the last segment of the key, where
    /// several are separated by commas.
    Whole(String),
    /// Two places.
    Parts(HostAndPort),
}

/// Where the parts of an address are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct HostAndPort {
    /// The place with the host.
    pub host: String,
    /// The place with the port, a number or a text.
    pub port: String,
}

/// The address is the last segment of the key.
pub(super) const IN_KEY: &str = "key";

/// Where a weight is.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct WeightAt {
    /// The place, with a number or a text that is one.
    pub at: String,
    /// The weight of entries that have none. Weights count in relation to it, so that registries with different scales
    /// can stand beside each other. Default: 1.
    #[serde(default = "one")]
    pub default: f64,
    /// What zero and less means. Default: `default`.
    #[serde(default)]
    pub zero: ZeroWeight,
}

/// What a weight of zero or less means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ZeroWeight {
    /// The same as none.
    #[default]
    Default,
    /// No requests.
    Drain,
}

/// Where a metric is.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MetricAt {
    /// The place, with a number or a text that is one.
    pub at: String,
    /// What it is multiplied by, such as 100 to make percent of a ratio. Default: 1.
    #[serde(default = "one")]
    pub times: f64,
}

fn one() -> f64 {
    1.0
}

impl Equals {
    /// This place has one of these values.
    pub fn new(at: impl Into<String>, is: impl IntoIterator<Item = Scalar>) -> Self {
        Self {
            at: at.into(),
            is: is.into_iter().collect(),
        }
    }
}

impl HostAndPort {
    /// The places with the host and with the port.
    pub fn new(host: impl Into<String>, port: impl Into<String>) -> Self {
        Self {
            host: host.into(),
            port: port.into(),
        }
    }
}

impl WeightAt {
    /// At this place; an entry that has none, or zero, has the weight 1.
    pub fn new(at: impl Into<String>) -> Self {
        Self {
            at: at.into(),
            default: one(),
            zero: ZeroWeight::default(),
        }
    }
}

impl MetricAt {
    /// At this place, as it is.
    pub fn new(at: impl Into<String>) -> Self {
        Self {
            at: at.into(),
            times: one(),
        }
    }
}

impl EntryTable {
    /// A table for JSON with the address in these places.
    pub fn new(address: impl IntoIterator<Item = AddressAt>) -> Self {
        Self {
            address: address.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Checks every field. Errors name it as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and what is allowed.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let error =
            |name: &str, reason: String| ClusterError::config(format!("{field}.{name}"), reason);
        if self.address.is_empty() && !self.text {
            let reason = "is missing: it says where in an entry the address is";
            return Err(error("address", reason.to_owned()));
        }
        for (name, pointer) in self.pointers() {
            check_pointer(pointer).map_err(|reason| error(&name, reason))?;
        }
        if let Some(index) = self.require.iter().position(|place| place.is.is_empty()) {
            let reason = "is empty: no entry could be for this group";
            return Err(error(&format!("require[{index}].is"), reason.to_owned()));
        }
        if let Some(index) = self.drain.iter().position(|place| place.is.is_empty()) {
            let reason = "is empty: no entry could say it";
            return Err(error(&format!("drain[{index}].is"), reason.to_owned()));
        }
        if self.text && !self.address.is_empty() {
            let reason = "is not for text: the value is the address";
            return Err(error("address", reason.to_owned()));
        }
        if self.text && self.pointers().next().is_some() {
            let reason = "an entry that is nothing but an address has no places in it";
            return Err(error("text", reason.to_owned()));
        }
        let numbers = self
            .weight
            .iter()
            .map(|weight| ("weight.default".to_owned(), weight.default));
        let times = self
            .metrics
            .iter()
            .map(|(name, metric)| (format!("metrics.{name}.times"), metric.times));
        for (name, number) in numbers.chain(times) {
            if !number.is_finite() || number <= 0.0 {
                return Err(error(&name, format!("{number} is not a number above 0")));
            }
        }
        Ok(())
    }

    /// Every place, by the field that names it.
    pub(super) fn pointers(&self) -> impl Iterator<Item = (String, &str)> {
        let mut all = Vec::new();
        for (index, place) in self.require.iter().enumerate() {
            all.push((format!("require[{index}].at"), &*place.at));
        }
        for (index, place) in self.address.iter().enumerate() {
            match place {
                AddressAt::Whole(place) if place == IN_KEY => {}
                AddressAt::Whole(place) => all.push((format!("address[{index}]"), place)),
                AddressAt::Parts(HostAndPort { host, port }) => {
                    all.push((format!("address[{index}].host"), host));
                    all.push((format!("address[{index}].port"), port));
                }
            }
        }
        all.extend(
            self.scheme
                .as_deref()
                .map(|place| ("scheme".to_owned(), place)),
        );
        all.extend(
            self.weight
                .as_ref()
                .map(|weight| ("weight.at".to_owned(), &*weight.at)),
        );
        all.extend(self.zone.as_deref().map(|place| ("zone".to_owned(), place)));
        for (index, place) in self.tags.iter().enumerate() {
            all.push((format!("tags[{index}]"), place));
        }
        all.extend(
            self.metadata
                .as_deref()
                .map(|place| ("metadata".to_owned(), place)),
        );
        for (name, metric) in &self.metrics {
            all.push((format!("metrics.{name}.at"), &*metric.at));
        }
        for (index, place) in self.drain.iter().enumerate() {
            all.push((format!("drain[{index}].at"), &*place.at));
        }
        all.into_iter()
    }
}

/// A pointer is empty, or begins with a slash; a tilde is followed by 0 or 1.
fn check_pointer(pointer: &str) -> Result<(), String> {
    if !pointer.is_empty() && !pointer.starts_with('/') {
        return Err(format!(
            "{pointer:?} is no JSON pointer, which begins with a slash"
        ));
    }
    let mut after_tilde = pointer.split('~').skip(1);
    if after_tilde.any(|rest| !rest.starts_with(['0', '1'])) {
        return Err(format!(
            "{pointer:?} is no JSON pointer: write ~0 for a tilde and ~1 for a slash"
        ));
    }
    Ok(())
}
