//! Everything the YAML file of the bundled load balancer can say. Parsed strictly, checked once.
//!
//! The file is Pingora's own configuration with a `cluster:` section beside it. A field that does
//! not exist is an error that names it and its line, in Pingora's part too, where Pingora alone
//! would ignore it. `config/load_balancer.yaml` shows every field.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use crate::balance::{
    Adaptive, Balancer, BalancerBuilder, Consistent, DEFAULT_CANDIDATES, Headroom, Policy, Zones,
};
use crate::discovery::{EntryLimits, NodeFilter, SelfPreservation, ServiceDiscovery, SnapshotFile};
use crate::error::ClusterError;
use crate::store::EtcdOptions;

/// The `cluster:` section.
///
/// ```
/// use pingora_etcd::config::ClusterConfig;
/// let yaml = "
/// cluster:
///   group: workers
///   etcd: { endpoints: ['http://127.0.0.1:2379'] }
///   policy: headroom
/// ";
/// let config = ClusterConfig::from_yaml(yaml, "balancer.yaml")?;
/// assert_eq!(config.listen, "127.0.0.1:6188");
///
/// let typo = yaml.replace("policy", "polcy");
/// let error = ClusterConfig::from_yaml(&typo, "balancer.yaml").unwrap_err().to_string();
/// assert!(error.contains("polcy") && error.contains("line 5"));
/// # Ok::<(), pingora_etcd::ClusterError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ClusterConfig {
    /// How to reach etcd.
    pub etcd: EtcdOptions,
    /// The group to route to.
    pub group: String,
    /// Only nodes of these zones, with these tags. Default: all.
    #[serde(default)]
    pub filter: NodeFilter,
    /// Only nodes whose address is in one of these networks: `10.0.0.0/8`, or a single address.
    /// Default: any.
    #[serde(default)]
    pub allowed_networks: Vec<String>,
    /// Only nodes whose port is one of these: `8080`, or `9000-9100`. Default: any.
    #[serde(default)]
    pub allowed_ports: Vec<Port>,
    /// How much an entry may take, and all of them.
    #[serde(default)]
    pub limits: EntryLimits,
    /// When nodes stay though their leases are gone.
    #[serde(default)]
    pub self_preservation: SelfPreservation,
    /// A file that keeps the nodes for a start without etcd. Default: none.
    #[serde(default)]
    pub snapshot: Option<SnapshotFile>,
    /// How long after a change is published the next ones wait. Default: 20 ms. Range: 0 to 10,000.
    #[serde(default = "default_publish_interval")]
    pub publish_interval_ms: u64,
    /// `address:port` to listen on. Default: `127.0.0.1:6188`.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// How a backend is chosen. Default: `adaptive`.
    #[serde(default)]
    pub policy: Policy,
    /// The constants of `adaptive`.
    #[serde(default)]
    pub adaptive: Adaptive,
    /// The coefficients of `headroom`.
    #[serde(default)]
    pub headroom: Headroom,
    /// The constants of `consistent`.
    #[serde(default)]
    pub consistent: Consistent,
    /// The zone this proxy is in: backends there are preferred. Default: none, all are alike.
    #[serde(default)]
    pub zone: Option<String>,
    /// Instead of `zone`: the id of a node whose zone it is in, as that node registered it.
    #[serde(default)]
    pub zone_of: Option<String>,
    /// How much traffic leaves the zone.
    #[serde(default)]
    pub zones: Zones,
    /// How many backends `adaptive` and `headroom` draw to choose from. Default: 5. Range: 1 to 8.
    #[serde(default = "default_candidates")]
    pub candidates: usize,
    /// What `consistent` hashes. Default: `client_ip`.
    #[serde(default)]
    pub hash_on: HashOn,
    /// Whether backends say in the response header `endpoint-load-metrics` how loaded they are
    /// ([`LoadReport`](crate::metrics::LoadReport)). The header does not reach the client then.
    /// Default: `false`, the header means nothing and is passed on.
    #[serde(default)]
    pub load_reports: bool,
    /// The port of nodes that registered none. Default: 80.
    #[serde(default = "default_port")]
    pub default_port: u16,
    /// How often a request is tried on another backend, while nothing of an answer has reached
    /// the client: after a failed connection always, after a lost one only for methods without
    /// side effects. Default: 2. Range: 0 to 2.
    #[serde(default = "default_retries")]
    pub retries: usize,
    /// How long to wait for a connection to a backend. Default: 1,000 ms. Range: 1 to 60,000.
    #[serde(default = "default_upstream_connect")]
    pub upstream_connect_timeout_ms: u64,
    /// How long to wait for a backend to send something. Default: 60,000 ms. Range: 1 to
    /// 3,600,000.
    #[serde(default = "default_upstream_read")]
    pub upstream_read_timeout_ms: u64,
    /// How long the start waits for the first view of the group. Default: 10,000 ms. Range: 0 to
    /// 600,000.
    #[serde(default = "default_ready")]
    pub ready_timeout_ms: u64,
    /// How long a write waits for a leader, where writes go to the leader. Default: 2,000 ms.
    /// Range: 0 to 60,000.
    #[serde(default = "default_leader_wait")]
    pub leader_wait_ms: u64,
}

/// A port, or a range of them: `8080` or `9000-9100`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Port {
    /// One.
    One(u64),
    /// One or several, as text.
    Text(String),
}

impl From<&Port> for String {
    fn from(port: &Port) -> Self {
        match port {
            Port::One(port) => port.to_string(),
            Port::Text(text) => text.clone(),
        }
    }
}

/// What a request is hashed on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
#[non_exhaustive]
pub enum HashOn {
    /// `client_ip`: the address the request came from.
    #[default]
    ClientIp,
    /// `uri`: path and query.
    Uri,
    /// `header:NAME`: the value of a request header; empty where there is none.
    Header(http::HeaderName),
}

impl TryFrom<String> for HashOn {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match (text.as_str(), text.strip_prefix("header:")) {
            ("client_ip", _) => Ok(Self::ClientIp),
            ("uri", _) => Ok(Self::Uri),
            (_, Some(name)) => name
                .parse()
                .map(Self::Header)
                .map_err(|_| format!("hash_on: {name:?} is not the name of a header")),
            _ => Err(format!(
                "hash_on: {text:?} is none of client_ip, uri, header:NAME"
            )),
        }
    }
}

fn default_publish_interval() -> u64 {
    20
}
fn default_listen() -> String {
    "127.0.0.1:6188".to_owned()
}
fn default_candidates() -> usize {
    DEFAULT_CANDIDATES
}
fn default_port() -> u16 {
    80
}
fn default_retries() -> usize {
    2
}
fn default_upstream_connect() -> u64 {
    1_000
}
fn default_upstream_read() -> u64 {
    60_000
}
fn default_ready() -> u64 {
    10_000
}
fn default_leader_wait() -> u64 {
    2_000
}

/// The file as far as it is read here.
#[derive(Deserialize)]
struct File {
    cluster: ClusterConfig,
}

impl ClusterConfig {
    /// Reads this section from the text of a file; `name` is for errors.
    ///
    /// # Errors
    ///
    /// [`ConfigFile`](ClusterError::ConfigFile) with file, field and, where known, line.
    pub fn from_yaml(text: &str, name: &str) -> Result<Self, ClusterError> {
        let file: File =
            serde_saphyr::from_str(text).map_err(|error| unreadable(name, text, &error))?;
        let checked = file.cluster.validate();
        checked.map_err(|error| in_file(name, error))?;
        Ok(file.cluster)
    }

    /// Checks every field's range.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn validate(&self) -> Result<(), ClusterError> {
        let etcd = |error| named(error, "cluster.etcd.", "_ms");
        self.etcd.validate().map_err(etcd)?;
        let outer = |error| named(error, "cluster.", "");
        self.balancer().map_err(outer)?;
        if self.listen.parse::<std::net::SocketAddr>().is_err() {
            return Err(ClusterError::config(
                "cluster.listen",
                format!("{:?} is not an address and a port", self.listen),
            ));
        }
        if self.zone.is_some() && self.zone_of.is_some() {
            return Err(ClusterError::config(
                "cluster.zone_of",
                "cannot be given together with cluster.zone",
            ));
        }
        let retries = u64::try_from(self.retries).unwrap_or(u64::MAX);
        for (field, value, range) in [
            ("retries", retries, 0..=2),
            (
                "upstream_connect_timeout_ms",
                self.upstream_connect_timeout_ms,
                1..=60_000,
            ),
            (
                "upstream_read_timeout_ms",
                self.upstream_read_timeout_ms,
                1..=3_600_000,
            ),
            ("ready_timeout_ms", self.ready_timeout_ms, 0..=600_000),
            ("leader_wait_ms", self.leader_wait_ms, 0..=60_000),
            ("publish_interval_ms", self.publish_interval_ms, 0..=10_000),
        ] {
            if !range.contains(&value) {
                return Err(ClusterError::config(
                    format!("cluster.{field}"),
                    format!(
                        "{value} is out of range, {} to {}",
                        range.start(),
                        range.end()
                    ),
                ));
            }
        }
        self.discovery().map_err(outer)?;
        Ok(())
    }

    /// The discovery that this section describes.
    ///
    /// # Errors
    ///
    /// When endpoints, times or group make no sense.
    pub fn discovery(&self) -> Result<ServiceDiscovery, ClusterError> {
        let mut builder = ServiceDiscovery::builder(self.etcd.clone(), &self.group)
            .filter(self.filter.clone())
            .allowed_networks(self.allowed_networks.iter().cloned())
            .allowed_ports(self.allowed_ports.iter())
            .limits(self.limits)
            .self_preservation(self.self_preservation)
            .publish_interval(Duration::from_millis(self.publish_interval_ms));
        if let Some(file) = &self.snapshot {
            builder = builder.snapshot_file(file.clone());
        }
        builder.try_build()
    }

    /// The balancer that this section describes.
    ///
    /// # Errors
    ///
    /// When coefficients, candidates or the default port are out of range.
    pub fn balancer(&self) -> Result<Balancer, ClusterError> {
        self.weights().try_build()
    }

    /// The same as settings. For a stock load balancer, which hears of no outcome, give them
    /// [`Adaptive::metrics_only`].
    pub fn weights(&self) -> BalancerBuilder {
        let mut builder = Balancer::builder();
        if let Some(zone) = &self.zone {
            builder = builder.zone(zone);
        }
        if let Some(id) = &self.zone_of {
            builder = builder.zone_of(id);
        }
        builder
            .zones(self.zones)
            .policy(self.policy)
            .adaptive(self.adaptive)
            .headroom(self.headroom)
            .consistent(self.consistent)
            .candidates(self.candidates)
            .default_port(self.default_port)
    }
}

/// Gives a field the name it has in the file: with where it is, and the unit of a time.
fn named(error: ClusterError, path: &str, unit: &str) -> ClusterError {
    match error {
        ClusterError::InvalidConfig { field, reason } => {
            let is_time = ["timeout", "interval", "pause"]
                .iter()
                .any(|end| field.ends_with(end));
            let unit = if is_time { unit } else { "" };
            ClusterError::config(format!("{path}{field}{unit}"), reason)
        }
        other => other,
    }
}

fn in_file(path: impl fmt::Display, reason: impl fmt::Display) -> ClusterError {
    ClusterError::ConfigFile {
        path: path.to_string(),
        reason: reason.to_string(),
    }
}

/// With the lines around, unless one of them may be the password.
fn unreadable(path: &str, text: &str, error: &serde_saphyr::Error) -> ClusterError {
    // An endpoint with a user and a password in it, which is refused, but has to be read first. Errors
    // repeat what they do not understand.
    let bare = error.without_snippet().to_string();
    if bare.contains('@') {
        let at = error.location();
        let at = at.map_or(String::new(), |at| {
            format!("line {} column {}: ", at.line(), at.column())
        });
        return in_file(
            path,
            format!(
                "{at}cannot be read; what is there has an @ in it and is not shown, for it may hold a password"
            ),
        );
    }
    let holds_password = text.split("password").skip(1).any(|rest| {
        let rest = rest.trim_start_matches(['"', '\'', ' ']);
        let value = rest.strip_prefix(':').map(str::trim_start);
        value.is_some_and(|value| {
            let end = value.find([',', '}', '\n', ' ']).unwrap_or(value.len());
            !matches!(value[..end].trim_end(), "null" | "~")
        })
    });
    if holds_password || text.contains('@') {
        in_file(path, bare)
    } else {
        in_file(path, error)
    }
}

/// Pingora's part of the file, checked for fields that do not exist.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile), naming the field and its line.
#[cfg(feature = "pingora")]
pub fn server_conf(
    text: &str,
    name: &str,
) -> Result<pingora::server::configuration::ServerConf, ClusterError> {
    use std::collections::HashMap;

    use pingora::server::configuration::ServerConf;
    use serde::de::IgnoredAny;
    use serde_saphyr::Spanned;

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
        if value == 0 {
            return Err(in_file(
                name,
                format!("{field}: 0 is out of range, at least 1"),
            ));
        }
    }
    conf.validate().map_err(|error| in_file(name, error))
}

/// Reads both parts of a file: what the bundled load balancer starts from.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile) with file, field and, where known, line.
#[cfg(feature = "pingora")]
pub fn load(
    path: impl AsRef<std::path::Path>,
) -> Result<(ClusterConfig, pingora::server::configuration::ServerConf), ClusterError> {
    let name = path.as_ref().display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| in_file(&name, error))?;
    let cluster = ClusterConfig::from_yaml(&text, &name)?;
    Ok((cluster, server_conf(&text, &name)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Credentials, Password};

    const LEAST: &str = "
version: 1
threads: 2
cluster:
  etcd:
    endpoints: ['memory://x']
  group: workers
";

    fn error(text: &str) -> String {
        ClusterConfig::from_yaml(text, "file.yaml")
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let config = ClusterConfig::from_yaml(LEAST, "file.yaml").unwrap();
        assert_eq!(config.policy, Policy::Adaptive);
        assert_eq!(config.retries, 2);
        assert_eq!(config.etcd, EtcdOptions::new(["memory://x"]));
    }

    #[test]
    fn unknown_fields_are_named_with_their_line() {
        for (at, line) in [
            ("  group: workers\n", 8),
            ("    endpoints: ['memory://x']\n", 7),
        ] {
            let indent = &at[..at.len() - at.trim_start().len()];
            let text = LEAST.replace(at, &format!("{at}{indent}grop: 1\n"));
            let error = error(&text);
            assert!(error.contains("grop"), "{error}");
            assert!(error.contains(&format!("line {line}")), "{line}: {error}");
            assert!(error.starts_with("file.yaml: "), "{error}");
        }
        let text = format!("{LEAST}  headroom: {{ cpu: 1, mem: 1 }}\n");
        assert!(error(&text).contains("mem"), "{}", error(&text));
    }

    #[test]
    fn wrong_values_are_named() {
        for (field, named) in [
            ("policy: fastest", "fastest"),
            ("headroom: { cpu: -1 }", "cluster.headroom.cpu"),
            ("headroom: { cpu: much }", "cpu"),
            ("candidates: 99", "cluster.candidates"),
            (
                "adaptive: { metrics_gain: 2 }",
                "cluster.adaptive.metrics_gain",
            ),
            ("adaptive: { gain: 2 }", "gain"),
            (
                "consistent: { balance_factor: 1 }",
                "cluster.consistent.balance_factor",
            ),
            ("zones: { spare: 0 }", "cluster.zones.spare"),
            ("zone: a\n  zone_of: n1", "cluster.zone_of"),
            ("zone: ''", "cluster.zone"),
            ("default_port: 0", "cluster.default_port"),
            ("retries: 3", "cluster.retries"),
            ("listen: nowhere", "cluster.listen"),
            ("leader_wait_ms: 1000000", "cluster.leader_wait_ms"),
            ("hash_on: colour", "colour"),
            ("filter: { zone: a }", "zone"),
            (
                "allowed_networks: ['10.0.0.0/99']",
                "cluster.allowed_networks",
            ),
            ("allowed_ports: [80, 0]", "cluster.allowed_ports"),
            ("allowed_ports: ['9-8']", "cluster.allowed_ports"),
            ("limits: { depth: 1000 }", "cluster.limits.depth"),
            (
                "self_preservation: { part: 0 }",
                "cluster.self_preservation.part",
            ),
            (
                "snapshot: { file: /nowhere/at/all }",
                "cluster.snapshot.file",
            ),
            (
                "snapshot: { file: nodes, max_age_ms: 1 }",
                "cluster.snapshot.max_age_ms",
            ),
            ("snapshot: {}", "file"),
            ("publish_interval_ms: 10001", "cluster.publish_interval_ms"),
            ("hash_on: 'header:not valid'", "not valid"),
        ] {
            let error = error(&format!("{LEAST}  {field}\n"));
            assert!(error.contains(named), "{field}: {error}");
        }
        let error = error(&LEAST.replace("memory://x", "ftp://x"));
        assert!(error.contains("ftp://x"), "{error}");
        let slow = LEAST.replace("  group", "    keep_alive_interval_ms: 1\n  group");
        let told = self::error(&slow);
        assert!(
            told.contains("cluster.etcd.keep_alive_interval_ms"),
            "{told}"
        );
        for field in ["silence_timeout_ms", "breaker_pause_ms", "breaker_failures"] {
            let wrong = LEAST.replace("  group", &format!("    {field}: 0\n  group"));
            let told = self::error(&wrong);
            assert!(told.contains(&format!("cluster.etcd.{field}")), "{told}");
        }
        assert!(self::error("cluster:\n  group: g\n").contains("etcd"));
        assert!(self::error("version: 1\n").contains("cluster"));
        assert!(self::error(": : :").contains("file.yaml"));
    }

    #[test]
    fn tls_and_user() {
        let with = |fields: &str| {
            let text = LEAST.replace("  group", &format!("    {fields}\n  group"));
            ClusterConfig::from_yaml(&text, "file.yaml")
        };
        let config = with("user: u\n    password: 'hunter2'").unwrap();
        let options = &config.etcd;
        let expected = Credentials::new("u", Password::Text("hunter2".to_owned()));
        assert_eq!(options.credentials, Some(expected));
        assert!(!format!("{config:?} {options:?}").contains("hunter2"));
        // The fields as the shipped files show them.
        let nothing = "tls: { ca_file: null, cert_file: null, key_file: null, server_name: null }
    user: null
    password: null
    password_file: null
    password_env: null";
        let config = with(nothing).unwrap();
        assert_eq!(config.etcd, EtcdOptions::new(["memory://x"]));

        for (fields, named) in [
            ("user: u", "cluster.etcd.user"),
            ("password: hunter2", "cluster.etcd.user"),
            (
                "user: u\n    password: hunter2\n    password_env: HOME",
                "cluster.etcd.user",
            ),
            ("user: ''\n    password: hunter2", "cluster.etcd.user"),
            ("user: u\n    password: ''", "cluster.etcd.password"),
            (
                "user: u\n    password_file: /no/such/file",
                "cluster.etcd.password_file: /no/such/file",
            ),
            (
                "user: u\n    password_env: PINGORA_ETCD_NO_SUCH",
                "cluster.etcd.password_env",
            ),
            ("user: u\n    password: [hunter2]", "password"),
            ("user: u\n    password: { hunter2: 1 }", "password"),
            ("user: u\n    password: !x hunter2\n    tlss: 1", "tlss"),
            ("password: hunter2\n    user: [", "file.yaml"),
            ("password: 'hunter2\n    user: u", "file.yaml"),
            ("password: !!int hunter2\n    user: u", "file.yaml"),
            ("tls: { ca: x }", "ca_file"),
            ("tls: { ca_file: /no/such }", "cluster.etcd.tls"),
            ("tls: { cert_file: /no/such }", "cluster.etcd.tls.key_file"),
        ] {
            let error = with(fields).unwrap_err();
            let told = format!("{error} {error:?}");
            assert!(told.contains(named), "{fields}: {told}");
            assert!(!told.contains("hunter2"), "{fields}: {told}");
        }
        // Numbers and the like are no text.
        let told = with("user: u\n    password: 20261124").map_err(|error| error.to_string());
        match told {
            Ok(config) => assert!(!format!("{config:?}").contains("20261124")),
            Err(told) => assert!(!told.contains("20261124"), "{told}"),
        }
    }

    #[test]
    fn a_password_in_an_endpoint_is_not_repeated() {
        for (endpoints, named) in [
            ("['http://root:s3cret@h:1']", "http://...@h:1"),
            ("['http://root:p@s3cret@h:1', 1]", "file.yaml"),
            ("[root:s3cret@h]", "...@h"),
            ("http://root:s3cret@h:1", "line 6"),
            ("{ 'http://root:s3cret@h:1': 1 }", "line 6"),
            ("[['http://root:s3cret@h:1']]", "line 6"),
            ("['http://root:s3cret@h:1'", "file.yaml"),
            ("['http://root:s3cret@h:1]", "file.yaml"),
            ("[]\n    'http://root:s3cret@h:1': 1", "line 7"),
            ("['http://root:s3cret@h:1']\n    colour: red", "colour"),
            ("['http://root:s3cret@h:1']\n    tls: 1", "line 7"),
        ] {
            let text = LEAST.replace("['memory://x']", endpoints);
            let error = ClusterConfig::from_yaml(&text, "file.yaml").unwrap_err();
            let told = format!("{error} {error:?}");
            assert!(told.contains(named), "{endpoints}: {told}");
            assert!(!told.contains("s3cret"), "{endpoints}: {told}");
            #[cfg(feature = "pingora")]
            if let Err(error) = server_conf(&text.replace("threads", "thread"), "file.yaml") {
                let told = format!("{error} {error:?}");
                assert!(!told.contains("s3cret"), "{endpoints}: {told}");
            }
        }
        let file: File =
            serde_saphyr::from_str(&LEAST.replace("memory://x", "http://u:s3cret@h:1")).unwrap();
        assert!(!format!("{:?}", file.cluster).contains("s3cret"));
    }

    #[test]
    fn key_prefix() {
        let with = |prefix: &str| {
            let text = LEAST.replace("  group", &format!("    key_prefix: '{prefix}'\n  group"));
            ClusterConfig::from_yaml(&text, "file.yaml")
        };
        let options = with("prod").unwrap().etcd;
        assert_eq!(options.prefix(), "prod/");
        for wrong in [" ", "prod//"] {
            let error = with(wrong).unwrap_err().to_string();
            assert!(error.contains("cluster.etcd.key_prefix"), "{error}");
        }
    }

    #[test]
    fn hash_on() {
        let text = format!("{LEAST}  hash_on: header:X-User\n");
        let config = ClusterConfig::from_yaml(&text, "file.yaml").unwrap();
        let header = http::HeaderName::from_static("x-user");
        assert_eq!(config.hash_on, HashOn::Header(header));
    }

    #[cfg(feature = "pingora")]
    #[test]
    fn pingoras_part_is_strict_too() {
        assert_eq!(server_conf(LEAST, "file.yaml").unwrap().threads, 2);
        let text = LEAST.replace("threads", "thread");
        let error = server_conf(&text, "file.yaml").unwrap_err().to_string();
        assert!(
            error.contains("line 3") && error.contains("\"thread\""),
            "{error}"
        );
        for (wrong, named) in [
            ("threads: many", "line 3"),
            ("threads: 0", "threads"),
            ("max_retries: 0", "max_retries"),
            ("listener_tasks_per_fd: 0", "listener_tasks_per_fd"),
        ] {
            let text = LEAST.replace("threads: 2", wrong);
            let error = server_conf(&text, "file.yaml").unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
