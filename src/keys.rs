//! The key layout, shared with `photon-etcd-cluster`:
//!
//! ```text
//! {prefix}registry/{group}/{node id}       -> the node, as JSON
//! {prefix}election/{group}/{lease in hex}  -> the candidate's node id; least create revision leads
//! ```
//!
//! and one of our own, which `photon-etcd-cluster` never looks at:
//!
//! ```text
//! {prefix}handover/{group}/{lease in hex}  -> who is to lead next, asked for by the holder of the lease
//! ```
//!
//! Prefixes end with a slash: without it group `app` would see the keys of `app-2`. So does the key
//! prefix before all of them, unless it is empty: see [`with_slash`].

use crate::bugs::{self, Bug};
use crate::error::ClusterError;
use crate::ids::LeaseId;
use crate::validate;

/// The keys of one group.
#[derive(Debug, Clone)]
pub(crate) struct GroupKeys {
    registry: String,
    election: String,
    handover: String,
}

impl GroupKeys {
    pub(crate) fn new(prefix: &str, group: &str) -> Self {
        let slash = if bugs::has(Bug::PrefixWithoutSlash) {
            ""
        } else {
            "/"
        };
        Self {
            registry: format!("{prefix}registry/{group}{slash}"),
            election: format!("{prefix}election/{group}{slash}"),
            handover: format!("{prefix}handover/{group}/"),
        }
    }

    /// Who is to lead next.
    pub(crate) fn handover_prefix(&self) -> &str {
        &self.handover
    }

    /// Whether `key` is a request of this very group.
    pub(crate) fn is_handover(&self, key: &str) -> bool {
        Self::last(&self.handover, key).is_some()
    }

    /// The request of this lease's holder.
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
        if bugs::has(Bug::PrefixWithoutSlash) {
            return format!("{}/{node_id}", self.registry);
        }
        format!("{}{node_id}", self.registry)
    }

    pub(crate) fn candidacy(&self, lease: LeaseId) -> String {
        if bugs::has(Bug::PrefixWithoutSlash) {
            return format!("{}/{lease}", self.election);
        }
        format!("{}{lease}", self.election)
    }

    /// The node id that a registry key stands for. `None` for a key of a nested group
    /// (`registry/app/blue/n1` is of group `app/blue`, not of `app`).
    pub(crate) fn node_id<'k>(&self, key: &'k str) -> Option<&'k str> {
        Self::last(&self.registry, key)
    }

    /// Whether `key` is a candidacy of this very group.
    pub(crate) fn is_candidacy(&self, key: &str) -> bool {
        Self::last(&self.election, key).is_some()
    }

    fn last<'k>(prefix: &str, key: &'k str) -> Option<&'k str> {
        if bugs::has(Bug::PrefixWithoutSlash) {
            return key.strip_prefix(prefix)?.rsplit('/').next();
        }
        key.strip_prefix(prefix)
            .filter(|rest| !rest.is_empty() && !rest.contains('/'))
    }
}

impl GroupKeys {
    /// What a node of this id may have in the store under its lease.
    pub(crate) fn own(&self, id: &str, lease: LeaseId) -> [String; 3] {
        [
            self.registration(id),
            self.candidacy(lease),
            self.handover(lease),
        ]
    }
}

/// The keys of every group.
#[derive(Debug)]
pub(crate) struct Layout([String; 3]);

impl Layout {
    pub(crate) fn new(prefix: &str) -> Self {
        Self(["registry", "election", "handover"].map(|what| format!("{prefix}{what}/")))
    }

    /// Whether a key is one that nodes write. An application may have keys of its own under a
    /// leader's lease.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|prefix| key.starts_with(prefix.as_str()))
    }
}

/// A node id: one key segment.
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

/// A group: one key segment or several.
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

/// What goes before every key. Empty, or segments with a slash behind each.
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

/// A key prefix as it goes before every key: what ends without a slash would run into the layout,
/// as in `prodregistry/`.
pub(crate) fn with_slash(prefix: &str) -> String {
    if prefix.is_empty() || prefix.ends_with('/') {
        prefix.to_owned()
    } else {
        format!("{prefix}/")
    }
}

/// Whether readers take every key that a node of this id writes.
pub(crate) fn check_keys(prefix: &str, group: &str, node_id: &str) -> Result<(), ClusterError> {
    let keys = GroupKeys::new(prefix, group);
    // All three kinds of keys begin equally long.
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
    }

    #[test]
    fn groups_do_not_mix() {
        let keys = GroupKeys::new("", "app");
        assert_eq!(keys.node_id("registry/app/n1"), Some("n1"));
        assert_eq!(keys.node_id("registry/app-2/n1"), None);
        assert_eq!(keys.node_id("registry/app/blue/n1"), None);
        assert_eq!(keys.node_id("registry/app/"), None);
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
    fn a_key_that_no_reader_takes_is_refused_by_name() {
        let long = "x".repeat(500);
        for (prefix, group, id, field) in [
            (format!("{long}{long}/"), "g", "n", "key_prefix"),
            (
                String::new(),
                &*"x".repeat(512),
                &*"x".repeat(512),
                "node_id",
            ),
            // Short as they are: the lease is part of a key too.
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
