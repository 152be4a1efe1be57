//! What a discovery was built with, checked.

use std::net::SocketAddr;
use std::time::Duration;

use super::admission::Admission;
use super::self_preservation::SelfPreservation;
use super::snapshot_file::SnapshotFile;
use super::snapshot_format::Origin;
use crate::keys::GroupKeys;

/// The settings of a discovery.
pub(super) struct Settings {
    pub(super) keys: GroupKeys,
    pub(super) key_prefix: String,
    /// Names the format of the entries; empty for this crate's own.
    pub(super) format: String,
    pub(super) admission: Admission,
    /// What resolves host names; none for those of the system.
    #[cfg_attr(not(feature = "host-names"), allow(dead_code))]
    pub(super) name_servers: Vec<SocketAddr>,
    pub(super) preserve: SelfPreservation,
    pub(super) snapshot: Option<SnapshotFile>,
    pub(super) publish_interval: Duration,
    /// Whether to serve what a single member has while there is no quorum.
    pub(super) serializable_fallback: bool,
}

impl Settings {
    /// Resolves the host names of the group for as long as it is polled.
    pub(super) async fn resolve_names(&self) {
        #[cfg(feature = "host-names")]
        if self.admission.resolves() {
            super::resolve::resolve(self.admission.names.clone(), self.name_servers.clone()).await;
        }
        std::future::pending::<()>().await;
    }

    /// What a snapshot of this group belongs to.
    pub(super) fn origin(&self, group: &str) -> Origin {
        Origin {
            group: group.to_owned(),
            key_prefix: self.key_prefix.clone(),
            format: self.format.clone(),
            ..Origin::default()
        }
    }
}
