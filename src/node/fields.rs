//! How the fields of an entry are read: `null` means absence, and an error names the field.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

use super::state::NodeState;
use crate::metadata::{Found, Metadata};

fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    field: &str,
    deserializer: D,
) -> Result<T, D::Error> {
    T::deserialize(deserializer).map_err(|error| D::Error::custom(format_args!("{field}: {error}")))
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

/// A weight that is not a number is no reason to refuse the rest of the entry: it is read as `NaN`.
pub(super) fn weight<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    Ok(match named("weight", deserializer)? {
        Found::Absent => None,
        Found::Number(weight) => Some(weight),
        Found::Other => Some(f64::NAN),
    })
}

pub(super) fn is_no_number(weight: &Option<f64>) -> bool {
    weight.is_none_or(|weight| !weight.is_finite())
}

/// A time in milliseconds, which other writers may write with a fraction.
struct Millis(i64);

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MillisVisitor)
    }
}

struct MillisVisitor;

impl Visitor<'_> for MillisVisitor {
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
        // The conversion saturates, so only the lower limit is left to apply.
        Ok(Millis((millis as i64).max(0)))
    }
}

/// A run is written as 16 hexadecimal digits, because not every reader of JSON keeps all 64 bits of
/// a number. Any other value stands for itself by its hash: it only has to differ from others.
pub(super) mod run {
    use std::num::NonZeroU64;

    use serde::{Deserialize, Deserializer, Serializer};
    use xxhash_rust::xxh3::xxh3_64;

    pub(crate) fn serialize<S: Serializer>(
        run: &Option<NonZeroU64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match run {
            Some(run) => serializer.collect_str(&format_args!("{run:016x}")),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
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
