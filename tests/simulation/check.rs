//! What must hold at every step, seen from outside: by the nodes' own account and by the store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pingora_etcd::pingora::{LeaderRoute, LeaderUpstream};
use pingora_etcd::store::{Clock, Entry, LeaseId, MemoryStore, Revision, Txn, Write};
use pingora_etcd::{ClusterNode, Leadership, Node, ServiceDiscovery};
use tokio::time::Instant;

use super::history::{History, Moment, Term};
use super::net::{Heard, Skewed};

/// Looks at everything after each step of each process.
#[derive(Debug)]
pub struct Checker {
    store: MemoryStore,
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: Vec<Watched>,
    /// What a lease may be counted on for: when its last answered renewal was sent, and the TTL.
    acknowledged: HashMap<LeaseId, (Duration, Duration)>,
    groups: BTreeMap<String, Tokens>,
    /// Who stood in line when a candidacy, by its key and its revision, was deleted.
    lines: HashMap<(String, Revision), Vec<Candidate>>,
    history: History,
    readers: Vec<Observed>,
    rolled_back_to: Revision,
    violation: Option<String>,
    steps: u64,
    terms: u64,
    commits: u64,
    claims: u64,
    calls: u64,
    /// Folds everything that happens, to compare two runs of a seed.
    trace: u64,
}

#[derive(Debug)]
struct Watched {
    node: ClusterNode,
    clock: Arc<Skewed>,
    name: String,
}

/// Somebody in line.
#[derive(Debug, Clone)]
pub struct Candidate {
    key: String,
    id: String,
    created: Revision,
    /// It is of the process that is registered under its id.
    is_current: bool,
}

/// A discovery, and what it was told.
#[derive(Debug)]
struct Observed {
    discovery: ServiceDiscovery,
    route: LeaderRoute,
    heard: Heard,
    group: &'static str,
    place: String,
    /// What it said, and had heard, when it was looked at last.
    last: Option<(Option<Said>, Moment)>,
}

/// A leader and its token, as a reader names them.
type Said = (Arc<Node>, Revision);

/// The tokens of a group in the present history.
#[derive(Debug, Default)]
struct Tokens {
    /// The greatest one that a leader had.
    seen: Revision,
    /// The greatest one that a fenced write was committed with.
    committed: Revision,
    /// Terms of an earlier history go on until their deadline.
    of_before: Vec<Revision>,
}

/// What has been looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Looked {
    pub steps: u64,
    pub terms: u64,
    pub commits: u64,
    pub claims: u64,
    pub trace: u64,
}

/// A key that only the leader of a group writes.
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

    pub fn add(&self, node: &ClusterNode, clock: &Arc<Skewed>, name: String) {
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

    /// Lets go of everything, when it is over.
    pub fn forget(&self) {
        let inner = std::mem::take(&mut *self.inner.lock().unwrap());
        // Not under the lock: what it has may ask for it.
        drop(inner);
    }

    pub fn looked(&self) -> Looked {
        let inner = self.inner.lock().unwrap();
        Looked {
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
        heard: &Heard,
        group: &'static str,
        place: &str,
    ) {
        self.inner.lock().unwrap().readers.push(Observed {
            route: LeaderRoute::new(discovery.clone(), 0),
            discovery: discovery.clone(),
            heard: heard.clone(),
            group,
            place: place.to_owned(),
            last: None,
        });
    }

    /// Nobody looks at it any more.
    pub fn forget_reader(&self, heard: &Heard, group: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner
            .readers
            .retain(|reader| reader.group != group || !Arc::ptr_eq(&reader.heard, heard));
    }

    /// Reads the store's history up to now: it is about to be forgotten.
    pub fn read_history(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        // Whoever is first in line now may have been told so, and not have heard it yet.
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
            tokens.of_before.extend(first.map(|(epoch, _)| epoch));
        }
    }

    /// When the store was at this revision of its present history.
    pub fn moment(&self, revision: Revision) -> Moment {
        self.inner.lock().unwrap().history.moment(revision)
    }

    /// A reader was told of a leader, at last: that has to have been one, at whatever time.
    pub fn told(&self, group: &str, leader: &Leadership, place: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        let was = Term::said(leader).and_then(|term| {
            let was = inner.history.was(group, Moment::default(), &term);
            was.then_some(())
                .ok_or_else(|| format!("{term:?} never led"))
        });
        drop(inner);
        if let Err(text) = was {
            self.violation(format!(
                "on {place} a change tells of what never was: {text}"
            ));
        }
    }

    /// A request for the leader goes there.
    pub fn routed(&self, group: &str, heard: &Heard, to: &LeaderUpstream, place: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.read(&self.store);
        let since = heard.lock().unwrap().get(group).copied();
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
                "on {place} a request goes to {} with token {}: there was no such leader",
                to.addr, to.epoch
            ));
        }
    }

    /// The store's history is another one from here on. Tokens up to `rolled_back_to` may come in
    /// either order: a place in line that others have seen end is there again.
    pub fn new_history(&self, rolled_back_to: Revision) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.begin_anew(&self.store);
        for tokens in inner.groups.values_mut() {
            let seen = std::mem::take(&mut tokens.seen);
            tokens.of_before.push(seen);
            tokens.committed = 0;
        }
        inner.rolled_back_to = rolled_back_to;
    }

    /// Which of the store's histories this is.
    pub fn history(&self) -> u64 {
        self.moment(0).history
    }

    pub fn acknowledged(&self, lease: LeaseId, sent: Duration, ttl: Duration) {
        let mut inner = self.inner.lock().unwrap();
        inner.acknowledged.insert(lease, (sent, ttl));
    }

    /// A request was made.
    pub fn called(&self) {
        self.inner.lock().unwrap().calls += 1;
    }

    pub fn calls(&self) -> u64 {
        self.inner.lock().unwrap().calls
    }

    /// Until when a lease may be counted on, by what its process knows: what the documentation
    /// says.
    pub fn deadline(&self, lease: LeaseId) -> Duration {
        self.inner.lock().unwrap().deadline(lease)
    }

    /// The candidates of the group that one of these entries stands in line of.
    pub fn line_of(&self, entries: &[Entry]) -> Vec<Candidate> {
        let candidacy = entries
            .iter()
            .find(|entry| entry.key.starts_with("election/"));
        let Some((prefix, _)) = candidacy.and_then(|entry| entry.key.rsplit_once('/')) else {
            return Vec::new();
        };
        let registry = prefix.replacen("election/", "registry/", 1);
        let prefix = format!("{prefix}/");
        let mut line: Vec<_> = self
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
        line.sort_by_key(|candidate| candidate.created);
        line
    }

    /// A candidacy was deleted; this was the line then.
    pub fn left_the_line(&self, txn: &Txn, before: &[Entry], line: Vec<Candidate>) {
        for write in &txn.writes {
            let Write::Delete { key } = write else {
                continue;
            };
            if let Some(entry) = before.iter().find(|entry| entry.key == *key)
                && key.starts_with("election/")
            {
                let mut inner = self.inner.lock().unwrap();
                inner
                    .lines
                    .insert((key.clone(), entry.create_revision), line.clone());
            }
        }
    }

    /// Leadership of this term was handed to `target`: that has to have been the next one, and the
    /// process that is known under this id.
    pub fn handed_over(&self, term: &Leadership, target: &str) {
        let text = {
            let inner = self.inner.lock().unwrap();
            let line = inner.lines.get(&(term.key.to_string(), term.epoch));
            let next = line.map(|line| line.iter().find(|candidate| candidate.key != *term.key));
            let is_there =
                line.is_some_and(|line| line.iter().any(|candidate| candidate.id == target));
            match next {
                None => format!("leadership was not handed to {target}"),
                _ if !is_there => format!("{target} was given leadership after it had left"),
                Some(Some(next)) if next.id == target && next.is_current => return,
                Some(Some(next)) if next.id == target => {
                    format!("leadership was handed to a former life of {target}")
                }
                Some(next) => format!("leadership for {target} was handed to {next:?}"),
            }
        };
        self.violation(text);
    }

    /// A transaction was carried out.
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

    /// After each step of each process.
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
            let group = watched.node.group_name().to_owned();
            if let Some(other) = leaders.iter().find(|leader| leader.1 == group) {
                let other = &inner.nodes[other.0].name;
                let text = format!("two leaders of {group}: {other} and {}", watched.name);
                drop(inner);
                return self.violation(text);
            }
            let lease = term.key.rsplit('/').next().unwrap_or_default();
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

    /// What each reader says of the leader was so at some instant: not later than now, and not
    /// before the last event that it was given.
    fn check_readers(&mut self, store: &MemoryStore) -> Result<(), String> {
        self.history.read(store);
        let Self {
            readers,
            history,
            claims,
            ..
        } = self;
        for reader in readers {
            let Some(since) = reader.heard.lock().unwrap().get(reader.group).copied() else {
                continue;
            };
            let says = reader.discovery.leadership();
            let now = says.as_ref().map(|says| (&says.node, says.epoch));
            let is_as_before = reader.last.as_ref().is_some_and(|(last, heard)| {
                let same = match (last, now) {
                    (Some(last), Some(now)) => Arc::ptr_eq(&last.0, now.0) && last.1 == now.1,
                    (last, now) => last.is_none() && now.is_none(),
                };
                same && *heard == since
            });
            // What was so then is so: the time that it may have been so in has only grown.
            if is_as_before {
                continue;
            }
            let (group, place) = (reader.group, &reader.place);
            let told = |text: &str| format!("the discovery on {place} says of {group}: {text}");
            match &says {
                Some(says) => {
                    let term = Term::said(says).map_err(|text| told(&text))?;
                    if !history.was(group, since, &term) {
                        let led: Vec<_> = history.times(group, since).collect();
                        return Err(told(&format!("{term:?} leads, but since then {led:?}")));
                    }
                    let to = reader.route.leader();
                    let to = to.as_ref().map(|to| (to.addr, &to.node.id, to.epoch));
                    if to != Some((term.addr, &term.id, term.token)) {
                        return Err(told(&format!("{term:?} leads, but requests go to {to:?}")));
                    }
                }
                None => {
                    let nodes = reader.discovery.nodes();
                    let led = |leader: &Option<Term>| {
                        leader
                            .as_ref()
                            .is_some_and(|leader| !nodes.is_suspect(&leader.id))
                    };
                    if history.times(group, since).all(led) {
                        let led: Vec<_> = history.times(group, since).collect();
                        return Err(told(&format!("nobody leads, but since then {led:?}")));
                    }
                }
            }
            let says = says.map(|says| (says.node, says.epoch));
            let token = |says: &Option<Said>| says.as_ref().map(|says| says.1);
            let last = reader.last.replace((says, since));
            let before = last.and_then(|(says, _)| token(&says));
            let after = reader.last.as_ref().and_then(|(says, _)| token(says));
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
            return Err(format!("{name} leads {group}"));
        }
        // Whatever its tasks are doing.
        if clock.now() >= self.deadline(lease) {
            return Err(format!("{name} leads after its deadline"));
        }
        let tokens = self.groups.entry(group.to_owned()).or_default();
        if tokens.of_before.contains(&epoch) && epoch > tokens.seen {
            return Ok(());
        }
        if epoch < tokens.seen {
            return Err(format!(
                "{name} leads with token {epoch} after one with {}",
                tokens.seen
            ));
        }
        let is_new = epoch > tokens.seen;
        tokens.seen = epoch;
        if is_new {
            self.terms += 1;
            self.fold(epoch as u64);
        }
        // By the store: its key is the first in line.
        let prefix = format!("election/{group}/");
        let is_first = store.oldest(&prefix) == Some((epoch, Some(lease)));
        if !is_first {
            let name = &self.nodes[index].name;
            return Err(format!(
                "{name} leads with token {epoch}, and is not the first in line"
            ));
        }
        Ok(())
    }
}
