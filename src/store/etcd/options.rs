//! The options of the connection to the store, in code and in the section `cluster.etcd` of a file.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::credentials::{Credentials, Password, Secret};
use super::endpoint::{self, MEMORY, redacted};
use super::tls::TlsOptions;
use crate::error::{ClusterError, in_range};
use crate::keys;

/// How to reach etcd, or the in-memory store.
///
/// A list of endpoints converts into it, so that wherever options are taken
/// `vec!["http://10.0.0.1:2379".to_string()]` is enough.
///
/// In a YAML file it has the same fields, with two differences: times are in milliseconds and named
/// so, as `request_timeout_ms`; and instead of `credentials` there are `user` and one of `password`,
/// `password_file` and `password_env`.
///
/// ```
/// use pingora_etcd::EtcdOptions;
/// let options = EtcdOptions::new(["http://10.0.0.1:2379", "http://10.0.0.2:2379"])
///     .key_prefix("prod/")
///     .request_timeout(std::time::Duration::from_secs(2));
/// options.validate().unwrap();
/// assert!(EtcdOptions::new(["ftp://nowhere"]).validate().is_err());
/// ```
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(
    remote = "Self",
    default = "EtcdOptions::without_endpoints",
    deny_unknown_fields
)]
#[non_exhaustive]
pub struct EtcdOptions {
    /// `http://host:port` or, with the feature `tls`, `https://host:port` of each member. They are
    /// tried in turn, at each address that their name has; one connection is used at a time. For the order see
    /// `shuffle_endpoints`. Without
    /// a scheme it is `https` if `tls` is given, and `http` if not. Or one `memory://name`: the
    /// in-memory store of that name in this process, which needs no server and keeps nothing. An
    /// endpoint must not contain user and password: see `credentials`.
    pub endpoints: Vec<String>,
    /// A prefix of every key, to share an etcd with others, such as `prod/` in
    /// `prod/registry/workers/n1`. A slash is added at its end if there is none. No control
    /// characters, no spaces around it, no double slash, at most 512 bytes. Default: empty.
    pub key_prefix: String,
    /// Whether the endpoints follow the cluster's member list: the client URLs of its members,
    /// except learners, are read after each connection and then every minute. Those of `endpoints`
    /// are tried after them. Every member must be reachable by the URLs that it advertises. Default:
    /// false.
    pub sync_endpoints: bool,
    /// Whether each process tries the endpoints in an order of its own, so that a fleet with one list is spread over
    /// the members: each member sends changes only to the watches of its own clients. False for an order of preference,
    /// such as the member of the same zone first. Default: true.
    pub shuffle_endpoints: bool,
    /// How long to wait for a connection to one endpoint before the next one is tried. The slow
    /// attempt goes on in the background, for up to 30 s. Default: 2 s. Range: 10 ms to 60 s.
    #[serde(rename = "connect_timeout_ms", deserialize_with = "milliseconds")]
    #[cfg_attr(feature = "schema", schemars(with = "u64"))]
    pub connect_timeout: Duration,
    /// How long to wait for the answer to one request. If answers were measured to take longer than
    /// half of this, the wait is longer too: at most twice the time of an answer, up to 30 s.
    /// Default: 3 s. Range: 10 ms to 60 s.
    #[serde(rename = "request_timeout_ms", deserialize_with = "milliseconds")]
    #[cfg_attr(feature = "schema", schemars(with = "u64"))]
    pub request_timeout: Duration,
    /// After how long without any data a connection is probed by an HTTP/2 ping, which must be
    /// answered within 30 s, or `request_timeout` if that is longer. This is for connections without
    /// a watch; a discovery probes its watches earlier, see `silence_timeout`. Default: 10 s. Range:
    /// 10 s to 1 hour, because etcd closes the connection of a client that pings more often than
    /// every 5 s.
    #[serde(rename = "keep_alive_interval_ms", deserialize_with = "milliseconds")]
    #[cfg_attr(feature = "schema", schemars(with = "u64"))]
    pub keep_alive_interval: Duration,
    /// How long a watch may receive nothing at all before its connection is replaced. A quiet server
    /// is asked for an answer well before that, and has more time if its answers were measured to
    /// take longer than a quarter of this. Default: 5 s. Range: 500 ms to 5 minutes.
    #[serde(rename = "silence_timeout_ms", deserialize_with = "milliseconds")]
    #[cfg_attr(feature = "schema", schemars(with = "u64"))]
    pub silence_timeout: Duration,
    /// Whether a discovery without a view uses the registrations as any one member has them, while
    /// there is no quorum. They may be out of date. Not with `credentials`: etcd needs a quorum to
    /// check a password. Default: false.
    pub serializable_fallback: bool,
    /// After how many failures in a row (to connect, or to get an answer) calls fail at once, except
    /// lease renewals and one trial call per pause. Default: 5. Range: 1 to 1,000,000.
    pub breaker_failures: u32,
    /// How long calls then fail at once before one is tried. Default: 1 s. Range: 10 ms to 60 s.
    #[serde(rename = "breaker_pause_ms", deserialize_with = "milliseconds")]
    #[cfg_attr(feature = "schema", schemars(with = "u64"))]
    pub breaker_pause: Duration,
    /// False in tests of servers that do not answer progress requests.
    #[serde(skip)]
    pub(super) requests_progress: bool,
    /// The TLS options. Default: none, which for an `https://` endpoint means the system's CAs and
    /// no client certificate.
    #[serde(deserialize_with = "tls_if_set")]
    pub tls: Option<TlsOptions>,
    /// The user to make requests as, if etcd has authentication enabled. If it has not, this is
    /// logged once, and the user is used as soon as authentication is enabled. Default: none; with
    /// TLS the user is then the common name of the client certificate, if etcd has
    /// `--client-cert-auth`.
    #[serde(skip)]
    pub credentials: Option<Credentials>,

    // The fields of a file that `credentials` is made from, empty once that is done.
    #[serde(rename = "user")]
    user_field: Option<String>,
    #[serde(rename = "password")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<String>"))]
    password_field: Option<Secret>,
    #[serde(rename = "password_file")]
    password_file_field: Option<PathBuf>,
    #[serde(rename = "password_env")]
    password_env_field: Option<String>,
}

impl<'de> Deserialize<'de> for EtcdOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The derived function, which `remote` has made an inherent one.
        let mut options = Self::deserialize(deserializer)?;
        if options.endpoints.is_empty() {
            let reason = "endpoints: at least one is needed, such as http://127.0.0.1:2379";
            return Err(serde::de::Error::custom(reason));
        }
        let text = options.password_field.take().map(Password::from);
        let file = options.password_file_field.take().map(Password::File);
        let env = options.password_env_field.take().map(Password::Env);
        let passwords = [text, file, env].into_iter().flatten();
        options.credentials = Credentials::from_fields(options.user_field.take(), passwords);
        Ok(options)
    }
}

fn milliseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u64::deserialize(deserializer).map(Duration::from_millis)
}

/// A section in which nothing is set means the same as none.
fn tls_if_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<TlsOptions>, D::Error> {
    let tls = TlsOptions::deserialize(deserializer)?;
    Ok((tls != TlsOptions::default()).then_some(tls))
}

/// Not derived: a user may have put a password into an endpoint, and the output of wrong options must
/// not show it.
impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<_> = self.endpoints.iter().map(|one| redacted(one)).collect();
        f.debug_struct("EtcdOptions")
            .field("endpoints", &endpoints)
            .field("key_prefix", &self.key_prefix)
            .field("sync_endpoints", &self.sync_endpoints)
            .field("shuffle_endpoints", &self.shuffle_endpoints)
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("keep_alive_interval", &self.keep_alive_interval)
            .field("silence_timeout", &self.silence_timeout)
            .field("serializable_fallback", &self.serializable_fallback)
            .field("breaker_failures", &self.breaker_failures)
            .field("breaker_pause", &self.breaker_pause)
            .field("tls", &self.tls)
            .field("credentials", &self.credentials)
            .finish()
    }
}

impl EtcdOptions {
    /// Options with these endpoints and every default.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            ..Self::without_endpoints()
        }
    }

    /// The defaults. Not public, because they are not valid without an endpoint.
    fn without_endpoints() -> Self {
        Self {
            endpoints: Vec::new(),
            key_prefix: String::new(),
            sync_endpoints: false,
            shuffle_endpoints: true,
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(3),
            keep_alive_interval: Duration::from_secs(10),
            silence_timeout: Duration::from_secs(5),
            serializable_fallback: false,
            breaker_failures: 5,
            breaker_pause: Duration::from_secs(1),
            requests_progress: true,
            tls: None,
            credentials: None,
            user_field: None,
            password_field: None,
            password_file_field: None,
            password_env_field: None,
        }
    }

    /// Behaves as with a server that does not answer progress requests.
    #[cfg(any(test, feature = "test-util"))]
    #[doc(hidden)]
    #[must_use]
    pub fn without_progress_requests(mut self) -> Self {
        self.requests_progress = false;
        self
    }

    /// The in-memory store of this name in this process.
    pub fn memory(name: &str) -> Self {
        Self::new([format!("{MEMORY}{name}")])
    }

    /// Sets [`key_prefix`](Self::key_prefix).
    #[must_use]
    pub fn key_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.key_prefix = prefix.into();
        self
    }

    /// Sets [`sync_endpoints`](Self::sync_endpoints).
    #[must_use]
    pub fn sync_endpoints(mut self, sync: bool) -> Self {
        self.sync_endpoints = sync;
        self
    }

    /// Sets [`shuffle_endpoints`](Self::shuffle_endpoints).
    #[must_use]
    pub fn shuffle_endpoints(mut self, shuffle: bool) -> Self {
        self.shuffle_endpoints = shuffle;
        self
    }

    /// Sets [`connect_timeout`](Self::connect_timeout).
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Sets [`request_timeout`](Self::request_timeout).
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Sets [`keep_alive_interval`](Self::keep_alive_interval).
    #[must_use]
    pub fn keep_alive_interval(mut self, interval: Duration) -> Self {
        self.keep_alive_interval = interval;
        self
    }

    /// Sets [`silence_timeout`](Self::silence_timeout).
    #[must_use]
    pub fn silence_timeout(mut self, timeout: Duration) -> Self {
        self.silence_timeout = timeout;
        self
    }

    /// Sets [`serializable_fallback`](Self::serializable_fallback).
    #[must_use]
    pub fn serializable_fallback(mut self, fallback: bool) -> Self {
        self.serializable_fallback = fallback;
        self
    }

    /// Sets [`breaker_failures`](Self::breaker_failures) and
    /// [`breaker_pause`](Self::breaker_pause).
    #[must_use]
    pub fn breaker(mut self, failures: u32, pause: Duration) -> Self {
        self.breaker_failures = failures;
        self.breaker_pause = pause;
        self
    }

    /// Sets [`tls`](Self::tls).
    #[must_use]
    pub fn tls(mut self, tls: TlsOptions) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets [`credentials`](Self::credentials).
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// Checks every field, and that the files of `tls` and `credentials` are there and valid. Reads
    /// the files; does not connect. It is meant for the start of a program: a file that is missing
    /// later is logged and retried without limit.
    ///
    /// # Errors
    ///
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint) or
    /// [`InvalidConfig`](ClusterError::InvalidConfig), which name the one that is wrong.
    pub fn validate(&self) -> Result<(), ClusterError> {
        self.check_values()?;
        self.tls.as_ref().map_or(Ok(()), validate_tls)?;
        let credentials = self.credentials.as_ref();
        credentials.map_or(Ok(()), Credentials::validate)
    }

    /// Checks every field, but not the contents of files.
    pub(crate) fn check_values(&self) -> Result<(), ClusterError> {
        if let Some(credentials) = &self.credentials {
            credentials.check_fields()?;
        }
        if self.endpoints.is_empty() {
            return Err(ClusterError::config(
                "endpoints",
                "at least one etcd endpoint is needed, such as http://127.0.0.1:2379",
            ));
        }
        for endpoint in &self.endpoints {
            endpoint::check(endpoint, self.endpoints.len(), self.tls.is_some())?;
        }
        self.check_key_prefix()?;
        let seconds = Duration::from_secs;
        let usual = Duration::from_millis(10)..=seconds(60);
        let keep_alive = seconds(10)..=seconds(3_600);
        let silence = Duration::from_millis(500)..=seconds(300);
        for (name, value, range) in [
            ("connect_timeout", self.connect_timeout, usual.clone()),
            ("request_timeout", self.request_timeout, usual.clone()),
            ("keep_alive_interval", self.keep_alive_interval, keep_alive),
            ("silence_timeout", self.silence_timeout, silence),
            ("breaker_pause", self.breaker_pause, usual),
        ] {
            in_range("", name, value, range)?;
        }
        if self.serializable_fallback && self.credentials.is_some() {
            return Err(ClusterError::config(
                "serializable_fallback",
                "cannot be used with a user and a password: etcd needs a quorum to check them",
            ));
        }
        in_range("", "breaker_failures", self.breaker_failures, 1..=1_000_000)
    }

    /// Checks the key prefix, which is used even where a store is given.
    pub(crate) fn check_key_prefix(&self) -> Result<(), ClusterError> {
        keys::check_prefix(&self.key_prefix)
    }

    /// The key prefix with a slash at its end.
    pub(crate) fn prefix(&self) -> String {
        keys::with_slash(&self.key_prefix)
    }

    /// All endpoints, for an error.
    pub(crate) fn named(&self) -> String {
        let endpoints: Vec<_> = self.endpoints.iter().map(|one| redacted(one)).collect();
        endpoints.join(",")
    }

    /// The name of the in-memory store, if the options are for one.
    pub(crate) fn memory_name(&self) -> Option<&str> {
        self.endpoints.first()?.strip_prefix(MEMORY)
    }
}

fn validate_tls(tls: &TlsOptions) -> Result<(), ClusterError> {
    #[cfg(feature = "tls")]
    return super::tls_files::validate(tls);
    #[cfg(not(feature = "tls"))]
    return tls
        .check_values()
        .and_then(|()| Err(ClusterError::config("tls", super::tls::NEEDS_FEATURE)));
}

impl From<Vec<String>> for EtcdOptions {
    fn from(endpoints: Vec<String>) -> Self {
        Self::new(endpoints)
    }
}

#[cfg(test)]
mod tests;
