//! The bundled proxy: a complete HTTP load balancer over the adapters (feature `pingora`).

mod context;
mod front;
mod headers;
mod leader;
mod listener;
mod outcome;
mod peers;
mod pick;
mod reply;
mod retry;
mod server;

pub use context::RequestContext;
pub use front::ClusterProxy;
