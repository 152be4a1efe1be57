//! The user of the connection to etcd, and where its password comes from.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::files::read_file;
use crate::error::ClusterError;

/// The user that requests to etcd are made as.
///
/// The password is read at each authentication, so a file or variable that changes needs no
/// restart; while it cannot be read, the last one is used. It appears in no log, no error and no
/// `Debug` output. Over `http://` it is sent in plain text: use TLS as well.
///
/// ```
/// use pingora_etcd::{EtcdOptions, store::{Credentials, Password}};
/// let credentials = Credentials::new("balancer", Password::Text("secret".to_owned()));
/// let options = EtcdOptions::new(["http://10.0.0.1:2379"]).credentials(credentials);
/// assert!(!format!("{options:?}").contains("secret"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// The user's name in etcd.
    pub user: String,
    /// Where the password comes from.
    pub password: Password,
    /// Why the fields of a file do not make credentials. Reported by `validate`, with the field.
    fault: Option<&'static str>,
}

/// Where a password comes from.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Password {
    /// The password itself.
    Text(String),
    /// The content of this file, without the line break at its end.
    File(PathBuf),
    /// The value of this environment variable.
    Env(String),
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(..)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Env(name) => f.debug_tuple("Env").field(name).finish(),
        }
    }
}

/// A password in a file. No error about the file shows it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Serde's own error about a wrong type would show the value.
        String::deserialize(deserializer)
            .map(Self)
            .map_err(|_| serde::de::Error::custom("password: must be a text in quotes"))
    }
}

impl From<Secret> for Password {
    fn from(secret: Secret) -> Self {
        Self::Text(secret.0)
    }
}

fn config(field: &str, reason: impl Into<String>) -> ClusterError {
    ClusterError::config(field, reason)
}

impl Credentials {
    /// This user with this password.
    pub fn new(user: impl Into<String>, password: Password) -> Self {
        Self {
            user: user.into(),
            password,
            fault: None,
        }
    }

    /// From the fields `user`, `password`, `password_file` and `password_env` of a file. A wrong
    /// combination is kept as such, because it must be an error and not be taken for no credentials.
    pub(super) fn from_fields(
        user: Option<String>,
        passwords: impl IntoIterator<Item = Password>,
    ) -> Option<Self> {
        let mut passwords = passwords.into_iter();
        let (first, has_more) = (passwords.next(), passwords.next().is_some());
        let fault = match (&user, &first) {
            (None, None) => return None,
            (None, Some(_)) => Some("is missing, and a password is given"),
            (Some(_), None) => Some("needs one of password, password_file and password_env"),
            (Some(_), Some(_)) if has_more => {
                Some("needs only one of password, password_file and password_env")
            }
            (Some(_), Some(_)) => None,
        };
        Some(Self {
            user: user.unwrap_or_default(),
            password: first.unwrap_or(Password::Text(String::new())),
            fault,
        })
    }

    /// Checks which of the fields of a file are there.
    pub(super) fn check_fields(&self) -> Result<(), ClusterError> {
        self.fault
            .map_or(Ok(()), |fault| Err(config("user", fault)))
    }

    /// Checks the user, and that the password can be read. Blocks.
    pub(super) fn validate(&self) -> Result<(), ClusterError> {
        self.check_fields()?;
        if self.user.is_empty() {
            return Err(config("user", "must not be empty"));
        }
        self.password.read().map(drop)
    }
}

impl Password {
    /// The current password. Blocks.
    pub(super) fn read(&self) -> Result<String, ClusterError> {
        let (field, source, password) = match self {
            Self::Text(text) => ("password", String::new(), text.clone()),
            Self::File(path) => {
                let field = "password_file";
                let source = format!("{}: ", path.display());
                let text = String::from_utf8(read_file(field, path)?)
                    .map_err(|_| config(field, format!("{source}is not UTF-8")))?;
                let line = text.strip_suffix('\n').unwrap_or(&text);
                let line = line.strip_suffix('\r').unwrap_or(line);
                (field, source, line.to_owned())
            }
            Self::Env(name) => {
                let field = "password_env";
                let source = format!("the environment variable {name:?} ");
                // Not `env::var`: its error shows a value that is not UTF-8.
                let value = std::env::var_os(name)
                    .ok_or_else(|| config(field, format!("{source}is not set")))?;
                let value = value
                    .into_string()
                    .map_err(|_| config(field, format!("{source}is not UTF-8")))?;
                (field, source, value)
            }
        };
        if password.is_empty() {
            return Err(config(field, format!("{source}is empty")));
        }
        Ok(password)
    }
}

#[cfg(test)]
mod tests;
