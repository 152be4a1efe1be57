//! How to reach the store.

use std::fmt;
use std::time::Duration;

use super::security::{Credentials, TlsOptions};
use crate::error::ClusterError;
use crate::keys;

const MEMORY: &str = "memory://";

/// How to reach etcd, or the embedded store.
///
/// A list of endpoints converts into it, so that wherever options are taken
/// `vec!["http://10.0.0.1:2379".to_string()]` will do.
///
/// ```
/// use pingora_etcd::EtcdOptions;
/// let options = EtcdOptions::new(["http://10.0.0.1:2379", "http://10.0.0.2:2379"])
///     .key_prefix("prod/")
///     .request_timeout(std::time::Duration::from_secs(2));
/// options.validate().unwrap();
/// assert!(EtcdOptions::new(["ftp://nowhere"]).validate().is_err());
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdOptions {
    /// `http://host:port` or, with the feature `tls`, `https://host:port` of each member, tried in
    /// turn, at each address that its name has; one connection is used at a time. Without a scheme it
    /// is `https` if `tls` is given, and `http` if not. Or one `memory://name`: the embedded store of
    /// that name in this process, which needs no server and keeps nothing. User and password do not
    /// belong here: see `credentials`.
    pub endpoints: Vec<String>,
    /// Goes before every key, to share an etcd with others, as `prod/` in
    /// `prod/registry/workers/n1`. Without a slash at its end it is given one. No control
    /// characters, no spaces around it, no double slash, 512 bytes at most. Default: empty.
    pub key_prefix: String,
    /// Whether the endpoints follow the cluster's member list: the client URLs of its members, but of
    /// learners, are read after each connection and then every minute. Those of `endpoints` are
    /// tried when those fail. Every member has to be reachable by the URLs that it advertises. Default:
    /// false.
    pub sync_endpoints: bool,
    /// How long to wait for a connection to one endpoint until the next one is tried. One that is slow
    /// is not given up for that: it may come about meanwhile, up to 30 s later. Default: 2 s. Range:
    /// 10 ms to 60 s.
    pub connect_timeout: Duration,
    /// How long to wait for the answer to one request. Where answers are measured to take longer
    /// than half of this, the wait is longer, too: twice what an answer takes at most, up to 30 s.
    /// Default: 3 s. Range: 10 ms to 60 s.
    pub request_timeout: Duration,
    /// After how long without anything heard a connection is probed by an HTTP/2 ping, which has to be
    /// answered within 30 s, or `request_timeout` if that is longer. A discovery asks its watches
    /// before that, see `silence_timeout`: this is for connections that nobody watches on.
    /// Default: 10 s. At least 10 s, because etcd closes the connection of a client that pings more
    /// often than every 5 s.
    pub keep_alive_interval: Duration,
    /// How long a watch may hear nothing at all until its connection is given up for another one. A
    /// quiet server is asked to say something well before that, and given longer where its answers
    /// are measured to take longer than a quarter of this. Default: 5 s. Range: 500 ms to 5
    /// minutes.
    pub silence_timeout: Duration,
    /// Whether a discovery that has no view yet takes what any one member has of the registrations,
    /// while there is no quorum. That may be out of date. Not with `credentials`: etcd needs a quorum to
    /// check a password. Default: false.
    pub serializable_fallback: bool,
    /// After how many failures in a row (to connect, or to be answered) calls fail at once, but for
    /// one now and then that is tried, and for renewals of leases. Default: 5. Range: 1 to 1,000,000.
    pub breaker_failures: u32,
    /// How long they then fail at once, before one is tried. Default: 1 s. Range: 10 ms to 60 s.
    pub breaker_pause: Duration,
    /// For tests: as with a server that does not answer progress requests.
    pub(crate) asks_for_progress: bool,
    /// How TLS is done. Default: none given, which for an `https://` endpoint means the system's
    /// CAs and no client certificate.
    pub tls: Option<TlsOptions>,
    /// The user to ask as, where etcd has authentication enabled; where it has not, this is told in
    /// the log, once, and matters from when it is enabled on. Default: none; with TLS it is then the
    /// common name of the client certificate, if etcd has `--client-cert-auth`.
    pub credentials: Option<Credentials>,
}

/// Not by `derive`: somebody may have put a password where none belongs, and what is shown of wrong
/// options is how they find out.
impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<_> = self.endpoints.iter().map(|one| redacted(one)).collect();
        f.debug_struct("EtcdOptions")
            .field("endpoints", &endpoints)
            .field("key_prefix", &self.key_prefix)
            .field("sync_endpoints", &self.sync_endpoints)
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("keep_alive_interval", &self.keep_alive_interval)
            .field("silence_timeout", &self.silence_timeout)
            .field("serializable_fallback", &self.serializable_fallback)
            .field("breaker_failures", &self.breaker_failures)
            .field("breaker_pause", &self.breaker_pause)
            .field("asks_for_progress", &self.asks_for_progress)
            .field("tls", &self.tls)
            .field("credentials", &self.credentials)
            .finish()
    }
}

impl EtcdOptions {
    /// These endpoints, and every default.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            key_prefix: String::new(),
            sync_endpoints: false,
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(3),
            keep_alive_interval: Duration::from_secs(10),
            silence_timeout: Duration::from_secs(5),
            serializable_fallback: false,
            breaker_failures: 5,
            breaker_pause: Duration::from_secs(1),
            asks_for_progress: true,
            tls: None,
            credentials: None,
        }
    }

    /// As with a server that does not answer progress requests.
    #[cfg(any(test, feature = "test-util"))]
    #[doc(hidden)]
    #[must_use]
    pub fn without_progress_requests(mut self) -> Self {
        self.asks_for_progress = false;
        self
    }

    /// The embedded store of this name in this process.
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

    /// Checks every field, and that the files of `tls` and `credentials` are there and make
    /// sense. Reads them; does not connect. For the start: files that are missing later are tried
    /// again for ever, and told in the log.
    ///
    /// # Errors
    ///
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint) or
    /// [`InvalidConfig`](ClusterError::InvalidConfig), which name the one that is wrong.
    pub fn validate(&self) -> Result<(), ClusterError> {
        self.check_values()?;
        self.tls.as_ref().map_or(Ok(()), TlsOptions::validate)?;
        let credentials = self.credentials.as_ref();
        credentials.map_or(Ok(()), Credentials::validate)
    }

    /// All of that but for the contents of files.
    pub(crate) fn check_values(&self) -> Result<(), ClusterError> {
        if self.endpoints.is_empty() {
            return Err(ClusterError::config(
                "endpoints",
                "at least one etcd endpoint is needed, such as http://127.0.0.1:2379",
            ));
        }
        for endpoint in &self.endpoints {
            check_endpoint(endpoint, self.endpoints.len(), self.tls.is_some())?;
        }
        self.check_key_prefix()?;
        let (least, most) = (Duration::from_millis(10), Duration::from_secs(60));
        for (field, value, least, most) in [
            ("connect_timeout", self.connect_timeout, least, most),
            ("request_timeout", self.request_timeout, least, most),
            (
                "keep_alive_interval",
                self.keep_alive_interval,
                Duration::from_secs(10),
                Duration::from_secs(3600),
            ),
            (
                "silence_timeout",
                self.silence_timeout,
                Duration::from_millis(500),
                Duration::from_secs(300),
            ),
            ("breaker_pause", self.breaker_pause, least, most),
        ] {
            if value < least || value > most {
                return Err(ClusterError::config(
                    field,
                    format!("{value:?} is out of range, {least:?} to {most:?}"),
                ));
            }
        }
        if self.serializable_fallback && self.credentials.is_some() {
            return Err(ClusterError::config(
                "serializable_fallback",
                "is of no use with a user and a password: etcd needs a quorum to check them",
            ));
        }
        if !(1..=1_000_000).contains(&self.breaker_failures) {
            return Err(ClusterError::config(
                "breaker_failures",
                format!("{} is out of range, 1 to 1000000", self.breaker_failures),
            ));
        }
        Ok(())
    }

    /// What matters of the options also where a store is given.
    pub(crate) fn check_key_prefix(&self) -> Result<(), ClusterError> {
        keys::check_prefix(&self.key_prefix)
    }

    /// What goes before every key: the key prefix, with a slash at its end.
    pub(crate) fn prefix(&self) -> String {
        keys::with_slash(&self.key_prefix)
    }

    /// All endpoints, for an error.
    pub(crate) fn named(&self) -> String {
        let endpoints: Vec<_> = self.endpoints.iter().map(|one| redacted(one)).collect();
        endpoints.join(",")
    }

    /// The name of the embedded store, if that is what is asked for.
    pub(crate) fn memory_name(&self) -> Option<&str> {
        self.endpoints.first()?.strip_prefix(MEMORY)
    }
}

impl From<Vec<String>> for EtcdOptions {
    fn from(endpoints: Vec<String>) -> Self {
        Self::new(endpoints)
    }
}

/// An endpoint as it may be shown: without what stands before an `@` or behind a `?`, which may be a
/// password.
pub(crate) fn redacted(endpoint: &str) -> String {
    if endpoint.starts_with(MEMORY) {
        return endpoint.to_owned();
    }
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| endpoint.starts_with(scheme))
        .unwrap_or_default();
    // Behind the last one: a password may have one in it, and a slash or a question mark too.
    let (hidden, rest) = match endpoint.rsplit_once('@') {
        Some((_, rest)) => ("...@", rest),
        None => ("", &endpoint[scheme.len()..]),
    };
    match rest.split_once('?') {
        Some((rest, _)) => format!("{scheme}{hidden}{rest}?..."),
        None => format!("{scheme}{hidden}{rest}"),
    }
}

/// Whether a member's own URL can be used beside these options.
pub(crate) fn is_usable(options: &EtcdOptions, url: &str) -> bool {
    let is_secure = |endpoint: &str| {
        endpoint.starts_with("https://") || (options.tls.is_some() && !endpoint.contains("://"))
    };
    let wanted = options.endpoints.iter().any(|endpoint| is_secure(endpoint));
    let host = url.rsplit("//").next().unwrap_or_default();
    // As configured by somebody who takes it for every address.
    let is_anywhere = host.starts_with("0.0.0.0:") || host.starts_with("[::]:");
    let is_checked = check_endpoint(url, usize::MAX, options.tls.is_some()).is_ok();
    is_secure(url) == wanted && !is_anywhere && is_checked && !url.starts_with(MEMORY)
}

fn check_endpoint(endpoint: &str, count: usize, tls: bool) -> Result<(), ClusterError> {
    let invalid = |reason: &str| {
        Err(ClusterError::InvalidEndpoint {
            endpoint: redacted(endpoint),
            reason: reason.to_owned(),
        })
    };
    if endpoint.starts_with(MEMORY) {
        return if count == 1 {
            Ok(())
        } else {
            invalid("the embedded store cannot be mixed with other endpoints")
        };
    }
    if endpoint.contains('@') {
        return invalid(
            "user and password do not belong in it: give credentials (in the file: user, with \
             password_file, password_env or password)",
        );
    }
    #[cfg(not(feature = "tls"))]
    if endpoint.starts_with("https://") {
        return invalid(super::security::NEEDS_FEATURE);
    }
    if tls && endpoint.starts_with("http://") {
        return invalid("TLS is configured, so the scheme must be https://");
    }
    let rest = endpoint
        .strip_prefix("https://")
        .or_else(|| endpoint.strip_prefix("http://"))
        .unwrap_or(endpoint);
    if rest.contains("://") {
        return invalid("the scheme must be http://, https:// or memory://");
    }
    match format!("http://{rest}").parse::<http::Uri>() {
        Err(error) => invalid(&error.to_string()),
        Ok(uri) if uri.host().is_none_or(str::is_empty) => invalid("there is no host in it"),
        Ok(uri) if uri.port_u16().is_none() => invalid("there is no port in it, etcd's is 2379"),
        Ok(uri) if uri.path() != "/" || uri.query().is_some() => {
            invalid("only scheme, host and port belong there")
        }
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_endpoints_are_named() {
        for endpoint in [
            "",
            "http://",
            "http://host",
            "host",
            "ftp://host:1",
            "https://host",
            "http://host:2379/path",
            "http://host:99999",
            "http://ho st:2379",
        ] {
            let error = EtcdOptions::new([endpoint]).validate().unwrap_err();
            assert!(
                matches!(&error, ClusterError::InvalidEndpoint { endpoint: named, .. } if named == endpoint),
                "{endpoint:?}: {error:?}"
            );
        }
        assert!(
            EtcdOptions::new(["http://a:1", "memory://b"])
                .validate()
                .is_err()
        );
        let none: [&str; 0] = [];
        let error = EtcdOptions::new(none).validate().unwrap_err();
        assert!(error.to_string().contains("endpoints"));
    }

    #[test]
    fn a_password_in_an_endpoint_is_refused_and_shown_nowhere() {
        for (endpoint, shown) in [
            ("http://root:s3cret@host:2379", "http://...@host:2379"),
            ("https://root:s3cret@host:2379", "https://...@host:2379"),
            ("http://root:p@s3cret@host:2379", "http://...@host:2379"),
            ("http://root:s3cret/?#@host:2379", "http://...@host:2379"),
            ("root:s3cret@host:2379", "...@host:2379"),
            ("s3cret://x@host:2379", "...@host:2379"),
            ("http://root:s3cret@", "http://...@"),
            ("http://root:s3cret@ho st", "http://...@ho st"),
            ("http:/root:s3cret@host", "...@host"),
            ("http://host:2379?p=s3cret", "http://host:2379?..."),
            ("http://x@host:2379/?p=s3cret", "http://...@host:2379/?..."),
        ] {
            let options = EtcdOptions::new(["http://a:1", endpoint]);
            let error = options.validate().unwrap_err();
            assert!(
                matches!(&error, ClusterError::InvalidEndpoint { endpoint, .. } if endpoint == shown),
                "{error:?}"
            );
            let told = format!(
                "{error} {error:?} {options:?} {options:#?} {}",
                options.named()
            );
            assert!(!told.contains("s3cret"), "{told}");
        }
        let error = EtcdOptions::new(["http://u:p@h:1"]).validate();
        let error = error.unwrap_err().to_string();
        assert!(error.contains("credentials"), "{error}");
        // A name, not a user.
        EtcdOptions::memory("a@b").validate().unwrap();
    }

    #[test]
    fn a_key_prefix_ends_with_a_slash() {
        for (given, prefix) in [
            ("", ""),
            ("prod", "prod/"),
            ("prod/", "prod/"),
            ("/prod", "/prod/"),
            ("/", "/"),
            ("a/b c", "a/b c/"),
        ] {
            let mut options = EtcdOptions::memory("").key_prefix(given);
            options.validate().unwrap();
            assert_eq!(options.prefix(), prefix);
            options = EtcdOptions::memory("");
            options.key_prefix = given.to_owned();
            assert_eq!(options.prefix(), prefix);
        }
        let long = "x".repeat(513);
        for wrong in [
            " ", "\t", "prod//", "//", "a//b", " prod", "prod ", "a\n", &long,
        ] {
            let error = EtcdOptions::memory("").key_prefix(wrong).validate();
            let error = error.unwrap_err().to_string();
            assert!(error.contains("key_prefix"), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn right_ones_pass() {
        for endpoint in [
            "http://127.0.0.1:2379",
            "localhost:2379",
            "http://[::1]:2379",
            "memory://",
            "memory://demo",
        ] {
            EtcdOptions::new([endpoint]).validate().unwrap();
        }
    }

    #[test]
    fn members_are_reached_as_the_endpoints_are() {
        let plain = EtcdOptions::new(["host:2379"]);
        assert!(is_usable(&plain, "http://10.0.0.1:2379"));
        for url in [
            "https://10.0.0.1:2379",
            "http://0.0.0.0:2379",
            "http://[::]:2379",
            "http://10.0.0.1",
            "unix://socket:1",
            "memory://x",
            "",
        ] {
            assert!(!is_usable(&plain, url), "{url}");
        }
        let secure = EtcdOptions::new(["https://host:2379"]);
        assert!(!is_usable(&secure, "http://10.0.0.1:2379"));
        assert_eq!(
            is_usable(&secure, "https://10.0.0.1:2379"),
            cfg!(feature = "tls")
        );
    }

    #[test]
    fn https_needs_the_feature_and_tls_needs_https() {
        let https = EtcdOptions::new(["https://host:2379"]).validate();
        assert_eq!(https.is_ok(), cfg!(feature = "tls"), "{https:?}");
        let plain = EtcdOptions::new(["http://host:2379"]).tls(TlsOptions::new());
        let error = plain.validate().unwrap_err().to_string();
        assert!(error.contains("http://host:2379"), "{error}");
        let bare = EtcdOptions::new(["host:2379"]).tls(TlsOptions::new());
        assert_eq!(bare.validate().is_ok(), cfg!(feature = "tls"));
    }

    #[test]
    fn out_of_range_times_are_named() {
        let options = EtcdOptions::new(["h:1"]).keep_alive_interval(Duration::from_secs(1));
        let error = options.validate().unwrap_err().to_string();
        assert!(error.contains("keep_alive_interval"), "{error}");
    }
}
