//! Announcements of a term, for readers that learn of a leader from writes only.

use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::Election;
use crate::store::{Revision, WatchEvent};

/// How long after an announcement that failed it is tried again.
const ANNOUNCE_AGAIN_AFTER: Duration = Duration::from_secs(1);

impl Election<'_> {
    /// Announces a term. A failure costs the term nothing. Returns when to try again, if that may help.
    pub(super) async fn announce(&self, epoch: Revision) -> Option<Instant> {
        let announced = self.participant.announce_term(epoch).await;
        let mut record = self.participant.state.record();
        // Not before: whoever drops this future in between has announced nothing.
        record.announced = epoch;
        record.announce_due = None;
        let error = announced.err()?;
        debug!(%error, "the term was not announced");
        if error.is_transient() {
            record.announce_due = Some(Instant::now() + ANNOUNCE_AGAIN_AFTER);
        }
        record.announce_due
    }

    /// Whether the event is what [`announce`](Self::announce) writes.
    pub(super) fn is_announcement(&self, event: &WatchEvent, epoch: Revision) -> bool {
        let participant = self.participant;
        matches!(event, WatchEvent::Put(entry)
            if entry.key == participant.candidacy
                && entry.create_revision == epoch
                && entry.lease == Some(participant.lease_id())
                && entry.value == participant.state.id().as_bytes())
    }
}
