//! Reconstructs who led each group, and when, from the store's own history and without code of the
//! crate.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use pingora_etcd::store::{Entry, LeaseId, MemoryStore, Revision, WatchEvent};
use pingora_etcd::{Leadership, Node};

/// A moment of the store: the number of its history, and the revision reached in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    pub history: u64,
    revision: Revision,
}

/// A term of one incarnation of a node. Each incarnation has its own address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    pub id: String,
    pub addr: SocketAddr,
    pub lease: LeaseId,
    pub token: Revision,
}

impl Term {
    /// The term that a reader shows, unless its parts belong to two incarnations.
    pub fn shown(leadership: &Leadership) -> Result<Self, String> {
        let lease = leadership.key.rsplit('/').next().unwrap_or_default();
        let lease = LeaseId(i64::from_str_radix(lease, 16).unwrap_or(0));
        let node = &leadership.node;
        if node.incarnation() != lease.0 {
            return Err(format!(
                "{} at {} with lease {:x} is shown with token {} of lease {lease}",
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
    /// The lease and the address of each registration, by id.
    registered: BTreeMap<String, (Option<LeaseId>, SocketAddr)>,
    /// The lease and the id of each candidacy, by create revision and key.
    queue: BTreeMap<(Revision, String), (Option<LeaseId>, String)>,
    revisions: HashMap<String, Revision>,
    /// Each leader with the moment at which it began to lead; at first nobody.
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
            queue: BTreeMap::new(),
            revisions: HashMap::new(),
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
    /// Reads the events since the last call.
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

    /// Starts a new history: other data has replaced the store's.
    pub fn start_new(&mut self, store: &MemoryStore) {
        self.now = Moment {
            history: self.now.history + 1,
            revision: store.revision(),
        };
        for group in self.groups.values_mut() {
            group.registered.clear();
            group.queue.clear();
            group.revisions.clear();
        }
        for entry in store.entries() {
            self.put(&entry);
        }
        for group in self.groups.values_mut() {
            group.led.push((self.now, group.leader()));
        }
        // Leases may have expired at this moment.
        self.read(store);
    }

    /// The moment at which the current history had this revision.
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
                group.revisions.insert(entry.key.clone(), place.0);
                group.queue.insert(place, (entry.lease, id));
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
                if let Some(place) = group.revisions.remove(key) {
                    group.queue.remove(&(place, key.to_owned()));
                }
            }
            _ => {}
        }
    }

    /// Whether this term led at some moment since `since`.
    pub fn was(&self, group: &str, since: Moment, shown: &Term) -> bool {
        let mut from = self.times(group, since);
        from.any(|leader| leader.as_ref() == Some(shown))
    }

    /// Everybody who led at some moment since `since`; `None` where nobody did.
    pub fn times(&self, group: &str, since: Moment) -> impl Iterator<Item = &Option<Term>> {
        let led = self
            .groups
            .get(group)
            .map_or(&[AT_FIRST][..], |group| &group.led);
        // Whoever led at `since` began to lead before it.
        let first = led.partition_point(|(begin, _)| *begin <= since);
        led[first.saturating_sub(1)..]
            .iter()
            .rev()
            .map(|(_, leader)| leader)
    }
}

impl Group {
    /// There is a leader if the first candidacy has the lease that its id is registered under.
    fn leader(&self) -> Option<Term> {
        let ((token, _), (lease, id)) = self.queue.first_key_value()?;
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
