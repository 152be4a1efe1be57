//! The words between the trades: the immutable group, its changes, and who leads it.

mod change;
mod event;
mod leadership;
mod nodes;

pub use change::Change;
pub use event::ClusterEvent;
pub use leadership::Leadership;
pub use nodes::Nodes;
