//! [`Node`]: the entry under a registry key.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::fields;
use super::state::NodeState;
use crate::ids::{LeaseId, Revision};
use crate::metadata::Metadata;

/// One registered node, stored as JSON under `registry/{group}/{id}`.
///
/// Two nodes are equal if their `id` and `ip` are equal, whatever they report at the moment.
/// Compare the other fields where they matter.
///
/// In the JSON, `null` means the same as an absent field, except for `id` and `ip`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Node {
    /// Unique within the group; the last segment of its key.
    #[serde(deserialize_with = "fields::id")]
    pub id: String,
    /// The address to connect to. A `ServiceDiscovery` skips an entry
    /// whose address nobody can connect to: unspecified, multicast, broadcast, or link-local (IPv6).
    #[serde(deserialize_with = "fields::ip")]
    pub ip: IpAddr,
    /// When the node last wrote this entry, by its own clock: Unix time in milliseconds. A fraction
    /// is cut off; a time before 1970 is read as 0.
    #[serde(default, deserialize_with = "fields::last_seen")]
    pub last_seen: i64,
    /// What the node reports about itself.
    #[serde(
        default,
        deserialize_with = "fields::metadata",
        skip_serializing_if = "Metadata::is_null"
    )]
    pub metadata: Metadata,
    /// The port the node serves on; with `None` readers use their default port. A discovery skips an
    /// entry with port 0.
    #[serde(
        default,
        deserialize_with = "fields::port",
        skip_serializing_if = "Option::is_none"
    )]
    pub port: Option<u16>,
    /// Where the node runs: availability zone, rack or data centre.
    #[serde(
        default,
        deserialize_with = "fields::zone",
        skip_serializing_if = "Option::is_none"
    )]
    pub zone: Option<String>,
    /// Free-form labels.
    #[serde(
        default,
        deserialize_with = "fields::tags",
        skip_serializing_if = "BTreeSet::is_empty"
    )]
    pub tags: BTreeSet<String>,
    /// The node's static weight: its share of the traffic relative to the other nodes. 0 means no
    /// traffic. Range: 0.000001 to 1,000,000; a value outside counts as the nearest limit. `None`
    /// counts as 1. So does a negative number, and a value that is not a number (read as `NaN`); a
    /// discovery counts and logs those two.
    #[serde(
        default,
        deserialize_with = "fields::weight",
        skip_serializing_if = "fields::is_no_number"
    )]
    pub weight: Option<f64>,
    /// Whether the node takes new requests.
    #[serde(
        default,
        deserialize_with = "fields::state",
        skip_serializing_if = "NodeState::is_serving"
    )]
    pub state: NodeState,
    /// The node's priority as a leader: a candidate with a higher priority takes over. `None` for a
    /// node that does not know priorities (`photon-etcd-cluster`): it counts as 0, and never gives
    /// its place up.
    #[serde(
        default,
        deserialize_with = "fields::priority",
        skip_serializing_if = "Option::is_none"
    )]
    pub priority: Option<u16>,
    #[serde(
        default,
        deserialize_with = "fields::leaving",
        skip_serializing_if = "std::ops::Not::not"
    )]
    leaving: bool,
    #[serde(default, with = "fields::run", skip_serializing_if = "Option::is_none")]
    run: Option<NonZeroU64>,
    #[serde(skip)]
    incarnation: i64,
    #[serde(skip)]
    revision: Revision,
    #[serde(skip)]
    place: u8,
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && self.ip == other.ip
    }
}

impl Eq for Node {}

impl Node {
    /// A serving node without metadata and without a port of its own.
    pub fn new(id: impl Into<String>, ip: IpAddr) -> Self {
        Self {
            id: id.into(),
            ip,
            last_seen: 0,
            metadata: Metadata::default(),
            port: None,
            zone: None,
            tags: BTreeSet::new(),
            weight: None,
            state: NodeState::Serving,
            priority: None,
            leaving: false,
            run: None,
            incarnation: 0,
            revision: 0,
            place: 0,
        }
    }

    /// Sets the port the node serves on.
    #[must_use]
    pub fn with_port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Sets the zone.
    #[must_use]
    pub fn with_zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets the labels.
    #[must_use]
    pub fn with_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the static weight; 0 means no traffic.
    #[must_use]
    pub fn with_weight(mut self, weight: f64) -> Self {
        self.weight = Some(weight);
        self
    }

    /// Sets what the node reports about itself.
    #[must_use]
    pub fn with_metadata(mut self, metadata: impl Into<Metadata>) -> Self {
        self.metadata = metadata.into();
        self
    }

    /// Sets whether the node takes new requests.
    #[must_use]
    pub fn with_state(mut self, state: NodeState) -> Self {
        self.state = state;
        self
    }

    /// Sets the priority as a leader.
    #[must_use]
    pub fn with_priority(mut self, priority: u16) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Sets which registration this is; see [`incarnation`](Self::incarnation). Discovery sets it;
    /// so may a simulator or a test that feeds a balancer directly.
    #[must_use]
    pub fn with_incarnation(mut self, incarnation: i64) -> Self {
        self.incarnation = incarnation;
        self
    }

    /// The socket address, with `default_port` if the node registered no port, or port 0.
    pub fn addr(&self, default_port: u16) -> SocketAddr {
        let port = self.port.filter(|port| *port != 0).unwrap_or(default_port);
        SocketAddr::new(self.ip, port)
    }

    /// Distinguishes this registration from earlier and later ones with the same id: the lease that
    /// holds the entry; without a lease, the revision that created the entry as a negative number; 0
    /// for a node that did not come from a store. It changes when a process restarts, or loses its
    /// lease and registers again. Leadership depends on the lease; what was learned about a backend
    /// depends on [`run`](Self::run).
    pub fn incarnation(&self) -> i64 {
        self.incarnation
    }

    /// The lease that holds the entry. `None` for an entry that was written without a lease (a
    /// static backend, which stays until it is deleted) or did not come from a store.
    pub fn lease(&self) -> Option<LeaseId> {
        (self.incarnation > 0).then_some(LeaseId(self.incarnation))
    }

    /// The run of the process that wrote the entry: a random number that stays the same for the
    /// whole run, also when the process loses its lease and registers again under another one.
    /// `None` for a node of `photon-etcd-cluster`, which does not write it.
    pub fn run(&self) -> Option<u64> {
        self.run.map(NonZeroU64::get)
    }

    /// Sets the run; see [`run`](Self::run). 0 means none. The worker sets it.
    #[must_use]
    pub fn with_run(mut self, run: u64) -> Self {
        self.run = NonZeroU64::new(run);
        self
    }

    pub(crate) fn set_run(&mut self, run: u64) {
        self.run = NonZeroU64::new(run);
    }

    /// Whether both entries come from one life of a process: from one run or, if neither has a run,
    /// under one lease.
    pub fn is_same_life(&self, other: &Self) -> bool {
        let is_same_run =
            self.run == other.run && (self.run.is_some() || self.incarnation == other.incarnation);
        self.id == other.id && is_same_run
    }

    /// The store's revision that wrote the entry. It orders two entries independently of the clocks
    /// of their writers. 0 for a node that did not come from a store.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Sets the revision that wrote the entry; see [`revision`](Self::revision). Discovery sets it.
    #[must_use]
    pub fn with_revision(mut self, revision: Revision) -> Self {
        self.revision = revision;
        self
    }

    /// Sets by which lease and write the entry is there.
    #[cfg(feature = "discovery")]
    pub(crate) fn set_written(&mut self, incarnation: i64, revision: Revision) {
        (self.incarnation, self.revision) = (incarnation, revision);
    }

    /// In which of the registries of its group the entry is, 0 for the first one.
    #[cfg_attr(not(feature = "balance"), allow(dead_code))]
    pub(crate) fn place(&self) -> u8 {
        self.place
    }

    #[cfg(feature = "discovery")]
    pub(crate) fn set_place(&mut self, place: u8) {
        self.place = place;
    }

    /// Adds a field to the metadata.
    #[cfg(feature = "discovery")]
    pub(crate) fn add_metadata(&mut self, name: &str, value: &str) {
        let metadata = serde_json::to_value(&self.metadata);
        if let Ok(serde_json::Value::Object(mut fields)) = metadata {
            fields.insert(name.to_owned(), value.into());
            self.metadata = serde_json::Value::Object(fields).into();
        }
    }

    /// Whether the node takes new requests.
    pub fn is_serving(&self) -> bool {
        self.state.is_serving() && !self.leaving
    }

    /// Whether the node has announced that it is leaving: its entry is deleted next. The
    /// announcement alone causes no event.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(crate) fn set_leaving(&mut self) {
        self.leaving = true;
    }

    /// The entry as it is written to the store.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        // Serialising fails only for maps whose keys are not strings, and for metadata that is too
        // deep to be read. A node has neither.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Sets every field that is written at one time or another, so that the JSON is as long as it
    /// can become with these metadata.
    pub(crate) fn at_its_longest(mut self) -> Self {
        self.last_seen = i64::MAX;
        self.state = NodeState::Draining;
        self.leaving = true;
        self.run = Some(NonZeroU64::MAX);
        self
    }

    /// A number from the metadata; `None` if it is absent or not a number.
    pub fn metric(&self, key: &str) -> Option<f64> {
        self.metadata.number(key)
    }

    /// Whether the entries differ in anything that makes an update worth an event: neither the time
    /// of writing nor the announcement of leaving counts.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        self != other
            || self.incarnation != other.incarnation
            || self.run != other.run
            || self.metadata != other.metadata
            || self.port != other.port
            || self.zone != other.zone
            || self.tags != other.tags
            // By bits, so that `NaN` equals itself.
            || self.weight.map(f64::to_bits) != other.weight.map(f64::to_bits)
            || self.state != other.state
            || self.priority != other.priority
    }
}

#[cfg(test)]
mod tests;
