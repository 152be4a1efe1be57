//! From the nodes of a group to their weights: what is shared by everything that routes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use super::Policy;
use super::adaptive::{Adaptive, Learned};
use super::member::{Member, Signals};
use super::report::LoadReport;
use super::weight::{Headroom, Load, base_weight, mean_load};
use super::zone::Zones;
use crate::node::Node;

/// A load that comes with responses is newer than the one in the registration, for so long.
const RESPONSES_COUNT: Duration = Duration::from_secs(10);
/// A load that comes with responses and does not say when it was sampled counts again after so
/// long, though nothing in it has changed.
const SAME_AGAIN: Duration = Duration::from_secs(5);
/// A report older than the last one by more than this is not late: its sender's clock was set.
const CLOCK_SET_MS: u64 = 60_000;

/// What weights follow from.
#[derive(Debug, Clone)]
pub(crate) struct Weighing {
    pub(crate) policy: Policy,
    pub(crate) headroom: Headroom,
    pub(crate) adaptive: Adaptive,
    pub(crate) zones: Zones,
    pub(crate) default_port: u16,
}

/// What only the updater needs to know of a registration.
#[derive(Debug)]
struct Known {
    member: Arc<Member>,
    node: Arc<Node>,
    base: f64,
    load: Load,
    learned: Learned,
    /// The last sample that came with a response, and when.
    response: Option<(LoadReport, Instant)>,
    /// Another registration has its address, and wrote later.
    shadowed: bool,
    /// Its load is new and the controller has not had it yet.
    fresh: bool,
}

impl Known {
    fn is_of(&self, node: &Node, addr: SocketAddr) -> bool {
        self.member.addr() == addr
            && self.node.incarnation() == node.incarnation()
            && self.node.id == node.id
    }

    /// Takes over a registration that was written again. Answers how many metrics were refused.
    fn observe(&mut self, node: &Arc<Node>, now: Instant) -> u32 {
        let late = self.node.last_seen.saturating_sub(node.last_seen);
        let outdated = late > 0 && late < CLOCK_SET_MS;
        let by_response = self
            .response
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < RESPONSES_COUNT);
        let same = node.last_seen == self.node.last_seen && node.metadata == self.node.metadata;
        self.base = base_weight(node);
        self.node = node.clone();
        self.member.set_node(node.clone());
        if outdated || by_response {
            return 0;
        }
        self.fresh |= !same;
        self.load.observe(node)
    }

    /// Takes over what came with a response.
    fn hear(&mut self, now: Instant) {
        let Some(report) = self.member.take_sample() else {
            return;
        };
        let again = self.response.is_some_and(|(last, at)| {
            match (last.sampled_at, report.sampled_at) {
                (Some(last), Some(this)) => this <= last && last - this < CLOCK_SET_MS,
                _ => {
                    last.load() == report.load() && now.saturating_duration_since(at) < SAME_AGAIN
                }
            }
        });
        if again {
            return;
        }
        self.response = Some((report, now));
        let load = report.load();
        self.load = Load {
            cpu: load.cpu.or(self.load.cpu),
            memory: load.memory.or(self.load.memory),
            queue: load.queue.or(self.load.queue),
        };
        self.fresh = true;
    }

    fn counts(&self) -> bool {
        !self.shadowed && self.node.is_serving()
    }
}

/// Weighs nodes, and remembers of each registration what a single report does not tell.
#[derive(Debug)]
pub(crate) struct Weigher {
    config: Weighing,
    signals: Arc<Signals>,
    known: Vec<Known>,
    /// When there were nodes for the first time: those are not new.
    started: bool,
    ticked: Option<Instant>,
    spill: f64,
    refused: u64,
}

impl Weigher {
    pub(crate) fn new(config: Weighing) -> Self {
        Self {
            signals: Arc::new(Signals::new(&config.adaptive)),
            config,
            known: Vec::new(),
            started: false,
            ticked: None,
            spill: 0.0,
            refused: 0,
        }
    }

    pub(super) fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Takes over the nodes of a group and weighs them. Of several registrations of one address the
    /// one written last counts: that process is there, the others are leases that have not run out
    /// yet. Forgets registrations that are gone.
    pub(crate) fn update<'a>(&mut self, nodes: impl IntoIterator<Item = &'a Arc<Node>>, now: Instant) {
        let joined = self.started.then_some(now);
        let mut before = Before::new(std::mem::take(&mut self.known));
        let mut at: HashMap<SocketAddr, usize, Xxh3DefaultBuilder> = HashMap::default();
        for node in nodes {
            let addr = node.addr(self.config.default_port);
            let mut known = match before.take(node, addr) {
                Some(mut known) => {
                    // Each report counts once, however often the group changes in the meantime.
                    if !Arc::ptr_eq(&known.node, node) {
                        self.refused += u64::from(known.observe(node, now));
                    }
                    known
                }
                None => {
                    let mut load = Load::default();
                    self.refused += u64::from(load.observe(node));
                    Known {
                        member: Arc::new(Member::new(node, addr, &self.signals)),
                        node: node.clone(),
                        base: base_weight(node),
                        load,
                        learned: Learned::new(joined, now),
                        response: None,
                        shadowed: false,
                        fresh: true,
                    }
                }
            };
            known.shadowed = false;
            match at.entry(addr) {
                Entry::Vacant(vacant) => {
                    vacant.insert(self.known.len());
                }
                Entry::Occupied(mut other) => {
                    let rival = &mut self.known[*other.get()];
                    if rival.node.last_seen < known.node.last_seen {
                        rival.shadowed = true;
                        other.insert(self.known.len());
                    } else {
                        known.shadowed = true;
                    }
                }
            }
            self.known.push(known);
        }
        self.started |= !self.known.is_empty();
        self.learn(now);
        self.weigh(now);
    }

    /// What time and requests bring, once a second.
    pub(crate) fn tick(&mut self, now: Instant) {
        let passed = self
            .ticked
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.ticked = Some(now);
        for known in &mut self.known {
            known.hear(now);
        }
        self.learn(now);
        let adaptive = &self.config.adaptive;
        let mut heard = (0.0, 0_u32);
        let mut excess = (0.0, 0.0);
        for known in &mut self.known {
            let learned = &mut known.learned;
            learned.age(adaptive, now, passed);
            learned.latencies(known.member.take_latencies(adaptive.latency_samples));
            if known.shadowed || !known.node.is_serving() {
                continue;
            }
            if learned.load.is_some() {
                heard = (heard.0 + learned.metrics, heard.1 + 1);
            }
            if let Some(own) = learned.excess {
                let weight = known.member.share();
                excess = (excess.0 + own * weight, excess.1 + weight);
            }
        }
        let centre = heard.0 / f64::from(heard.1.max(1));
        let mean = if excess.1 > 0.0 { excess.0 / excess.1 } else { 0.0 };
        for known in self.known.iter_mut().filter(|known| known.counts()) {
            if known.learned.load.is_some() {
                known.learned.metrics -= centre;
            }
            known.learned.trim(adaptive, mean);
        }
        let reporting = self
            .members()
            .any(|member| member.reported_since(Duration::from_secs(5), now));
        if !reporting {
            self.signals.no_reports();
        }
        let success = self.members().filter(|member| member.is_serving());
        let (mut best, mut worst) = (0.0_f32, 1.0_f32);
        for success in success.map(|member| member.success()) {
            best = best.max(success);
            worst = worst.min(success);
        }
        self.signals.settle(best, worst);
        self.weigh(now);
    }

    /// Lets the controller have the reports that are new.
    fn learn(&mut self, now: Instant) {
        let adaptive = &self.config.adaptive;
        if !self.known.iter().any(|known| known.fresh) {
            return;
        }
        let live = self.known.iter().filter(|known| known.counts());
        let mean = mean_load(live.map(|known| &known.load));
        for known in self.known.iter_mut().filter(|known| known.fresh) {
            let load = adaptive.load(&known.load, &mean, known.member.success());
            known.learned.heard(load, now);
        }
        let loads = self.known.iter().filter(|known| known.counts());
        let (sum, count) = loads
            .filter_map(|known| known.learned.load)
            .fold((0.0, 0_u32), |(sum, count), load| (sum + load, count + 1));
        for known in &mut self.known {
            if std::mem::take(&mut known.fresh) && count >= 2 && !known.shadowed {
                let mean = sum / f64::from(count);
                known.learned.report(adaptive, mean, known.member.success());
            }
        }
    }

    /// Publishes what is known as weights.
    fn weigh(&mut self, now: Instant) {
        let config = &self.config;
        let serving = || self.known.iter().filter(|known| known.counts());
        let mean = mean_load(serving().map(|known| &known.load));
        let raw = |known: &Known| match config.policy {
            Policy::Headroom => config.headroom.weight(known.base, &known.load, &mean),
            Policy::Adaptive => (known.learned.metrics + known.learned.latency).exp(),
            Policy::RoundRobin | Policy::Random | Policy::Consistent => known.base,
        };
        let (sum, count) = serving()
            .map(raw)
            .fold((0.0, 0_u32), |(sum, count), raw| (sum + raw, count + 1));
        let middle = sum / f64::from(count.max(1));
        let whole = |known: &Known| match config.policy {
            Policy::Adaptive if middle > 0.0 => {
                let factor = raw(known) / middle;
                known.base * factor.clamp(config.adaptive.weight_min, config.adaptive.weight_max)
            }
            _ => raw(known),
        };
        let ramp = |known: &Known| match known.learned.joined {
            Some(joined) if config.policy == Policy::Adaptive => {
                let age = now.saturating_duration_since(joined);
                config.adaptive.slow_start(age)
            }
            _ => 1.0,
        };
        // Those that start slowly leave the others to carry their part: so much at most.
        let (mut settled, mut starting) = (0.0, 0.0);
        for known in serving() {
            match ramp(known) {
                1.0 => settled += whole(known),
                _ => starting += whole(known),
            }
        }
        let least = if starting > 0.0 {
            ((settled + starting) / config.adaptive.slow_start_strain - settled) / starting
        } else {
            0.0
        };
        let weights: Vec<f64> = self
            .known
            .iter()
            .map(|known| whole(known) * ramp(known).max(least.min(1.0)))
            .collect();
        let gates = matches!(config.policy, Policy::Adaptive | Policy::Consistent);
        self.spill = 1.0;
        for (known, weight) in self.known.iter().zip(weights) {
            let gate = if gates {
                self.signals.chance(known.member.success())
            } else {
                1.0
            };
            known.member.set_weight(weight, gate, 1.0);
        }
    }

    fn members(&self) -> impl Iterator<Item = &Arc<Member>> {
        let seen = self.known.iter().filter(|known| !known.shadowed);
        seen.map(|known| &known.member)
    }

    /// Every address once, draining nodes too, in the order they were given in.
    pub(crate) fn current(&self) -> Vec<Arc<Member>> {
        self.members().cloned().collect()
    }

    /// Metrics refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused + self.signals.refused()
    }
}

/// What was known before an update. Nodes mostly come in the order they came in before, so the
/// next is looked for in its place first.
struct Before {
    known: Vec<Option<Known>>,
    next: usize,
    places: Option<HashMap<(SocketAddr, i64, u64), usize, Xxh3DefaultBuilder>>,
}

impl Before {
    fn new(known: Vec<Known>) -> Self {
        Self {
            known: known.into_iter().map(Some).collect(),
            next: 0,
            places: None,
        }
    }

    fn take(&mut self, node: &Node, addr: SocketAddr) -> Option<Known> {
        let place = match self.known.get(self.next) {
            None => return self.find(node, addr),
            Some(Some(known)) if known.is_of(node, addr) => self.next,
            Some(_) => return self.find(node, addr),
        };
        self.next = place + 1;
        self.known[place].take()
    }

    fn find(&mut self, node: &Node, addr: SocketAddr) -> Option<Known> {
        if self.known.is_empty() {
            return None;
        }
        let hash = |node: &Node| xxh3_64(node.id.as_bytes());
        let places = self.places.get_or_insert_with(|| {
            let known = self.known.iter().enumerate();
            known
                .filter_map(|(place, known)| {
                    let known = known.as_ref()?;
                    let key = (known.member.addr(), known.node.incarnation(), hash(&known.node));
                    Some((key, place))
                })
                .collect()
        });
        let place = *places.get(&(addr, node.incarnation(), hash(node)))?;
        let known = self.known[place].take_if(|known| known.is_of(node, addr))?;
        self.next = place + 1;
        Some(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weigher() -> Weigher {
        Weigher::new(Weighing {
            policy: Policy::Headroom,
            headroom: Headroom::default(),
            adaptive: Adaptive::default(),
            zones: Zones::default(),
            default_port: 80,
        })
    }

    #[test]
    fn of_two_registrations_of_one_address_the_newer_counts() {
        let node = |id: &str, last_seen| {
            let mut node = Node::new(id, "10.0.0.1".parse().unwrap());
            node.last_seen = last_seen;
            Arc::new(node)
        };
        for nodes in [
            [node("old", 1), node("new", 2)],
            [node("new", 2), node("old", 1)],
        ] {
            let mut weigher = weigher();
            weigher.update(&nodes, Instant::now());
            let members = weigher.current();
            assert_eq!(members.len(), 1);
            assert_eq!(members[0].node().id, "new");
        }
    }

    #[test]
    fn a_report_is_counted_once() {
        let bad = serde_json::json!({ "cpu_usage_percent": -1 });
        let node = Arc::new(Node::new("n", "10.0.0.1".parse().unwrap()).with_metadata(bad));
        let mut weigher = weigher();
        for _ in 0..3 {
            weigher.update([&node], Instant::now());
        }
        assert_eq!(weigher.refused(), 1);
    }
}
