//! The metadata of a node, kept in a compact form.

use std::fmt;
use std::ops::Deref;
use std::sync::OnceLock;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::validate;

/// Arbitrary JSON that a node publishes about itself, normally an object with the keys of
/// [`metadata_keys`]. `Value::Null` if it publishes nothing.
pub type NodeMetadata = serde_json::Value;

/// The standard keys of [`NodeMetadata`]. Other keys are kept and passed on unchanged.
pub mod metadata_keys {
    /// CPU usage in percent of the whole machine, 0 to 100 (`f64`). More counts as 100.
    pub const CPU_USAGE_PERCENT: &str = "cpu_usage_percent";
    /// Memory in use in percent, 0 to 100 (`f64`). More counts as 100.
    pub const MEMORY_USAGE_PERCENT: &str = "memory_usage_percent";
    /// Memory available without swapping, in bytes (`u64`).
    pub const MEMORY_AVAILABLE_BYTES: &str = "memory_available_bytes";
    /// Load average over one minute (`f64`, 0 or more).
    pub const LOAD_AVG_1M: &str = "load_avg_1m";
    /// Open connections (`u32`).
    pub const ACTIVE_CONNECTIONS: &str = "active_connections";
    /// Request throughput per second (`f64`).
    pub const REQUESTS_PER_SECOND: &str = "requests_per_second";
    /// Items of work that wait to be processed (`u32`).
    pub const QUEUE_DEPTH: &str = "queue_depth";
    /// How well the node is by its own checks (`str`: `well`, `degraded` or `failing`): see
    /// [`HealthCollector`](crate::metrics::HealthCollector). Balancers give a node that is degraded a quarter of its
    /// weight, and leave out one that is failing while enough others are well.
    pub const HEALTH: &str = "health";
    /// Why it is not well (`str`).
    pub const HEALTH_REASON: &str = "health_reason";
    /// How the node is spoken to (`str`: `http1`, `h2c`, `https` or `h2`), for proxies that believe
    /// nodes in that.
    pub const PROTOCOL: &str = "protocol";
    /// The name that the node's certificate is for (`str`), for such proxies.
    pub const SERVER_NAME: &str = "server_name";
    /// The host name that the address of the node was resolved from.
    pub const HOST_NAME: &str = "host_name";
    /// Why that name cannot be resolved at present: the address is the last one that it had.
    pub const HOST_NAME_ERROR: &str = "host_name_error";
}

/// The metadata of a [`Node`](crate::Node). Dereferences to the [`NodeMetadata`] (a
/// `serde_json::Value`) that the node published.
///
/// A value nested deeper than 100 levels, which no reader could parse, is `null` here.
///
/// The metadata is kept as text. The first use as a value parses the text, and the value is kept
/// from then on. A value of four metrics takes 770 bytes, its text 130, and a balancer only needs
/// the text ([`number`](Self::number)): with ten thousand nodes that saves 6 MiB.
///
/// ```
/// use pingora_etcd::Node;
/// use serde_json::json;
///
/// let node = Node::new("n", "10.0.0.1".parse().unwrap())
///     .with_metadata(json!({ "cpu_usage_percent": 45.2, "model": "x" }));
/// assert_eq!(node.metadata["model"], "x");
/// assert_eq!(node.metadata.number("cpu_usage_percent"), Some(45.2));
/// ```
#[derive(Clone, Default)]
pub struct Metadata {
    /// Compact JSON with sorted keys; empty for `null`.
    text: Box<str>,
    value: OnceLock<Box<NodeMetadata>>,
}

static NULL: NodeMetadata = NodeMetadata::Null;

impl Metadata {
    /// A number at the top level; `None` if it is absent or not a number. Scans the text: the cost is
    /// proportional to its length, and nothing is kept.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.find([key]) {
            [Found::Number(number)] => Some(number),
            _ => None,
        }
    }

    /// A text at the top level; `None` if it is absent or not a text. Scans the text of the metadata as
    /// [`number`](Self::number) does, and costs next to nothing where the key is nowhere in it.
    ///
    /// ```
    /// use pingora_etcd::Node;
    /// use serde_json::json;
    ///
    /// let node = Node::new("n", "10.0.0.1".parse().unwrap()).with_metadata(json!({ "health": "well" }));
    /// assert_eq!(node.metadata.string("health").as_deref(), Some("well"));
    /// ```
    pub fn string(&self, key: &str) -> Option<String> {
        let is_escaped = |byte: u8| byte < b' ' || byte == b'"' || byte == b'\\';
        let is_plain = !key.bytes().any(is_escaped);
        if !self.text.starts_with('{') || (is_plain && !self.text.contains(key)) {
            return None;
        }
        let mut found = None;
        let mut json = serde_json::Deserializer::from_str(&self.text);
        let _ = json.deserialize_map(LookupString {
            key,
            found: &mut found,
        });
        found
    }

    /// Whether the node published nothing.
    pub fn is_null(&self) -> bool {
        self.text.is_empty()
    }

    /// The metadata as compact JSON with sorted keys.
    pub fn as_json(&self) -> &str {
        if self.text.is_empty() {
            "null"
        } else {
            &self.text
        }
    }

    /// Looks up several top-level keys in one pass, without building a value.
    pub(crate) fn find<const N: usize>(&self, keys: [&str; N]) -> [Found; N] {
        let mut found = [Found::Absent; N];
        if self.text.starts_with('{') {
            let mut json = serde_json::Deserializer::from_str(&self.text);
            // The text was written by this crate, so it always parses.
            let _ = json.deserialize_map(Lookup {
                keys,
                found: &mut found,
            });
        }
        found
    }
}

/// The value of a top-level key, as far as it is a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Found {
    /// There is no such key, or it is `null`.
    Absent,
    Number(f64),
    /// Any other value.
    Other,
}

struct Lookup<'f, const N: usize> {
    keys: [&'f str; N],
    found: &'f mut [Found; N],
}

impl<'de, const N: usize> Visitor<'de> for Lookup<'_, N> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(at) = map.next_key_seed(IndexOf(&self.keys))? {
            match at {
                Some(at) => self.found[at] = map.next_value()?,
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

struct LookupString<'f> {
    key: &'f str,
    found: &'f mut Option<String>,
}

impl<'de> Visitor<'de> for LookupString<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(at) = map.next_key_seed(IndexOf(&[self.key]))? {
            match at {
                Some(_) => {
                    let value: NodeMetadata = map.next_value()?;
                    *self.found = value.as_str().map(str::to_owned);
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// Finds the index of a key among the keys that are looked up.
struct IndexOf<'p>(&'p [&'p str]);

impl<'de> DeserializeSeed<'de> for IndexOf<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for IndexOf<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|own| *own == key))
    }
}

impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Found;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }
            fn visit_u64<E>(self, number: u64) -> Result<Found, E> {
                Ok(Found::Number(number as f64))
            }
            fn visit_i64<E>(self, number: i64) -> Result<Found, E> {
                Ok(Found::Number(number as f64))
            }
            fn visit_f64<E>(self, number: f64) -> Result<Found, E> {
                Ok(Found::Number(number))
            }
            fn visit_unit<E>(self) -> Result<Found, E> {
                Ok(Found::Absent)
            }
            fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
                Ok(Found::Other)
            }
            fn visit_str<E>(self, _: &str) -> Result<Found, E> {
                Ok(Found::Other)
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> Result<Found, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Found::Other)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Found::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

impl Deref for Metadata {
    type Target = NodeMetadata;

    fn deref(&self) -> &NodeMetadata {
        if self.text.is_empty() {
            return &NULL;
        }
        self.value
            .get_or_init(|| Box::new(serde_json::from_str(&self.text).unwrap_or_default()))
    }
}

impl From<NodeMetadata> for Metadata {
    fn from(value: NodeMetadata) -> Self {
        Self {
            text: match value {
                NodeMetadata::Null => Box::default(),
                // Writing and dropping it recursively would need unlimited stack.
                value if validate::is_deeper(&value, validate::MOST_DEPTH) => {
                    validate::take_apart(value);
                    Box::default()
                }
                value => value.to_string().into(),
            },
            value: OnceLock::new(),
        }
    }
}

impl From<Metadata> for NodeMetadata {
    fn from(metadata: Metadata) -> Self {
        (*metadata).clone()
    }
}

impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl PartialEq<NodeMetadata> for Metadata {
    fn eq(&self, other: &NodeMetadata) -> bool {
        **self == *other
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_json())
    }
}

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_json())
    }
}

impl Serialize for Metadata {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.value.get() {
            Some(value) => value.serialize(serializer),
            None => serde_json::from_str::<NodeMetadata>(self.as_json())
                .map_err(serde::ser::Error::custom)?
                .serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        NodeMetadata::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn a_lookup_finds_top_level_numbers_only() {
        let value = json!({
            "a": 1, "b": -2.5, "c": "text", "d": [1, {"a": 7}], "e": null, "f": {"a": 9}, "g": true,
            "quo\"te": 3,
        });
        let metadata = Metadata::from(value.clone());
        let [a, b, c, d, e, f, g] = metadata.find(["a", "b", "c", "d", "e", "f", "g"]);
        assert_eq!([a, b], [Found::Number(1.0), Found::Number(-2.5)]);
        assert_eq!([c, d, f, g], [Found::Other; 4]);
        assert_eq!(e, Found::Absent);
        assert_eq!(metadata.number("quo\"te"), Some(3.0));
        assert_eq!(metadata.string("c").as_deref(), Some("text"));
        let escaped =
            Metadata::from(json!({ "quo\"te": "a", "back\\slash": "b", "tab\t": "c", "ä": "d" }));
        for (key, text) in [
            ("quo\"te", "a"),
            ("back\\slash", "b"),
            ("tab\t", "c"),
            ("ä", "d"),
        ] {
            assert_eq!(escaped.string(key).as_deref(), Some(text), "{key}");
        }
        for other in ["a", "d", "e", "f", "text", "missing"] {
            assert_eq!(metadata.string(other), None, "{other}");
        }
        assert_eq!(metadata.number("missing"), None);
        assert_eq!(metadata, value);
        for other in [json!(null), json!(3), json!([1]), json!("a")] {
            let metadata = Metadata::from(other.clone());
            assert_eq!(metadata.find(["a"]), [Found::Absent]);
            assert_eq!(*metadata, other);
        }
    }

    /// Without its feature `float_roundtrip`, `serde_json` may be off by the last bit.
    #[test]
    fn numbers_are_read_exactly() {
        for text in ["-6.5642605384680295e-195", "0.30000000000000004", "1e300"] {
            let value: Value = serde_json::from_str(text).unwrap();
            assert_eq!(value.as_f64(), text.parse().ok());
            assert_eq!(*Metadata::from(value.clone()), value);
        }
    }

    #[test]
    fn metadata_that_is_too_deep_to_be_read_is_null() {
        let nested = |levels| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        let metadata = Metadata::from(nested(100));
        assert_eq!(*metadata, nested(100));
        serde_json::to_string(&metadata).unwrap();
        for levels in [101, 130] {
            assert!(Metadata::from(nested(levels)).is_null(), "{levels}");
        }
        // Built without the `json!` macro, which would drop it recursively.
        let abyss = (0..200_000).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
        assert!(Metadata::from(abyss).is_null());
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".{0,4}", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Converting to text and back changes nothing, and equal texts mean equal values.
        #[test]
        fn nothing_is_lost(a in value(), b in value()) {
            let (first, second) = (Metadata::from(a.clone()), Metadata::from(b.clone()));
            prop_assert_eq!(&*first, &a);
            prop_assert_eq!(first == second, a == b);
            let through = serde_json::to_string(&first).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Metadata>(&through).unwrap(), &first);
            if let Value::Object(fields) = &a {
                for (key, value) in fields {
                    prop_assert_eq!(first.number(key), value.as_f64());
                }
            }
        }
    }
}
