//! Entry points for `tests/fuzz`: how a discovery handles what the store delivers, without a store and
//! without a clock.

use std::time::Duration;

use tokio::time::Instant;

use super::admission::{Admission, EntryLimits, NodeFilter, parse_networks, parse_ports};
use super::format::Places;
use super::format::Registry;
use super::group::Group as FollowedGroup;
use super::rejected::RejectedEntries;
use super::self_preservation::SelfPreservation;
use super::snapshot_format::{decode as decode_file, seal as seal_file};
use super::staged::Staged;
use crate::error::ClusterError;
use crate::keys::GroupKeys;
use crate::node::Node;
use crate::store::{Entry, Revision, WatchEvent};
use crate::view::{Change, Leadership, Nodes};

/// The sizes of what a [`Group`] remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sizes {
    /// Candidates in the queue.
    pub queue: usize,
    /// Candidates in the index by key.
    pub index: usize,
    /// Refused entries that have been logged.
    pub logged: usize,
}

/// The view of the group `g`, fed directly.
pub struct Group {
    group: FollowedGroup,
    now: Instant,
}

impl Group {
    /// An empty view.
    ///
    /// # Errors
    ///
    /// If a network or port is invalid.
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
            networks: parse_networks(allowed_networks)?,
            ports: parse_ports(allowed_ports)?,
            ..Admission::default()
        };
        Ok(Self {
            group: FollowedGroup::new(GroupKeys::new("", "g"), admission, preserve),
            now: Instant::now(),
        })
    }

    /// Applies the events of a watch.
    pub fn apply(&mut self, events: &[WatchEvent]) -> Vec<Change> {
        self.group.apply(events, self.now)
    }

    /// Applies a complete listing, page by page: registrations and candidates.
    pub fn list(
        &mut self,
        registrations: impl IntoIterator<Item = Vec<Entry>>,
        candidates: impl IntoIterator<Item = Vec<Entry>>,
        revision: Revision,
    ) -> Vec<Change> {
        let mut staged = Staged::default();
        for page in registrations {
            self.group.stage(&mut staged, &page);
        }
        for page in candidates {
            self.group.stage_candidates(&mut staged, &page);
        }
        self.group.reset(staged, revision, self.now)
    }

    /// Starts from the nodes of a snapshot file.
    pub fn restore(&mut self, nodes: Vec<Node>) -> Vec<Change> {
        self.group.restore(nodes, 1)
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) -> Vec<Change> {
        self.now += time;
        self.group.expire(self.now)
    }

    /// The nodes that readers see.
    pub fn nodes(&self) -> &Nodes {
        self.group.nodes()
    }

    /// The leader that readers see.
    pub fn leader(&self) -> Option<&Leadership> {
        self.group.leader()
    }

    /// The entries that were rejected.
    pub fn rejected_entries(&self) -> RejectedEntries {
        self.group.rejected_entries()
    }

    /// The sizes of what it remembers.
    pub fn sizes(&self) -> Sizes {
        let [queue, index, logged] = self.group.sizes();
        Sizes {
            queue,
            index,
            logged,
        }
    }
}

/// The node of an entry of another registry, as a discovery of the group `g` reads it.
///
/// # Errors
///
/// Why there is none, in words.
pub fn read_foreign(registry: &Registry, entry: &Entry) -> Result<Node, String> {
    let places = Places {
        main: registry.clone(),
        ..Places::default()
    };
    let admission = Admission {
        decoders: places.decoders("g"),
        ..Admission::default()
    };
    let keys = places.keys("", "g").map_err(|error| error.to_string())?;
    let id = keys.node_id(&entry.key).ok_or("no id")?;
    let admitted = admission.admit(&id, entry);
    admitted.map_err(|refusal| refusal.reason().to_owned())
}

/// The nodes in the bytes of a snapshot file.
///
/// # Errors
///
/// Why the bytes are not a valid file.
pub fn decode(bytes: &[u8]) -> Result<Vec<Node>, String> {
    decode_file(bytes).map(|snapshot| snapshot.nodes)
}

/// The bytes of a snapshot file with this JSON and the right checksum.
pub fn seal(json: &[u8]) -> Vec<u8> {
    seal_file(json)
}
