//! The YAML file of the bundled load balancer. It is parsed strictly, and checked once.
//!
//! The file is Pingora's own configuration with a `cluster:` section beside it. A field that does
//! not exist is an error that names it and its line, also in Pingora's part, where Pingora alone
//! would ignore it. `config/load_balancer.yaml` shows every field.

mod access_log;
mod admin;
mod backends;
mod clients;
mod cluster;
mod covers;
mod effects;
mod file;
mod group;
mod groups;
mod health_check;
mod leader;
mod lines;
mod listener;
mod listeners;
mod made;
mod opentelemetry;
mod overload;
mod references;
mod retry;
mod route;
#[cfg(feature = "schema")]
mod schema;
#[cfg(feature = "pingora")]
mod server;
mod timeouts;
mod tls;
mod unreadable;
mod values;

pub use access_log::{AccessLog, LogFormat};
pub use admin::Admin;
#[cfg(feature = "pingora")]
pub(crate) use backends::is_name;
pub use backends::{Backends, Protocol};
pub use clients::{Clients, Network};
pub use cluster::ClusterConfig;
#[cfg(feature = "pingora")]
pub(crate) use cluster::READY_TIMEOUT;
pub(crate) use covers::{is_below, without_last_dot};
#[cfg(feature = "pingora")]
#[cfg(feature = "pingora")]
pub(crate) use covers::{may_be_below, normalized};
pub use file::locate;
pub use group::{DEFAULT_GROUP, Group};
pub use health_check::{CheckKind, HealthCheck, StatusRange};
pub use leader::Leader;
pub use lines::{Given, given};
pub use listener::Listener;
#[cfg(feature = "pingora")]
pub(crate) use listeners::{ListenerAt, check_all, listed};
pub use opentelemetry::OpenTelemetry;
pub use overload::Overload;
pub use retry::Retry;
pub use route::{Answer, HeaderChanges, Mirror, Pattern, Redirect, Rewrite, Route};
#[cfg(feature = "schema")]
pub use schema::schema;
#[cfg(feature = "pingora")]
pub use server::{load, read, server_conf};
pub use timeouts::{BackendTimeouts, Timeouts};
pub use tls::{CertificateFiles, ClientCertificate, ListenerTls};
pub use values::{HashOn, Port, Scheme, Upgrade};
