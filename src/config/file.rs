//! Reading the file: errors name the file, the line and the field, and never show a password.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_saphyr::with_deserializer_from_str_with_options;

use super::cluster::ClusterConfig;
use super::lines::{given, line_of};
use super::unreadable::{in_file, unreadable};
use crate::error::ClusterError;

/// The part of the file that is described here; Pingora's own settings are beside it.
#[derive(Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(
    feature = "schema",
    schemars(title = "The file of the load balancer pingora-etcd")
)]
pub(super) struct File {
    cluster: ClusterConfig,
}

impl ClusterConfig {
    /// Reads this section from the text of a file; `name` is used in errors. In a value without quotes, `${NAME}`
    /// stands for the environment variable of that name, and `${NAME:-other}` for `other` where there is none.
    ///
    /// # Errors
    ///
    /// [`ConfigFile`](ClusterError::ConfigFile) with file, field and, where known, line.
    pub fn from_yaml(text: &str, name: &str) -> Result<Self, ClusterError> {
        let file: File = parse(text, name)?;
        let checked = file.cluster.validate();
        checked.map_err(|error| at_line(name, text, error))?;
        Ok(file.cluster)
    }
}

/// Reads a text, with the values of environment variables.
pub(super) fn parse<T: DeserializeOwned>(text: &str, name: &str) -> Result<T, ClusterError> {
    let variables: HashMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let options = serde_saphyr::Options::default().with_properties(variables);
    let mut field = None;
    let read = with_deserializer_from_str_with_options(text, options, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = Some(error.path().to_string());
            error.into_inner()
        })
    });
    read.map_err(|error| unreadable(name, text, field.as_deref(), &error))
}

/// An error that names a field of the file, with the file's name and, if the field is given there, its line: for what is only
/// found out when a server is built, such as an address that is taken. `text` is that of the file. Other errors stay as
/// they are.
///
/// ```
/// use pingora_etcd::{ClusterError, config};
///
/// let error = ClusterError::InvalidConfig { field: "cluster.listen".to_owned(), reason: "it is taken".to_owned() };
/// let error = config::locate(error, "cluster:\n  listen: 0.0.0.0:80\n", "x.yaml");
/// assert_eq!(error.to_string(), "x.yaml: line 2: invalid cluster.listen: it is taken");
/// ```
pub fn locate(error: ClusterError, text: &str, name: &str) -> ClusterError {
    match &error {
        ClusterError::InvalidConfig { field, .. } => match line_of(text, field) {
            Some(line) => in_file(name, format!("line {line}: {error}")),
            None => in_file(name, error),
        },
        _ => error,
    }
}

/// An error in a field of this file, with its line.
fn at_line(name: &str, text: &str, error: ClusterError) -> ClusterError {
    match &error {
        ClusterError::InvalidConfig { field, .. } => match line_of(text, field) {
            // Its value may be secret.
            Some(line) if is_from_variable(text, field) && !error.to_string().contains("${") => {
                let reason = "the value that its variables give cannot be used";
                in_file(name, format!("line {line}: invalid {field}: {reason}"))
            }
            _ => locate(error, text, name),
        },
        _ => in_file(name, error),
    }
}

/// Whether the value of a field, or a part of it, is that of a variable.
fn is_from_variable(text: &str, field: &str) -> bool {
    let is_within = |one: &str, other: &str| {
        let rest = one.strip_prefix(other);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let given = given(text, "").unwrap_or_default();
    let mut values = given
        .iter()
        .filter(|it| is_within(&it.field, field) || is_within(field, &it.field));
    values.any(|it| it.value.to_string().contains("${"))
}

#[cfg(test)]
mod tests;
