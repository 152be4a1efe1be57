//! Records which nodes report that they lead. A dedicated thread samples every two milliseconds, so
//! that a busy runtime cannot hide anything.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pingora_etcd::pingora::LeaderRoute;
use pingora_etcd::{ClusterNode, ServiceDiscovery};

const SAMPLE_INTERVAL: Duration = Duration::from_millis(2);

/// What was measured since the last [`Monitor::take`].
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// The longest time with two or more leaders.
    pub two_leaders: Duration,
    /// The names of the leaders when this was first seen.
    pub two_leaders_names: Option<String>,
    /// The longest time without a leader.
    pub no_leader: Duration,
    /// Fencing tokens that were smaller than an earlier one, and where they were seen.
    pub token_decreases: Vec<String>,
    /// Leaders whose parts, as a reader saw them, belong to different processes with the same id.
    pub mixed: Vec<String>,
    /// How many terms began.
    pub terms: usize,
    /// The longest time between two samples, in which the monitor saw nothing.
    pub blind: Duration,
}

#[derive(Default)]
struct State {
    nodes: Vec<ClusterNode>,
    /// The nodes in the second group.
    second: Vec<ClusterNode>,
    discoveries: Vec<ServiceDiscovery>,
    /// The id and address of the leader of each term, as the first reader saw them.
    terms: HashMap<(String, i64), (String, SocketAddr)>,
    stats: Stats,
    /// The greatest token that a worker reported, and that each discovery showed.
    token: i64,
    seen: Vec<i64>,
    may_decrease: bool,
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
                lock(&shared).sample();
                std::thread::sleep(SAMPLE_INTERVAL);
            }
        });
        Self {
            state,
            stop,
            thread: Some(thread),
        }
    }

    /// Replaces the nodes that are monitored.
    pub fn watch_nodes(&self, nodes: Vec<ClusterNode>, second: Vec<ClusterNode>) {
        let mut state = lock(&self.state);
        (state.nodes, state.second) = (nodes, second);
    }

    pub fn watch_discoveries(&self, discoveries: Vec<ServiceDiscovery>) {
        let mut state = lock(&self.state);
        state.seen = vec![0; discoveries.len()];
        state.discoveries = discoveries;
    }

    /// While an old copy of the store is restored, revisions and tokens may decrease. When that is
    /// no longer allowed, tokens must increase from their value at that time.
    pub fn allow_smaller_tokens(&self, may: bool) {
        let mut state = lock(&self.state);
        state.may_decrease = may;
        state.token = 0;
        state.seen.fill(0);
        state.terms.clear();
    }

    /// Returns what was measured since the last call.
    pub fn take(&self) -> Stats {
        let mut state = lock(&self.state);
        let now = Instant::now();
        // A period without a leader that has not ended is counted in both intervals.
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

    /// Checks that what readers show of the leader belongs to a single process.
    fn sample_readers(&mut self) {
        for (index, discovery) in self.discoveries.iter().enumerate() {
            // The route that requests to the leader take.
            let route = LeaderRoute::new(discovery.clone(), 0);
            if let Some(to) = route.leader() {
                let term = (discovery.group_name().to_owned(), to.epoch);
                let is = (to.node.id.clone(), to.addr);
                let was = self.terms.entry(term).or_insert_with(|| is.clone());
                if *was != is && !self.may_decrease {
                    self.stats.mixed.push(format!(
                        "discovery {index}: {is:?} leads with token {}, which belonged to {was:?}",
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
                    "discovery {index}: {id} with lease {of:x} leads, but its candidate key has lease {lease}"
                ));
            }
        }
    }

    /// Returns the names of two nodes that lead the second group in two consecutive samples.
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

    fn sample(&mut self) {
        self.sample_readers();
        if let Some(names) = self.two_in_second() {
            self.stats.two_leaders = self.stats.two_leaders.max(SAMPLE_INTERVAL);
            self.stats.two_leaders_names.get_or_insert(names);
        }
        let mut leaders = self.leaders();
        if leaders.len() > 1 {
            // Leadership may have been transferred between two reads of this sample. Only a node
            // that leads in the same term in a second sample also led while the others did.
            let again = self.leaders();
            leaders.retain(|leader| again.contains(leader));
        }
        let now = Instant::now();
        let last = self.last.replace(now).unwrap_or(now);
        self.stats.blind = self.stats.blind.max(now - last);

        if leaders.len() > 1 {
            let since = *self.two_since.get_or_insert(now);
            // A single sighting counts as one interval.
            self.stats.two_leaders = self
                .stats
                .two_leaders
                .max((now - since).max(SAMPLE_INTERVAL));
            let names = leaders
                .iter()
                .map(|(index, token)| format!("{} (token {token})", self.nodes[*index].id()));
            let names = names.collect::<Vec<_>>().join(", ");
            if since == now {
                // Logged with its time among the log lines of the crate (RUST_LOG).
                tracing::error!(names, "two leaders");
            }
            self.stats.two_leaders_names.get_or_insert(names);
        } else {
            self.two_since = None;
        }

        if leaders.is_empty() && !self.nodes.is_empty() {
            let since = *self.none_since.get_or_insert(last);
            self.stats.no_leader = self.stats.no_leader.max(now - since);
        } else {
            self.none_since = None;
        }

        self.check_tokens(leaders);
    }

    fn check_tokens(&mut self, leaders: Vec<(usize, i64)>) {
        // While two nodes lead, one of them has the smaller token, which is already reported.
        let one = leaders.len() == 1;
        for (index, token) in leaders {
            if !one {
                self.token = self.token.max(token);
            } else if token < self.token && !self.may_decrease {
                let name = self.nodes[index].id();
                let back = format!("{name} leads with token {token} after {}", self.token);
                if self.stats.token_decreases.last() != Some(&back) {
                    self.stats.token_decreases.push(back);
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
            if token < *seen && !self.may_decrease {
                let back = format!("discovery {index} shows token {token} after {seen}");
                self.stats.token_decreases.push(back);
            }
            // Each decrease is reported once: from here on, tokens are compared with the smaller
            // one.
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
