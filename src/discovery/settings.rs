//! What a discovery was built with, checked.

use std::time::Duration;

use super::admission::Admission;
use super::self_preservation::SelfPreservation;
use super::snapshot_file::SnapshotFile;
use crate::keys::GroupKeys;

/// The settings of a discovery.
pub(super) struct Settings {
    pub(super) keys: GroupKeys,
    pub(super) key_prefix: String,
    pub(super) admission: Admission,
    pub(super) preserve: SelfPreservation,
    pub(super) snapshot: Option<SnapshotFile>,
    pub(super) publish_interval: Duration,
    /// Whether to serve what a single member has while there is no quorum.
    pub(super) serializable_fallback: bool,
}
