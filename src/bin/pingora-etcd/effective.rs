//! Every value of a configuration, and where it comes from.

use std::collections::BTreeMap;

use pingora_etcd::ClusterError;
use pingora_etcd::config::{Given, given};
use serde_json::Value;

/// The shipped file, which shows every field with its default.
const DEFAULTS: &str = include_str!("../../../config/load_balancer.yaml");
/// These have no default in common: the shipped file shows examples.
const EXAMPLES: [&str; 3] = ["cluster.etcd.endpoints", "cluster.group", "version"];

fn defaults() -> Result<Vec<Given>, ClusterError> {
    given(DEFAULTS, "the shipped file")
}

/// A line for each field: its value, and the line of the file that sets it, or that it is the default.
pub fn described(text: &str, name: &str) -> Result<String, ClusterError> {
    let given = given(text, name)?;
    let mut given: BTreeMap<_, _> = given
        .into_iter()
        .map(|given| (given.field, (given.value, given.line)))
        .collect();
    let mut lines = Vec::new();
    for Given {
        field: path,
        value: default,
        ..
    } in defaults()?
    {
        // What is set below a field that is empty by default, such as a list of certificates.
        let is_below = |field: &str| {
            let rest = field.strip_prefix(&*path);
            rest.is_some_and(|rest| rest.starts_with(['.', '[']))
        };
        let set = given.keys().filter(|field| is_below(field));
        let set: Vec<String> = set.cloned().collect();
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
    let is_secret = path.ends_with(".password") && !value.is_null() || path.contains("headers.");
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
