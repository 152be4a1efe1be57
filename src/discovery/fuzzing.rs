//! For `tests/fuzz`: what a discovery does with what the store tells, without store and clock.

use std::time::Duration;

use tokio::time::Instant;

use super::admission::{Admission, networks, ports};
use super::file::{decode as decode_file, seal as seal_file};
use super::snapshot::{RejectedEntries, Staged, View};
use super::{EntryLimits, NodeFilter, SelfPreservation};
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::{Entry, Revision, WatchEvent};
use crate::view::{Change, Leadership, Nodes};

/// How much a [`Group`] remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sizes {
    /// Candidates in line.
    pub queue: usize,
    /// The same, by key.
    pub places: usize,
    /// Keys whose value is refused.
    pub refused: usize,
}

/// The view of the group `g`, fed by hand.
pub struct Group {
    view: View,
    now: Instant,
}

impl Group {
    /// A view with nothing in it yet.
    ///
    /// # Errors
    ///
    /// Networks or ports that are none.
    pub fn new(
        limits: EntryLimits,
        filter: NodeFilter,
        allowed_networks: &[String],
        allowed_ports: &[String],
        preserve: SelfPreservation,
    ) -> Result<Self, ClusterError> {
        let admission = Admission {
            filter,
            limits,
            networks: networks(allowed_networks)?,
            ports: ports(allowed_ports)?,
        };
        Ok(Self {
            view: View::new(GroupKeys::new("", "g"), admission, preserve),
            now: Instant::now(),
        })
    }

    /// What a watch tells.
    pub fn apply(&mut self, events: &[WatchEvent]) -> Vec<Change> {
        self.view.apply(events, self.now)
    }

    /// A whole listing, page by page: registrations and candidates.
    pub fn list(
        &mut self,
        registrations: impl IntoIterator<Item = Vec<Entry>>,
        candidates: impl IntoIterator<Item = Vec<Entry>>,
        revision: Revision,
    ) -> Vec<Change> {
        let mut staged = Staged::default();
        for page in registrations {
            self.view.stage(&mut staged, &page);
        }
        for page in candidates {
            self.view.stage_candidates(&mut staged, &page);
        }
        self.view.reset(staged, revision, self.now)
    }

    /// Starts from these nodes, as from a snapshot file.
    pub fn restore(&mut self, nodes: Vec<Node>) -> Vec<Change> {
        self.view.restore(nodes, 1)
    }

    /// Lets time go by.
    pub fn pass(&mut self, time: Duration) -> Vec<Change> {
        self.now += time;
        self.view.expire(self.now)
    }

    /// What readers see.
    pub fn nodes(&self) -> &Nodes {
        self.view.nodes()
    }

    /// Who leads.
    pub fn leader(&self) -> Option<&Leadership> {
        self.view.leader()
    }

    /// What was not taken in.
    pub fn rejected_entries(&self) -> RejectedEntries {
        self.view.rejected_entries()
    }

    /// How much it remembers.
    pub fn sizes(&self) -> Sizes {
        let [queue, places, refused] = self.view.sizes();
        Sizes {
            queue,
            places,
            refused,
        }
    }
}

/// The nodes of a snapshot file with these contents.
///
/// # Errors
///
/// Why it is none.
pub fn decode(bytes: &[u8]) -> Result<Vec<Node>, String> {
    decode_file(bytes).map(|loaded| loaded.nodes)
}

/// These contents as a snapshot file, with the right checksum.
pub fn seal(json: &[u8]) -> Vec<u8> {
    seal_file(json)
}
