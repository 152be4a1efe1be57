//! What a person or Prometheus sees of a running process (feature `admin`): a live page, the same as
//! JSON, and metrics; with a token, nodes can be drained and more.
//!
//! | path | what it is |
//! |---|---|
//! | `/` | the page: groups, nodes with their state and the reason for it, traffic, events |
//! | `/api/v1/status` | the same as JSON, see [`Status`] |
//! | `/api/v1/events` | server-sent events: `status` each second, and `event` when something happens |
//! | `/metrics` | metrics for Prometheus |
//! | `/healthz` | 200 as long as the process answers |
//! | `POST /api/v1/reload` | reads the file again; 202 if it waits for a group for more than 45 s, and then the status has the outcome |
//! | `POST /api/v1/groups/GROUP/nodes/ID/ACTION` | `drain`, `undrain`, `transfer`, `evict`, or `weight` with the body `{"weight": 0.5}` (`null` for the node's own): see [`Operator`](crate::Operator) |
//! | `/readyz` | 200 while every group has a view, one of them has nodes, and the process does not drain, otherwise 503 |
//!
//! The bundled load balancer has it with the section `admin` of its file. A program of your own:
//!
//! ```no_run
//! use pingora::services::background::background_service;
//! use pingora_etcd::admin::Admin;
//! use pingora_etcd::config;
//! use pingora_etcd::proxy::ClusterProxy;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (config, server_conf) = config::load("config/load_balancer.yaml")?;
//! let mut server = pingora::server::Server::new_with_opt_and_conf(None, server_conf);
//! let parts = ClusterProxy::add_to(&mut server, &config, false)?;
//! let admin = Admin::try_new(config::Admin::default())?.proxy(&parts);
//! server.add_service(background_service("admin", admin));
//! # Ok(()) }
//! ```
//!
//! `Admin::router` is the same as a router of axum, for a listener that you have.

mod events;
mod group;
mod listener;
mod metrics;
mod operate;
mod page;
mod router;
mod service;
mod shown;
mod status;

pub use group::Group;
pub use service::{Admin, add_to};
pub use status::{
    CertificateStatus, CheckResult, GroupStatus, LeaderStatus, NodeStatus, ReloadStatus,
    RequestStatus, RouteStatus, Status,
};
