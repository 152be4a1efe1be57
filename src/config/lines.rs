//! Where in a file each value is.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::unreadable::unreadable;
use crate::error::ClusterError;

/// A value that a file gives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Given {
    /// Where it is in the structure: `cluster.routes[0].hosts`.
    pub field: String,
    /// As it stands there: variables are not replaced.
    pub value: Value,
    /// The line, from 1.
    pub line: u64,
}

/// Every value that the text of a file gives, in its order. A list of plain values is one value. `name` is
/// used in errors.
///
/// ```
/// let given = pingora_etcd::config::given("threads: 2\ncluster:\n  group: ${GROUP}\n", "x.yaml")?;
/// assert_eq!((&*given[1].field, given[1].line), ("cluster.group", 3));
/// assert_eq!(given[1].value, "${GROUP}");
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile) if the text is not YAML.
pub fn given(text: &str, name: &str) -> Result<Vec<Given>, ClusterError> {
    // Without the values of variables, which may be secret.
    let tree =
        serde_saphyr::from_str(text).map_err(|error| unreadable(name, text, None, &error))?;
    let mut found = Vec::new();
    collect(String::new(), tree, 0, &mut found);
    Ok(found)
}

/// The line of a field, or of the nearest one above it that is given.
pub(super) fn line_of(text: &str, field: &str) -> Option<u64> {
    let mut lines = Vec::new();
    positions(
        String::new(),
        &serde_saphyr::from_str(text).ok()?,
        &mut lines,
    );
    let is_above = |path: &str| {
        let rest = field.strip_prefix(path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let above = lines.into_iter().filter(|(path, _)| is_above(path));
    above
        .max_by_key(|(path, _)| path.len())
        .map(|(_, line)| line)
}

/// A value with the lines of its parts.
enum Tree {
    Map(Vec<(Spanned<String>, Tree)>),
    List(Vec<Spanned<Tree>>),
    Leaf(Value),
}

fn below(path: &str, key: &str) -> String {
    match path.is_empty() {
        true => key.to_owned(),
        false => format!("{path}.{key}"),
    }
}

fn positions(path: String, tree: &Tree, found: &mut Vec<(String, u64)>) {
    match tree {
        Tree::Leaf(_) => {}
        Tree::Map(fields) => {
            for (key, value) in fields {
                let path = below(&path, &key.value);
                found.push((path.clone(), key.referenced.line()));
                positions(path, value, found);
            }
        }
        Tree::List(items) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                found.push((path.clone(), item.referenced.line()));
                positions(path, &item.value, found);
            }
        }
    }
}

fn collect(field: String, tree: Tree, line: u64, found: &mut Vec<Given>) {
    match tree {
        Tree::Leaf(value) => found.push(Given { field, value, line }),
        Tree::Map(fields) => {
            for (key, value) in fields {
                let line = key.referenced.line();
                collect(below(&field, &key.value), value, line, found);
            }
        }
        Tree::List(items) => {
            let plain: Option<Vec<Value>> = items
                .iter()
                .map(|item| match &item.value {
                    Tree::Leaf(value) => Some(value.clone()),
                    Tree::Map(_) | Tree::List(_) => None,
                })
                .collect();
            if let Some(plain) = plain {
                let value = Value::Array(plain);
                return found.push(Given { field, value, line });
            }
            for (index, item) in items.into_iter().enumerate() {
                let line = item.referenced.line();
                collect(format!("{field}[{index}]"), item.value, line, found);
            }
        }
    }
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
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Tree::List(items))
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
