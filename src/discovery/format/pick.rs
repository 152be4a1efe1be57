//! Takes the wanted places out of a JSON text, and skips the rest without keeping it.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// The wanted places, as a tree.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    /// All of it is wanted.
    is_wanted: bool,
    below: BTreeMap<String, Wanted>,
}

/// What has been found, by pointer.
pub(super) type Picked = BTreeMap<String, Value>;

impl Wanted {
    pub(super) fn new<'p>(pointers: impl Iterator<Item = &'p str>) -> Self {
        let mut all = Self::default();
        for pointer in pointers {
            let mut place = &mut all;
            for segment in pointer.split('/').skip(1) {
                let name = segment.replace("~1", "/").replace("~0", "~");
                place = place.below.entry(name).or_default();
            }
            place.is_wanted = true;
        }
        all
    }

    /// Whether no place at all is wanted.
    pub(super) fn is_nothing(&self) -> bool {
        !self.is_wanted && self.below.is_empty()
    }

    /// Reads a JSON text. An error is in words.
    pub(super) fn pick(&self, json: &[u8]) -> Result<Picked, String> {
        let mut picked = Picked::new();
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let seed = Seed {
            wanted: self,
            at: String::new(),
            picked: &mut picked,
        };
        seed.deserialize(&mut deserializer)
            .and_then(|()| deserializer.end())
            .map_err(|error| error.to_string())?;
        Ok(picked)
    }

    /// Puts everything that is wanted in a value, or below it, where it belongs.
    fn take(&self, at: &str, value: Value, picked: &mut Picked) {
        for (name, below) in &self.below {
            let inner = match &value {
                Value::Object(fields) => fields.get(name),
                Value::Array(list) => name.parse::<usize>().ok().and_then(|index| list.get(index)),
                _ => None,
            };
            if let Some(inner) = inner {
                below.take(&below_of(at, name), inner.clone(), picked);
            }
        }
        if self.is_wanted {
            picked.insert(at.to_owned(), value);
        }
    }
}

fn below_of(at: &str, name: &str) -> String {
    format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"))
}

struct Seed<'w, 'p> {
    wanted: &'w Wanted,
    at: String,
    picked: &'p mut Picked,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.wanted.is_wanted {
            let value = serde::Deserialize::deserialize(deserializer)?;
            self.wanted.take(&self.at, value, self.picked);
            return Ok(());
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key::<String>()? {
            match self.wanted.below.get(&name) {
                Some(wanted) => fields.next_value_seed(Seed {
                    wanted,
                    at: below_of(&self.at, &name),
                    picked: self.picked,
                })?,
                None => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        for index in 0usize.. {
            let name = index.to_string();
            let is_there = match self.wanted.below.get(&name) {
                Some(wanted) => list
                    .next_element_seed(Seed {
                        wanted,
                        at: below_of(&self.at, &name),
                        picked: self.picked,
                    })?
                    .is_some(),
                None => list.next_element::<IgnoredAny>()?.is_some(),
            };
            if !is_there {
                break;
            }
        }
        Ok(())
    }

    // What is wanted in a simple value is not there.
    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}
