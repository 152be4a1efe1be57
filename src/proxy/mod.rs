//! The bundled proxy: a complete HTTP load balancer over the adapters (feature `pingora`).

mod cluster_proxy;
mod listening;

pub use cluster_proxy::{ClusterProxy, RequestContext};
