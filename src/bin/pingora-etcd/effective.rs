//! Every value of a configuration, and where it comes from.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// The shipped file, which shows every field with its default.
const DEFAULTS: &str = include_str!("../../../config/load_balancer.yaml");
/// These have no default in common: the shipped file shows examples.
const EXAMPLES: [&str; 3] = ["cluster.etcd.endpoints", "cluster.group", "version"];

/// A value with the line of its key.
enum Tree {
    Map(Vec<(Spanned<String>, Tree)>),
    Leaf(Value),
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Tree::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tree, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Tree::Leaf(Value::Array(values)))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }
}

/// The values in the order of the text, with the lines of their keys.
fn leaves(text: &str) -> Result<Vec<(String, Value, u64)>, serde_saphyr::Error> {
    let mut found = Vec::new();
    collect(String::new(), serde_saphyr::from_str(text)?, 0, &mut found);
    Ok(found)
}

fn collect(path: String, tree: Tree, line: u64, found: &mut Vec<(String, Value, u64)>) {
    match tree {
        Tree::Leaf(value) => found.push((path, value, line)),
        Tree::Map(fields) => {
            for (key, value) in fields {
                let line = key.referenced.line();
                let below = match path.is_empty() {
                    true => key.value,
                    false => format!("{path}.{}", key.value),
                };
                collect(below, value, line, found);
            }
        }
    }
}

/// A line for each field: its value, and the line of the file that sets it, or that it is the default.
pub fn described(text: &str, name: &str) -> Result<String, serde_saphyr::Error> {
    let given = leaves(text)?;
    let mut given: BTreeMap<_, _> = given
        .into_iter()
        .map(|(path, value, line)| (path, (value, line)))
        .collect();
    let mut lines = Vec::new();
    for (path, default, _) in leaves(DEFAULTS)? {
        // What is set below a field that is empty by default, such as a list of certificates.
        let below = format!("{path}.");
        let mut set: Vec<_> = given.range(below.clone()..).collect();
        set.retain(|(field, _)| field.starts_with(&below));
        let set: Vec<String> = set.into_iter().map(|(field, _)| field.clone()).collect();
        for field in set {
            if let Some((value, line)) = given.remove(&field) {
                lines.push((shown(&field, &value), format!("{name}:{line}")));
            }
        }
        match given.remove(&path) {
            Some((value, line)) => lines.push((shown(&path, &value), format!("{name}:{line}"))),
            None if EXAMPLES.contains(&&*path) => {}
            None => lines.push((shown(&path, &default), "default".to_owned())),
        }
    }
    for (path, (value, line)) in given {
        lines.push((shown(&path, &value), format!("{name}:{line}")));
    }
    let width = lines.iter().map(|(text, _)| text.chars().count()).max();
    let width = width.unwrap_or(0).min(60);
    let lines: Vec<_> = lines
        .into_iter()
        .map(|(text, from)| format!("{text:width$}  # {from}"))
        .collect();
    Ok(lines.join("\n"))
}

fn shown(path: &str, value: &Value) -> String {
    let is_secret = path.ends_with(".password") && !value.is_null();
    match is_secret {
        true => format!("{path}: (not shown)"),
        false => format!("{path}: {value}"),
    }
}

#[cfg(test)]
mod tests {
    use pingora_etcd::config::ClusterConfig;

    use super::*;

    #[test]
    fn what_is_shown_as_default_is_the_default() {
        let short = "cluster: { group: workers, etcd: { endpoints: ['http://127.0.0.1:2379'] } }";
        let short = ClusterConfig::from_yaml(short, "short").unwrap();
        let full = ClusterConfig::from_yaml(DEFAULTS, "full").unwrap();
        assert_eq!(short, full);
    }

    #[test]
    fn each_value_says_where_it_comes_from() {
        let text = "version: 1\ncluster:\n  group: g\n  etcd:\n    endpoints: [http://a:1]\n    user: u\n    \
                    password: p\n  timeouts: { connect_ms: 7 }\n";
        let described = described(text, "x.yaml").unwrap();
        for line in [
            "version: 1  # x.yaml:1",
            "cluster.group: \"g\"  # x.yaml:3",
            "cluster.etcd.password: (not shown)  # x.yaml:7",
            "cluster.timeouts.connect_ms: 7  # x.yaml:8",
            "cluster.timeouts.handshake_ms: 1000  # default",
        ] {
            let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let is_there = described
                .lines()
                .any(|found| squeezed(found) == squeezed(line));
            assert!(is_there, "{line} in\n{described}");
        }
        assert!(!described.contains("\"p\""));
    }
}
