//! How current a view is.

use std::fmt;
use std::time::SystemTime;

/// How current the view of a group is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoveryStatus {
    /// There is no view yet.
    #[default]
    Connecting,
    /// The view follows the store.
    Live,
    /// Contact with the store is lost; the view is as it was at that time.
    Stale {
        /// When contact was lost.
        since: SystemTime,
    },
    /// The view was read from a snapshot file, and the store has not been reached yet. There is no
    /// leader.
    FromDisk {
        /// When the store had this state.
        written: SystemTime,
    },
    /// The run has ended, so nothing follows the store: the view stays as it was at that time until
    /// there is another run.
    Ended {
        /// When the run ended.
        since: SystemTime,
    },
}

impl fmt::Display for DiscoveryStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let age = |since: &SystemTime| {
            let age = SystemTime::now().duration_since(*since);
            age.unwrap_or_default().as_secs()
        };
        match self {
            Self::Connecting => f.write_str("connecting"),
            Self::Live => f.write_str("live"),
            Self::Stale { since } => write!(f, "stale for {} s", age(since)),
            Self::FromDisk { written } => write!(f, "from disk, {} s old", age(written)),
            Self::Ended { since } => write!(f, "not followed for {} s", age(since)),
        }
    }
}
