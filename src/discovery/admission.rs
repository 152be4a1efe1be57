//! Which registrations are taken in: what the reader wants, and what it trusts. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::Deserialize;

use crate::error::{ClusterError, in_range};
use crate::node::Node;
use crate::store::Entry;
use crate::validate::{self, Bounds};

/// The nodes that a discovery is about, by zone and tags: the others are not in its view, and
/// cost it nothing but being read. It is looked at with every write of a node: one that changes its
/// tags joins or leaves at once.
///
/// A leader that does not match is not seen either.
///
/// ```
/// use pingora_etcd::{Node, discovery::NodeFilter};
/// let filter = NodeFilter::new().zone("a").zone("b").tag("canary");
/// let node = Node::new("n", "10.0.0.1".parse().unwrap()).with_zone("b");
/// assert!(!filter.matches(&node));
/// assert!(filter.matches(&node.with_tags(["canary", "x"])));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NodeFilter {
    /// Nodes of any of these zones; empty: of every zone, and of none. Default: empty.
    pub zones: BTreeSet<String>,
    /// Nodes that have all of these tags. Default: empty.
    pub tags: BTreeSet<String>,
}

impl NodeFilter {
    /// Lets every node through.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a zone to those that are let through.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zones.insert(zone.into());
        self
    }

    /// Adds a tag that a node must have.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.insert(tag.into());
        self
    }

    /// Whether it lets a node through.
    pub fn matches(&self, node: &Node) -> bool {
        let in_zone = self.zones.is_empty()
            || node
                .zone
                .as_ref()
                .is_some_and(|zone| self.zones.contains(zone));
        in_zone && self.tags.is_subset(&node.tags)
    }
}

/// How much one entry may take, and all of them, so that whoever may write to the store cannot
/// exhaust its readers. An entry beyond a limit is skipped, counted, and logged once.
///
/// A [`ClusterNode`](crate::ClusterNode) writes nothing beyond the defaults. Narrower limits refuse
/// what it may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EntryLimits {
    /// Length of a key in bytes. Default: 1,024. Range: 64 to 65,536.
    pub key_bytes: usize,
    /// Length of a node's entry in bytes, metadata included. Default: 65,536. Range: 256 to
    /// 10,485,760.
    pub value_bytes: usize,
    /// How deep objects and lists are nested in it. Default: 32. Range: 2 to 100.
    pub depth: usize,
    /// How many values are in it: fields, and elements of lists, at every depth. Default: 1,024.
    /// Range: 16 to 1,000,000.
    pub values: usize,
    /// Nodes, and candidates, in a group. Default: 1,000,000. Range: 1 to 10,000,000.
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
    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
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

    /// Answers what is too much about an entry. Reads it once, and builds nothing.
    pub(crate) fn check(&self, entry: &Entry) -> Result<(), String> {
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

    pub(crate) fn check_key(&self, key: &str) -> Result<(), String> {
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
pub(crate) enum Refusal {
    /// It cannot be understood.
    Malformed(String),
    /// It is more than the limits allow.
    TooLarge(String),
    /// It points where it must not, or where nobody is.
    NotAllowed(String),
    /// It is fine, but not what the reader wants.
    Unwanted,
}

impl Refusal {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Malformed(reason) | Self::TooLarge(reason) | Self::NotAllowed(reason) => reason,
            Self::Unwanted => "not wanted",
        }
    }
}

/// What a discovery takes in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Admission {
    pub(crate) filter: NodeFilter,
    pub(crate) limits: EntryLimits,
    /// Empty: every address.
    pub(crate) networks: Vec<IpNet>,
    /// Empty: every port.
    pub(crate) ports: Vec<RangeInclusive<u16>>,
}

impl Admission {
    /// Whether a node of this id may be in the view.
    pub(crate) fn admit(&self, id: &str, entry: &Entry) -> Result<Node, Refusal> {
        self.limits.check(entry).map_err(Refusal::TooLarge)?;
        let node: Node = serde_json::from_slice(&entry.value)
            .map_err(|error| Refusal::Malformed(error.to_string()))?;
        if node.id != id {
            let reason = format!(
                "its id is {:?}, which is not its key's",
                shortened(&node.id)
            );
            return Err(Refusal::Malformed(reason));
        }
        self.check_address(&node)?;
        if !self.filter.matches(&node) {
            return Err(Refusal::Unwanted);
        }
        Ok(node)
    }

    /// A node of a file instead of the store.
    pub(crate) fn readmit(&self, node: &Node) -> Result<(), Refusal> {
        self.check_address(node)?;
        if self.filter.matches(node) {
            Ok(())
        } else {
            Err(Refusal::Unwanted)
        }
    }

    fn check_address(&self, node: &Node) -> Result<(), Refusal> {
        validate::address(node.ip)
            .map_err(|reason| Refusal::NotAllowed(format!("its address {reason}")))?;
        if node.port == Some(0) {
            let reason = "its port is 0, which nobody can connect to".to_owned();
            return Err(Refusal::NotAllowed(reason));
        }
        // An IPv4 address in IPv6 clothes is reached as what it is.
        let ip: IpAddr = node.ip.to_canonical();
        let in_network = |network: &IpNet| network.contains(&ip);
        if !self.networks.is_empty() && !self.networks.iter().any(in_network) {
            let reason = format!("its address {ip} is in none of the allowed networks");
            return Err(Refusal::NotAllowed(reason));
        }
        // Without a port it is reached at the reader's own default.
        if let Some(port) = node.port
            && !self.ports.is_empty()
            && !self.ports.iter().any(|range| range.contains(&port))
        {
            let reason = format!("its port {port} is none of the allowed ones");
            return Err(Refusal::NotAllowed(reason));
        }
        Ok(())
    }
}

/// Reads `allowed_networks`.
pub(crate) fn networks(texts: &[String]) -> Result<Vec<IpNet>, ClusterError> {
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

/// Reads `allowed_ports`: `8080`, or `9000-9100`.
pub(crate) fn ports(texts: &[String]) -> Result<Vec<RangeInclusive<u16>>, ClusterError> {
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

/// For a message: a key can be long.
pub(crate) fn shortened(text: &str) -> &str {
    let end = (0..=128.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(value: &str) -> Entry {
        Entry {
            key: "registry/g/n".to_owned(),
            value: value.as_bytes().to_vec(),
            create_revision: 1,
            mod_revision: 1,
            lease: None,
        }
    }

    #[test]
    fn strangers_are_refused() {
        let admission = Admission {
            networks: networks(&[
                "10.0.0.0/8".to_owned(),
                "fd00::/8".to_owned(),
                "192.0.2.1".to_owned(),
            ])
            .unwrap(),
            ports: ports(&["8080".to_owned(), "9000-9100".to_owned()]).unwrap(),
            ..Admission::default()
        };
        for (ip, port, allowed) in [
            ("10.1.2.3", "8080", true),
            ("::ffff:10.1.2.3", "9100", true),
            ("fd00::1", "9000", true),
            ("192.0.2.1", "8080", true),
            ("192.0.2.2", "8080", false),
            ("::ffff:169.254.169.254", "8080", false),
            ("10.1.2.3", "22", false),
            ("10.1.2.3", "9101", false),
            ("10.1.2.3", "0", false),
            ("10.1.2.3", "null", true),
        ] {
            let value = format!(r#"{{"id":"n","ip":"{ip}","port":{port}}}"#);
            let admitted = admission.admit("n", &entry(&value));
            assert_eq!(admitted.is_ok(), allowed, "{value}");
            if !allowed {
                assert!(matches!(admitted, Err(Refusal::NotAllowed(_))));
            }
        }
    }

    #[test]
    fn what_is_no_network_and_no_port_is_named() {
        for text in ["", "10.0.0.0/33", "host", "10.0.0/8"] {
            let error = networks(&[text.to_owned()]).unwrap_err().to_string();
            assert!(
                error.contains("allowed_networks") && error.contains(text),
                "{error}"
            );
        }
        for text in ["", "0", "65536", "9-8", "a-b", "1-2-3"] {
            let error = ports(&[text.to_owned()]).unwrap_err().to_string();
            assert!(
                error.contains("allowed_ports") && error.contains(text),
                "{error}"
            );
        }
    }

    #[test]
    fn too_much_is_refused_before_it_is_parsed() {
        let limits = EntryLimits {
            key_bytes: 64,
            value_bytes: 300,
            depth: 4,
            values: 16,
            nodes: 1,
        };
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(300));
        let wide = format!("[{}1]", "1,".repeat(20));
        for (value, named) in [
            (long.as_str(), "bytes"),
            ("[[[[[1]]]]]", "levels"),
            (wide.as_str(), "values"),
        ] {
            let error = limits.check(&entry(value)).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        limits
            .check(&entry(r#"{"text":"[[[[[[,,,,,,,,,,,,,,,,,\"{{{{"}"#))
            .unwrap();
        let mut key = entry("{}");
        key.key = "k".repeat(65);
        assert!(limits.check(&key).unwrap_err().contains("key"));
        let error = EntryLimits {
            depth: 1,
            ..EntryLimits::default()
        }
        .validate("limits")
        .unwrap_err();
        assert!(error.to_string().contains("limits.depth"), "{error}");
    }

    #[test]
    fn what_is_no_backend_is_refused_by_name() {
        let admission = Admission::default();
        for (ip, port, named) in [
            ("0.0.0.0", "80", "0.0.0.0"),
            ("::", "80", "::"),
            ("::ffff:0.0.0.0", "80", "unspecified"),
            ("224.0.0.1", "80", "multicast"),
            ("ff02::1", "80", "multicast"),
            ("255.255.255.255", "80", "broadcast"),
            ("fe80::1", "80", "link-local"),
            ("10.0.0.1", "0", "port is 0"),
        ] {
            let value = format!(r#"{{"id":"n","ip":"{ip}","port":{port}}}"#);
            let Err(Refusal::NotAllowed(reason)) = admission.admit("n", &entry(&value)) else {
                panic!("{value} is taken in");
            };
            assert!(reason.contains(named), "{reason}");
            let node: Node = serde_json::from_str(&value).unwrap();
            assert!(admission.readmit(&node).is_err(), "{value} in a file");
        }
    }

    #[test]
    fn a_field_that_cannot_be_read_is_named() {
        for (field, value) in [
            ("port", r#""80""#),
            ("port", "70000"),
            ("zone", "7"),
            ("tags", r#""blue""#),
            ("state", "1"),
            ("priority", "-1"),
            ("last_seen", r#""now""#),
            ("leaving", "1"),
            ("ip", r#""10.0.0.300""#),
        ] {
            let ip = if field == "ip" {
                ""
            } else {
                r#""ip":"10.0.0.1","#
            };
            let value = format!(r#"{{"id":"n",{ip}"{field}":{value}}}"#);
            let Err(Refusal::Malformed(reason)) = Admission::default().admit("n", &entry(&value))
            else {
                panic!("{value} is taken in");
            };
            assert!(reason.starts_with(&format!("{field}: ")), "{reason}");
        }
    }

    proptest! {
        /// Whatever is stored, it is taken in or refused with a reason.
        #[test]
        fn any_bytes(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut any = entry("");
            any.value = value;
            let _ = Admission::default().admit("n", &any);
        }
    }
}
