//! The JSON Schema of the file.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};

use super::clients::Network;
use super::file::File;
use super::route::Pattern;
use super::values::HashOn;

/// The JSON Schema (2020-12) of the YAML file, for editors and for checks before it is used: every field of the
/// section `cluster` with its meaning and kind. What [`ClusterConfig::validate`](super::ClusterConfig::validate) knows beyond it are
/// ranges and what fits together; of Pingora's part it knows nothing.
///
/// ```
/// let schema = pingora_etcd::config::schema();
/// assert_eq!(schema["title"], "The file of the load balancer pingora-etcd");
/// ```
pub fn schema() -> serde_json::Value {
    let settings = SchemaSettings::draft2020_12().for_deserialize();
    settings
        .into_generator()
        .into_root_schema_for::<File>()
        .into()
}

/// Values that are written as text.
macro_rules! text {
    ($($kind:ident),*) => {
        $(impl JsonSchema for $kind {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($kind).into()
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                String::json_schema(generator)
            }
        })*
    };
}

text!(HashOn, Network, Pattern);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_files_are_as_the_schema_says_and_wrong_ones_are_not() {
        let schema = jsonschema::validator_for(&schema()).unwrap();
        let problems = |text: &str| {
            let file: serde_json::Value = serde_saphyr::from_str(text).unwrap();
            let problems = schema.iter_errors(&file);
            problems
                .map(|problem| problem.to_string())
                .collect::<Vec<_>>()
        };
        let shipped = [
            include_str!("../../config/load_balancer.yaml"),
            include_str!("../../config/demo.yaml"),
            include_str!("../../config/leader_routing.yaml"),
            include_str!("../../config/routes.yaml"),
        ];
        for text in shipped {
            assert_eq!(problems(text), [""; 0]);
        }
        for (from, to) in [
            ("policy: headroom", "polcy: headroom"),
            ("policy: headroom", "policy: best"),
            ("response_ms: 2000", "response_ms: soon"),
            ("methods: [GET, POST, DELETE]", "methods: GET"),
            ("max_in_flight: 500", "max_in_flight: -1"),
            ("cluster:", "clusters:"),
        ] {
            let text = shipped[3].replacen(from, to, 1);
            assert!(!problems(&text).is_empty(), "{to}");
        }
    }
}
