//! Pingora's part of the file, and the file as a whole.

use std::collections::HashMap;
use std::path::Path;

use pingora::server::configuration::ServerConf;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

use super::cluster::ClusterConfig;
use super::file::{in_file, unreadable};
use crate::error::ClusterError;

/// Reads Pingora's part of the text of a file, and checks it for fields that do not exist; `name` is
/// used in errors.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile), naming the field and its line.
pub fn server_conf(text: &str, name: &str) -> Result<ServerConf, ClusterError> {
    type Fields<Key> = HashMap<Key, IgnoredAny>;
    let given: Fields<Spanned<String>> =
        serde_saphyr::from_str(text).map_err(|error| unreadable(name, text, &error))?;
    let known: Fields<String> = serde_saphyr::from_str(&ServerConf::default().to_yaml())
        .map_err(|error| in_file("Pingora's defaults", error))?;
    let mut unknown: Vec<_> = given
        .keys()
        .filter(|field| field.value != "cluster" && !known.contains_key(&field.value))
        .collect();
    unknown.sort_by_key(|field| field.referenced.line());
    if let Some(field) = unknown.first() {
        let (line, field) = (field.referenced.line(), &field.value);
        return Err(in_file(
            name,
            format!("line {line}: Pingora's server section has no field {field:?}"),
        ));
    }
    // Not by Pingora's own parser, whose errors repeat the whole file.
    let conf: ServerConf =
        serde_saphyr::from_str(text).map_err(|error| unreadable(name, text, &error))?;
    for (field, value) in [
        ("threads", conf.threads),
        ("listener_tasks_per_fd", conf.listener_tasks_per_fd),
        ("max_retries", conf.max_retries),
    ] {
        // There is no upper limit that a range could name.
        if value == 0 {
            return Err(in_file(
                name,
                format!("{field}: 0 is out of range, at least 1"),
            ));
        }
    }
    conf.validate().map_err(|error| in_file(name, error))
}

/// Reads both parts of a file, from which the bundled load balancer starts.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile) with file, field and, where known, line.
pub fn load(path: impl AsRef<Path>) -> Result<(ClusterConfig, ServerConf), ClusterError> {
    let name = path.as_ref().display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| in_file(&name, error))?;
    let cluster = ClusterConfig::from_yaml(&text, &name)?;
    Ok((cluster, server_conf(&text, &name)?))
}
