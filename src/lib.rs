//! A live view of the cluster behind [Pingora](https://docs.rs/pingora).
//!
//! Worker processes register in etcd, elect a leader per group, and publish their CPU, memory and
//! queue depth. Balancer processes watch the group, turn those metrics into weights, and route every
//! request with them, without polling and without a lock on the request path.
//!
//! # Three ways in
//!
//! - **Drop in.** A Pingora proxy that has a `LoadBalancer` replaces its discovery by
//!   `pingora::ClusterBackends` and its selection by `pingora::MetricsWeighted`, or uses
//!   `pingora::LiveLoadBalancer`, which changes reach at once.
//! - **Bundled.** `proxy::ClusterProxy` is a complete proxy; the example `load_balancer` runs it
//!   from one YAML file.
//! - **The core alone.** [`ClusterNode`] for workers, `ServiceDiscovery` for programs that need the
//!   membership or the leader, both without Pingora.
//!
//! # A worker
//!
//! ```no_run
//! use pingora_etcd::ClusterNodeBuilder;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let etcd = vec!["http://10.0.0.1:2379".to_string()];
//! let node = ClusterNodeBuilder::new(etcd, "worker-1", "10.0.1.1".parse()?, "workers")
//!     .port(8080)
//!     .try_build()?;
//! // Registers and campaigns until SIGTERM or Ctrl-C; then leaves.
//! let mut signals = pingora_etcd::worker::EndSignals::new()?;
//! node.run_until(async {
//!     signals.next().await;
//!     // No new requests from here on: those in flight have 5 s, or until load_reporter() counts none.
//!     node.drain_until_idle(std::time::Duration::from_secs(5)).await;
//! })
//! .await?;
//! # Ok(()) }
//! ```
//!
//! With [`metrics_collector`](ClusterNodeBuilder::metrics_collector) and
//! [`metrics_update_interval`](ClusterNodeBuilder::metrics_update_interval) it publishes its load, too.
//!
//! # The guide
//!
//! [Getting started](guide::getting_started), [concepts](guide::concepts), [routing](guide::routing),
//! [configuration](guide::configuration), [at the edge](guide::edge), [watching a process](guide::operating), [other registries](guide::registries), [the command](guide::command), [leadership and fencing](guide::fencing),
//! [when etcd is away](guide::when_etcd_is_away), [security](guide::security),
//! [scale](guide::scale), [what Pingora could do better](guide::upstream), [how it is tested](guide::testing), [limits](guide::limits),
//! [coming from photon-etcd-cluster](guide::migrating).
//!
//! Read [fencing](guide::fencing#fencing) before you let a leader do what must not happen twice.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `pingora` | yes | the modules `pingora` and `proxy`; implies `config` |
//! | `config` | by `pingora` | the module `config`: the YAML file; implies `balance` |
//! | `balance` | by `pingora` | the module `balance`: the `Balancer`, without Pingora; implies `discovery` |
//! | `discovery` | by `pingora` | `ServiceDiscovery`, the snapshot file |
//! | `system-metrics` | no | `SystemMetricsCollector` |
//! | `tls` | no | `https://` endpoints, by rustls with ring |
//! | `proxy-tls` | no | TLS to clients and backends in the bundled proxy, by rustls with ring; implies `pingora` |
//! | `admin` | no | the module `admin`: a live page, JSON and metrics of a process; implies `pingora` |
//! | `opentelemetry` | no | a span for each request of the bundled proxy, sent by OTLP; implies `pingora` |
//! | `host-names` | no | host names as addresses in other registries, resolved by `hickory-resolver` |
//! | `cli` | no | the command `pingora-etcd`, for `cargo install` |
//! | `mimalloc` | no | with `cli`: the allocator mimalloc in the command |
//! | `schema` | by `cli` | the JSON Schema of the file |
//! | `tower` | no | `LoadReporter::layer`: counts requests and reports load with every response |
//! | `test-util` | no | controls of the in-memory store: compaction, expiry, refusal, silence |
//!
//! A worker alone needs `default-features = false`; a program that reads the membership adds
//! `features = ["discovery"]`.
//!
//! Types of these crates are in signatures, so that a program needs the same version: `pingora` 0.9, `http` 1, `bytes` 1,
//! `tokio` 1, `serde_json` 1, `tracing` 0.1, and `axum` 0.8 with the feature `admin`.
#![forbid(unsafe_code)]
#![deny(missing_docs, unreachable_pub)]
#![warn(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used
)]
// A test is one scenario, read from top to bottom.
#![cfg_attr(test, allow(clippy::too_many_lines))]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "admin")]
pub mod admin;
mod backoff;
#[cfg(feature = "balance")]
pub mod balance;
mod cluster;
#[cfg(feature = "config")]
pub mod config;
#[cfg(feature = "discovery")]
pub mod discovery;
pub mod error;
// Pages only. Their examples are compiled where the features that they show are there.
#[cfg(all(
    doc,
    any(not(doctest), all(feature = "pingora", feature = "system-metrics"))
))]
pub mod guide;
mod ids;
mod keys;
mod lifecycle;
mod load_report;
mod metadata;
pub mod metrics;
mod node;
mod opaque;
mod operator;
#[cfg(any(feature = "tls", feature = "proxy-tls"))]
mod pem;
#[cfg(feature = "pingora")]
pub mod pingora;
#[cfg(feature = "discovery")]
mod private_file;
#[cfg(feature = "pingora")]
pub mod proxy;
mod signal;
pub mod store;
mod supervise;
mod sync;
#[cfg(test)]
mod testing;
mod validate;
mod view;
pub mod worker;

pub use cluster::{Cluster, ClusterBuilder};
#[cfg(feature = "discovery")]
pub use discovery::{ServiceDiscovery, ServiceDiscoveryBuilder};
pub use error::ClusterError;
pub use metadata::{Metadata, NodeMetadata, metadata_keys};
pub use metrics::MetricsCollector;
#[cfg(feature = "system-metrics")]
pub use metrics::SystemMetricsCollector;
pub use node::{HealthStatus, Node, NodeState};
pub use operator::Operator;
pub use store::EtcdOptions;
#[cfg(feature = "discovery")]
pub use view::{Change, ClusterEvent, Nodes, Source};
pub use view::{Leadership, NodeOverride};
pub use worker::{ClusterNode, ClusterNodeBuilder};

// Names and modules of `photon-etcd-cluster`, for programs that come from there.
#[doc(hidden)]
pub use metrics::{CompositeMetricsCollector, NoopMetricsCollector};

#[doc(hidden)]
pub mod cluster_node {
    pub use crate::worker::{ClusterNode, ClusterNodeBuilder};
}

#[cfg(feature = "discovery")]
#[doc(hidden)]
pub mod event {
    pub use crate::view::ClusterEvent;
}

#[doc(hidden)]
pub mod types {
    pub use crate::metadata::{NodeMetadata, metadata_keys};
    pub use crate::node::{HealthStatus, Node};
}

/// The README's code is compiled with the doc tests.
#[cfg(all(doctest, feature = "pingora", feature = "system-metrics"))]
#[doc = include_str!("../README.md")]
struct Readme;
