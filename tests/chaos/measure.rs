//! Who leads by their own account, looked at every two milliseconds by a thread of its own, so
//! that a busy runtime hides nothing.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pingora_etcd::pingora::LeaderRoute;
use pingora_etcd::{ClusterNode, ServiceDiscovery};

const EVERY: Duration = Duration::from_millis(2);

/// Of the time since the last [`Monitor::take`].
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// The longest time with two leaders or more.
    pub two_leaders: Duration,
    /// Who they were, the first time.
    pub two_were: Option<String>,
    /// The longest time without a leader.
    pub no_leader: Duration,
    /// Fencing tokens that were less than one before: which and where.
    pub tokens_back: Vec<String>,
    /// What readers said of a leader that is of two lives of a process.
    pub mixed: Vec<String>,
    /// Terms that began.
    pub terms: usize,
    /// The longest time between two looks: what the machine hid.
    pub blind: Duration,
}

#[derive(Default)]
struct State {
    nodes: Vec<ClusterNode>,
    /// Those in the second group.
    second: Vec<ClusterNode>,
    discoveries: Vec<ServiceDiscovery>,
    /// Where the leader of each term was, for any reader.
    terms: HashMap<(String, i64), (String, SocketAddr)>,
    stats: Stats,
    /// The greatest token by a worker's own account, and by each discovery's.
    token: i64,
    seen: Vec<i64>,
    may_go_back: bool,
    two_since: Option<Instant>,
    none_since: Option<Instant>,
    last: Option<Instant>,
}

pub struct Monitor {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (state.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                lock(&shared).look();
                std::thread::sleep(EVERY);
            }
        });
        Self {
            state,
            stop,
            thread: Some(thread),
        }
    }

    /// These are the workers now.
    pub fn watch_nodes(&self, nodes: Vec<ClusterNode>, second: Vec<ClusterNode>) {
        let mut state = lock(&self.state);
        (state.nodes, state.second) = (nodes, second);
    }

    pub fn watch_discoveries(&self, discoveries: Vec<ServiceDiscovery>) {
        let mut state = lock(&self.state);
        state.seen = vec![0; discoveries.len()];
        state.discoveries = discoveries;
    }

    /// While the store goes back in time, its revisions do too. From the end of that on, tokens
    /// have to grow from what they are then.
    pub fn let_tokens_go_back(&self, may: bool) {
        let mut state = lock(&self.state);
        state.may_go_back = may;
        state.token = 0;
        state.seen.fill(0);
        state.terms.clear();
    }

    /// What was measured since the last time.
    pub fn take(&self) -> Stats {
        let mut state = lock(&self.state);
        let now = Instant::now();
        // Something that lasts is counted on both sides.
        if let Some(since) = state.none_since {
            state.stats.no_leader = state.stats.no_leader.max(now - since);
        }
        state.none_since = state.none_since.map(|_| now);
        std::mem::take(&mut state.stats)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl State {
    fn leaders(&self) -> Vec<(usize, i64)> {
        leaders_of(&self.nodes)
    }

    /// What a reader says of the leader is of one life of one process.
    fn look_at_readers(&mut self) {
        for (index, discovery) in self.discoveries.iter().enumerate() {
            // Where requests for the leader go.
            let route = LeaderRoute::new(discovery.clone(), 0);
            if let Some(to) = route.leader() {
                let term = (discovery.group_name().to_owned(), to.epoch);
                let is = (to.node.id.clone(), to.addr);
                let was = self.terms.entry(term).or_insert_with(|| is.clone());
                if *was != is && !self.may_go_back {
                    self.stats.mixed.push(format!(
                        "discovery {index}: {is:?} leads with token {}, which was of {was:?}",
                        to.epoch
                    ));
                    *was = is;
                }
            }
            let Some(term) = discovery.leadership() else {
                continue;
            };
            let lease = term.key.rsplit('/').next().unwrap_or_default();
            if format!("{:x}", term.node.incarnation()) != lease {
                let (id, of) = (&term.node.id, term.node.incarnation());
                self.stats.mixed.push(format!(
                    "discovery {index}: {id} of lease {of:x} leads, by the key of lease {lease}"
                ));
            }
        }
    }

    /// Answers with two that lead the second group, at two glances.
    fn two_in_second(&self) -> Option<String> {
        let leaders = leaders_of(&self.second);
        if leaders.len() < 2 {
            return None;
        }
        let again = leaders_of(&self.second);
        let both: Vec<_> = leaders
            .iter()
            .filter(|leader| again.contains(leader))
            .collect();
        (both.len() > 1).then(|| {
            let names = both
                .iter()
                .map(|(index, token)| format!("{} (token {token})", self.second[*index].id()));
            names.collect::<Vec<_>>().join(", ")
        })
    }

    fn look(&mut self) {
        self.look_at_readers();
        if let Some(names) = self.two_in_second() {
            self.stats.two_leaders = self.stats.two_leaders.max(EVERY);
            self.stats.two_were.get_or_insert(names);
        }
        let mut leaders = self.leaders();
        if leaders.len() > 1 {
            // One may have handed over to another between two glances of this thread. Only who
            // leads in the same term at the second look too led while the others did.
            let again = self.leaders();
            leaders.retain(|leader| again.contains(leader));
        }
        let now = Instant::now();
        let last = self.last.replace(now).unwrap_or(now);
        self.stats.blind = self.stats.blind.max(now - last);

        if leaders.len() > 1 {
            let since = *self.two_since.get_or_insert(now);
            // A single sighting counts as one interval.
            self.stats.two_leaders = self.stats.two_leaders.max((now - since).max(EVERY));
            let names = leaders
                .iter()
                .map(|(index, token)| format!("{} (token {token})", self.nodes[*index].id()));
            let names = names.collect::<Vec<_>>().join(", ");
            if since == now {
                // Among the crate's own log lines (RUST_LOG), at its time.
                tracing::error!(names, "two leaders");
            }
            self.stats.two_were.get_or_insert(names);
        } else {
            self.two_since = None;
        }

        if leaders.is_empty() && !self.nodes.is_empty() {
            let since = *self.none_since.get_or_insert(last);
            self.stats.no_leader = self.stats.no_leader.max(now - since);
        } else {
            self.none_since = None;
        }

        // While two lead, one of them has the lesser token: that is told already.
        let one = leaders.len() == 1;
        for (index, token) in leaders {
            if !one {
                self.token = self.token.max(token);
            } else if token < self.token && !self.may_go_back {
                let name = self.nodes[index].id();
                let back = format!("{name} leads with {token} after {}", self.token);
                if self.stats.tokens_back.last() != Some(&back) {
                    self.stats.tokens_back.push(back);
                }
            } else if token != self.token {
                self.stats.terms += 1;
                self.token = token;
            }
        }
        for (index, discovery) in self.discoveries.iter().enumerate() {
            let Some(token) = discovery.leadership().map(|term| term.epoch) else {
                continue;
            };
            let seen = &mut self.seen[index];
            if token < *seen && !self.may_go_back {
                let back = format!("discovery {index} shows {token} after {seen}");
                self.stats.tokens_back.push(back);
            }
            // Told once: from here on it counts anew.
            *seen = token;
        }
    }
}

fn leaders_of(nodes: &[ClusterNode]) -> Vec<(usize, i64)> {
    let nodes = nodes.iter().enumerate();
    nodes
        .filter(|(_, node)| node.is_leader())
        .filter_map(|(index, node)| Some((index, node.leadership()?.epoch)))
        .collect()
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
