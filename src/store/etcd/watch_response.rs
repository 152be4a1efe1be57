//! A response of the watch stream, converted and classified.

use etcd_client::WatchResponse;

use super::convert::{revision_of, watch_event};
use super::status::Failure;
use crate::ids::Revision;
use crate::store::types::{WatchEvent, WatchRange};

#[derive(Debug)]
pub(super) struct Response {
    /// The server's number of the watch; -1 for all watches, or for one that was refused.
    pub(super) number: i64,
    /// The server has created the watch, or has refused to.
    pub(super) is_confirmation: bool,
    /// The server has ended the watch.
    pub(super) is_end: bool,
    /// Why it has ended, or cannot be created.
    pub(super) failure: Option<Failure>,
    /// The revision of the store; 0 if the server did not say.
    pub(super) revision: Revision,
    pub(super) events: Vec<WatchEvent>,
}

impl Response {
    /// The revision of the last event. All changes of one revision come in one response.
    pub(super) fn last_event(&self) -> Option<Revision> {
        self.events.last().map(WatchEvent::revision)
    }

    /// The first revision that a watch reports, which this response confirms: a watch "from now on"
    /// starts after the current revision.
    pub(super) fn start_of(&self, range: &WatchRange) -> Revision {
        match range.from {
            0 => self.revision + 1,
            from => from,
        }
    }
}

impl From<WatchResponse> for Response {
    fn from(response: WatchResponse) -> Self {
        let failure = if response.compact_revision() > 0 {
            Some(Failure::Compacted(Some(response.compact_revision())))
        } else if response.canceled() {
            let reason = response.cancel_reason();
            let known = Failure::of_message(reason);
            Some(known.unwrap_or_else(|| Failure::Unavailable(reason.to_owned())))
        } else {
            None
        };
        Self {
            number: response.watch_id(),
            is_confirmation: response.created(),
            is_end: response.canceled(),
            failure,
            revision: revision_of(response.header()),
            events: response.events().iter().filter_map(watch_event).collect(),
        }
    }
}
