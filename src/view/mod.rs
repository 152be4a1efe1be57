//! The vocabulary that following a group and balancing over it share: the immutable group, its
//! changes, and its leader.

mod change;
mod event;
mod leadership;
mod nodes;

pub use change::Change;
pub use event::ClusterEvent;
pub use leadership::Leadership;
pub use nodes::Nodes;
