//! The `groups` section: more groups than the one of the `cluster` section itself.

use serde::Deserialize;

use super::backends::Backends;
use super::health_check::HealthCheck;
use super::leader::Leader;
use super::overload::Overload;
use super::retry::Retry;
use super::timeouts::BackendTimeouts;
use super::values::{HashOn, Port};
use crate::balance::{Adaptive, Consistent, Headroom, Policy, Zones};
use crate::discovery::{EntryLimits, NodeFilter, Registry, SelfPreservation, SnapshotFile};
use crate::metrics::{LoadReportForm, MetricNames};

/// The name of the group that the `cluster` section itself describes.
pub const DEFAULT_GROUP: &str = "default";

/// One of `groups`: another group that [routes](super::Route) can name. Each field is as the one of the
/// same name in [`ClusterConfig`](super::ClusterConfig), and what a group does not say is as there, section by section: one that
/// says `retry: { budget: 0.1 }` has the defaults in the rest of `retry`. Five things are not taken over, because they
/// would mix groups up: [`leader`](Self::leader), [`snapshot`](Self::snapshot), [`sticky_cookie`](Self::sticky_cookie),
/// [`further_registries`](Self::further_registries) and the `prefix` of [`registry`](Self::registry).
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
#[allow(missing_docs)] // Said above, once for all.
pub struct Group {
    /// The name in etcd. Default: the one it has in the file.
    pub group: Option<String>,
    /// Default: as there, but below a prefix of its own.
    pub registry: Option<Registry>,
    /// Default: none.
    pub further_registries: Vec<Registry>,
    pub name_servers: Option<Vec<String>>,
    pub filter: Option<NodeFilter>,
    pub allowed_networks: Option<Vec<String>>,
    pub allowed_ports: Option<Vec<Port>>,
    pub limits: Option<EntryLimits>,
    pub self_preservation: Option<SelfPreservation>,
    /// Default: none.
    pub snapshot: Option<SnapshotFile>,
    pub publish_interval_ms: Option<u64>,
    pub policy: Option<Policy>,
    pub adaptive: Option<Adaptive>,
    pub headroom: Option<Headroom>,
    pub consistent: Option<Consistent>,
    pub zones: Option<Zones>,
    pub candidates: Option<usize>,
    pub hash_on: Option<HashOn>,
    pub load_reports: Option<bool>,
    pub load_reports_to_clients: Option<bool>,
    /// Default: as there.
    pub load_report_format: Option<LoadReportForm>,
    pub load_report_metrics: Option<MetricNames>,
    pub default_port: Option<u16>,
    pub retries: Option<usize>,
    pub retry: Option<Retry>,
    /// The times of `timeouts` that are about backends, one by one.
    pub timeouts: BackendTimeouts,
    pub overload: Option<Overload>,
    pub health_check: Option<HealthCheck>,
    /// Default: no request goes to the leader.
    pub leader: Leader,
    pub leader_wait_ms: Option<u64>,
    /// Default: none. Groups that one client uses need different names.
    pub sticky_cookie: Option<String>,
    pub backends: Option<Backends>,
}
