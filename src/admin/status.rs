//! Everything that is shown, as plain values.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::group::Group;
use crate::balance::BackendStatus;
use crate::discovery::DiscoveryStatus;
use crate::metadata::metadata_keys;
use crate::node::Node;
use crate::pingora::CheckStatus;
use crate::proxy::{
    self, AccessLogStatistics, BackendCounts, CertificateFile, FrontCounts, LatencyCounts,
    ProxyParts, RequestCounts, ServedRoute, Shutdown,
};
use crate::store::Circuit;
use crate::view::{NodeOverride, Nodes};

/// The answer of `/api/v1/status`.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// The version of this crate.
    pub version: &'static str,
    /// Since when the process runs: Unix time in milliseconds.
    pub started_ms: u64,
    /// The time of this answer: Unix time in milliseconds.
    pub now_ms: u64,
    /// Whether every group has a view, at least one of them has nodes, and the process does not drain.
    pub ready: bool,
    /// Whether the process is about to end.
    pub draining: bool,
    /// Whether something can be changed, with the token.
    pub writable: bool,
    /// The groups.
    pub groups: Vec<GroupStatus>,
    /// The routes, in their order.
    pub routes: Vec<RouteStatus>,
    /// Requests that no group has served: refused, redirected, or answered by a route.
    pub unserved: Option<RequestStatus>,
    /// Lines of the access log that were lost; `None` if there is none.
    pub access_log_lines_lost: Option<u64>,
    /// What has become of reloads; `None` if the process has none.
    pub reload: Option<ReloadStatus>,
    /// The certificates that are in use.
    pub certificates: Vec<CertificateStatus>,
}

/// A file with certificates that is in use.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct CertificateStatus {
    /// The field of the configuration that names it.
    pub field: String,
    /// The file.
    pub file: String,
    /// The names that the certificate is for which ends then.
    pub names: Vec<String>,
    /// When the first one of its certificates ends, of CAs the last one: Unix time in milliseconds.
    pub ends_ms: u64,
}

impl From<CertificateFile> for CertificateStatus {
    fn from(file: CertificateFile) -> Self {
        Self {
            field: file.field,
            file: file.file.display().to_string(),
            names: file.names,
            ends_ms: unix_millis(file.ends),
        }
    }
}

/// What health checks say of a node.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct CheckResult {
    /// Whether it is well.
    pub well: bool,
    /// What the last check has found, if it failed.
    pub problem: Option<String>,
}

impl From<CheckStatus> for CheckResult {
    fn from(status: CheckStatus) -> Self {
        Self {
            well: status.is_well,
            problem: status.problem,
        }
    }
}

/// A route.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RouteStatus {
    /// Its name.
    pub name: String,
    /// How many requests it has been for.
    pub requests: u64,
}

/// What has become of reloads of the configuration.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ReloadStatus {
    /// When the one that is in use was taken over, in Unix milliseconds.
    pub since_ms: u64,
    /// How often another one was taken over.
    pub taken_over: u64,
    /// How often one was refused.
    pub refused: u64,
    /// Why the last one was refused, if it was.
    pub error: Option<String>,
    /// Fields that have a new value in the file, which takes effect only after a restart.
    pub needs_restart: Vec<String>,
}

impl From<proxy::ReloadStatus> for ReloadStatus {
    fn from(status: proxy::ReloadStatus) -> Self {
        Self {
            since_ms: unix_millis(status.since),
            taken_over: status.taken_over,
            refused: status.refused,
            error: status.error,
            needs_restart: status.needs_restart,
        }
    }
}

/// A group.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// `connecting`, `live`, `stale`, `from disk` or `ended`.
    pub view: &'static str,
    /// For how long the view has not followed etcd, in milliseconds; 0 while it does.
    pub stale_for_ms: u64,
    /// The revision of the view.
    pub revision: i64,
    /// The endpoint of the connection to etcd, if there is one.
    pub etcd: Option<String>,
    /// How long etcd takes to answer on this connection, in milliseconds: a mean of the last answers.
    pub etcd_round_trip_ms: Option<f64>,
    /// How many calls to etcd have failed in a row, if that is why none are sent.
    pub breaker_open_after: Option<u32>,
    /// Whether the snapshot file cannot be written.
    pub snapshot_failing: bool,
    /// Whether health checks find so few nodes well that all are used.
    pub panicking: bool,
    /// Who leads.
    pub leader: Option<LeaderStatus>,
    /// Entries that were refused, by reason.
    pub rejected: HashMap<&'static str, u64>,
    /// What has become of requests; `None` where no proxy counts them.
    pub requests: Option<RequestStatus>,
    /// What has happened to client connections, by what it was.
    pub clients: HashMap<&'static str, u64>,
    /// The nodes, by id.
    pub nodes: Vec<NodeStatus>,
}

/// Who leads a group.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct LeaderStatus {
    /// The id of the node.
    pub id: String,
    /// The fencing token.
    pub epoch: i64,
}

/// What has become of requests since the start.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RequestStatus {
    /// Those in flight.
    pub in_flight: u64,
    /// How often one was sent again.
    pub retried: u64,
    /// Connections that were made to backends.
    pub connected: u64,
    /// Those for which no backend was found, by reason.
    pub without_backend: HashMap<&'static str, u64>,
    /// Calls of gRPC that have ended, by their status; the last one is for what is none.
    pub calls: [u64; 18],
    /// Those that have ended, by the first digit of the status; the first one is for those without.
    pub by_class: [u64; 6],
    /// How long they took, by bucket; see [`LATENCY_BUCKETS`](crate::proxy::LATENCY_BUCKETS).
    pub buckets: Vec<u64>,
}

/// A node.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct NodeStatus {
    /// Its id.
    pub id: String,
    /// Where requests are sent.
    pub address: SocketAddr,
    /// Its zone.
    pub zone: Option<String>,
    /// The name of its [`BackendState`](crate::pingora::BackendState).
    pub state: &'static str,
    /// Why it is in this state.
    pub reason: String,
    /// Whether it leads.
    pub leader: bool,
    /// What it reports of its CPU, in percent.
    pub cpu: Option<f64>,
    /// What it reports of its memory, in percent.
    pub memory: Option<f64>,
    /// What it reports of its queue.
    pub queue: Option<f64>,
    /// The weight that it has registered.
    pub registered_weight: Option<f64>,
    /// The weight that the balancer gives it.
    pub weight: Option<f64>,
    /// The part of requests that it is drawn for, 0 to 1.
    pub share: Option<f64>,
    /// Its recent success rate, 0 to 1.
    pub success: Option<f64>,
    /// What an operator says of it, if anything.
    #[serde(rename = "override")]
    pub said: Option<NodeOverride>,
    /// What health checks say of it; `None` without checks, or before the first one.
    pub check: Option<CheckResult>,
    /// Requests of this process that it is working on.
    pub in_flight: u32,
    /// Requests that it has answered.
    pub answered: u64,
    /// Requests that have failed there.
    pub failed: u64,
    /// How long it took until it answered, by bucket.
    pub buckets: Vec<u64>,
    /// When it has written its entry, by its own clock: Unix time in milliseconds.
    pub last_seen_ms: i64,
}

fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Whether every group has a view, at least one of them has nodes, and the process does not drain.
pub(super) fn is_ready(groups: &[Group]) -> bool {
    let has_view = |group: &Group| group.balancer.discovery().is_ready();
    let has_nodes = |group: &Group| !group.balancer.is_empty();
    !Shutdown::of_process().is_draining()
        && groups.iter().all(has_view)
        && groups.iter().any(has_nodes)
}

impl Status {
    pub(super) fn of(groups: &[Group], proxy: Option<&ProxyParts>, started: SystemTime) -> Self {
        let route = |route: ServedRoute| RouteStatus {
            name: route.name,
            requests: route.requests,
        };
        let routes = proxy.map(|parts| parts.reloader.routes());
        let certificates = proxy.map(|parts| parts.reloader.certificates());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            started_ms: unix_millis(started),
            now_ms: unix_millis(SystemTime::now()),
            ready: is_ready(groups),
            draining: Shutdown::of_process().is_draining(),
            writable: false,
            groups: groups.iter().map(GroupStatus::of).collect(),
            routes: routes.into_iter().flatten().map(route).collect(),
            unserved: proxy.map(|parts| RequestStatus::of(&parts.unserved.counts())),
            access_log_lines_lost: proxy
                .and_then(|parts| parts.access_log.as_ref())
                .map(AccessLogStatistics::lost),
            reload: proxy.map(|parts| parts.reloader.status().into()),
            certificates: certificates
                .into_iter()
                .flatten()
                .map(CertificateStatus::from)
                .collect(),
        }
    }
}

/// The word for a state of a view, and since when it is old.
pub(super) fn view(status: DiscoveryStatus) -> (&'static str, Option<SystemTime>) {
    match status {
        DiscoveryStatus::Connecting => ("connecting", None),
        DiscoveryStatus::Live => ("live", None),
        DiscoveryStatus::Stale { since } => ("stale", Some(since)),
        DiscoveryStatus::FromDisk { written } => ("from disk", Some(written)),
        DiscoveryStatus::Ended { since } => ("ended", Some(since)),
    }
}

/// How old something is; at least a millisecond, also if the clock has been set back since, so that 0 always says that
/// there is nothing.
pub(super) fn age(since: Option<SystemTime>) -> Duration {
    let since = since.map(|since| since.elapsed().unwrap_or_default());
    since.map_or(Duration::ZERO, |age| age.max(Duration::from_millis(1)))
}

/// What has happened to client connections, by name.
pub(super) fn named(counts: &FrontCounts) -> [(&'static str, u64); 10] {
    [
        ("accepted", counts.accepted),
        ("refused", counts.refused),
        ("idle", counts.idle),
        ("read_timeout", counts.read_timeouts),
        ("write_timeout", counts.write_timeouts),
        ("bad_request", counts.bad_requests),
        ("request_timeout", counts.request_timeouts),
        ("head_too_large", counts.heads_too_large),
        ("bad_proxy_header", counts.bad_proxy_headers),
        ("failed_handshake", counts.failed_handshakes),
    ]
}

impl GroupStatus {
    fn of(group: &Group) -> Self {
        let discovery = group.balancer.discovery();
        let (nodes, leadership) = (discovery.nodes(), discovery.leadership());
        let (view, since) = view(discovery.status());
        let store = discovery.store_status();
        let rejected = discovery.rejected_entries();
        let clients = group
            .clients
            .as_ref()
            .map(|clients| named(&clients.counts()));
        Self {
            name: group.name().to_owned(),
            view,
            stale_for_ms: u64::try_from(age(since).as_millis()).unwrap_or(u64::MAX),
            revision: nodes.revision(),
            etcd: store.endpoint,
            etcd_round_trip_ms: store.round_trip.map(|time| time.as_secs_f64() * 1e3),
            breaker_open_after: match store.circuit {
                Circuit::Closed => None,
                Circuit::Open { failures } | Circuit::HalfOpen { failures } => Some(failures),
            },
            snapshot_failing: discovery.is_snapshot_failing(),
            panicking: group.balancer.is_panicking(),
            leader: leadership.as_ref().map(|leadership| LeaderStatus {
                id: leadership.node.id.clone(),
                epoch: leadership.epoch,
            }),
            rejected: HashMap::from([
                ("malformed", rejected.malformed),
                ("too_large", rejected.too_large),
                ("not_allowed", rejected.not_allowed),
                ("weight", rejected.weights),
            ]),
            requests: group
                .requests
                .as_ref()
                .map(|requests| RequestStatus::of(&requests.counts())),
            clients: clients.into_iter().flatten().collect(),
            nodes: nodes_of(
                group,
                &nodes,
                leadership.map(|leadership| leadership.node.id.clone()),
            ),
        }
    }
}

impl RequestStatus {
    fn of(counts: &RequestCounts) -> Self {
        let sum_of = |bucket: usize| {
            counts
                .by_class
                .iter()
                .map(|class| class.buckets[bucket])
                .sum()
        };
        Self {
            in_flight: counts.in_flight(),
            retried: counts.retried,
            connected: counts.connected,
            without_backend: HashMap::from(counts.without_backend),
            calls: counts.calls,
            by_class: std::array::from_fn(|class| counts.by_class[class].count()),
            buckets: (0..LatencyCounts::default().buckets.len())
                .map(sum_of)
                .collect(),
        }
    }
}

/// The nodes by id, with what the balancer makes of each.
pub(super) fn nodes_of(group: &Group, nodes: &Nodes, leader: Option<String>) -> Vec<NodeStatus> {
    let backends = group.balancer.backends();
    let all: f64 = backends.iter().map(|backend| backend.share).sum();
    let by_id: HashMap<&str, &BackendStatus> = backends
        .iter()
        .map(|backend| (&*backend.node.id, backend))
        .collect();
    let unused = group.balancer.unused_in_flight();
    let unused: HashMap<&str, u32> = unused
        .iter()
        .map(|(node, count)| (&*node.id, *count))
        .collect();
    // Of several nodes at one address the balancer knows one, which has the requests.
    let held: HashSet<SocketAddr> = backends.iter().map(|backend| backend.addr).collect();
    let mut shown: Vec<_> = nodes
        .iter()
        .map(|node| {
            let backend = by_id.get(&*node.id).copied();
            let address = group.balancer.address_of(node);
            let counts = group.requests.as_ref();
            let counts = counts.filter(|_| backend.is_some() || !held.contains(&address));
            let counts =
                counts.map_or_else(BackendCounts::default, |counts| counts.backend(address));
            let found = group.balancer.state_of(node, nodes, backend);
            let mut status = NodeStatus::of(node, address, backend, all, &counts);
            (status.state, status.reason) = (found.state.name(), found.reason);
            // A node that gets nothing new may not be done.
            if backend.is_none() {
                status.in_flight = unused.get(&*node.id).copied().unwrap_or_default();
            }
            status.check = found.check.map(CheckResult::from);
            status.said = found.said;
            status.leader = leader.as_deref() == Some(&*node.id);
            status
        })
        .collect();
    shown.sort_by(|one, other| one.id.cmp(&other.id));
    shown
}

impl NodeStatus {
    fn of(
        node: &Node,
        address: SocketAddr,
        backend: Option<&BackendStatus>,
        all: f64,
        counts: &BackendCounts,
    ) -> Self {
        Self {
            id: node.id.clone(),
            address,
            zone: node.zone.clone(),
            state: "serving",
            reason: String::new(),
            check: None,
            said: None,
            leader: false,
            cpu: node.metric(metadata_keys::CPU_USAGE_PERCENT),
            memory: node.metric(metadata_keys::MEMORY_USAGE_PERCENT),
            queue: node.metric(metadata_keys::QUEUE_DEPTH),
            registered_weight: node.weight.filter(|weight| weight.is_finite()),
            weight: backend.map(|backend| backend.weight),
            share: backend.map(|backend| if all > 0.0 { backend.share / all } else { 0.0 }),
            success: backend.map(|backend| backend.success),
            in_flight: backend.map_or(0, |backend| backend.in_flight),
            answered: counts.answered.count(),
            failed: counts.failed,
            buckets: counts.answered.buckets.to_vec(),
            last_seen_ms: node.last_seen,
        }
    }
}
