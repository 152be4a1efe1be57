//! A live view of the cluster behind [Pingora](https://docs.rs/pingora).
//!
//! Worker processes register in etcd, elect a leader per group, and publish their CPU, memory and
//! queue depth. Balancer processes watch the group, turn those metrics into weights, and route
//! every request with them, without polling and without a lock on the request path.
//!
//! # Three ways in
//!
//! - **Drop in.** A Pingora proxy that has a `LoadBalancer` swaps its discovery for
//!   `pingora::ClusterBackends` and its selection for
//!   `pingora::MetricsWeighted`, or takes
//!   `pingora::LiveLoadBalancer`, which changes reach at once.
//! - **Bundled.** `pingora::ClusterProxy` is a complete proxy; the example
//!   `load_balancer` runs it from one YAML file.
//! - **The core alone.** [`ClusterNode`] and [`ServiceDiscovery`] without Pingora
//!   (`default-features = false`), for workers and for programs that only need membership or a
//!   leader.
//!
//! # A worker
//!
//! ```no_run
//! use pingora_etcd::ClusterNodeBuilder;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = ClusterNodeBuilder::new(
//!     vec!["http://10.0.0.1:2379".to_string()],
//!     "worker-1",
//!     "10.0.1.1".parse()?,
//!     "my-service",
//! )
//! .port(8080)
//! .try_build()?;
//! // Registers, campaigns and publishes until Ctrl-C; then leaves.
//! node.run_until(async { _ = tokio::signal::ctrl_c().await }).await?;
//! # Ok(()) }
//! ```
//!
//! # How it works
//!
//! - **One lease per process and group** holds the node's entry and its candidacy. A lease that is
//!   lost for any reason is replaced by another, for ever.
//! - **The election** is etcd's own recipe: the candidate with the least create revision leads,
//!   each other one watches the one ahead of it. That revision is the term's *fencing token*
//!   ([`Leadership::epoch`]), greater with every term.
//! - **Leadership ends by the clock.** [`ClusterNode::is_leader`] compares it with a local
//!   deadline on each call: the instant the last answered renewal was sent, plus the TTL, less a
//!   margin. A leader that is cut off stops before its lease can pass to another, without anybody
//!   telling it.
//! - **Discovery** lists a group at one revision and watches it from the next one, in one stream.
//!   After a disconnect it resumes where it stopped; if history is gone by then it lists again and
//!   tells the difference. The last view stays in use for as long as etcd is away.
//! - **Weights live beside the backends.** An update of metrics never touches a backend's
//!   identity, so it forgets nobody's health.
//! - **Weights follow what is seen**, by default ([`balance::Adaptive`]): two integral controllers,
//!   one on what backends report, one on the latencies of this process's own requests, and a gate on
//!   failures. [`balance`] does it without I/O, with time and randomness from outside.
//! - **The pick** draws a few backends by weight and takes the least busy for its weight. It takes
//!   no lock and allocates nothing.
//!
//! # What it does not do
//!
//! - The local deadline trusts the machine's clock to run at the right *rate*, within the margin,
//!   and not to stop: a machine that is suspended may believe in its term after it resumes, until
//!   the first renewal. Send the fencing token along with whatever must not be done twice.
//! - It trusts the store not to end a lease before its time. If somebody revokes a leader's lease by
//!   hand, the term ends when the leader hears of it: by its watch, or at its next renewal.
//! - [`EtcdOptions::memory`] is a store for one process, for tests and demos. It keeps nothing.
//! - TLS and passwords for etcd, a snapshot for a start without etcd, and groups on a shared
//!   watch are not there yet; see the README for the whole list.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `pingora` | yes | the module `pingora`, the adapters |
//! | `system-metrics` | no | `SystemMetricsCollector` |
//! | `tower` | no | `LoadReporter::layer`: counts requests and reports load with every response |
//! | `test-util` | no | controls of the in-memory store: compaction, expiry, refusal, silence |
#![forbid(unsafe_code)]
#![deny(missing_docs, unreachable_pub)]

mod backoff;
pub mod balance;
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub mod bugs;
#[cfg(not(any(test, feature = "test-util")))]
mod bugs;
mod cluster;
pub mod config;
pub mod discovery;
pub mod error;
mod keys;
mod load_report;
pub mod metrics;
mod node;
#[cfg(feature = "pingora")]
pub mod pingora;
mod signal;
pub mod store;
#[cfg(test)]
mod testing;
mod worker;

pub use cluster::{Cluster, ClusterBuilder};
pub use discovery::{
    Change, Changes, ClusterEvent, DiscoveryStatus, Nodes, ServiceDiscovery,
    ServiceDiscoveryBuilder,
};
pub use error::ClusterError;
pub use load_report::{LOAD_REPORT_HEADER, LoadReport, LoadReportError};
#[cfg(feature = "system-metrics")]
pub use metrics::SystemMetricsCollector;
pub use metrics::{
    CompositeMetricsCollector, Deadband, LoadReporter, MetricsCollector, NoopMetricsCollector,
    RequestGuard, Tolerance,
};
pub use node::{HealthStatus, Node, NodeMetadata, NodeState, metadata_keys};
pub use store::EtcdOptions;
pub use worker::{ClusterNode, ClusterNodeBuilder, Leadership, SessionState};

/// The worker's types, under the name that `photon-etcd-cluster` has for them.
pub mod cluster_node {
    pub use crate::worker::{ClusterNode, ClusterNodeBuilder};
}

/// Events, under the name that `photon-etcd-cluster` has for them.
pub mod event {
    pub use crate::discovery::ClusterEvent;
}

/// What is stored and shown, under the name that `photon-etcd-cluster` has for it.
pub mod types {
    pub use crate::node::{HealthStatus, Node, NodeMetadata, metadata_keys};
}

/// The README's code is compiled with the doc tests.
#[cfg(all(doctest, feature = "pingora", feature = "system-metrics"))]
#[doc = include_str!("../README.md")]
struct Readme;
