//! The bundled proxy: a complete HTTP load balancer over the adapters (feature `pingora`).

mod access_entry;
mod access_log;
mod client;
mod cluster_proxy;
mod context;
mod failure;
mod front;
mod grpc;
mod headers;
mod hooks;
mod hop_by_hop;
mod leader;
mod listener;
mod outcome;
mod overload;
mod peers;
mod pick;
#[cfg(any(test, feature = "test-util"))]
mod piped;
mod readiness;
mod reply;
mod requests;
mod retry;
mod retry_budget;
mod server;
mod shutdown;
mod statistics;
mod sticky;
mod tls;
mod trace;
mod via;

pub use client::TrustedProxies;
pub use cluster_proxy::ClusterProxy;
pub use context::RequestContext;
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub use front::proxy_header_length;
pub use front::{FrontCounts, FrontStatistics};
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub use piped::PipedProxy;
pub use server::ProxyParts;
pub use shutdown::{Hold, Shutdown, run};
pub use statistics::{
    BackendCounts, LATENCY_BUCKETS, LatencyCounts, RequestCounts, RequestStatistics,
};
