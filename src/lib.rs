//! pingora-etcd
#![forbid(unsafe_code)]
#![deny(missing_docs, unreachable_pub)]

mod backoff;
pub mod balance;
pub mod config;
pub mod discovery;
pub mod error;
mod keys;
pub mod metrics;
mod node;
#[cfg(feature = "pingora")]
pub mod pingora;
pub mod store;
mod worker;

pub use discovery::{
    Change, Changes, ClusterEvent, DiscoveryStatus, Nodes, ServiceDiscovery,
    ServiceDiscoveryBuilder,
};
pub use error::ClusterError;
#[cfg(feature = "system-metrics")]
pub use metrics::SystemMetricsCollector;
pub use metrics::{CompositeMetricsCollector, MetricsCollector, NoopMetricsCollector};
pub use node::{HealthStatus, Node, NodeMetadata, NodeState, metadata_keys};
pub use store::EtcdOptions;
pub use worker::{ClusterNode, ClusterNodeBuilder, Leadership};
