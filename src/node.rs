//! What is stored under a registry key.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::{LeaseId, Revision};
use crate::metadata::Metadata;

/// Whether a node takes new requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NodeState {
    /// Is about to leave: finishes what it has, takes nothing new. Read in upper and lower case.
    Draining,
    /// Takes requests. Also what a state unknown to this version is read as.
    #[default]
    Serving,
}

impl<'de> Deserialize<'de> for NodeState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(fields::State)
    }
}

impl NodeState {
    fn is_serving(&self) -> bool {
        *self == Self::Serving
    }
}

/// One registered node, as JSON under `registry/{group}/{id}`.
///
/// Two nodes are equal when `id` and `ip` are, whatever they report at the moment; compare the
/// fields for more.
///
/// In the JSON `null` is the same as nothing for each field but `id` and `ip`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Node {
    /// Unique within the group; the last segment of its key.
    #[serde(deserialize_with = "fields::id")]
    pub id: String,
    /// Where it is reached. A [`ServiceDiscovery`](crate::ServiceDiscovery) skips an entry whose
    /// address nobody can connect to: unspecified, multicast, broadcast, or link-local (IPv6).
    #[serde(deserialize_with = "fields::ip")]
    pub ip: IpAddr,
    /// When it last wrote this entry, by its own clock: Unix time in milliseconds. A fraction is
    /// cut off; what is before 1970 is 0.
    #[serde(default, deserialize_with = "fields::last_seen")]
    pub last_seen: i64,
    /// What it reports about itself.
    #[serde(
        default,
        deserialize_with = "fields::metadata",
        skip_serializing_if = "Metadata::is_null"
    )]
    pub metadata: Metadata,
    /// The port it serves on; `None` leaves it to the reader's default. A discovery skips an entry
    /// with port 0.
    #[serde(
        default,
        deserialize_with = "fields::port",
        skip_serializing_if = "Option::is_none"
    )]
    pub port: Option<u16>,
    /// Where it runs: availability zone, rack, data centre.
    #[serde(
        default,
        deserialize_with = "fields::zone",
        skip_serializing_if = "Option::is_none"
    )]
    pub zone: Option<String>,
    /// Free labels.
    #[serde(
        default,
        deserialize_with = "fields::tags",
        skip_serializing_if = "BTreeSet::is_empty"
    )]
    pub tags: BTreeSet<String>,
    /// Its static share of traffic relative to others. 0: no traffic. Else 0.000001 to 1,000,000;
    /// what is beyond counts as the nearest of these. `None` counts as 1, and so does a negative
    /// number and what was no number at all (`NaN` here), which a discovery counts and logs.
    #[serde(
        default,
        deserialize_with = "fields::weight",
        skip_serializing_if = "fields::is_no_number"
    )]
    pub weight: Option<f64>,
    /// Whether it takes new requests.
    #[serde(
        default,
        deserialize_with = "fields::state",
        skip_serializing_if = "NodeState::is_serving"
    )]
    pub state: NodeState,
    /// Its priority as a leader: one with a higher priority takes over. `None` for a node that
    /// knows nothing of priorities (`photon-etcd-cluster`): it counts as 0, and makes way for
    /// nobody.
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
    #[serde(default, with = "run_text", skip_serializing_if = "Option::is_none")]
    run: Option<NonZeroU64>,
    #[serde(skip)]
    incarnation: i64,
    #[serde(skip)]
    revision: Revision,
}

/// In the entry a run is 16 hexadecimal digits, because a number of 64 bits is not the same for every
/// reader of JSON. Whatever else somebody writes there stands for itself: it only has to differ.
mod run_text {
    use std::num::NonZeroU64;

    use serde::{Deserialize, Deserializer, Serializer};
    use xxhash_rust::xxh3::xxh3_64;

    pub(super) fn serialize<S: Serializer>(
        run: &Option<NonZeroU64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match run {
            Some(run) => serializer.collect_str(&format_args!("{run:016x}")),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<NonZeroU64>, D::Error> {
        let run = match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Null => return Ok(None),
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        };
        let is_ours = run.len() == 16 && run.bytes().all(|digit| digit.is_ascii_hexdigit());
        let number = u64::from_str_radix(&run, 16).ok().filter(|_| is_ours);
        Ok(NonZeroU64::new(
            number.unwrap_or_else(|| xxh3_64(run.as_bytes())),
        ))
    }
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && self.ip == other.ip
    }
}

impl Eq for Node {}

impl Node {
    /// A serving node that reports nothing and leaves its port to the reader's default.
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
        }
    }

    /// Sets the port it serves on.
    #[must_use]
    pub fn with_port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Sets its zone.
    #[must_use]
    pub fn with_zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets its labels.
    #[must_use]
    pub fn with_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Sets its static weight; 0 is no traffic.
    #[must_use]
    pub fn with_weight(mut self, weight: f64) -> Self {
        self.weight = Some(weight);
        self
    }

    /// Sets what it reports.
    #[must_use]
    pub fn with_metadata(mut self, metadata: impl Into<Metadata>) -> Self {
        self.metadata = metadata.into();
        self
    }

    /// Sets whether it takes new requests.
    #[must_use]
    pub fn with_state(mut self, state: NodeState) -> Self {
        self.state = state;
        self
    }

    /// Sets its priority as a leader.
    #[must_use]
    pub fn with_priority(mut self, priority: u16) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Sets which registration this is; see [`incarnation`](Self::incarnation). Discovery does
    /// it; a simulator or a test that feeds a balancer by hand may.
    #[must_use]
    pub fn with_incarnation(mut self, incarnation: i64) -> Self {
        self.incarnation = incarnation;
        self
    }

    /// Its address, with `default_port` where it registered none (or 0).
    pub fn addr(&self, default_port: u16) -> SocketAddr {
        let port = self.port.filter(|port| *port != 0).unwrap_or(default_port);
        SocketAddr::new(self.ip, port)
    }

    /// Tells one registration of this id from the next: the lease that holds the entry; the revision
    /// that created it, as a negative number, where no lease does; 0 for a node that did not come
    /// from a store. A process that restarts, or loses its lease and registers again, has another
    /// one. Who leads is a matter of the lease; what was learned of a backend goes by
    /// [`run`](Self::run).
    pub fn incarnation(&self) -> i64 {
        self.incarnation
    }

    /// The lease that holds its entry; `None` for one that was put without a lease (a static
    /// backend, which stays until it is deleted), or did not come from a store.
    pub fn lease(&self) -> Option<LeaseId> {
        (self.incarnation > 0).then_some(LeaseId(self.incarnation))
    }

    /// Which run of its process wrote the entry: a random number, the same for as long as the run
    /// lasts, also when its lease is lost and it registers again under another one. `None` for a
    /// node of `photon-etcd-cluster`, which writes none.
    pub fn run(&self) -> Option<u64> {
        self.run.map(NonZeroU64::get)
    }

    /// Sets which run it is of; see [`run`](Self::run). 0 means none. The worker does it.
    #[must_use]
    pub fn with_run(mut self, run: u64) -> Self {
        self.run = NonZeroU64::new(run);
        self
    }

    pub(crate) fn set_run(&mut self, run: u64) {
        self.run = NonZeroU64::new(run);
    }

    /// Whether both are of one life of a process: of one lease, or of one run.
    pub fn is_same_life(&self, other: &Self) -> bool {
        let is_same_run =
            self.run == other.run && (self.run.is_some() || self.incarnation == other.incarnation);
        self.id == other.id && is_same_run
    }

    /// The store's revision that wrote the entry, which is what orders two of them, whatever the
    /// clocks of their writers say. 0 for a node that did not come from a store.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Sets the revision that wrote it; see [`revision`](Self::revision). Discovery does it.
    #[must_use]
    pub fn with_revision(mut self, revision: Revision) -> Self {
        self.revision = revision;
        self
    }

    /// Whether it takes new requests.
    pub fn is_serving(&self) -> bool {
        self.state.is_serving() && !self.leaving
    }

    /// Whether it has said goodbye: its entry goes in a moment. That alone makes no event.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(crate) fn set_leaving(&mut self) {
        self.leaving = true;
    }

    /// As it is written.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        // Only a map with keys that are no strings could fail, or metadata too deep to be read: there
        // are neither.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// With all that is written at one time or another, so that its JSON is as long as it ever
    /// gets with these metadata.
    pub(crate) fn at_its_longest(mut self) -> Self {
        self.last_seen = i64::MAX;
        self.state = NodeState::Draining;
        self.leaving = true;
        self.run = Some(NonZeroU64::MAX);
        self
    }

    /// A number from the metadata; `None` where it is absent or no number.
    pub fn metric(&self, key: &str) -> Option<f64> {
        self.metadata.number(key)
    }

    /// Whether anything but the time of writing differs.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        self != other
            || self.incarnation != other.incarnation
            || self.run != other.run
            || self.metadata != other.metadata
            || self.port != other.port
            || self.zone != other.zone
            || self.tags != other.tags
            // `NaN` is as good as another.
            || self.weight.map(f64::to_bits) != other.weight.map(f64::to_bits)
            || self.state != other.state
            || self.priority != other.priority
    }
}

/// How the fields of an entry are read: `null` is absence, and an error says which field it is.
mod fields {
    use std::collections::BTreeSet;
    use std::fmt;
    use std::net::IpAddr;

    use serde::de::{Deserialize, Deserializer, Error, Visitor};

    use super::NodeState;
    use crate::metadata::{Found, Metadata};

    fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        field: &str,
        deserializer: D,
    ) -> Result<T, D::Error> {
        T::deserialize(deserializer)
            .map_err(|error| D::Error::custom(format_args!("{field}: {error}")))
    }

    macro_rules! fields {
        ($($name:ident: $type:ty),*) => {$(
            pub(super) fn $name<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<$type, D::Error> {
                named(stringify!($name), deserializer)
            }
        )*};
    }

    macro_rules! or_default {
        ($($name:ident: $type:ty),*) => {$(
            pub(super) fn $name<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<$type, D::Error> {
                let value: Option<$type> = named(stringify!($name), deserializer)?;
                Ok(value.unwrap_or_default())
            }
        )*};
    }

    fields!(id: String, ip: IpAddr, metadata: Metadata, port: Option<u16>, zone: Option<String>);
    fields!(priority: Option<u16>);
    or_default!(tags: BTreeSet<String>, state: NodeState, leaving: bool);

    pub(super) fn last_seen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let millis: Option<Millis> = named("last_seen", deserializer)?;
        Ok(millis.map_or(0, |millis| millis.0))
    }

    /// What is no number is no reason to refuse the rest: `NaN`.
    pub(super) fn weight<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<f64>, D::Error> {
        Ok(match named("weight", deserializer)? {
            Found::Absent => None,
            Found::Number(weight) => Some(weight),
            Found::Other => Some(f64::NAN),
        })
    }

    pub(super) fn is_no_number(weight: &Option<f64>) -> bool {
        weight.is_none_or(|weight| !weight.is_finite())
    }

    /// As others write a time: in whole milliseconds, or with a fraction.
    struct Millis(i64);

    impl<'de> Deserialize<'de> for Millis {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Time)
        }
    }

    struct Time;

    impl Visitor<'_> for Time {
        type Value = Millis;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a time in milliseconds")
        }
        fn visit_u64<E>(self, millis: u64) -> Result<Millis, E> {
            Ok(Millis(i64::try_from(millis).unwrap_or(i64::MAX)))
        }
        fn visit_i64<E>(self, millis: i64) -> Result<Millis, E> {
            Ok(Millis(millis.max(0)))
        }
        fn visit_f64<E>(self, millis: f64) -> Result<Millis, E> {
            // Saturates: below 0 it is 0.
            Ok(Millis((millis as i64).max(0)))
        }
    }

    pub(super) struct State;

    impl Visitor<'_> for State {
        type Value = NodeState;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text such as draining")
        }
        fn visit_str<E>(self, state: &str) -> Result<NodeState, E> {
            Ok(if state.eq_ignore_ascii_case("draining") {
                NodeState::Draining
            } else {
                NodeState::Serving
            })
        }
    }
}

/// How a [`ClusterNode`](crate::ClusterNode) stands with the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HealthStatus {
    /// Not running, or not through with the first try to register.
    #[default]
    Unknown,
    /// Registered, and its lease is being renewed.
    Healthy,
    /// Three renewals in a row have failed, or the registration is lost and being made again.
    Unhealthy,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::metadata_keys;

    #[test]
    fn json_is_the_predecessors_while_nothing_is_added() {
        let node = Node::new("n1", "192.168.1.10".parse().unwrap());
        assert_eq!(
            serde_json::to_string(&node).unwrap(),
            r#"{"id":"n1","ip":"192.168.1.10","last_seen":0}"#
        );
    }

    #[test]
    fn reads_the_predecessor_and_ignores_what_it_does_not_know() {
        let node: Node = serde_json::from_str(
            r#"{"id":"n1","ip":"::1","last_seen":7,"metadata":{"cpu_usage_percent":45.2},"new":[1]}"#,
        )
        .unwrap();
        assert_eq!(node.last_seen, 7);
        assert_eq!(node.metric(metadata_keys::CPU_USAGE_PERCENT), Some(45.2));
        assert_eq!(node.addr(8080), "[::1]:8080".parse().unwrap());
        assert!(node.is_serving());
    }

    #[test]
    fn round_trip_keeps_every_field() {
        let node = Node::new("n1", "10.0.0.1".parse().unwrap())
            .with_port(81)
            .with_zone("a")
            .with_tags(["x", "y"])
            .with_weight(2.5)
            .with_state(NodeState::Draining)
            .with_priority(7)
            .with_run(0xab)
            .with_metadata(serde_json::json!({"queue_depth": 3}));
        let read: Node = serde_json::from_slice(&serde_json::to_vec(&node).unwrap()).unwrap();
        assert!(!read.differs(&node));
    }

    #[test]
    fn any_run_is_told_from_any_other() {
        let run = |json: &str| {
            let node: Node =
                serde_json::from_str(&format!(r#"{{"id":"n","ip":"::1","run":{json}}}"#)).unwrap();
            let again = serde_json::to_vec(&node).unwrap();
            let again: Node = serde_json::from_slice(&again).unwrap();
            assert_eq!(again.run(), node.run(), "{json}");
            node.run()
        };
        assert_eq!(run(r#""00000000000000ff""#), Some(255));
        assert_eq!(run("null"), None);
        let all = [
            run(r#""pod-1""#),
            run(r#""pod-2""#),
            run("17"),
            run("[1]"),
            run(r#""ff""#),
        ];
        let different: BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
        assert!(!different.contains(&None));
    }

    #[test]
    fn a_life_is_a_lease_or_a_run() {
        let node = |lease, run| {
            Node::new("n", "::1".parse().unwrap())
                .with_incarnation(lease)
                .with_run(run)
        };
        assert!(node(1, 7).is_same_life(&node(2, 7)), "another lease");
        assert!(!node(1, 7).is_same_life(&node(2, 8)));
        assert!(
            !node(1, 7).is_same_life(&node(1, 8)),
            "run again on one lease"
        );
        assert!(node(1, 0).is_same_life(&node(1, 0)));
        assert!(!node(1, 0).is_same_life(&node(2, 0)));
    }

    #[test]
    fn an_unknown_state_serves() {
        let node: Node =
            serde_json::from_str(r#"{"id":"n","ip":"::1","state":"warming"}"#).unwrap();
        assert!(node.is_serving());
    }

    #[test]
    fn null_is_absence() {
        let node: Node = serde_json::from_str(
            r#"{"id":"n","ip":"::1","last_seen":null,"metadata":null,"port":null,"zone":null,
                "tags":null,"weight":null,"state":null,"priority":null,"leaving":null}"#,
        )
        .unwrap();
        assert!(!node.differs(&Node::new("n", "::1".parse().unwrap())));
        assert!(node.last_seen == 0 && !node.is_leaving());
    }

    #[test]
    fn values_as_people_write_them() {
        let read = |field: &str| {
            let text = format!(r#"{{"id":"n","ip":"::1",{field}}}"#);
            serde_json::from_str::<Node>(&text).unwrap()
        };
        for (time, millis) in [
            ("1700000000000.75", 1_700_000_000_000),
            ("-3", 0),
            ("-0.5", 0),
            ("1e300", i64::MAX),
        ] {
            let node = read(&format!(r#""last_seen":{time}"#));
            assert_eq!(node.last_seen, millis, "{time}");
        }
        for state in ["draining", "DRAINING", "Draining"] {
            assert!(!read(&format!(r#""state":"{state}""#)).is_serving());
        }
        for (weight, counts) in [("0", Some(0.0)), ("-5", Some(-5.0)), ("null", None)] {
            assert_eq!(read(&format!(r#""weight":{weight}"#)).weight, counts);
        }
        for weight in [r#""0""#, "[0]", "{}", "true"] {
            let node = read(&format!(r#""weight":{weight}"#));
            assert!(node.weight.is_some_and(f64::is_nan), "{weight}");
            assert!(!node.differs(&node), "{weight}");
            let text = serde_json::to_string(&node).unwrap();
            assert!(!text.contains("weight"), "{text}");
        }
    }
}
