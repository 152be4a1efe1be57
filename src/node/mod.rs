//! A registered node: what is stored under its registry key.

mod entry;
mod fields;
mod state;

pub use entry::Node;
pub use state::{HealthStatus, NodeState};
