//! Who led each group, and when: read off the store's own history, with no code of the crate's.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use pingora_etcd::store::{Entry, LeaseId, MemoryStore, Revision, WatchEvent};
use pingora_etcd::{Leadership, Node};

/// An instant of the store: in which of its histories, and how far that had come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    pub history: u64,
    revision: Revision,
}

/// A term of one life of one process. Each life of a process has an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    pub id: String,
    pub addr: SocketAddr,
    pub lease: LeaseId,
    pub token: Revision,
}

impl Term {
    /// What a reader says, if it is not of two lives by itself.
    pub fn said(leadership: &Leadership) -> Result<Self, String> {
        let lease = leadership.key.rsplit('/').next().unwrap_or_default();
        let lease = LeaseId(i64::from_str_radix(lease, 16).unwrap_or(0));
        let node = &leadership.node;
        if node.incarnation() != lease.0 {
            return Err(format!(
                "{} at {} of lease {:x} leads with token {} of lease {lease}",
                node.id,
                node.addr(0),
                node.incarnation(),
                leadership.epoch
            ));
        }
        Ok(Self {
            id: node.id.clone(),
            addr: node.addr(0),
            lease,
            token: leadership.epoch,
        })
    }
}

#[derive(Debug)]
struct Group {
    /// By id: under which lease, and where.
    registered: BTreeMap<String, (Option<LeaseId>, SocketAddr)>,
    /// By create revision and key: whose lease and id.
    line: BTreeMap<(Revision, String), (Option<LeaseId>, String)>,
    places: HashMap<String, Revision>,
    /// Who led from when on. Nobody at first.
    led: Vec<(Moment, Option<Term>)>,
}

const AT_FIRST: (Moment, Option<Term>) = (
    Moment {
        history: 0,
        revision: 0,
    },
    None,
);

impl Default for Group {
    fn default() -> Self {
        Self {
            registered: BTreeMap::new(),
            line: BTreeMap::new(),
            places: HashMap::new(),
            led: vec![AT_FIRST],
        }
    }
}

#[derive(Debug, Default)]
pub struct History {
    now: Moment,
    groups: BTreeMap<String, Group>,
}

impl History {
    /// Reads on.
    pub fn read(&mut self, store: &MemoryStore) {
        let events = store.events_after(self.now.revision);
        for one in events.chunk_by(|a, b| a.revision() == b.revision()) {
            for event in one {
                match event {
                    WatchEvent::Put(entry) => self.put(entry),
                    WatchEvent::Delete { key, .. } => self.delete(key),
                }
            }
            self.now.revision = one[0].revision();
            for group in self.groups.values_mut() {
                let leader = group.leader();
                if group.led.last().is_none_or(|(_, last)| *last != leader) {
                    group.led.push((self.now, leader));
                }
            }
        }
    }

    /// Other data has taken the place of the store's.
    pub fn begin_anew(&mut self, store: &MemoryStore) {
        self.now = Moment {
            history: self.now.history + 1,
            revision: store.revision(),
        };
        for group in self.groups.values_mut() {
            group.registered.clear();
            group.line.clear();
            group.places.clear();
        }
        for entry in store.entries() {
            self.put(&entry);
        }
        for group in self.groups.values_mut() {
            group.led.push((self.now, group.leader()));
        }
        // Leases may have run out just now.
        self.read(store);
    }

    /// When a revision of the present history was.
    pub fn moment(&self, revision: Revision) -> Moment {
        Moment {
            revision,
            ..self.now
        }
    }

    fn put(&mut self, entry: &Entry) {
        let mut parts = entry.key.split('/');
        let (kind, group, last) = (parts.next(), parts.next(), parts.next());
        let (Some(kind), Some(name), Some(last)) = (kind, group, last) else {
            return;
        };
        let group = self.groups.entry(name.to_owned()).or_default();
        match kind {
            "registry" => {
                let node: Node = serde_json::from_slice(&entry.value).expect("a node");
                let registered = (entry.lease, node.addr(0));
                group.registered.insert(last.to_owned(), registered);
            }
            "election" => {
                let id = String::from_utf8_lossy(&entry.value).into_owned();
                let place = (entry.create_revision, entry.key.clone());
                group.places.insert(entry.key.clone(), place.0);
                group.line.insert(place, (entry.lease, id));
            }
            _ => {}
        }
    }

    fn delete(&mut self, key: &str) {
        let mut parts = key.split('/');
        let (kind, group, last) = (parts.next(), parts.next(), parts.next());
        let group = group.and_then(|group| self.groups.get_mut(group));
        let (Some(kind), Some(group), Some(last)) = (kind, group, last) else {
            return;
        };
        match kind {
            "registry" => drop(group.registered.remove(last)),
            "election" => {
                if let Some(place) = group.places.remove(key) {
                    group.line.remove(&(place, key.to_owned()));
                }
            }
            _ => {}
        }
    }

    /// Whether that was so at some instant from `since` on.
    pub fn was(&self, group: &str, since: Moment, said: &Term) -> bool {
        let mut from = self.times(group, since);
        from.any(|leader| leader.as_ref() == Some(said))
    }

    /// Everybody who led at some instant from `since` on; with `None` where nobody did.
    pub fn times(&self, group: &str, since: Moment) -> impl Iterator<Item = &Option<Term>> {
        let led = self
            .groups
            .get(group)
            .map_or(&[AT_FIRST][..], |group| &group.led);
        // The one who led at `since` began before.
        let first = led.partition_point(|(begin, _)| *begin <= since);
        led[first.saturating_sub(1)..]
            .iter()
            .rev()
            .map(|(_, leader)| leader)
    }
}

impl Group {
    /// There is one where the first in line is of the lease that its id is registered under.
    fn leader(&self) -> Option<Term> {
        let ((token, _), (lease, id)) = self.line.first_key_value()?;
        let (registered, addr) = self.registered.get(id)?;
        let lease = lease.filter(|lease| *registered == Some(*lease))?;
        Some(Term {
            id: id.clone(),
            addr: *addr,
            lease,
            token: *token,
        })
    }
}
