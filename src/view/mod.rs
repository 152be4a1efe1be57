//! The vocabulary that following a group and balancing over it share: the immutable group, its
//! changes, and its leader.

#[cfg(feature = "discovery")]
mod change;
#[cfg(feature = "discovery")]
mod event;
mod leadership;
mod node_override;
#[cfg(feature = "discovery")]
mod nodes;
#[cfg(feature = "discovery")]
mod source;

#[cfg(feature = "discovery")]
pub use change::Change;
#[cfg(feature = "discovery")]
pub use event::ClusterEvent;
pub use leadership::Leadership;
pub use node_override::NodeOverride;
#[cfg(feature = "discovery")]
pub use nodes::Nodes;
#[cfg(feature = "discovery")]
pub use source::Source;
