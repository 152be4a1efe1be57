//! Makes a node of an entry.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Map, Value};

use super::address::{self, Address, Host};
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
    /// An address that begins with `http` may be one of gRPC: this says what it is, and not the address.
    is_url_any: bool,
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
    metadata: Map<String, Value>,
    pub(in crate::discovery) addresses: Vec<Address>,
    /// Why others were left out.
    pub(in crate::discovery) fault: Option<Fault>,
    /// How many values it has, and how deep they are.
    pub(in crate::discovery) size: (usize, usize),
}

impl Decoded {
    /// The node at one of its addresses, whose host is this one.
    pub(in crate::discovery) fn node(&self, address: &Address, ip: IpAddr) -> Node {
        let mut node = self.node.clone();
        (node.ip, node.port) = (ip, address.port);
        let mut metadata = self.metadata.clone();
        if let Some(protocol) = address.scheme.as_deref().and_then(address::protocol) {
            metadata.insert(metadata_keys::PROTOCOL.to_owned(), protocol.into());
        }
        if let Host::Name(name) = &address.host {
            metadata.insert(metadata_keys::HOST_NAME.to_owned(), name.clone().into());
        }
        match metadata.is_empty() {
            true => node,
            false => node.with_metadata(Value::Object(metadata)),
        }
    }
}

impl Decoder {
    pub(super) fn new(table: EntryTable, scheme: Scheme, usual: Option<&'static str>) -> Self {
        Self::with(table, scheme, usual, false)
    }

    /// The same, where an address that begins with `http` may be one of gRPC.
    pub(super) fn of_urls(table: EntryTable, scheme: Scheme) -> Self {
        Self::with(table, scheme, None, true)
    }

    fn with(
        table: EntryTable,
        scheme: Scheme,
        usual: Option<&'static str>,
        is_url_any: bool,
    ) -> Self {
        let pointers: Vec<_> = table
            .pointers()
            .map(|(_, place)| place.to_owned())
            .collect();
        Self {
            wanted: Wanted::new(pointers.iter().map(|place| &**place)),
            table,
            scheme,
            usual,
            is_url_any,
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
            // Everything may be in the key.
            false if self.wanted.is_nothing() || value.is_empty() => Picked::new(),
            false => self.wanted.pick(value).map_err(Fault::Malformed)?,
        };
        if !self.table.require.iter().all(|place| holds(place, &picked)) {
            return Err(Fault::Unwanted);
        }
        let texts = self.texts(key, &picked)?;
        let (addresses, fault) = self.addresses(&texts, &picked)?;
        let mut node = Node::new(id, IpAddr::from([0; 4]));
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
        let (values, depth) = size_of(metadata.values());
        Ok(Decoded {
            size: (values + node.tags.len() + addresses.len(), depth),
            node,
            metadata,
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
        let mut is_empty_list = false;
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
                        is_empty_list |= list.is_empty();
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
                    let port = picked.get(port).filter(|port| !port.is_null());
                    let port = port.map(number);
                    host.map(|host| Written::Parts(host, port))
                        .into_iter()
                        .collect()
                }
            };
            if !found.is_empty() {
                return Ok(found);
            }
        }
        if is_empty_list {
            // A process that serves nothing, or nothing any more.
            return Err(Fault::Unwanted);
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
        let said = self.table.scheme.as_ref();
        let said = said.and_then(|place| text(picked.get(place)?));
        let said = said.map(|word| word.trim().to_ascii_lowercase());
        let said = said.filter(|word| !word.is_empty());
        let wanted = self.scheme.word();
        let (mut addresses, mut fault) = (Vec::new(), None);
        for text in texts {
            let own = text.scheme();
            let usual = || said.as_deref().or(self.usual).or(wanted).map(str::to_owned);
            let mut scheme = own.or_else(usual);
            if self.is_url_any
                && let (Some("http"), Some("grpc")) | (Some("https"), Some("grpcs")) =
                    (scheme.as_deref(), wanted)
            {
                scheme = wanted.map(str::to_owned);
            }
            let is_known = |scheme: &str| address::protocol(scheme).is_some();
            let is_wanted = match wanted {
                Some(wanted) => scheme.as_deref() == Some(wanted),
                None => scheme.as_deref().is_none_or(is_known),
            };
            if !is_wanted {
                continue;
            }
            match text.parse() {
                Ok((host, port)) => addresses.push(Address { host, port, scheme }),
                Err(reason) => {
                    fault.get_or_insert(Fault::NotAllowed(format!("its address {reason}")));
                }
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

    /// What is copied, with the metrics on top of it. What has a meaning of its own here is not copied: how a backend
    /// is spoken to follows from the scheme, and by which name it is verified is not for it to say.
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
        for name in [
            metadata_keys::PROTOCOL,
            metadata_keys::SERVER_NAME,
            metadata_keys::HOST_NAME,
            metadata_keys::HEALTH,
            metadata_keys::HEALTH_REASON,
        ] {
            metadata.remove(name);
        }
        for name in [
            metadata_keys::CPU_USAGE_PERCENT,
            metadata_keys::MEMORY_USAGE_PERCENT,
            metadata_keys::QUEUE_DEPTH,
        ] {
            let value = metadata.remove(name);
            if let Some(value) = value.as_ref().and_then(number) {
                metadata.insert(name.to_owned(), value.into());
            }
        }
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
    /// The scheme that it names itself.
    fn scheme(&self) -> Option<String> {
        match self {
            Self::Whole(text) => address::split_scheme(text).0,
            Self::Parts(..) => None,
        }
    }

    fn parse(&self) -> Result<(Host, Option<u16>), String> {
        match self {
            Self::Whole(text) => {
                let (scheme, rest) = address::split_scheme(text);
                address::host_and_port(scheme.as_deref(), rest)
            }
            Self::Parts(host, port) => {
                let port = match port {
                    None => None,
                    Some(Some(port)) if (0.0..=65_535.0).contains(port) && port.fract() == 0.0 => {
                        Some(*port as u16)
                    }
                    Some(_) => return Err("has no valid port".to_owned()),
                };
                Ok((address::host(host)?, port))
            }
        }
    }
}

/// In relation to that of entries which have none: each registry has a scale of its own.
fn weight(place: &WeightAt, picked: &Picked) -> f64 {
    match picked.get(&place.at).and_then(number) {
        Some(weight) if weight > 0.0 => weight / place.default,
        Some(_) if place.zero == ZeroWeight::Drain => 0.0,
        _ => 1.0,
    }
}

/// Whether one of the values is in the place, also as text.
fn holds(place: &Equals, picked: &Picked) -> bool {
    let Some(found) = picked.get(&place.at) else {
        return false;
    };
    place.is.iter().any(|value| match value {
        Scalar::Bool(value) => text(found).is_some_and(|found| found == value.to_string()),
        Scalar::Number(value) => number(found) == Some(*value),
        Scalar::Text(value) => text(found).as_ref() == Some(value),
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

/// How many values there are in these and below them, and how deep they are.
fn size_of<'v>(values: impl Iterator<Item = &'v Value>) -> (usize, usize) {
    values.fold((1, 1), |(count, depth), value| {
        let (more, below) = match value {
            Value::Array(list) => size_of(list.iter()),
            Value::Object(fields) => size_of(fields.values()),
            _ => (1, 0),
        };
        (count + more, depth.max(below + 1))
    })
}
