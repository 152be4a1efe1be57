//! The `cluster.etcd` section.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::error::ClusterError;
use crate::store::{Credentials, EtcdOptions, Password, TlsOptions};

/// `cluster.etcd`: the fields of [`EtcdOptions`].
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct EtcdConfig {
    /// See [`EtcdOptions::endpoints`].
    pub endpoints: Vec<String>,
    /// See [`EtcdOptions::key_prefix`].
    #[serde(default)]
    pub key_prefix: String,
    /// See [`EtcdOptions::sync_endpoints`].
    #[serde(default)]
    pub sync_endpoints: bool,
    /// See [`EtcdOptions::connect_timeout`].
    #[serde(default = "default_etcd_connect")]
    pub connect_timeout_ms: u64,
    /// See [`EtcdOptions::request_timeout`].
    #[serde(default = "default_etcd_request")]
    pub request_timeout_ms: u64,
    /// See [`EtcdOptions::keep_alive_interval`].
    #[serde(default = "default_etcd_keep_alive")]
    pub keep_alive_interval_ms: u64,
    /// See [`EtcdOptions::silence_timeout`].
    #[serde(default = "default_etcd_silence")]
    pub silence_timeout_ms: u64,
    /// See [`EtcdOptions::serializable_fallback`].
    #[serde(default)]
    pub serializable_fallback: bool,
    /// See [`EtcdOptions::breaker_failures`].
    #[serde(default = "default_breaker_failures")]
    pub breaker_failures: u32,
    /// See [`EtcdOptions::breaker_pause`].
    #[serde(default = "default_breaker_pause")]
    pub breaker_pause_ms: u64,
    /// See [`EtcdOptions::tls`]. Default: nothing in it set, as if it were not given.
    #[serde(default)]
    pub tls: TlsOptions,
    /// See [`Credentials`]. Needs exactly one of the next three fields. Default: none.
    #[serde(default)]
    pub user: Option<String>,
    /// The password itself. Better in a file or a variable: see [`Password`].
    #[serde(default)]
    pub password: Option<Secret>,
    /// The file that contains the password.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// The environment variable that contains the password.
    #[serde(default)]
    pub password_env: Option<String>,
}

/// As the options that it describes, which show no password, whichever field contains it.
impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EtcdConfig")
            .field(&EtcdOptions::from(self))
            .finish()
    }
}

/// A text that neither `Debug` nor an error about the file shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The error of a wrong type would show the value.
        String::deserialize(deserializer)
            .map(Self)
            .map_err(|_| serde::de::Error::custom("password: must be a text in quotes"))
    }
}

fn default_etcd_silence() -> u64 {
    5_000
}

fn default_breaker_failures() -> u32 {
    5
}

fn default_breaker_pause() -> u64 {
    1_000
}

fn default_etcd_connect() -> u64 {
    2_000
}

fn default_etcd_request() -> u64 {
    3_000
}

fn default_etcd_keep_alive() -> u64 {
    10_000
}

impl EtcdConfig {
    fn passwords(&self) -> impl Iterator<Item = Password> {
        let text = self.password.clone();
        let text = text.map(|Secret(text)| Password::Text(text));
        let file = self.password_file.clone().map(Password::File);
        let env = self.password_env.clone().map(Password::Env);
        text.into_iter().chain(file).chain(env)
    }

    fn credentials(&self) -> Option<Credentials> {
        // A user without a password must stay visible, so that a later check can refuse it.
        let password = self.passwords().next();
        let user = self.user.clone()?;
        Some(Credentials::new(
            user,
            password.unwrap_or(Password::Text(String::new())),
        ))
    }

    pub(super) fn check_user(&self) -> Result<(), ClusterError> {
        let reason = match (&self.user, self.passwords().count()) {
            (None, 0) | (Some(_), 1) => return Ok(()),
            (None, _) => "is missing, and a password is given",
            (Some(_), 0) => "goes with one of password, password_file and password_env",
            (Some(_), _) => "goes with only one of password, password_file and password_env",
        };
        Err(ClusterError::config("user", reason))
    }
}

impl From<&EtcdConfig> for EtcdOptions {
    fn from(config: &EtcdConfig) -> Self {
        let mut options = EtcdOptions::new(config.endpoints.iter().cloned());
        if config.tls != TlsOptions::default() {
            options = options.tls(config.tls.clone());
        }
        if let Some(credentials) = config.credentials() {
            options = options.credentials(credentials);
        }
        options
            .key_prefix(config.key_prefix.clone())
            .sync_endpoints(config.sync_endpoints)
            .connect_timeout(Duration::from_millis(config.connect_timeout_ms))
            .request_timeout(Duration::from_millis(config.request_timeout_ms))
            .keep_alive_interval(Duration::from_millis(config.keep_alive_interval_ms))
            .silence_timeout(Duration::from_millis(config.silence_timeout_ms))
            .serializable_fallback(config.serializable_fallback)
            .breaker(
                config.breaker_failures,
                Duration::from_millis(config.breaker_pause_ms),
            )
    }
}
