//! Makes a node of an entry.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Map, Value};

use super::address::{self, Address};
use super::kinds::Scheme;
use super::pick::{Picked, Wanted};
use super::table::{
    AddressAt, EntryTable, Equals, HostAndPort, IN_KEY, Scalar, WeightAt, ZeroWeight,
};
use crate::metadata::metadata_keys;
use crate::node::{Node, NodeState};

/// Makes nodes of entries, as a table says.
#[derive(Debug, Clone)]
pub(in crate::discovery) struct Decoder {
    table: EntryTable,
    scheme: Scheme,
    /// Of addresses that do not name one.
    usual: Option<&'static str>,
    wanted: Wanted,
}

/// Why there is no node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::discovery) enum Fault {
    Malformed(String),
    /// There are addresses, but none that a request can be sent to.
    NotAllowed(String),
    /// It is not for this group.
    Unwanted,
}

/// A node that has not got its address yet.
#[derive(Debug)]
pub(in crate::discovery) struct Decoded {
    node: Node,
    addresses: Vec<Address>,
    /// Why others were left out.
    pub(in crate::discovery) fault: Option<Fault>,
    /// How many values it has, and how deep they are.
    pub(in crate::discovery) size: (usize, usize),
}

impl Decoded {
    /// The node at each of its addresses.
    pub(in crate::discovery) fn nodes(&self) -> impl Iterator<Item = Node> {
        self.addresses.iter().map(|address| {
            let mut node = self.node.clone();
            (node.ip, node.port) = (address.ip, address.port);
            let mut metadata = match serde_json::to_value(&node.metadata) {
                Ok(Value::Object(fields)) => fields,
                _ => Map::new(),
            };
            if let Some(protocol) = address.scheme.as_deref().and_then(address::protocol) {
                metadata.insert(metadata_keys::PROTOCOL.to_owned(), protocol.into());
            }
            if metadata.is_empty() {
                return node;
            }
            node.with_metadata(Value::Object(metadata))
        })
    }
}

impl Decoder {
    pub(super) fn new(table: EntryTable, scheme: Scheme, usual: Option<&'static str>) -> Self {
        let pointers: Vec<_> = table
            .pointers()
            .map(|(_, place)| place.to_owned())
            .collect();
        Self {
            wanted: Wanted::new(pointers.iter().map(|place| &**place)),
            table,
            scheme,
            usual,
        }
    }

    /// Reads the entry of the node with this id, the rest of whose key is `key`.
    pub(in crate::discovery) fn decode(
        &self,
        id: &str,
        key: &str,
        value: &[u8],
    ) -> Result<Decoded, Fault> {
        let picked = match self.table.text {
            true => {
                let text = std::str::from_utf8(value);
                let text = text.map_err(|error| Fault::Malformed(error.to_string()))?;
                Picked::from([(String::new(), text.into())])
            }
            false => self.wanted.pick(value).map_err(Fault::Malformed)?,
        };
        if !self.table.require.iter().all(|place| holds(place, &picked)) {
            return Err(Fault::Unwanted);
        }
        let texts = self.texts(key, &picked)?;
        let (addresses, fault) = self.addresses(&texts, &picked)?;
        let mut node = Node::new(id, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        node.weight = self
            .table
            .weight
            .as_ref()
            .map(|place| weight(place, &picked));
        node.zone = self
            .table
            .zone
            .as_ref()
            .and_then(|place| text(picked.get(place)?));
        node.tags = self.tags(&picked);
        if self.table.drain.iter().any(|place| holds(place, &picked)) {
            node.state = NodeState::Draining;
        }
        let metadata = self.metadata(&picked);
        let size = size(&Value::Object(metadata.clone()));
        if !metadata.is_empty() {
            node = node.with_metadata(Value::Object(metadata));
        }
        Ok(Decoded {
            size: (size.0 + node.tags.len(), size.1),
            node,
            addresses,
            fault,
        })
    }

    /// The addresses as they are written.
    fn texts(&self, key: &str, picked: &Picked) -> Result<Vec<Written>, Fault> {
        if self.table.text {
            let whole = picked.get("").and_then(Value::as_str).unwrap_or_default();
            return Ok(vec![Written::Whole(whole.to_owned())]);
        }
        for place in &self.table.address {
            let found = match place {
                AddressAt::Whole(place) if place == IN_KEY => {
                    let last = key.rsplit('/').next().unwrap_or(key);
                    last.split(',')
                        .map(|text| Written::Whole(text.to_owned()))
                        .collect()
                }
                AddressAt::Whole(place) => match picked.get(place) {
                    Some(Value::String(text)) if !text.is_empty() => {
                        vec![Written::Whole(text.clone())]
                    }
                    Some(Value::Array(list)) => {
                        let texts = list.iter().filter_map(Value::as_str);
                        texts.map(|text| Written::Whole(text.to_owned())).collect()
                    }
                    _ => Vec::new(),
                },
                AddressAt::Parts(HostAndPort { host, port }) => {
                    let host = picked
                        .get(host)
                        .and_then(text)
                        .filter(|host| !host.is_empty());
                    let port = picked.get(port).map(number);
                    host.map(|host| Written::Parts(host, port))
                        .into_iter()
                        .collect()
                }
            };
            if !found.is_empty() {
                return Ok(found);
            }
        }
        Err(Fault::Malformed(
            "it has no address where one is expected".to_owned(),
        ))
    }

    /// The addresses with the wanted scheme, and what is wrong with others.
    fn addresses(
        &self,
        texts: &[Written],
        picked: &Picked,
    ) -> Result<(Vec<Address>, Option<Fault>), Fault> {
        let said = self
            .table
            .scheme
            .as_ref()
            .and_then(|place| text(picked.get(place)?));
        let (mut addresses, mut fault) = (Vec::new(), None);
        for text in texts {
            let mut address = match text.parse() {
                Ok(address) => address,
                Err(reason) => {
                    fault.get_or_insert(Fault::NotAllowed(format!("its address {reason}")));
                    continue;
                }
            };
            let usual = || said.clone().or_else(|| self.usual.map(str::to_owned));
            address.scheme = address.scheme.or_else(usual);
            let is_known = address
                .scheme
                .as_deref()
                .is_none_or(|scheme| address::protocol(scheme).is_some());
            let is_wanted = match self.scheme.word() {
                Some(wanted) => address.scheme.as_deref() == Some(wanted),
                None => is_known,
            };
            if is_wanted {
                addresses.push(address);
            }
        }
        match (addresses.is_empty(), fault) {
            (true, Some(fault)) => Err(fault),
            // A process that only serves something else.
            (true, None) => Err(Fault::Unwanted),
            (false, fault) => Ok((addresses, fault)),
        }
    }

    fn tags(&self, picked: &Picked) -> BTreeSet<String> {
        let mut tags = BTreeSet::new();
        for value in self.table.tags.iter().filter_map(|place| picked.get(place)) {
            match value {
                Value::Array(list) => tags.extend(list.iter().filter_map(text)),
                Value::Object(fields) => tags.extend(
                    fields
                        .iter()
                        .filter_map(|(name, value)| Some(format!("{name}={}", text(value)?))),
                ),
                value => tags.extend(text(value)),
            }
        }
        tags.remove("");
        tags
    }

    /// What is copied, with the metrics on top of it. How a backend is spoken to is not copied: it follows from the
    /// scheme.
    fn metadata(&self, picked: &Picked) -> Map<String, Value> {
        let copied = self
            .table
            .metadata
            .as_ref()
            .and_then(|place| picked.get(place));
        let mut metadata = match copied {
            Some(Value::Object(fields)) => fields.clone(),
            None | Some(Value::Null) => Map::new(),
            Some(other) => Map::from_iter([("value".to_owned(), other.clone())]),
        };
        metadata.remove(metadata_keys::PROTOCOL);
        for (name, place) in &self.table.metrics {
            if let Some(value) = picked.get(&place.at).and_then(number) {
                metadata.insert(name.clone(), (value * place.times).into());
            }
        }
        metadata
    }
}

/// An address as it is written.
enum Written {
    Whole(String),
    /// With what is in the place of the port, if there is anything.
    Parts(String, Option<Option<f64>>),
}

impl Written {
    fn parse(&self) -> Result<Address, String> {
        match self {
            Self::Whole(text) => address::parse(text),
            Self::Parts(host, port) => Ok(Address {
                scheme: None,
                ip: address::host(host)?,
                port: match port {
                    None => None,
                    Some(Some(port)) if (0.0..=65_535.0).contains(port) && port.fract() == 0.0 => {
                        Some(*port as u16)
                    }
                    Some(_) => return Err("has no valid port".to_owned()),
                },
            }),
        }
    }
}

fn weight(place: &WeightAt, picked: &Picked) -> f64 {
    match picked.get(&place.at).and_then(number) {
        Some(weight) if weight > 0.0 => weight,
        Some(_) if place.zero == ZeroWeight::Drain => 0.0,
        _ => place.default,
    }
}

/// Whether one of the values is in the place.
fn holds(place: &Equals, picked: &Picked) -> bool {
    let found = picked.get(&place.at);
    found.is_some_and(|found| {
        place.is.iter().any(|value| match value {
            Scalar::Bool(value) => found.as_bool() == Some(*value),
            Scalar::Number(value) => found.as_f64() == Some(*value),
            Scalar::Text(value) => found.as_str() == Some(value),
        })
    })
}

/// A simple value as text.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    }
}

/// A number, or a text that is one.
fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        value => value.as_f64(),
    };
    number.filter(|number: &f64| number.is_finite())
}

/// How many values there are in a value, and how deep they are.
fn size(value: &Value) -> (usize, usize) {
    let inner: Vec<_> = match value {
        Value::Array(list) => list.iter().map(size).collect(),
        Value::Object(fields) => fields.values().map(size).collect(),
        _ => return (1, 0),
    };
    let values = inner.iter().map(|(values, _)| values).sum::<usize>();
    let depth = inner.iter().map(|(_, depth)| *depth).max().unwrap_or(0);
    (values + 1, depth + 1)
}
