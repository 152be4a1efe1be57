//! What is served while the store cannot be read: a snapshot file, or what one member has.

use std::time::SystemTime;

use tokio::time::Instant;
use tracing::{debug, warn};

use super::Follower;
use crate::discovery::staged::Staged;
use crate::discovery::state::{Input, State};
use crate::discovery::status::DiscoveryStatus;
use crate::store::Selector;

impl Follower<'_> {
    /// Serves the nodes of the snapshot file, if it can be used.
    pub(super) async fn read_file(&mut self) {
        let Some(file) = self.settings.snapshot.clone() else {
            return;
        };
        let origin = self.settings.origin(self.name);
        let read = move || file.read(&origin, SystemTime::now());
        let snapshot = match tokio::task::spawn_blocking(read).await {
            Ok(Ok(snapshot)) => Some(snapshot),
            Ok(Err(error)) => {
                warn!(%error, "the store cannot be reached, and the snapshot file cannot be used");
                None
            }
            // The runtime is shutting down.
            Err(_) => None,
        };
        let Some(snapshot) = snapshot else {
            self.transition(Input::FileRefused);
            return;
        };
        let (written, origin) = (snapshot.written, snapshot.origin);
        let changes = self.group.restore(snapshot.nodes, origin.revision);
        let nodes = self.group.nodes().len();
        let age = SystemTime::now().duration_since(written);
        let age = age.unwrap_or_default();
        warn!(
            nodes,
            ?age,
            "the store cannot be reached: serving the nodes of the snapshot file"
        );
        let cluster_id = origin.cluster_id;
        self.transition(Input::FileLoaded { cluster_id });
        self.publish_reset(changes);
        self.published
            .set_status(DiscoveryStatus::FromDisk { written });
        self.published.set_ready();
    }

    /// Serves the registrations that a single member has, while readers have no view of the store: a
    /// view from before the quorum was lost is better. There is no leader.
    pub(super) async fn list_one_member(&mut self) {
        if !self.state.lacks_a_view_of_the_store() {
            return;
        }
        let mut staged = Staged::default();
        let mut revision = 0;
        for prefix in self.settings.keys.registry_prefixes() {
            let registrations = Selector::Prefix(prefix.to_owned());
            let listing = match self.store.list_stale(&registrations).await {
                Ok(listing) => listing,
                Err(error) => {
                    debug!(%error, "no member returns what it has");
                    return;
                }
            };
            self.group.stage(&mut staged, &listing.entries);
            revision = listing.revision;
        }
        let changes = self.group.reset(staged, revision, Instant::now());
        let is_first = !matches!(self.state, State::FromMember { .. });
        if is_first {
            let nodes = self.group.nodes().len();
            warn!(
                revision,
                nodes, "there is no quorum: serving what one member has, which may be out of date"
            );
        }
        self.transition(Input::MemberListed);
        self.publish_reset(changes);
        if is_first {
            let since = SystemTime::now();
            self.published.set_status(DiscoveryStatus::Stale { since });
        }
        self.published.set_ready();
    }
}
