//! The state of following a group, and its transitions. No I/O.

use tokio::time::Instant;

use crate::error::ClusterError;
use crate::store::WatchRange;

/// From where in which history a watch continues: all changes before these revisions are in the view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Position {
    /// Revisions of another cluster mean something else.
    pub(super) cluster_id: u64,
    pub(super) ranges: Vec<WatchRange>,
}

/// How far a run has come with following the group, and what readers see meanwhile.
///
/// The first five states are those before the first listing of the run. The others have listed the
/// group, so readers see a view of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum State {
    /// Readers have no view. A snapshot file is configured, and will be read if the store stays
    /// silent or fails.
    Starting,
    /// Readers have no view, and there is no snapshot file that can be used.
    #[default]
    Empty,
    /// Readers see the view of an earlier run.
    Inherited,
    /// Readers see the nodes of a snapshot file, which were read from this cluster.
    FromDisk { cluster_id: u64 },
    /// Readers see what a single member has, without a quorum.
    FromMember {
        /// The cluster of the snapshot file that was used before, if there was one.
        on_disk: Option<u64>,
    },
    /// The group has been listed; a watch from this position has to be opened.
    Listed { position: Position },
    /// A watch is open; the position is where it began, and where it ended once it has failed.
    Watching { position: Position },
    /// Contact is lost, and readers know it. A watch from this position will continue where the last
    /// one ended.
    Disconnected { position: Position, since: Instant },
    /// The store answers, but events are gone for good: its history was compacted, or is another
    /// one. The group has to be listed again. Readers are not notified, because the listing normally
    /// follows at once.
    MustRelist { cluster_id: u64, since: Instant },
    /// Contact is lost, readers know it, and a watch cannot continue: the group has to be listed
    /// again.
    DisconnectedMustRelist { cluster_id: u64, since: Instant },
}

/// What has happened.
#[derive(Debug, Clone)]
pub(super) enum Input<'e> {
    /// The group has been listed; a watch is to start from here.
    Listed(Position),
    /// The watch is open, and the store still has the history of its position.
    WatchOpened,
    /// Listing failed, or opening the watch, or the watch itself.
    Failed(&'e ClusterError),
    /// The nodes of a snapshot file are in the view; they were read from this cluster.
    FileLoaded { cluster_id: u64 },
    /// The snapshot file cannot be used.
    FileRefused,
    /// What a single member has is in the view.
    MemberListed,
}

/// What a transition means to readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// The store is reached for the first time, after readers were served something else.
    Connected,
    /// The store is reached again, after contact was lost.
    Reconnected,
    /// Contact is lost.
    Disconnected,
}

/// What a failure says about the position.
enum Failure {
    /// The events that follow it are gone for good.
    Missed,
    /// An event after it is too large for a watch, but not for a listing, which can fetch entries
    /// one by one.
    TooLarge,
    /// Nothing: a watch may continue from there.
    Other,
}

impl Failure {
    fn of(error: &ClusterError) -> Self {
        match error {
            ClusterError::Compacted { .. } => Self::Missed,
            ClusterError::TooLarge { .. } => Self::TooLarge,
            _ => Self::Other,
        }
    }
}

impl State {
    /// The first state of a run.
    pub(super) fn start(has_view: bool, has_file: bool) -> Self {
        match (has_view, has_file) {
            (true, _) => Self::Inherited,
            (false, true) => Self::Starting,
            (false, false) => Self::Empty,
        }
    }

    /// The next state, and the news for readers. An input that cannot occur in a state
    /// changes nothing.
    pub(super) fn next(self, input: Input<'_>, now: Instant) -> (Self, Option<News>) {
        match (self, input) {
            (state, Input::Failed(error)) => state.failed(error, now),

            (state, Input::Listed(position)) => {
                (Self::Listed { position }, state.news_of_listing())
            }

            (Self::Listed { position }, Input::WatchOpened) => (Self::Watching { position }, None),
            (Self::Disconnected { position, .. }, Input::WatchOpened) => {
                (Self::Watching { position }, Some(News::Reconnected))
            }

            (Self::Starting, Input::FileLoaded { cluster_id }) => {
                (Self::FromDisk { cluster_id }, None)
            }
            (Self::Starting, Input::FileRefused) => (Self::Empty, None),

            (Self::Starting | Self::Empty, Input::MemberListed) => {
                (Self::FromMember { on_disk: None }, None)
            }
            (Self::FromDisk { cluster_id }, Input::MemberListed) => {
                let on_disk = Some(cluster_id);
                (Self::FromMember { on_disk }, None)
            }

            (state, _) => (state, None),
        }
    }

    fn failed(self, error: &ClusterError, now: Instant) -> (Self, Option<News>) {
        match (self, Failure::of(error)) {
            (Self::Listed { position } | Self::Watching { position }, failure) => {
                let (cluster_id, since) = (position.cluster_id, now);
                match failure {
                    Failure::Missed => (Self::MustRelist { cluster_id, since }, None),
                    Failure::TooLarge => {
                        let outdated = Self::DisconnectedMustRelist { cluster_id, since };
                        (outdated, Some(News::Disconnected))
                    }
                    Failure::Other => {
                        let disconnected = Self::Disconnected { position, since };
                        (disconnected, Some(News::Disconnected))
                    }
                }
            }
            (Self::Disconnected { position, since }, Failure::Missed | Failure::TooLarge) => {
                let cluster_id = position.cluster_id;
                (Self::DisconnectedMustRelist { cluster_id, since }, None)
            }
            (Self::MustRelist { cluster_id, since }, Failure::TooLarge | Failure::Other) => {
                let outdated = Self::DisconnectedMustRelist { cluster_id, since };
                (outdated, Some(News::Disconnected))
            }
            // Nothing was listed yet, or it has to be listed again anyway.
            (state, _) => (state, None),
        }
    }

    fn news_of_listing(&self) -> Option<News> {
        match self {
            Self::Starting | Self::Empty => None,
            Self::FromDisk { .. } | Self::FromMember { .. } => Some(News::Connected),
            Self::Inherited | Self::Disconnected { .. } | Self::DisconnectedMustRelist { .. } => {
                Some(News::Reconnected)
            }
            Self::Listed { .. } | Self::Watching { .. } | Self::MustRelist { .. } => None,
        }
    }

    /// From where to watch; `None` if the group has to be listed first.
    pub(super) fn watch_from(&self) -> Option<&Position> {
        match self {
            Self::Listed { position } | Self::Disconnected { position, .. } => Some(position),
            _ => None,
        }
    }

    /// Takes over how far a watch has come.
    pub(super) fn advance(&mut self, ranges: &[WatchRange]) {
        if let Self::Watching { position } = self {
            position.ranges = ranges.to_vec();
        }
    }

    /// Since when the run has had no contact with the store, or no events of it.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        match self {
            Self::Disconnected { since, .. }
            | Self::MustRelist { since, .. }
            | Self::DisconnectedMustRelist { since, .. } => Some(*since),
            _ => None,
        }
    }

    /// The cluster whose nodes a snapshot file had, if it has been used.
    pub(super) fn on_disk(&self) -> Option<u64> {
        match self {
            Self::FromDisk { cluster_id } => Some(*cluster_id),
            Self::FromMember { on_disk } => *on_disk,
            _ => None,
        }
    }

    /// The cluster that readers see a view of, as this run has listed it.
    pub(super) fn cluster_id(&self) -> Option<u64> {
        match self {
            Self::Listed { position }
            | Self::Watching { position }
            | Self::Disconnected { position, .. } => Some(position.cluster_id),
            Self::MustRelist { cluster_id, .. }
            | Self::DisconnectedMustRelist { cluster_id, .. } => Some(*cluster_id),
            _ => None,
        }
    }

    /// Whether the view of a single member is better than what readers see.
    pub(super) fn lacks_a_view_of_the_store(&self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Empty | Self::FromDisk { .. } | Self::FromMember { .. }
        )
    }
}

#[cfg(test)]
mod tests;
