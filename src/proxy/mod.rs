//! The bundled proxy: a complete HTTP load balancer over the adapters (feature `pingora`).

mod access_entry;
mod access_log;
mod certificates;
mod client;
mod client_settings;
mod cluster_proxy;
mod conditions;
mod connections;
mod context;
mod daemon;
mod deadline;
mod ends_with_head;
mod failed;
mod failed_try;
mod front;
mod group;
mod grpc;
mod header_changes;
mod header_policy;
mod headers;
mod hooks;
mod hop_by_hop;
mod http_1_0;
mod kept;
mod last_clients;
mod last_connected;
mod leader;
mod learned;
mod listener;
mod load_reports;
mod log_limit;
mod mirror;
mod outcome;
mod overload;
mod own_proxy;
mod peers;
mod phases;
mod pick;
#[cfg(any(test, feature = "test-util"))]
mod piped;
mod readiness;
mod reload;
mod reply;
mod request_state;
mod requests;
mod rest;
pub mod retry;
mod retry_budget;
mod route;
mod routing;
mod server;
mod shutdown;
mod spans;
mod statistics;
mod sticky;
mod tls;
mod trace;
mod tries;
mod unserved;
mod via;

pub use access_log::{AccessLog, AccessLogEntry, AccessLogStatistics};
pub use certificates::CertificateFile;
pub use client::TrustedProxies;
pub use cluster_proxy::ClusterProxy;
pub use context::RequestContext;
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub use front::proxy_header_length;
pub use front::{FrontCounts, FrontStatistics};
pub use header_policy::HeaderPolicy;
pub use outcome::Outcome;
pub use own_proxy::{FrontConfig, OwnProxy, add_proxy};
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub use piped::PipedProxy;
pub use reload::{ConfigFile, ReloadStatus, Reloaded, Reloader, ServedGroup, ServedRoute};
pub use server::ProxyParts;
pub use shutdown::{Hold, Shutdown, run};
pub use statistics::{
    BackendCounts, LATENCY_BUCKETS, LatencyCounts, RequestCounts, RequestStatistics,
};
