//! The guide: how coordination and routing work, chapter by chapter. Each chapter can be read alone.
//!
//! | chapter | what it answers |
//! |---|---|
//! | [Getting started](getting_started) | which of the three ways in fits, each as a complete program |
//! | [Concepts](concepts) | what runs where, what is stored in etcd |
//! | [Routing](routing) | how a backend is chosen, how near to the optimum, at what cost |
//! | [Configuration](configuration) | what the YAML file says, and how it is checked |
//! | [The command](command) | run a balancer, look at a group, make any program a member |
//! | [Other registries](registries) | fleets of gRPC, go-zero, Kratos and others, read as they are |
//! | [Watching a process](operating) | the live page, JSON, metrics, alerts |
//! | [At the edge](edge) | time-outs, limits and headers of the bundled proxy |
//! | [Leadership and fencing](fencing) | who leads, for how long, and how two leaders do no harm |
//! | [When etcd is away](when_etcd_is_away) | outages, slow servers, silent connections, bad entries |
//! | [Security](security) | TLS, users, the rights that each program needs |
//! | [Scale](scale) | what nodes cost a balancer, and what balancers cost etcd |
//! | [What Pingora could do better](upstream) | what a request costs, and where that goes |
//! | [How it is tested](testing) | promises, simulation, mutants, fuzzing, chaos |
//! | [Limits](limits) | what it does not do, and what it relies on |
//! | [Coming from photon-etcd-cluster](migrating) | the predecessor's calls, and what replaces them |
//!
//! The pages are the Markdown files beside this one, which can be read in the repository as well.
// A page links to what needs a feature; without the feature there is nothing to link to.
#![cfg_attr(
    not(all(feature = "pingora", feature = "system-metrics", feature = "tower")),
    allow(rustdoc::broken_intra_doc_links)
)]

// Of two definitions of a link the first one counts. So on these pages the links of `links.md` are
// used, and in the repository those at the end of each chapter.

#[doc = include_str!("links.md")]
#[doc = include_str!("getting_started.md")]
///
/// # In the API
///
/// [`pingora`](crate::pingora), [`ClusterProxy`](crate::proxy::ClusterProxy),
/// [`config::load`](crate::config::load), [`ClusterNodeBuilder`](crate::ClusterNodeBuilder),
/// [`ServiceDiscovery`](crate::ServiceDiscovery), [`Cluster`](crate::Cluster)
pub mod getting_started {}

#[doc = include_str!("links.md")]
#[doc = include_str!("concepts.md")]
///
/// # In the API
///
/// [`ClusterNode`](crate::ClusterNode), [`ServiceDiscovery`](crate::ServiceDiscovery),
/// [`Nodes`](crate::Nodes), [`Node`](crate::Node), [`Change`](crate::Change),
/// [`SessionState`](crate::worker::SessionState), [`MetricsCollector`](crate::MetricsCollector),
/// [`Deadband`](crate::metrics::Deadband), [`metadata_keys`](crate::metadata_keys)
pub mod concepts {}

#[doc = include_str!("links.md")]
#[doc = include_str!("registries.md")]
///
/// # In the API
///
/// [`Registry`](crate::discovery::Registry), [`Format`](crate::discovery::Format),
/// [`EntryTable`](crate::discovery::EntryTable)
pub mod registries {}

#[doc = include_str!("links.md")]
#[doc = include_str!("routing.md")]
///
/// # The plot
///
#[doc = include_str!("../../benches/routing_quality/routing_quality.svg")]
///
/// # In the API
///
/// [`balance`](crate::balance), [`Balancer`](crate::balance::Balancer),
/// [`Policy`](crate::balance::Policy), [`Adaptive`](crate::balance::Adaptive),
/// [`Headroom`](crate::balance::Headroom), [`Zones`](crate::balance::Zones),
/// [`Upstream`](crate::balance::Upstream), [`LoadReporter`](crate::metrics::LoadReporter),
/// [`BalancerService`](crate::pingora::BalancerService),
/// [`MetricsWeighted`](crate::pingora::MetricsWeighted)
pub mod routing {}

#[doc = include_str!("links.md")]
#[doc = include_str!("configuration.md")]
///
/// # The file
///
/// ```yaml
#[doc = include_str!("../../config/load_balancer.yaml")]
/// ```
///
/// # In the API
///
/// [`config`](crate::config), [`ClusterConfig`](crate::config::ClusterConfig),
/// [`config::load`](crate::config::load)
pub mod configuration {}

#[doc = include_str!("links.md")]
#[doc = include_str!("command.md")]
pub mod command {}

#[doc = include_str!("links.md")]
#[doc = include_str!("operating.md")]
pub mod operating {}

#[doc = include_str!("links.md")]
#[doc = include_str!("edge.md")]
///
/// # In the API
///
/// [`ClusterProxy`](crate::proxy::ClusterProxy), [`TrustedProxies`](crate::proxy::TrustedProxies),
/// [`FrontStatistics`](crate::proxy::FrontStatistics), [`Timeouts`](crate::config::Timeouts),
/// [`Clients`](crate::config::Clients)
pub mod edge {}

#[doc = include_str!("links.md")]
#[doc = include_str!("fencing.md")]
///
/// # In the API
///
/// [`Leadership`](crate::Leadership), [`is_leader`](crate::ClusterNode::is_leader),
/// [`leadership`](crate::ClusterNode::leadership), [`resign`](crate::ClusterNode::resign),
/// [`transfer_to`](crate::ClusterNode::transfer_to), [`drain`](crate::ClusterNode::drain),
/// [`priority`](crate::ClusterNodeBuilder::priority), [`LeaderRoute`](crate::pingora::LeaderRoute)
pub mod fencing {}

#[doc = include_str!("links.md")]
#[doc = include_str!("when_etcd_is_away.md")]
///
/// # In the API
///
/// [`DiscoveryStatus`](crate::discovery::DiscoveryStatus),
/// [`SelfPreservation`](crate::discovery::SelfPreservation),
/// [`SnapshotFile`](crate::discovery::SnapshotFile), [`EntryLimits`](crate::discovery::EntryLimits),
/// [`NodeFilter`](crate::discovery::NodeFilter),
/// [`RejectedEntries`](crate::discovery::RejectedEntries), [`EtcdOptions`](crate::EtcdOptions)
pub mod when_etcd_is_away {}

#[doc = include_str!("links.md")]
#[doc = include_str!("security.md")]
///
#[doc = include_str!("../../SECURITY.md")]
///
/// # In the API
///
/// [`TlsOptions`](crate::store::TlsOptions), [`Credentials`](crate::store::Credentials),
/// [`Password`](crate::store::Password),
/// [`allowed_networks`](crate::ServiceDiscoveryBuilder::allowed_networks),
/// [`allowed_ports`](crate::ServiceDiscoveryBuilder::allowed_ports)
pub mod security {}

#[doc = include_str!("links.md")]
#[doc = include_str!("scale.md")]
///
/// # In the API
///
/// [`Deadband`](crate::metrics::Deadband), [`LoadReport`](crate::metrics::LoadReport),
/// [`NodeFilter`](crate::discovery::NodeFilter), [`Cluster`](crate::Cluster)
pub mod scale {}

#[doc = include_str!("links.md")]
#[doc = include_str!("upstream.md")]
///
/// # In the API
///
/// [`ClusterProxy`](crate::proxy::ClusterProxy)
pub mod upstream {}

#[doc = include_str!("links.md")]
#[doc = include_str!("testing.md")]
pub mod testing {}

#[doc = include_str!("links.md")]
#[doc = include_str!("limits.md")]
pub mod limits {}

#[doc = include_str!("links.md")]
#[doc = include_str!("migrating.md")]
pub mod migrating {}
