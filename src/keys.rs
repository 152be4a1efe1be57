//! The key layout, shared with `photon-etcd-cluster`:
//!
//! ```text
//! {prefix}registry/{group}/{node id}       -> the node, as JSON
//! {prefix}election/{group}/{lease in hex}  -> the candidate's node id; lowest create revision leads
//! ```
//!
//! and those of our own, which `photon-etcd-cluster` never reads:
//!
//! ```text
//! {prefix}handover/{group}/{lease in hex}  -> the next leader, requested by the holder of the lease
//! {prefix}handover/{group}/operator        -> the same, requested by an operator
//! {prefix}override/{group}/{node id}       -> what an operator says of a node, as JSON
//! ```
//!
//! All prefixes end with a slash: without it, group `app` would see the keys of `app-2`. The key
//! prefix in front of them also ends with one, unless it is empty: see [`with_slash`].

#[cfg(feature = "discovery")]
use std::borrow::Cow;

use crate::error::ClusterError;
use crate::ids::LeaseId;
use crate::validate;

/// The keys of one group.
#[derive(Debug, Clone)]
pub(crate) struct GroupKeys {
    registry: String,
    /// Empty, like the next ones, for a group that others write: it has none.
    election: String,
    handover: String,
    overrides: String,
    #[cfg_attr(not(feature = "discovery"), allow(dead_code))]
    of_others: Option<Nested>,
    /// Where others write entries of the same group.
    #[cfg(feature = "discovery")]
    further: Vec<FurtherKeys>,
}

/// Keys of others beside those of a group.
#[cfg(feature = "discovery")]
#[derive(Debug, Clone)]
pub(crate) struct FurtherKeys {
    pub(crate) prefix: String,
    pub(crate) nested: bool,
    /// Stands before the ids of their nodes, which could otherwise be those of others.
    pub(crate) label: String,
}

/// Whether a key that others write may have more than one segment after the prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Nested(bool);

/// The last segment of the key of an operator's request.
pub(crate) const OPERATOR: &str = "operator";

impl GroupKeys {
    pub(crate) fn new(prefix: &str, group: &str) -> Self {
        Self {
            registry: format!("{prefix}registry/{group}/"),
            election: format!("{prefix}election/{group}/"),
            handover: format!("{prefix}handover/{group}/"),
            overrides: format!("{prefix}override/{group}/"),
            of_others: None,
            #[cfg(feature = "discovery")]
            further: Vec::new(),
        }
    }

    /// Those of a group whose entries others write below this prefix.
    #[cfg(feature = "discovery")]
    pub(crate) fn of_others(prefix: String, nested: bool) -> Self {
        Self {
            registry: prefix,
            election: String::new(),
            handover: String::new(),
            overrides: String::new(),
            of_others: Some(Nested(nested)),
            further: Vec::new(),
        }
    }

    /// The same, with keys of others beside them.
    #[cfg(feature = "discovery")]
    pub(crate) fn with_further(mut self, further: Vec<FurtherKeys>) -> Self {
        self.further = further;
        self
    }

    /// The prefixes of all registrations, the group's own first.
    #[cfg(feature = "discovery")]
    pub(crate) fn registry_prefixes(&self) -> impl Iterator<Item = &str> {
        let further = self.further.iter().map(|keys| &*keys.prefix);
        std::iter::once(&*self.registry).chain(further)
    }

    /// Whether this crate's nodes write the entries: then there is an election, and operators have a word.
    #[cfg(feature = "discovery")]
    pub(crate) fn are_ours(&self) -> bool {
        self.of_others.is_none()
    }

    /// The prefix of what operators say of nodes.
    pub(crate) fn override_prefix(&self) -> &str {
        &self.overrides
    }

    /// The key of what an operator says of a node.
    pub(crate) fn override_of(&self, node_id: &str) -> String {
        format!("{}{node_id}", self.overrides)
    }

    /// The node id in the key of an override; `None` for a key of a nested group.
    pub(crate) fn overridden<'k>(&self, key: &'k str) -> Option<&'k str> {
        Self::last(&self.overrides, key)
    }

    /// The key of an operator's request that another node leads.
    pub(crate) fn operator_request(&self) -> String {
        format!("{}{OPERATOR}", self.handover)
    }

    /// The prefix of the requests to hand leadership over.
    pub(crate) fn handover_prefix(&self) -> &str {
        &self.handover
    }

    /// Whether `key` is such a request in this group (not in a nested one).
    pub(crate) fn is_handover(&self, key: &str) -> bool {
        Self::last(&self.handover, key).is_some()
    }

    /// The key of a request by the holder of this lease.
    pub(crate) fn handover(&self, lease: LeaseId) -> String {
        format!("{}{lease}", self.handover)
    }

    pub(crate) fn registry_prefix(&self) -> &str {
        &self.registry
    }

    pub(crate) fn election_prefix(&self) -> &str {
        &self.election
    }

    pub(crate) fn registration(&self, node_id: &str) -> String {
        format!("{}{node_id}", self.registry)
    }

    pub(crate) fn candidacy(&self, lease: LeaseId) -> String {
        format!("{}{lease}", self.election)
    }

    /// The node id in a registry key. `None` for a key of a nested group (`registry/app/blue/n1`
    /// belongs to group `app/blue`, not to `app`). In a nested key of others, a slash is `%2F` in the id.
    /// Beside keys of the group itself, those of others have their label in front of it.
    #[cfg(feature = "discovery")]
    pub(crate) fn node_id<'k>(&self, key: &'k str) -> Option<Cow<'k, str>> {
        let is_nested = self.of_others == Some(Nested(true));
        if let Some(id) = Self::id_below(&self.registry, is_nested, key) {
            return Some(id);
        }
        self.further.iter().find_map(|keys| {
            let id = Self::id_below(&keys.prefix, keys.nested, key)?;
            Some(Cow::Owned(format!("{}:{id}", keys.label)))
        })
    }

    #[cfg(feature = "discovery")]
    fn id_below<'k>(prefix: &str, is_nested: bool, key: &'k str) -> Option<Cow<'k, str>> {
        if !is_nested {
            return Self::last(prefix, key).map(Cow::Borrowed);
        }
        let rest = key.strip_prefix(prefix)?;
        let rest = Some(rest).filter(|rest| !rest.is_empty() && !rest.ends_with('/'))?;
        Some(match rest.contains(['/', '%']) {
            true => Cow::Owned(rest.replace('%', "%25").replace('/', "%2F")),
            false => Cow::Borrowed(rest),
        })
    }

    /// Whether a node of this group can have this id.
    #[cfg(any(test, feature = "discovery"))]
    pub(crate) fn is_id(id: &str) -> bool {
        !id.is_empty() && !id.contains('/')
    }

    /// Whether `key` is a candidacy in this group (not in a nested one).
    pub(crate) fn is_candidacy(&self, key: &str) -> bool {
        Self::last(&self.election, key).is_some()
    }

    /// The last segment of a key that is directly below the prefix.
    fn last<'k>(prefix: &str, key: &'k str) -> Option<&'k str> {
        if prefix.is_empty() {
            return None;
        }
        key.strip_prefix(prefix)
            .filter(|rest| !rest.is_empty() && !rest.contains('/'))
    }

    /// The keys that a node with this id may have in the store under its lease.
    pub(crate) fn own(&self, id: &str, lease: LeaseId) -> [String; 3] {
        [
            self.registration(id),
            self.candidacy(lease),
            self.handover(lease),
        ]
    }
}

/// The prefixes of the keys of all groups.
#[derive(Debug)]
pub(crate) struct Layout([String; 3]);

impl Layout {
    pub(crate) fn new(prefix: &str) -> Self {
        Self(["registry", "election", "handover"].map(|what| format!("{prefix}{what}/")))
    }

    /// Whether nodes write keys like this one. An application may put its own keys under a leader's
    /// lease.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|prefix| key.starts_with(prefix.as_str()))
    }
}

/// Checks a node id: one key segment.
pub(crate) fn check_node_id(id: &str) -> Result<(), ClusterError> {
    check_name("node_id", id)?;
    if id.contains('/') {
        return Err(ClusterError::config(
            "node_id",
            format!("{id:?} contains a slash; it is the last segment of an etcd key"),
        ));
    }
    Ok(())
}

/// Checks a group name: one or more key segments.
pub(crate) fn check_group(group: &str) -> Result<(), ClusterError> {
    check_name("group", group)?;
    if group.split('/').any(str::is_empty) {
        return Err(ClusterError::config(
            "group",
            format!("{group:?} has an empty segment (leading, trailing or double slash)"),
        ));
    }
    Ok(())
}

/// Checks a key prefix: empty, or segments that are each followed by a slash, which may be missing
/// at the end.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), ClusterError> {
    let refuse = |reason| Err(ClusterError::config("key_prefix", reason));
    if prefix.is_empty() {
        return Ok(());
    }
    check_name("key_prefix", prefix)?;
    if prefix.trim() != prefix {
        return refuse(format!("{prefix:?} begins or ends with a space"));
    }
    if prefix.contains("//") {
        return refuse(format!("{prefix:?} has an empty segment (double slash)"));
    }
    Ok(())
}

/// The key prefix as it is put in front of every key. Without a slash at its end it would run into
/// the rest of the key, as in `prodregistry/`.
pub(crate) fn with_slash(prefix: &str) -> String {
    if prefix.is_empty() || prefix.ends_with('/') {
        prefix.to_owned()
    } else {
        format!("{prefix}/")
    }
}

/// Checks that readers accept every key that a node with this id writes.
pub(crate) fn check_keys(prefix: &str, group: &str, node_id: &str) -> Result<(), ClusterError> {
    let keys = GroupKeys::new(prefix, group);
    // The names `registry`, `election` and `handover` are equally long.
    let registration = keys.registration(node_id).len();
    let longest = registration.max(keys.candidacy(LeaseId(i64::MAX)).len());
    let most = validate::KEY_BYTES;
    if longest <= most {
        return Ok(());
    }
    let (prefix, group, id) = (prefix.len(), group.len(), node_id.len());
    let lengths = [("key_prefix", prefix), ("group", group), ("node_id", id)];
    let (field, _) = lengths
        .into_iter()
        .max_by_key(|(_, length)| *length)
        .unwrap_or(lengths[0]);
    Err(ClusterError::config(
        field,
        format!(
            "makes a key of {longest} bytes, at most {most} allowed: key_prefix has {prefix}, group {group}, node_id {id}"
        ),
    ))
}

fn check_name(field: &str, name: &str) -> Result<(), ClusterError> {
    if name.is_empty() {
        return Err(ClusterError::config(field, "must not be empty"));
    }
    validate::name(name).map_err(|reason| ClusterError::config(field, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_shared_one() {
        let keys = GroupKeys::new("", "app");
        assert_eq!(keys.registration("n1"), "registry/app/n1");
        assert_eq!(keys.candidacy(LeaseId(0x1a2b)), "election/app/1a2b");
        let keys = GroupKeys::new("prod/", "app");
        assert_eq!(keys.registration("n1"), "prod/registry/app/n1");
        assert_eq!(keys.candidacy(LeaseId(0x1a2b)), "prod/election/app/1a2b");
        assert_eq!(keys.handover(LeaseId(0x1a2b)), "prod/handover/app/1a2b");
        assert_eq!(keys.operator_request(), "prod/handover/app/operator");
        assert_eq!(keys.override_of("n1"), "prod/override/app/n1");
        assert_eq!(keys.registry_prefix(), "prod/registry/app/");
        assert_eq!(keys.election_prefix(), "prod/election/app/");
        assert_eq!(keys.handover_prefix(), "prod/handover/app/");
        assert_eq!(keys.override_prefix(), "prod/override/app/");
    }

    #[test]
    fn groups_do_not_mix() {
        let keys = GroupKeys::new("", "app");
        #[cfg(feature = "discovery")]
        {
            assert_eq!(keys.node_id("registry/app/n1").as_deref(), Some("n1"));
            assert_eq!(keys.node_id("registry/app-2/n1"), None);
            assert_eq!(keys.node_id("registry/app/blue/n1"), None);
            assert_eq!(keys.node_id("registry/app/"), None);
        }
        assert!(!keys.is_candidacy("election/app-2/1"));
        assert!(!keys.is_candidacy("election/app/blue/1"));
        assert!(!keys.is_handover("handover/app/blue/1"));
        assert!(keys.is_handover("handover/app/1"));
    }

    #[test]
    fn bad_names_are_refused_by_name() {
        for id in ["", "a/b", "a\nb"] {
            let error = check_node_id(id).unwrap_err().to_string();
            assert!(error.contains("node_id"), "{error}");
        }
        for group in ["", "/app", "app/", "a//b"] {
            let error = check_group(group).unwrap_err().to_string();
            assert!(error.contains("group"), "{error}");
        }
        check_group("team/app").unwrap();
    }

    #[test]
    fn a_key_that_no_reader_accepts_is_refused_by_name() {
        let long = "x".repeat(500);
        for (prefix, group, id, field) in [
            (format!("{long}{long}/"), "g", "n", "key_prefix"),
            (
                String::new(),
                &*"x".repeat(512),
                &*"x".repeat(512),
                "node_id",
            ),
            // The names alone would fit, but a key may also contain the lease.
            (format!("{long}/"), &*long, "n", "key_prefix"),
        ] {
            let error = check_keys(&prefix, group, id).unwrap_err().to_string();
            let named = error.contains(&format!("invalid {field}: ")) && error.contains("1024");
            assert!(named, "{error}");
        }
        check_keys("", &long, &long).unwrap();
        let most = 1_024 - "registry//".len() - 500;
        check_keys("", &long, &"x".repeat(most)).unwrap();
        check_keys("", &long, &"x".repeat(most + 1)).unwrap_err();
    }
}
