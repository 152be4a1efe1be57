//! Whether many nodes are gone, or only many leases. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use crate::error::{ClusterError, in_range};
use crate::node::Node;

/// When nodes stay though their leases are gone.
///
/// Leases end by the hundred when the store was away for longer than they live, or lost its data:
/// their nodes serve on. So when more than `part` of the nodes, and `at_least` so many, vanish within
/// `within`, or are missing from a fresh list, all of them stay in the view as *suspects* for `hold`.
/// Requests still go there, as far as their outcomes and health checks allow; one that registers
/// again is a node like any other; a suspect never leads. A node that was draining when it vanished,
/// or has said goodbye, as those of this crate do when they are told to stop, does not count.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SelfPreservation {
    /// Whether it is done at all. Default: true.
    pub enabled: bool,
    /// The part of the nodes that has to be exceeded. Default: 0.3. Range: 0.01 to 1.
    pub part: f64,
    /// How many it takes at least: in a smaller group each is let go at once. Default: 3. Range: 1 to
    /// 1,000,000.
    pub at_least: usize,
    /// Within how many milliseconds: about the time to live of the nodes' leases. Default: 10,000.
    /// Range: 100 to 3,600,000.
    pub within_ms: u64,
    /// For how many milliseconds they stay. Default: 30,000. Range: 100 to 86,400,000.
    pub hold_ms: u64,
}

impl Default for SelfPreservation {
    fn default() -> Self {
        Self {
            enabled: true,
            part: 0.3,
            at_least: 3,
            within_ms: 10_000,
            hold_ms: 30_000,
        }
    }
}

impl SelfPreservation {
    /// None: a node whose lease is gone is gone.
    pub fn off() -> Self {
        Self {
            enabled: false,
            ..Self::default()
        }
    }

    /// Checks every field, which is named as under `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and its range.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let whole = |value: u64| value as f64;
        for (name, value, range) in [
            ("part", self.part, 0.01..=1.0),
            ("at_least", self.at_least as f64, 1.0..=1e6),
            ("within_ms", whole(self.within_ms), 100.0..=3.6e6),
            ("hold_ms", whole(self.hold_ms), 100.0..=8.64e7),
        ] {
            in_range(field, name, value, range)?;
        }
        Ok(())
    }

    fn within(&self) -> Duration {
        Duration::from_millis(self.within_ms)
    }

    fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }
}

/// Who has vanished lately, and who stays all the same.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    config: SelfPreservation,
    /// Gone from the view, not for longer than `within`.
    recent: BTreeMap<Arc<str>, (Instant, Arc<Node>)>,
    /// The same in order, with some that have come back.
    order: VecDeque<(Instant, Arc<str>)>,
    /// In the view, until then.
    held: BTreeMap<Arc<str>, Instant>,
    due: BTreeSet<(Instant, Arc<str>)>,
}

/// What becomes of a node that has vanished.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It is gone.
    Gone,
    /// It stays, and these come back that were let go before it was clear that they are many.
    Stays(Vec<Arc<Node>>),
}

impl Suspects {
    pub(crate) fn new(config: SelfPreservation) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    pub(crate) fn contains(&self, id: &str) -> bool {
        self.held.contains_key(id)
    }

    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether so many of all are more than leave one by one.
    pub(crate) fn are_many(&self, lost: usize, all: usize) -> bool {
        let config = &self.config;
        config.enabled && lost >= config.at_least && lost as f64 > config.part * all as f64
    }

    /// A node has vanished from a view of so many, itself included; `more` others are missing too.
    pub(crate) fn vanished(
        &mut self,
        node: &Arc<Node>,
        nodes: usize,
        more: usize,
        now: Instant,
    ) -> Verdict {
        if !self.config.enabled || !node.is_serving() {
            return Verdict::Gone;
        }
        self.forget(now);
        let lost = self.recent.len() + self.held.len() + 1 + more;
        let all = nodes + self.recent.len();
        let many = self.are_many(lost, all);
        let id: Arc<str> = Arc::from(node.id.as_str());
        if !many {
            self.order.push_back((now, id.clone()));
            self.recent.insert(id, (now, node.clone()));
            return Verdict::Gone;
        }
        self.order.clear();
        let back = std::mem::take(&mut self.recent);
        let mut returned = Vec::with_capacity(back.len());
        for (id, (at, node)) in back {
            self.hold(id, at + self.config.hold());
            returned.push(node);
        }
        self.hold(id, now + self.config.hold());
        Verdict::Stays(returned)
    }

    fn hold(&mut self, id: Arc<str>, until: Instant) {
        if let Some(before) = self.held.insert(id.clone(), until) {
            self.due.remove(&(before, id.clone()));
        }
        self.due.insert((until, id));
    }

    /// A node has registered. Answers whether it was a suspect.
    pub(crate) fn returned(&mut self, id: &str) -> bool {
        self.recent.remove(id);
        self.release(id)
    }

    /// A node is not in the view any more. Answers whether it was a suspect.
    pub(crate) fn release(&mut self, id: &str) -> bool {
        let Some((id, until)) = self.held.remove_entry(id) else {
            return false;
        };
        self.due.remove(&(until, id));
        true
    }

    /// Who is given up next.
    pub(crate) fn first(&self) -> Option<Arc<str>> {
        self.due.first().map(|(_, id)| id.clone())
    }

    /// When the next one is given up.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(until, _)| *until)
    }

    /// Those that are given up now.
    pub(crate) fn take_due(&mut self, now: Instant) -> Vec<Arc<str>> {
        let mut ids = Vec::new();
        while let Some((until, _)) = self.due.first() {
            if *until > now {
                break;
            }
            if let Some((_, id)) = self.due.pop_first() {
                self.held.remove(&id);
                ids.push(id);
            }
        }
        ids
    }

    /// For so long nobody could register: each stays so much longer.
    pub(crate) fn postpone(&mut self, away: Duration) {
        let held: Vec<_> = self
            .held
            .iter()
            .map(|(id, until)| (id.clone(), *until))
            .collect();
        for (id, until) in held {
            self.hold(id, until + away);
        }
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, id)) = self.order.front() {
            if now.saturating_duration_since(*at) <= self.config.within() {
                break;
            }
            if self.recent.get(id).is_some_and(|(other, _)| other == at) {
                self.recent.remove(id);
            }
            self.order.pop_front();
        }
    }
}
