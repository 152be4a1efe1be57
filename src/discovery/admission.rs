//! Which registrations are accepted: by filter, by limits, and by address. No I/O.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

use super::format::{Address, Decoded, Decoders, Fault, Host, HostNames, Reader};
use super::names::{Answer, Names};
use crate::error::{ClusterError, in_range};
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::store::Entry;
use crate::validate::{self, Bounds};

/// Selects the nodes of a discovery by zone and tags. All other nodes are left out of its view, and
/// cost no more than reading their entries. The filter is applied to every write of a node: a node
/// that changes its tags joins or leaves at once.
///
/// A leader that does not match is left out too.
///
/// ```
/// use pingora_etcd::{Node, discovery::NodeFilter};
/// let filter = NodeFilter::new().zone("a").zone("b").tag("canary");
/// let node = Node::new("n", "10.0.0.1".parse().unwrap()).with_zone("b");
/// assert!(!filter.matches(&node));
/// assert!(filter.matches(&node.with_tags(["canary", "x"])));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NodeFilter {
    /// Accepts nodes in any of these zones. If empty, accepts all nodes, also those without a zone.
    /// Default: empty.
    pub zones: BTreeSet<String>,
    /// Accepts nodes that have all of these tags. Default: empty.
    pub tags: BTreeSet<String>,
}

impl NodeFilter {
    /// A filter that accepts every node.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a zone to the accepted ones.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zones.insert(zone.into());
        self
    }

    /// Adds a tag that a node needs.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    /// Whether the filter accepts a node.
    pub fn matches(&self, node: &Node) -> bool {
        let in_zone = self.zones.is_empty()
            || node
                .zone
                .as_ref()
                .is_some_and(|zone| self.zones.contains(zone));
        in_zone && self.tags.is_subset(&node.tags)
    }
}

/// Limits the size of an entry and the number of entries, so that a writer cannot exhaust the memory
/// of the readers. An entry beyond a limit is skipped, counted, and logged once.
///
/// A [`ClusterNode`](crate::ClusterNode) never exceeds the defaults. Narrower limits may refuse
/// entries that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EntryLimits {
    /// Maximum length of a key in bytes. Default: 1,024. Range: 64 to 65,536.
    pub key_bytes: usize,
    /// Maximum length of a node's entry in bytes, metadata included. Default: 65,536. Range: 256 to
    /// 10,485,760.
    pub value_bytes: usize,
    /// Maximum depth to which objects and lists are nested in an entry. Default: 32. Range: 2 to 100.
    pub depth: usize,
    /// Maximum number of values in an entry: fields, and elements of lists, at every depth. Default:
    /// 1,024. Range: 16 to 1,000,000.
    pub values: usize,
    /// Maximum number of nodes in a group, and of candidates. Default: 1,000,000. Range: 1 to
    /// 10,000,000.
    pub nodes: usize,
}

impl Default for EntryLimits {
    fn default() -> Self {
        let Bounds {
            bytes,
            depth,
            values,
        } = Bounds::default();
        Self {
            key_bytes: validate::KEY_BYTES,
            value_bytes: bytes,
            depth,
            values,
            nodes: 1_000_000,
        }
    }
}

impl EntryLimits {
    /// Checks every field. Errors name them as parts of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) with the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        for (name, value, range) in [
            ("key_bytes", self.key_bytes, 64..=65_536),
            ("value_bytes", self.value_bytes, 256..=10_485_760),
            ("depth", self.depth, 2..=validate::MOST_DEPTH),
            ("values", self.values, 16..=1_000_000),
            ("nodes", self.nodes, 1..=10_000_000),
        ] {
            in_range(field, name, value, range)?;
        }
        Ok(())
    }

    /// Returns which limit an entry exceeds. Scans it once, without parsing it into values.
    fn check(&self, entry: &Entry) -> Result<(), String> {
        self.check_key(&entry.key)?;
        let bounds = Bounds {
            bytes: self.value_bytes,
            depth: self.depth,
            values: self.values,
        };
        bounds
            .check(&entry.value)
            .map_err(|excess| excess.to_string())
    }

    /// The same for an entry that others write, of which most may not be needed: only its length.
    fn check_length(&self, entry: &Entry) -> Result<(), String> {
        self.check_key(&entry.key)?;
        let (length, most) = (entry.value.len(), self.value_bytes);
        if length > most {
            return Err(format!("it is {length} bytes long, at most {most} allowed"));
        }
        Ok(())
    }

    pub(super) fn check_key(&self, key: &str) -> Result<(), String> {
        let (length, most) = (key.len(), self.key_bytes);
        if length > most {
            return Err(format!(
                "its key is {length} bytes long, at most {most} allowed"
            ));
        }
        Ok(())
    }
}

/// Why an entry is not in the view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It cannot be parsed, or contradicts its key.
    Malformed(String),
    /// It exceeds a limit.
    TooLarge(String),
    /// Its address or port is not allowed, or nobody can connect to it.
    NotAllowed(String),
    /// It is valid, but the filter does not select it.
    Unwanted,
    /// Its host name has not been resolved yet.
    Unresolved,
}

impl Refusal {
    /// Whether the node stays in the view as it was before this entry. It does not if it points
    /// elsewhere now, or is not selected any more.
    pub(super) fn keeps_the_node(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_) | Self::TooLarge(_) | Self::Unresolved
        )
    }

    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Malformed(reason) | Self::TooLarge(reason) | Self::NotAllowed(reason) => reason,
            Self::Unwanted => "not selected by the filter",
            Self::Unresolved => "its host name is not resolved yet",
        }
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Malformed(reason) => Self::Malformed(reason),
            Fault::NotAllowed(reason) => Self::NotAllowed(reason),
            Fault::Unwanted => Self::Unwanted,
        }
    }
}

/// Which entries a discovery accepts.
#[derive(Debug, Clone, Default)]
pub(super) struct Admission {
    pub(super) filter: NodeFilter,
    pub(super) limits: EntryLimits,
    /// If empty, every address is allowed.
    pub(super) networks: Vec<IpNet>,
    /// If empty, every port is allowed.
    pub(super) ports: Vec<RangeInclusive<u16>>,
    /// Read entries that others write.
    pub(super) decoders: Decoders,
    /// Their host names.
    pub(super) names: Arc<Names>,
}

/// What becomes of an entry.
#[derive(Debug)]
pub(super) struct Admitted {
    /// One node, unless its address is a host name.
    pub(super) nodes: Result<Vec<Node>, Refusal>,
    /// The host names that it depends on: with what they lead to, the nodes change.
    pub(super) names: Vec<String>,
}

impl From<Result<Node, Refusal>> for Admitted {
    fn from(node: Result<Node, Refusal>) -> Self {
        Self {
            nodes: node.map(|node| vec![node]),
            names: Vec::new(),
        }
    }
}

impl Admission {
    /// Whether entries may have host names: then [`admit_all`](Self::admit_all) is for them.
    pub(super) fn resolves(&self) -> bool {
        self.decoders.resolve()
    }

    /// Parses the entry under the key of this id, and checks that the node may be in the view.
    pub(super) fn admit(&self, id: &str, entry: &Entry) -> Result<Node, Refusal> {
        if self.decoders.of(&entry.key).0.is_none() {
            return self.admit_ours(id, entry);
        }
        let first = self.admit_all(id, entry).nodes?.into_iter().next();
        first.ok_or(Refusal::Unwanted)
    }

    /// The same, with a node for each address of a host name.
    pub(super) fn admit_all(&self, id: &str, entry: &Entry) -> Admitted {
        let (reader, place) = self.decoders.of(&entry.key);
        let Some(reader) = reader else {
            return self.admit_ours(id, entry).into();
        };
        let decoded = match self.decode(reader, id, entry) {
            Ok(decoded) => decoded,
            Err(refusal) => return Err(refusal).into(),
        };
        let mut admitted = self.locate(&decoded, reader.host_names);
        if let Ok(nodes) = &mut admitted.nodes {
            let mut all = nodes.iter_mut();
            let selected = all.try_for_each(|node| {
                node.set_place(place);
                self.select(node, entry)
            });
            if let Err(refusal) = selected {
                admitted.nodes = Err(refusal);
            }
        }
        admitted
    }

    fn decode(&self, reader: &Reader, id: &str, entry: &Entry) -> Result<Decoded, Refusal> {
        self.limits.check_length(entry).map_err(Refusal::TooLarge)?;
        self.decoders
            .check_id(id, &entry.key)
            .map_err(Refusal::Malformed)?;
        let decoded = reader.decoder.decode(id, &entry.key, &entry.value)?;
        self.check_size(&decoded)?;
        Ok(decoded)
    }

    /// Reads an entry of this crate's own nodes.
    fn admit_ours(&self, id: &str, entry: &Entry) -> Result<Node, Refusal> {
        self.limits.check(entry).map_err(Refusal::TooLarge)?;
        self.decoders
            .check_id(id, &entry.key)
            .map_err(Refusal::Malformed)?;
        let mut node: Node = serde_json::from_slice(&entry.value)
            .map_err(|error| Refusal::Malformed(error.to_string()))?;
        if node.id != id {
            let reason = format!(
                "its id is {:?}, which is not the id in its key",
                shortened(&node.id)
            );
            return Err(Refusal::Malformed(reason));
        }
        self.check_address(node.ip, node.port)?;
        self.select(&mut node, entry)?;
        Ok(node)
    }

    fn select(&self, node: &mut Node, entry: &Entry) -> Result<(), Refusal> {
        if !self.filter.matches(node) {
            return Err(Refusal::Unwanted);
        }
        node.set_written(entry.incarnation(), entry.mod_revision);
        Ok(())
    }

    /// Checks the size of what was read of an entry that others write. What is not needed of it does not count.
    fn check_size(&self, decoded: &Decoded) -> Result<(), Refusal> {
        let limits = &self.limits;
        let (values, depth) = decoded.size;
        if values > limits.values || depth > limits.depth {
            let reason = format!(
                "its addresses, tags and metadata have {values} values, {depth} deep; at most {} and {} are allowed",
                limits.values, limits.depth
            );
            return Err(Refusal::TooLarge(reason));
        }
        Ok(())
    }

    /// The node of an entry at the first of its addresses that is allowed; with a host name, at its addresses.
    fn locate(&self, decoded: &Decoded, host_names: HostNames) -> Admitted {
        let fault = decoded.fault.as_ref();
        let mut fault = fault.map(|fault| Refusal::from(fault.clone()));
        let mut names = Vec::new();
        let mut is_unresolved = false;
        for address in &decoded.addresses {
            let found = match &address.host {
                Host::Ip(ip) => self
                    .check_address(*ip, address.port)
                    .map(|()| vec![decoded.node(address, *ip)]),
                Host::Name(name) if host_names == HostNames::Refused => {
                    let reason = format!(
                        "its address {:?} is a host name; host names are not resolved unless host_names says so",
                        shortened(name)
                    );
                    Err(Refusal::NotAllowed(reason))
                }
                Host::Name(name) => {
                    names.push(name.clone());
                    self.resolve(decoded, address, name, host_names)
                }
            };
            match found {
                Ok(nodes) => {
                    let nodes = Ok(nodes);
                    return Admitted { nodes, names };
                }
                Err(Refusal::Unresolved) => is_unresolved = true,
                Err(refusal) => fault = Some(refusal),
            }
        }
        let refusal = match is_unresolved {
            true => Refusal::Unresolved,
            false => fault.unwrap_or(Refusal::Unwanted),
        };
        let nodes = Err(refusal);
        Admitted { nodes, names }
    }

    /// The nodes at what a host name leads to.
    fn resolve(
        &self,
        decoded: &Decoded,
        address: &Address,
        name: &str,
        host_names: HostNames,
    ) -> Result<Vec<Node>, Refusal> {
        let Answer { addresses, error } = self.names.get(name);
        let mut refusal = Refusal::Unresolved;
        let mut nodes = Vec::new();
        for ip in addresses {
            if let Err(not_allowed) = self.check_address(ip, address.port) {
                refusal = not_allowed;
                continue;
            }
            let mut node = decoded.node(address, ip);
            if let Some(error) = &error {
                node.add_metadata(metadata_keys::HOST_NAME_ERROR, error);
            }
            if host_names == HostNames::All {
                node.id = format!("{}@{ip}", node.id);
            }
            nodes.push(node);
            if host_names == HostNames::First {
                break;
            }
        }
        match nodes.is_empty() {
            true => Err(refusal),
            false => Ok(nodes),
        }
    }

    /// The refusal of a node or candidate beyond the limit of the group.
    pub(super) fn too_many(&self) -> Refusal {
        let most = self.limits.nodes;
        Refusal::TooLarge(format!(
            "there are {most} nodes already, and no more are allowed"
        ))
    }

    /// Checks that a node from a snapshot file may be in the view.
    pub(super) fn readmit(&self, node: &Node) -> Result<(), Refusal> {
        self.check_address(node.ip, node.port)?;
        if self.filter.matches(node) {
            Ok(())
        } else {
            Err(Refusal::Unwanted)
        }
    }

    fn check_address(&self, ip: IpAddr, port: Option<u16>) -> Result<(), Refusal> {
        validate::address(ip)
            .map_err(|reason| Refusal::NotAllowed(format!("its address {reason}")))?;
        if port == Some(0) {
            let reason = "its port is 0, which nobody can connect to".to_owned();
            return Err(Refusal::NotAllowed(reason));
        }
        // An IPv4-mapped IPv6 address is reached as the IPv4 address.
        let ip = ip.to_canonical();
        let in_network = |network: &IpNet| network.contains(&ip);
        if !self.networks.is_empty() && !self.networks.iter().any(in_network) {
            let reason = format!("its address {ip} is in none of the allowed networks");
            return Err(Refusal::NotAllowed(reason));
        }
        // A node without a port is reached at the reader's default port.
        if let Some(port) = port
            && !self.ports.is_empty()
            && !self.ports.iter().any(|range| range.contains(&port))
        {
            let reason = format!("its port {port} is not among the allowed ports");
            return Err(Refusal::NotAllowed(reason));
        }
        Ok(())
    }
}

/// Parses `allowed_networks`.
pub(super) fn parse_networks(texts: &[String]) -> Result<Vec<IpNet>, ClusterError> {
    let parse = |text: &String| {
        let parsed = text.parse::<IpNet>();
        let parsed = parsed.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        parsed.map_err(|_| {
            let reason = format!("{text:?} is neither a network such as 10.0.0.0/8 nor an address");
            ClusterError::config("allowed_networks", reason)
        })
    };
    texts.iter().map(parse).collect()
}

/// Parses `allowed_ports`: `8080`, or `9000-9100`.
pub(super) fn parse_ports(texts: &[String]) -> Result<Vec<RangeInclusive<u16>>, ClusterError> {
    let parse = |text: &String| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
            (Ok(first), Ok(last)) if first > 0 && first <= last => Some(first..=last),
            _ => None,
        };
        range.ok_or_else(|| {
            let reason =
                format!("{text:?} is neither a port, 1 to 65535, nor a range such as 9000-9100");
            ClusterError::config("allowed_ports", reason)
        })
    };
    texts.iter().map(parse).collect()
}

/// A text for a message. A key can be very long.
pub(super) fn shortened(text: &str) -> &str {
    let end = (0..=128.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests;
