//! A process that serves requests: it registers in its group, campaigns for leadership and
//! publishes its metrics.
//!
//! [`ClusterNode`] is the handle, [`ClusterNodeBuilder`] builds it, and [`SessionState`] says how
//! far a node has come with its lease and its registration.

mod access;
mod builder;
mod command;
mod config;
mod decision;
mod election;
mod handle;
mod handover;
mod inbox;
mod lease;
mod lease_driver;
mod lease_pool;
mod lease_users;
mod orphans;
mod participant;
mod publisher;
mod reading;
mod refusals;
mod request;
mod run;
mod run_record;
mod session;
mod signals;
mod standing;
mod state;
mod takeover;
mod tenure;
#[cfg(test)]
mod tests;
mod transfer;

pub use builder::ClusterNodeBuilder;
pub(crate) use config::{DEFAULT_TTL, check_ttl};
pub use handle::ClusterNode;
pub(crate) use lease_pool::LeasePool;
pub use refusals::RefusedSamples;
pub(crate) use request::operators_request;
pub use session::SessionState;
pub use signals::EndSignals;
