//! The checks of all nodes of a group.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as SystemInstant};

use ::pingora::upstreams::peer::HttpPeer;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::check::NodeCheck;
use super::check_state::CheckState;
use crate::balance::pace::pause_after;
use crate::balance::{Balancer, TICK};
use crate::discovery::ServiceDiscovery;
use crate::node::Node;
use crate::supervise::{caught, say};
use crate::sync::lock;
use crate::view::{Change, Nodes};

/// A result for a node that the balancer does not know yet is repeated after this time.
const UNKNOWN_AGAIN: Duration = Duration::from_millis(100);
/// When there is nothing to do.
const IDLE: Duration = Duration::from_secs(3_600);

/// How a node is spoken to; the error is why it cannot be.
pub(crate) type MakePeer =
    Arc<dyn Fn(SocketAddr, &Node) -> Result<Box<HttpPeer>, &'static str> + Send + Sync>;

/// A check, and how nodes are spoken to.
#[derive(Clone)]
pub(crate) struct Checker {
    pub(crate) check: NodeCheck,
    pub(crate) peer: MakePeer,
}

/// What checks say of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckStatus {
    /// Whether it is well: after the first check by its result, and then by several in a row.
    pub is_well: bool,
    /// What the last check that failed has found, in words; `None` if the last one passed.
    pub problem: Option<String>,
}

/// The checks of a group, which can be switched on, off, and to other ones.
pub(crate) struct Checks {
    checker: watch::Sender<Option<Checker>>,
    known: Mutex<HashMap<String, Known>>,
}

/// What is known of a node.
struct Known {
    node: Arc<Node>,
    state: CheckState,
    problem: Option<String>,
    /// When it is checked next; `None` while it is being checked.
    next: Option<Instant>,
}

/// A result, and what was known before.
struct Done {
    node: Arc<Node>,
    result: Result<(), String>,
    before: Option<bool>,
}

/// How many checks run. Answers may be long in coming, or never come, of nodes that are down and of those that have just
/// joined, so that some places are for others.
struct Running {
    most: usize,
    unchecked: usize,
    well: usize,
    down: usize,
}

impl Running {
    fn of(&mut self, is_well: Option<bool>) -> &mut usize {
        match is_well {
            None => &mut self.unchecked,
            Some(true) => &mut self.well,
            Some(false) => &mut self.down,
        }
    }

    fn is_full(&self) -> bool {
        self.unchecked + self.well + self.down >= self.most
    }

    /// A quarter of the places is for nodes that are well.
    fn may_check_unchecked(&self) -> bool {
        self.unchecked + self.down < (self.most * 3 / 4).max(1)
    }

    fn may_check_down(&self) -> bool {
        self.may_check_unchecked() && self.down < (self.most / 2).max(1)
    }
}

/// When each node is checked next.
#[derive(Default)]
struct Due {
    unchecked: BTreeSet<(Instant, String)>,
    well: BTreeSet<(Instant, String)>,
    down: BTreeSet<(Instant, String)>,
}

impl Due {
    fn add(&mut self, at: Instant, id: String, is_well: Option<bool>) {
        let due = match is_well {
            None => &mut self.unchecked,
            Some(true) => &mut self.well,
            Some(false) => &mut self.down,
        };
        due.insert((at, id));
    }

    /// Those whose turn it is, if any: first who has not been checked, because it gets no requests before.
    fn first(&mut self, running: &Running) -> Option<&mut BTreeSet<(Instant, String)>> {
        if !self.unchecked.is_empty() && running.may_check_unchecked() {
            return Some(&mut self.unchecked);
        }
        let down = self.down.first().filter(|_| running.may_check_down());
        match (self.well.first(), down) {
            (None, None) => None,
            (Some(well), Some(down)) if down < well => Some(&mut self.down),
            (None, Some(_)) => Some(&mut self.down),
            (Some(_), _) => Some(&mut self.well),
        }
    }

    fn next(&mut self, running: &Running) -> Option<Instant> {
        self.first(running)?.first().map(|(at, _)| *at)
    }

    /// Takes the next one whose time has come.
    fn take(&mut self, now: Instant, running: &Running) -> Option<(Instant, String)> {
        let due = self.first(running)?;
        due.first()
            .is_some_and(|(at, _)| *at <= now)
            .then(|| due.pop_first())?
    }
}

impl Checks {
    pub(super) fn new() -> Self {
        Self {
            checker: watch::Sender::new(None),
            known: Mutex::default(),
        }
    }

    /// Checks in this way from now on, or not at all.
    pub(crate) fn set(&self, checker: Option<Checker>) {
        self.checker.send_replace(checker);
    }

    /// What checks say of a node; `None` if it has not been checked.
    pub(super) fn status(&self, id: &str) -> Option<CheckStatus> {
        let known = lock(&self.known);
        let known = known.get(id)?;
        Some(CheckStatus {
            is_well: known.state.is_well()?,
            problem: known.problem.clone(),
        })
    }

    /// Whether all of these nodes have been checked, if they are to be.
    pub(super) fn has_checked(&self, nodes: &Nodes) -> bool {
        let known = lock(&self.known);
        let is_checked = |node: &Arc<Node>| {
            let known = known.get(&node.id);
            known.is_some_and(|known| known.state.is_well().is_some())
        };
        self.checker.borrow().is_none() || nodes.iter().all(is_checked)
    }

    /// Runs the checks, whichever there are.
    pub(super) async fn run(
        &self,
        balancer: &Balancer,
        discovery: &ServiceDiscovery,
    ) -> Infallible {
        let mut current = self.checker.subscribe();
        loop {
            let checker = current.borrow_and_update().clone();
            let threshold = checker
                .as_ref()
                .map(|checker| checker.check.config().panic_threshold);
            balancer.set_checks(threshold);
            balancer.publish(SystemInstant::now());
            let Some(checker) = checker else {
                lock(&self.known).clear();
                // It cannot fail: this is what sends.
                let _ = current.changed().await;
                continue;
            };
            let round = Round::new(self, &checker, balancer);
            tokio::select! {
                _ = current.changed() => {}
                never = round.run(discovery) => match never {},
            }
        }
    }
}

/// The checks as long as they stay the same.
struct Round<'a> {
    checks: &'a Checks,
    checker: &'a Checker,
    balancer: &'a Balancer,
    due: Due,
    checks_running: JoinSet<Done>,
    running: Running,
    /// The balancer has results that are not published.
    is_unpublished: bool,
    /// No earlier than then.
    publish_at: Instant,
}

impl<'a> Round<'a> {
    fn new(checks: &'a Checks, checker: &'a Checker, balancer: &'a Balancer) -> Self {
        Self {
            checks,
            checker,
            balancer,
            due: Due::default(),
            checks_running: JoinSet::new(),
            running: Running {
                most: checker.check.config().at_once,
                unchecked: 0,
                well: 0,
                down: 0,
            },
            is_unpublished: false,
            publish_at: Instant::now(),
        }
    }

    /// The first checks of a round: nothing of the one before is going on.
    fn begin(&mut self) {
        let now = Instant::now();
        let interval = Duration::from_millis(self.checker.check.config().interval_ms);
        for (id, known) in lock(&self.checks.known).iter_mut() {
            // Those that have been checked are spread over the interval.
            let wait = match known.state.is_well() {
                Some(_) => interval.mul_f64(fastrand::f64()),
                None => Duration::ZERO,
            };
            known.next = Some(now + wait);
            self.due.add(now + wait, id.clone(), known.state.is_well());
        }
    }

    async fn run(mut self, discovery: &ServiceDiscovery) -> Infallible {
        let mut changes = discovery.changes();
        self.begin();
        loop {
            self.start_due();
            let is_full = self.running.is_full();
            let next = self.due.next(&self.running);
            let next = next
                .filter(|_| !is_full)
                .unwrap_or_else(|| Instant::now() + IDLE);
            tokio::select! {
                change = changes.next() => self.apply(&change),
                Some(done) = self.checks_running.join_next() => {
                    // Whoever has panicked has been caught.
                    self.is_unpublished |= done.is_ok_and(|done| self.take(done));
                }
                () = sleep_until(self.publish_at), if self.is_unpublished => {
                    let start = SystemInstant::now();
                    self.balancer.publish(start);
                    self.is_unpublished = false;
                    // As with other changes: almost all of a core is left to others.
                    self.publish_at = Instant::now() + pause_after(start.elapsed()).min(TICK);
                }
                () = sleep_until(next) => {}
            }
        }
    }

    fn apply(&mut self, change: &Change) {
        let mut known = lock(&self.checks.known);
        match change {
            Change::Reset(nodes) => {
                known.retain(|id, _| nodes.get(id).is_some());
                for node in nodes.iter() {
                    insert(&mut known, &mut self.due, node);
                }
            }
            Change::Joined(node) | Change::Updated { new: node, .. } => {
                insert(&mut known, &mut self.due, node);
            }
            Change::Left(node) => drop(known.remove(&node.id)),
            Change::Leader(_) => {}
        }
    }

    /// Starts the checks whose time has come, as many as there may be.
    fn start_due(&mut self) {
        let now = Instant::now();
        let mut all = lock(&self.checks.known);
        while !self.running.is_full()
            && let Some((at, id)) = self.due.take(now, &self.running)
        {
            // One that has left is not checked any more, and a new process has a time of its own.
            let Some(known) = all.get_mut(&id).filter(|known| known.next == Some(at)) else {
                continue;
            };
            known.next = None;
            let node = known.node.clone();
            let checker = self.checker.clone();
            let addr = self.balancer.address_of(&node);
            let before = known.state.is_well();
            *self.running.of(before) += 1;
            self.checks_running.spawn(async move {
                let checking = async {
                    let peer = (checker.peer)(addr, &node)?;
                    checker.check.check(&peer).await
                };
                let result = caught(checking).await.unwrap_or_else(Err);
                Done {
                    node,
                    result,
                    before,
                }
            });
        }
    }

    /// Takes over a result. Returns whether the balancer has to publish it.
    fn take(&mut self, done: Done) -> bool {
        let Done { node, result, .. } = done;
        *self.running.of(done.before) -= 1;
        let config = self.checker.check.config();
        let mut all = lock(&self.checks.known);
        let Some(known) = all.get_mut(&node.id) else {
            return false;
        };
        if !is_same_process(&known.node, &node) {
            // The new process has its own turn.
            return false;
        }
        let before = known.state.is_well();
        known.state = known.state.after(result.is_ok(), config.rise, config.fall);
        known.problem = result.err();
        let is_well = known.state.is_well().unwrap_or_default();
        if before.is_some_and(|before| before != is_well) || before.is_none() && !is_well {
            report(&node, is_well, known.problem.as_deref());
        }
        let interval = if is_well {
            config.interval_ms
        } else {
            config.down_interval_ms
        };
        let interval = Duration::from_millis(interval);
        let (wait, is_new) = match self.balancer.set_checked(&node, is_well) {
            // Spread over time, however many came at once.
            Some(is_new) if before.is_none() => (interval.mul_f64(fastrand::f64()), is_new),
            Some(is_new) => (interval.mul_f64(0.9 + fastrand::f64() * 0.2), is_new),
            None => (UNKNOWN_AGAIN.min(interval), false),
        };
        let next = Instant::now() + wait;
        known.next = Some(next);
        self.due.add(next, node.id.clone(), Some(is_well));
        is_new
    }
}

fn insert(known: &mut HashMap<String, Known>, due: &mut Due, node: &Arc<Node>) {
    match known.get_mut(&node.id) {
        Some(known) if is_same_process(&known.node, node) => known.node = node.clone(),
        _ => {
            let now = Instant::now();
            let new = Known {
                node: node.clone(),
                state: CheckState::default(),
                problem: None,
                next: Some(now),
            };
            known.insert(node.id.clone(), new);
            due.add(now, node.id.clone(), None);
        }
    }
}

fn is_same_process(one: &Node, other: &Node) -> bool {
    one.is_same_life(other) && one.ip == other.ip && one.port == other.port
}

fn report(node: &Node, is_well: bool, problem: Option<&str>) {
    say(|| match is_well {
        true => info!(node = node.id, "the health check finds the node well"),
        false => warn!(
            node = node.id,
            problem, "the health check finds the node down"
        ),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With every kind due, and no check that ends: who has not been checked comes first, and a quarter of the places is
    /// for those that are well.
    #[tokio::test(start_paused = true)]
    async fn silent_nodes_do_not_take_all_places() {
        let now = Instant::now();
        let (mut due, mut running) = (
            Due::default(),
            Running {
                most: 8,
                unchecked: 0,
                well: 0,
                down: 0,
            },
        );
        let kinds = [None, Some(false), Some(true)];
        for (kind, is_well) in kinds.into_iter().enumerate() {
            for index in 0..20 {
                due.add(now, format!("{kind}-{index:02}"), is_well);
            }
        }
        due.add(now + Duration::from_secs(1), "later".to_owned(), Some(true));
        let mut begun = [0; 3];
        while !running.is_full() {
            let (_, id) = due.take(now, &running).unwrap();
            let kind: usize = id[..1].parse().unwrap();
            *running.of(kinds[kind]) += 1;
            begun[kind] += 1;
        }
        assert_eq!(begun, [6, 0, 2]);
        // Those that are down have half of the places at most.
        running.unchecked = 0;
        due.unchecked.clear();
        running.well = 0;
        due.well.clear();
        while due.take(now, &running).is_some() {
            running.down += 1;
        }
        assert_eq!(running.down, 4);
        assert_eq!(due.next(&running), None);
        running.down = 0;
        assert_eq!(due.next(&running), Some(now));
    }
}
