//! The `cluster` section.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::access_log::AccessLog;
use super::admin::Admin;
use super::backends::Backends;
use super::clients::Clients;
use super::group::Group;
use super::health_check::HealthCheck;
use super::leader::Leader;
use super::listener::Listener;
use super::opentelemetry::OpenTelemetry;
use super::overload::Overload;
use super::retry::Retry;
use super::route::Route;
use super::timeouts::Timeouts;
use super::tls::ListenerTls;
use super::values::{HashOn, Port, is_token};
use crate::balance::{
    Adaptive, Balancer, BalancerBuilder, Consistent, DEFAULT_CANDIDATES, DEFAULT_PORT, Headroom,
    Policy, Zones,
};
use crate::cluster::Cluster;
use crate::discovery::{
    EntryLimits, NodeFilter, PUBLISH_INTERVAL, Registry, SelfPreservation, ServiceDiscovery,
    ServiceDiscoveryBuilder, SnapshotFile,
};
use crate::error::{ClusterError, in_range};
use crate::metrics::{LoadReportForm, MetricNames};
use crate::store::{EtcdOptions, Password};

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
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ClusterConfig {
    /// How to reach etcd.
    pub etcd: EtcdOptions,
    /// The group to route to: of all requests, or of those that no route is for.
    pub group: String,
    /// More groups, by the names that `routes` use. All share one connection to etcd. Default: none.
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    /// Which requests go where; the first route that is for a request decides. Default: none, all go to
    /// `group`.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Who writes the entries of the group, and where: this crate's nodes, or another registry. Default: nodes of this
    /// crate.
    #[serde(default)]
    pub registry: Registry,
    /// Further registries with nodes of the same group, such as while a fleet moves from one to another. Their nodes
    /// have the name of the format in front of their ids, as in `kratos:0b9c`; two entries with one address are one
    /// backend, for which `registry` comes first. Default: none.
    #[serde(default)]
    pub further_registries: Vec<Registry>,
    /// What resolves the host names of nodes, `address:port`, where a registry has `host_names`. Default: none, the
    /// servers of the system.
    #[serde(default)]
    pub name_servers: Vec<String>,
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
    /// Limits of one entry, and of all entries together.
    #[serde(default)]
    pub limits: EntryLimits,
    /// When nodes are kept although their leases are gone.
    #[serde(default)]
    pub self_preservation: SelfPreservation,
    /// A file that stores the nodes for a start without etcd, and beside it, with `.learned` added to its name, what
    /// was learned of them: weights, success rates, the lowest latencies. Default: none.
    #[serde(default)]
    pub snapshot: Option<SnapshotFile>,
    /// The shortest time from publishing one change to publishing the next ones. Default: 20 ms.
    /// Range: 0 to 10,000.
    #[serde(default = "default_publish_interval_ms")]
    pub publish_interval_ms: u64,
    /// `address:port` to listen on. Default: `127.0.0.1:6188`.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// Further addresses that clients connect to, each with or without TLS of its own, as for port 443 beside port 80.
    /// What `clients` and `timeouts` say holds for all of them together. Default: none. At most 30.
    #[serde(default)]
    pub further_listeners: Vec<Listener>,
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
    /// The zone that this proxy is in: backends in it are preferred. Default: none, all zones are
    /// alike.
    #[serde(default)]
    pub zone: Option<String>,
    /// Instead of `zone`: the id of a node, whose zone is the one that it registered.
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
    /// Whether the load that backends report with their responses is used
    /// ([`LoadReport`](crate::metrics::LoadReport)): in the header `endpoint-load-metrics`, in
    /// `endpoint-load-metrics-bin`, or in the trailers of a gRPC call. Default: `true`. With `false` it is
    /// ignored and passed on.
    #[serde(default = "yes")]
    pub load_reports: bool,
    /// Whether such a report also goes on to the client. Default: `false`.
    #[serde(default)]
    pub load_reports_to_clients: bool,
    /// The form to ask backends for in the request header `endpoint-load-metrics-format`, for servers that
    /// report only if they are asked, as vLLM does. Default: none is asked for.
    #[serde(default)]
    pub load_report_format: Option<LoadReportForm>,
    /// Under which names backends report what routing uses, where they have other ones.
    #[serde(default)]
    pub load_report_metrics: MetricNames,
    /// The port of nodes that registered none. Default: 80. Range: 1 to 65,535.
    #[serde(default = "default_port")]
    pub default_port: u16,
    /// How often a request is tried on another backend, while nothing of a response has reached the
    /// client: after a failed connection always, after a lost one only for methods without side
    /// effects. Default: 2. Range: 0 to 2.
    #[serde(default = "default_retries")]
    pub retries: usize,
    /// When else a request is tried on another backend.
    #[serde(default)]
    pub retry: Retry,
    /// How long to wait for clients and backends.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// A line for each request. Default: none.
    #[serde(default)]
    pub access_log: Option<AccessLog>,
    /// A span for each request, for a collector of OpenTelemetry. Default: none.
    #[serde(default)]
    pub opentelemetry: Option<OpenTelemetry>,
    /// A page, JSON and metrics of the process, on a listener of their own. Default: none.
    #[serde(default)]
    pub admin: Option<Admin>,
    /// Whether a request without a valid `traceparent` (W3C Trace Context) gets one on its way to the
    /// backend; a valid one is passed on in any case, and a request with a span has that of its span.
    /// Default: `true`.
    #[serde(default = "yes")]
    pub traceparent: bool,
    /// The part of those that get one which says that the trace is recorded. Backends usually do what it says: with 0
    /// they record nothing that begins here, with 1 all of it, whatever part they would take by themselves. With
    /// `opentelemetry`, `opentelemetry.sample` decides. Default: 1. Range: 0 to 1.
    #[serde(default = "all")]
    pub traceparent_sampled: f64,
    /// What happens when there are more requests than backends can take.
    #[serde(default)]
    pub overload: Overload,
    /// How nodes are asked whether they are well. Default: they are not, and what becomes of requests decides.
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    /// Which requests go to the leader, where writes do.
    #[serde(default)]
    pub leader: Leader,
    /// The name of a cookie that names the node, so that a client stays with it while the node serves.
    /// Default: none.
    #[serde(default)]
    pub sticky_cookie: Option<String>,
    /// TLS to the clients that connect to `listen`. Default: none, plain text.
    #[serde(default)]
    pub tls: Option<ListenerTls>,
    /// How backends are spoken to.
    #[serde(default)]
    pub backends: Backends,
    /// What clients may do, and which of them are believed.
    #[serde(default)]
    pub clients: Clients,
    /// How long the start waits for the first view of the group. Default: 10,000 ms. Range: 0 to
    /// 600,000.
    #[serde(default = "default_ready_timeout_ms")]
    pub ready_timeout_ms: u64,
    /// How long connections are still accepted after SIGTERM, so that load balancers in front notice
    /// that this process is about to end. Default: 5,000 ms. Range: 0 to 600,000.
    #[serde(default = "default_drain_delay_ms")]
    pub drain_delay_ms: u64,
    /// How long a write waits for a leader, where writes go to the leader. Default: 2,000 ms.
    /// Range: 0 to 60,000.
    #[serde(default = "default_leader_wait_ms")]
    pub leader_wait_ms: u64,
}

/// How long a service waits for the first complete view before it signals ready without one.
pub(crate) const READY_TIMEOUT: Duration = Duration::from_secs(10);

fn default_publish_interval_ms() -> u64 {
    PUBLISH_INTERVAL.as_millis() as u64
}

fn default_listen() -> String {
    "127.0.0.1:6188".to_owned()
}

fn default_candidates() -> usize {
    DEFAULT_CANDIDATES
}

fn default_port() -> u16 {
    DEFAULT_PORT
}

fn default_retries() -> usize {
    2
}

fn default_ready_timeout_ms() -> u64 {
    READY_TIMEOUT.as_millis() as u64
}

fn default_drain_delay_ms() -> u64 {
    5_000
}

fn yes() -> bool {
    true
}

/// All requests.
pub(super) const ALL: f64 = 1.0;

fn all() -> f64 {
    ALL
}

fn default_leader_wait_ms() -> u64 {
    2_000
}

impl ClusterConfig {
    /// Checks the range of every field.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint), naming what is wrong.
    pub fn validate(&self) -> Result<(), ClusterError> {
        self.check_section()?;
        self.check_groups()?;
        self.check_routes()?;
        self.check_effects()
    }

    /// Checks the fields that a group may have, too.
    pub(crate) fn check_section(&self) -> Result<(), ClusterError> {
        self.check_variables()?;
        self.check_etcd()?;
        let section = |error| as_in_file(error, "cluster.", "");
        self.balancer().map_err(section)?;
        self.check_listeners()?;
        if self.zone.is_some() && self.zone_of.is_some() {
            return Err(ClusterError::config(
                "cluster.zone_of",
                "cannot be given together with cluster.zone",
            ));
        }
        let millis = |name, value: u64, range| in_range("cluster", name, value, range);
        in_range("cluster", "retries", self.retries, 0..=2)?;
        self.retry.validate("cluster.retry")?;
        self.timeouts.validate("cluster.timeouts")?;
        if let Some(log) = &self.access_log {
            log.validate("cluster.access_log")?;
        }
        self.check_traces()?;
        if let Some(admin) = &self.admin {
            if !cfg!(feature = "admin") {
                let reason = "this program is built without the feature admin";
                return Err(ClusterError::config("cluster.admin", reason));
            }
            admin.validate("cluster.admin")?;
        }
        self.overload.validate("cluster.overload")?;
        if let Some(check) = &self.health_check {
            check.validate("cluster.health_check")?;
        }
        self.leader.validate("cluster.leader")?;
        self.check_schemes()?;
        self.load_report_metrics
            .validate("cluster.load_report_metrics")?;
        if self.leader.writes && !self.registry.is_native() {
            let reason = "is not possible: only groups of this crate's nodes have a leader";
            return Err(ClusterError::config("cluster.leader.writes", reason));
        }
        if let Some(name) = &self.sticky_cookie
            && !is_token(name)
        {
            let reason = format!("{name:?} is not the name of a cookie");
            return Err(ClusterError::config("cluster.sticky_cookie", reason));
        }
        self.spoken_to().validate("cluster.backends")?;
        self.clients.validate("cluster.clients")?;
        millis("ready_timeout_ms", self.ready_timeout_ms, 0..=600_000)?;
        millis("drain_delay_ms", self.drain_delay_ms, 0..=600_000)?;
        millis("leader_wait_ms", self.leader_wait_ms, 0..=60_000)?;
        millis("publish_interval_ms", self.publish_interval_ms, 0..=10_000)?;
        self.discovery().map_err(section).map(drop)
    }

    fn check_etcd(&self) -> Result<(), ClusterError> {
        self.etcd.validate().map_err(|error| match error {
            ClusterError::InvalidEndpoint { endpoint, reason } => {
                let all = &self.etcd.endpoints;
                let index = all.iter().position(|it| *it == endpoint);
                let field = match index {
                    Some(index) => format!("cluster.etcd.endpoints[{index}]"),
                    None => "cluster.etcd.endpoints".to_owned(),
                };
                ClusterError::config(field, format!("{endpoint:?}: {reason}"))
            }
            other => as_in_file(other, "cluster.etcd.", "_ms"),
        })
    }

    fn check_traces(&self) -> Result<(), ClusterError> {
        let sampled = self.traceparent_sampled;
        in_range("cluster", "traceparent_sampled", sampled, 0.0..=1.0)?;
        match &self.opentelemetry {
            Some(spans) => spans.validate("cluster.opentelemetry"),
            None => Ok(()),
        }
    }

    /// A variable in quotes would be taken for a name or a password.
    fn check_variables(&self) -> Result<(), ClusterError> {
        let endpoints = self.etcd.endpoints.iter();
        let endpoints = endpoints.map(|endpoint| ("etcd.endpoints", endpoint.as_str()));
        let further = self.further_listeners.iter();
        let further = further.map(|it| ("further_listeners", it.listen.as_str()));
        let all = endpoints.chain([("group", &*self.group), ("listen", &*self.listen)]);
        let names = [
            ("zone", &self.zone),
            ("zone_of", &self.zone_of),
            ("clients.ready_path", &self.clients.ready_path),
        ];
        let names = names.into_iter();
        let names = names.filter_map(|(field, value)| Some((field, value.as_deref()?)));
        let user = self.etcd.credentials.iter();
        let user = user.map(|it| ("etcd.user", it.user.as_str()));
        let all = all.chain(further).chain(names).chain(user);
        let password = match self.etcd.credentials.as_ref().map(|it| &it.password) {
            // A password may have any characters in it.
            Some(Password::Text(text)) if text.starts_with("${") && text.ends_with('}') => {
                Some(("etcd.password", text.as_str()))
            }
            _ => None,
        };
        let all = all.chain(password);
        match all.into_iter().find(|(_, value)| value.contains("${")) {
            Some((field, _)) => Err(ClusterError::config(
                format!("cluster.{field}"),
                "contains ${, and an environment variable is replaced only without quotes",
            )),
            None => Ok(()),
        }
    }

    /// How backends are spoken to: in other registries, entries say it.
    pub(crate) fn spoken_to(&self) -> Backends {
        let mut backends = self.backends.clone();
        backends.protocol_of_node |= self.registries().any(|registry| !registry.is_native());
        backends
    }

    fn registries(&self) -> impl Iterator<Item = &Registry> {
        std::iter::once(&self.registry).chain(&self.further_registries)
    }

    /// Where the file says that backends are spoken to over TLS, it has to be possible.
    fn check_schemes(&self) -> Result<(), ClusterError> {
        let Some(index) = self.registries().position(|it| it.scheme.is_tls()) else {
            return Ok(());
        };
        let field = match index {
            0 => "cluster.registry.scheme".to_owned(),
            further => format!("cluster.further_registries[{}].scheme", further - 1),
        };
        let error = |field: &str, reason: &str| Err(ClusterError::config(field, reason));
        if !cfg!(feature = "proxy-tls") {
            let reason =
                "needs TLS to backends, and this program is built without the feature proxy-tls";
            return error(&field, reason);
        }
        if self.backends.server_name.is_none() {
            let reason = "is missing: with a scheme over TLS, it is the name that certificates have to be for";
            return error("cluster.backends.server_name", reason);
        }
        Ok(())
    }

    /// The discovery that this section describes.
    ///
    /// # Errors
    ///
    /// When an endpoint, a time or the group is invalid.
    pub fn discovery(&self) -> Result<ServiceDiscovery, ClusterError> {
        let builder = ServiceDiscovery::builder(self.etcd.clone(), &self.group);
        self.describe(builder).try_build()
    }

    /// The same over a connection that others use, too.
    ///
    /// # Errors
    ///
    /// When a time or the group is invalid.
    pub fn discovery_over(&self, cluster: &Cluster) -> Result<ServiceDiscovery, ClusterError> {
        self.describe(cluster.discovery(&self.group)).try_build()
    }

    fn describe(&self, builder: ServiceDiscoveryBuilder) -> ServiceDiscoveryBuilder {
        let builder = builder
            .registry(self.registry.clone())
            .further_registries(self.further_registries.iter().cloned())
            .name_servers(self.name_servers.iter().cloned())
            .filter(self.filter.clone())
            .allowed_networks(self.allowed_networks.iter().cloned())
            .allowed_ports(self.allowed_ports.iter())
            .limits(self.limits)
            .self_preservation(self.self_preservation)
            .publish_interval(Duration::from_millis(self.publish_interval_ms));
        match &self.snapshot {
            Some(file) => builder.snapshot_file(file.clone()),
            None => builder,
        }
    }

    /// The file with what was learned of the backends, beside the one with the nodes, and how often it is written.
    #[cfg(feature = "pingora")]
    pub(crate) fn learned_file(&self) -> Option<(std::path::PathBuf, Duration)> {
        let snapshot = self.snapshot.as_ref()?;
        let mut path = snapshot.path.clone().into_os_string();
        path.push(".learned");
        Some((path.into(), Duration::from_millis(snapshot.interval_ms)))
    }

    /// The balancer that this section describes.
    ///
    /// # Errors
    ///
    /// When a coefficient, the number of candidates or the default port is out of range.
    pub fn balancer(&self) -> Result<Balancer, ClusterError> {
        self.weights().try_build()
    }

    /// The same as settings. For a stock load balancer, which is not informed of outcomes, change
    /// them to [`Adaptive::metrics_only`].
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

/// Gives the field of an error the name it has in the file: with its section, and with the unit if it
/// is a time.
pub(super) fn as_in_file(error: ClusterError, section: &str, unit: &str) -> ClusterError {
    match error {
        ClusterError::InvalidConfig { field, reason } => {
            let is_time = ["timeout", "interval", "pause"]
                .iter()
                .any(|end| field.ends_with(end));
            let unit = if is_time { unit } else { "" };
            ClusterError::config(format!("{section}{field}{unit}"), reason)
        }
        other => other,
    }
}
