//! Checks the invariants after every step, from outside: by what the nodes report and by what the
//! store contains.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pingora_etcd::pingora::{LeaderRoute, LeaderUpstream};
use pingora_etcd::store::{Clock, Entry, LeaseId, MemoryStore, Revision, Txn, Write};
use pingora_etcd::{ClusterNode, Leadership, Node, ServiceDiscovery};
use tokio::time::Instant;

use super::history::{History, Moment, Term};
use super::net::{Delivered, SkewedClock};

/// Checks everything after each step of each process.
#[derive(Debug)]
pub struct Checker {
    store: MemoryStore,
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: Vec<Watched>,
    /// How long a lease may be relied on: when its last successful renewal was sent, and the TTL.
    acknowledged: HashMap<LeaseId, (Duration, Duration)>,
    groups: BTreeMap<String, Tokens>,
    /// The queue of candidates at the time a candidacy, by its key and create revision, was
    /// deleted.
    queues: HashMap<(String, Revision), Vec<Candidate>>,
    history: History,
    readers: Vec<Observed>,
    rolled_back_to: Revision,
    violation: Option<String>,
    steps: u64,
    terms: u64,
    commits: u64,
    claims: u64,
    calls: u64,
    /// A hash over everything that happens, to compare two runs of a seed.
    trace: u64,
}

#[derive(Debug)]
struct Watched {
    node: ClusterNode,
    clock: Arc<SkewedClock>,
    name: String,
}

/// A candidate in the queue of a group.
#[derive(Debug, Clone)]
pub struct Candidate {
    key: String,
    id: String,
    created: Revision,
    /// Whether its lease is the one that its id is registered under.
    is_current: bool,
}

/// A discovery, and the events that were delivered to it.
#[derive(Debug)]
struct Observed {
    discovery: ServiceDiscovery,
    route: LeaderRoute,
    delivered: Delivered,
    group: &'static str,
    place: String,
    /// The leader it showed, and the last delivered event, when it was last checked.
    last: Option<(Option<ShownLeader>, Moment)>,
}

impl Observed {
    /// Checks what the discovery shows, if `since` is the last event that was delivered to it.
    fn check(
        &self,
        shown: Option<&Leadership>,
        since: Moment,
        history: &History,
    ) -> Result<(), String> {
        let (group, place) = (self.group, &self.place);
        let violation = |text: &str| format!("the discovery on {place}, group {group}: {text}");
        match shown {
            Some(shown) => {
                let term = Term::shown(shown).map_err(|text| violation(&text))?;
                if !history.was(group, since, &term) {
                    let led: Vec<_> = history.times(group, since).collect();
                    return Err(violation(&format!(
                        "it shows {term:?}, but the leaders since its last event were {led:?}"
                    )));
                }
                let to = self.route.leader();
                let to = to.as_ref().map(|to| (to.addr, &to.node.id, to.epoch));
                if to != Some((term.addr, &term.id, term.token)) {
                    return Err(violation(&format!(
                        "it shows {term:?}, but requests are sent to {to:?}"
                    )));
                }
            }
            None => {
                let nodes = self.discovery.nodes();
                let led = |leader: &Option<Term>| {
                    leader
                        .as_ref()
                        .is_some_and(|leader| !nodes.is_suspect(&leader.id))
                };
                if history.times(group, since).all(led) {
                    let led: Vec<_> = history.times(group, since).collect();
                    return Err(violation(&format!(
                        "it shows no leader, but the leaders since its last event were {led:?}"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A leader and its token, as a reader shows them.
type ShownLeader = (Arc<Node>, Revision);

/// The tokens of a group in the current history of the store.
#[derive(Debug, Default)]
struct Tokens {
    /// The greatest token that a leader had.
    seen: Revision,
    /// The greatest token that a fenced write was committed with.
    committed: Revision,
    /// The tokens of terms of an earlier history, which continue until their deadline.
    earlier_terms: Vec<Revision>,
}

/// How much was checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub steps: u64,
    pub terms: u64,
    pub commits: u64,
    pub claims: u64,
    pub trace: u64,
}

/// The key that only the leader of a group writes.
pub fn work(group: &str) -> String {
    format!("work/{group}")
}

impl Checker {
    pub fn new(store: &MemoryStore) -> Arc<Self> {
        Arc::new(Self {
            store: store.clone(),
            start: Instant::now(),
            inner: Mutex::default(),
        })
    }

    pub fn add(&self, node: &ClusterNode, clock: &Arc<SkewedClock>, name: String) {
        self.inner.lock().unwrap().nodes.push(Watched {
            node: node.clone(),
            clock: clock.clone(),
            name,
        });
    }

    pub fn violation(&self, text: String) {
        let at = self.start.elapsed();
        let mut inner = self.inner.lock().unwrap();
        inner
            .violation
            .get_or_insert_with(|| format!("at {at:?}: {text}"));
    }

    pub fn violated(&self) -> Option<String> {
        self.inner.lock().unwrap().violation.clone()
    }

    /// Drops everything that the checker holds, at the end of a seed.
    pub fn forget(&self) {
        let inner = std::mem::take(&mut *self.inner.lock().unwrap());
        // Dropped without the lock, because dropping a node may call the checker.
        drop(inner);
    }

    pub fn counts(&self) -> Counts {
        let inner = self.inner.lock().unwrap();
        Counts {
            steps: inner.steps,
            terms: inner.terms,
            commits: inner.commits,
            claims: inner.claims,
            trace: inner.trace,
        }
    }

    pub fn note(&self, what: &str) {
        let at = self.start.elapsed();
        let mut inner = self.inner.lock().unwrap();
        inner.fold(at.as_nanos() as u64);
        for byte in what.bytes() {
            inner.fold(u64::from(byte));
        }
    }

    pub fn add_reader(
        &self,
        discovery: &ServiceDiscovery,
        delivered: &Delivered,
        group: &'static str,
        place: &str,
    ) {
        self.inner.lock().unwrap().readers.push(Observed {
            route: LeaderRoute::new(discovery.clone(), 0),
            discovery: discovery.clone(),
            delivered: delivered.clone(),
            group,
            place: place.to_owned(),
            last: None,
        });
    }

    /// The reader has ended and is not checked any more.
    pub fn forget_reader(&self, delivered: &Delivered, group: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner
            .readers
            .retain(|reader| reader.group != group || !Arc::ptr_eq(&reader.delivered, delivered));
    }

    /// Reads the store's history up to now, because it is about to be compacted or replaced.
    pub fn read_history(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        // The first candidate may have been elected without having received that yet.
        let groups: BTreeSet<_> = self
            .store
            .entries()
            .into_iter()
            .filter_map(|entry| {
                let rest = entry.key.strip_prefix("election/")?;
                Some(rest.split('/').next()?.to_owned())
            })
            .collect();
        for group in groups {
            let first = self.store.oldest(&format!("election/{group}/"));
            let tokens = inner.groups.entry(group).or_default();
            tokens.earlier_terms.extend(first.map(|(epoch, _)| epoch));
        }
    }

    /// The moment at which the current history had this revision.
    pub fn moment(&self, revision: Revision) -> Moment {
        self.inner.lock().unwrap().history.moment(revision)
    }

    /// A change reported a leader to a reader. Changes may arrive late, so the leader must have led
    /// at any time at all.
    pub fn check_change(&self, group: &str, leader: &Leadership, place: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        let was = Term::shown(leader).and_then(|term| {
            let was = inner.history.was(group, Moment::default(), &term);
            was.then_some(())
                .ok_or_else(|| format!("{term:?} never led"))
        });
        drop(inner);
        if let Err(text) = was {
            self.violation(format!(
                "on {place} a change reports a leader that never was: {text}"
            ));
        }
    }

    /// A request for the leader is sent to this address, which must have been the leader's since
    /// the last delivered event.
    pub fn check_route(
        &self,
        group: &str,
        delivered: &Delivered,
        to: &LeaderUpstream,
        place: &str,
    ) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        let since = delivered.lock().unwrap().get(group).copied();
        let mut led = inner.history.times(group, since.unwrap_or_default());
        let was = led.any(|leader| {
            leader
                .as_ref()
                .is_some_and(|leader| leader.addr == to.addr && leader.token == to.epoch)
        });
        drop(led);
        drop(inner);
        if !was {
            self.violation(format!(
                "on {place} a request is sent to {} with token {}: there was no such leader",
                to.addr, to.epoch
            ));
        }
    }

    /// From here on the store has another history. Tokens up to `rolled_back_to` may appear in any
    /// order, because candidacies that readers saw end may exist again.
    pub fn new_history(&self, rolled_back_to: Revision) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.start_new(&self.store);
        for tokens in inner.groups.values_mut() {
            let seen = std::mem::take(&mut tokens.seen);
            tokens.earlier_terms.push(seen);
            tokens.committed = 0;
        }
        inner.rolled_back_to = rolled_back_to;
    }

    /// The number of the store's current history.
    pub fn history(&self) -> u64 {
        self.moment(0).history
    }

    pub fn acknowledged(&self, lease: LeaseId, sent: Duration, ttl: Duration) {
        let mut inner = self.inner.lock().unwrap();
        inner.acknowledged.insert(lease, (sent, ttl));
    }

    /// Counts a request.
    pub fn called(&self) {
        self.inner.lock().unwrap().calls += 1;
    }

    pub fn calls(&self) -> u64 {
        self.inner.lock().unwrap().calls
    }

    /// Until when a lease may be relied on, by what its process knows, as documented.
    pub fn deadline(&self, lease: LeaseId) -> Duration {
        self.inner.lock().unwrap().deadline(lease)
    }

    /// The candidates of the group to which a candidacy in `entries` belongs, in order.
    pub fn queue_of(&self, entries: &[Entry]) -> Vec<Candidate> {
        let candidacy = entries
            .iter()
            .find(|entry| entry.key.starts_with("election/"));
        let Some((prefix, _)) = candidacy.and_then(|entry| entry.key.rsplit_once('/')) else {
            return Vec::new();
        };
        let registry = prefix.replacen("election/", "registry/", 1);
        let prefix = format!("{prefix}/");
        let mut queue: Vec<_> = self
            .store
            .entries()
            .into_iter()
            .filter(|entry| entry.key.starts_with(&prefix))
            .map(|entry| {
                let id = String::from_utf8_lossy(&entry.value).into_owned();
                let registered = self.store.entry(&format!("{registry}/{id}"));
                Candidate {
                    is_current: registered
                        .is_some_and(|it| it.lease.is_some() && it.lease == entry.lease),
                    key: entry.key,
                    id,
                    created: entry.create_revision,
                }
            })
            .collect();
        queue.sort_by_key(|candidate| candidate.created);
        queue
    }

    /// Records the queue as it was before the transaction deleted a candidacy.
    pub fn record_queue(&self, txn: &Txn, before: &[Entry], queue: Vec<Candidate>) {
        for write in &txn.writes {
            let Write::Delete { key } = write else {
                continue;
            };
            if let Some(entry) = before.iter().find(|entry| entry.key == *key)
                && key.starts_with("election/")
            {
                let mut inner = self.inner.lock().unwrap();
                inner
                    .queues
                    .insert((key.clone(), entry.create_revision), queue.clone());
            }
        }
    }

    /// Leadership of this term was transferred to `target`, which must have been the next
    /// candidate, with the lease that its id is registered under.
    pub fn check_transfer(&self, term: &Leadership, target: &str) {
        let text = {
            let inner = self.inner.lock().unwrap();
            let queue = inner.queues.get(&(term.key.to_string(), term.epoch));
            let next = queue.map(|queue| queue.iter().find(|candidate| candidate.key != *term.key));
            let is_there =
                queue.is_some_and(|queue| queue.iter().any(|candidate| candidate.id == target));
            match next {
                None => format!("leadership was not transferred to {target}"),
                _ if !is_there => {
                    format!("leadership was transferred to {target} after it had left")
                }
                Some(Some(next)) if next.id == target && next.is_current => return,
                Some(Some(next)) if next.id == target => {
                    format!("leadership was transferred to an old incarnation of {target}")
                }
                Some(next) => format!("leadership for {target} was transferred to {next:?}"),
            }
        };
        self.violation(text);
    }

    /// A transaction was committed: a fenced write must not have a smaller token than an earlier
    /// one.
    pub fn committed(&self, txn: &Txn) {
        let revision = self.store.revision();
        let mut inner = self.inner.lock().unwrap();
        inner.fold(revision as u64);
        for write in &txn.writes {
            let Write::Put { key, value, .. } = write else {
                continue;
            };
            let Some(group) = key.strip_prefix("work/") else {
                continue;
            };
            inner.commits += 1;
            let token: Revision = std::str::from_utf8(value).unwrap().parse().unwrap();
            if token <= inner.rolled_back_to {
                continue;
            }
            let tokens = inner.groups.entry(group.to_owned()).or_default();
            if token < tokens.committed {
                let text = format!(
                    "a write with token {token} was committed after one with {}",
                    tokens.committed
                );
                drop(inner);
                return self.violation(text);
            }
            tokens.committed = token;
        }
    }

    /// Checks everything; called after each step of each process.
    pub fn step(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.steps += 1;
        if let Err(text) = inner.check_readers(&self.store) {
            drop(inner);
            return self.violation(text);
        }
        let mut leaders: Vec<(usize, String, Revision, LeaseId)> = Vec::new();
        for (index, watched) in inner.nodes.iter().enumerate() {
            if !watched.node.is_leader() {
                continue;
            }
            let Some(term) = watched.node.leadership() else {
                continue;
            };
            // Which group it leads is what its key says, not what it was built for.
            let key = term.key.strip_prefix("election/").unwrap_or_default();
            let (group, lease) = key.rsplit_once('/').unwrap_or_default();
            let group = group.to_owned();
            if let Some(other) = leaders.iter().find(|leader| leader.1 == group) {
                let other = &inner.nodes[other.0].name;
                let text = format!("two leaders of {group}: {other} and {}", watched.name);
                drop(inner);
                return self.violation(text);
            }
            let lease = LeaseId(i64::from_str_radix(lease, 16).unwrap_or(0));
            leaders.push((index, group, term.epoch, lease));
        }
        for (index, group, epoch, lease) in leaders {
            if let Err(text) = inner.check_leader(index, &group, epoch, lease, &self.store) {
                drop(inner);
                return self.violation(text);
            }
        }
    }
}

impl Inner {
    fn fold(&mut self, value: u64) {
        self.trace = (self.trace.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn deadline(&self, lease: LeaseId) -> Duration {
        let (sent, ttl) = self.acknowledged.get(&lease).copied().unwrap_or_default();
        sent + ttl - Duration::from_millis(500).max(ttl / 10).min(ttl)
    }

    /// Each leader that a reader shows must have led at some moment between the last event that was
    /// delivered to the reader and now.
    fn check_readers(&mut self, store: &MemoryStore) -> Result<(), String> {
        self.history.read(store);
        let Self {
            readers,
            history,
            claims,
            ..
        } = self;
        for reader in readers {
            let Some(since) = reader.delivered.lock().unwrap().get(reader.group).copied() else {
                continue;
            };
            let shown = reader.discovery.leadership();
            let now = shown.as_ref().map(|shown| (&shown.node, shown.epoch));
            let is_as_before = reader.last.as_ref().is_some_and(|(last, delivered)| {
                let same = match (last, now) {
                    (Some(last), Some(now)) => Arc::ptr_eq(&last.0, now.0) && last.1 == now.1,
                    (last, now) => last.is_none() && now.is_none(),
                };
                same && *delivered == since
            });
            // A statement that was valid stays valid, because the interval in which it may have
            // been true only grows.
            if is_as_before {
                continue;
            }
            reader.check(shown.as_ref(), since, history)?;
            let shown = shown.map(|shown| (shown.node, shown.epoch));
            let token = |shown: &Option<ShownLeader>| shown.as_ref().map(|shown| shown.1);
            let last = reader.last.replace((shown, since));
            let before = last.and_then(|(shown, _)| token(&shown));
            let after = reader.last.as_ref().and_then(|(shown, _)| token(shown));
            *claims += u64::from(before != after);
        }
        Ok(())
    }

    fn check_leader(
        &mut self,
        index: usize,
        group: &str,
        epoch: Revision,
        lease: LeaseId,
        store: &MemoryStore,
    ) -> Result<(), String> {
        let Watched { node, clock, name } = &self.nodes[index];
        if node.group_name() != group {
            let own = node.group_name();
            return Err(format!("{name} of {own} leads {group:?}"));
        }
        // The deadline holds even if the node's tasks are stuck.
        if clock.now() >= self.deadline(lease) {
            return Err(format!("{name} leads after its deadline"));
        }
        let tokens = self.groups.entry(group.to_owned()).or_default();
        if tokens.earlier_terms.contains(&epoch) && epoch > tokens.seen {
            return Ok(());
        }
        if epoch < tokens.seen {
            return Err(format!(
                "{name} leads with token {epoch} after a term with token {}",
                tokens.seen
            ));
        }
        let is_new = epoch > tokens.seen;
        tokens.seen = epoch;
        if is_new {
            self.terms += 1;
            self.fold(epoch as u64);
        }
        // In the store, its key must be the first of the queue.
        let prefix = format!("election/{group}/");
        let is_first = store.oldest(&prefix) == Some((epoch, Some(lease)));
        if !is_first {
            let name = &self.nodes[index].name;
            return Err(format!(
                "{name} leads with token {epoch}, but is not the first candidate"
            ));
        }
        Ok(())
    }
}
