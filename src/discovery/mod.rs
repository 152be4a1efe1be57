//! Following a group: its nodes, its leader, and their changes.

mod admission;
mod builder;
mod candidates;
mod changes;
mod follower;
mod format;
#[cfg(feature = "test-util")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod handle;
mod history;
mod last_write;
mod listing;
mod log_once;
#[cfg_attr(not(feature = "host-names"), allow(dead_code))]
mod names;
mod outbox;
mod overrides;
mod overrides_file;
mod published;
mod rejected;
#[cfg(feature = "host-names")]
mod resolve;
mod retry;
mod saver;
mod self_preservation;
mod settings;
mod snapshot_file;
mod snapshot_format;
mod staged;
mod state;
mod status;
mod suspects;
#[cfg(test)]
mod tests;

pub use admission::{EntryLimits, NodeFilter};
#[cfg(feature = "config")]
pub(crate) use builder::PUBLISH_INTERVAL;
pub use builder::ServiceDiscoveryBuilder;
pub use changes::Changes;
pub use format::{
    AddressAt, EntryTable, Equals, Format, HostAndPort, HostNames, MetricAt, Registry, Scalar,
    Scheme, WeightAt, ZeroWeight,
};
pub use handle::ServiceDiscovery;
#[cfg(feature = "pingora")]
pub(crate) use overrides::Overrides;
pub use rejected::RejectedEntries;
pub use self_preservation::SelfPreservation;
pub use snapshot_file::SnapshotFile;
pub use status::DiscoveryStatus;
