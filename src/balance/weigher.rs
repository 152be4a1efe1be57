//! From the nodes of a group to their weights: what is shared by everything that routes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use super::Policy;
use super::adaptive::{Adaptive, Learned, Mean, Trust};
use super::member::{Member, Signals};
use super::weight::{Headroom, Load, base_weight, mean_load};
use super::zone::{Place, Side, Spill, Zones};
use crate::load_report::LoadReport;
use crate::node::Node;

/// A load that comes with responses is newer than the one in the registration, for so long.
const RESPONSES_COUNT: Duration = Duration::from_secs(10);
/// A load that comes with responses and does not say when it was sampled counts again after so
/// long, though nothing in it has changed.
const SAME_AGAIN: Duration = Duration::from_secs(5);
/// A sample that has been the same for longer than this keeps out the registration no more.
const SAME_MOST: Duration = Duration::from_secs(60);
/// A report older than the last one by more than this is not late: its sender's clock was set.
const CLOCK_SET_MS: u64 = 60_000;

/// How long requests in flight count that were reported.
const REPORTS_COUNT: Duration = Duration::from_secs(5);
/// A weight stays above 0.
const MIN_SPILL: f64 = 1e-6;

/// What weights follow from.
#[derive(Debug, Clone)]
pub(crate) struct Weighing {
    pub(crate) policy: Policy,
    pub(crate) headroom: Headroom,
    pub(crate) adaptive: Adaptive,
    pub(crate) zones: Zones,
    pub(crate) place: Place,
    pub(crate) default_port: u16,
    /// Whether requests are counted and their outcomes told. Else every backend counts as busy.
    pub(crate) sees_requests: bool,
}

/// What only the updater needs to know of a registration.
#[derive(Debug)]
struct Known {
    member: Arc<Member>,
    node: Arc<Node>,
    base: f64,
    load: Load,
    learned: Learned,
    /// The last new sample that came with a response, and when.
    response: Option<(LoadReport, Instant)>,
    /// When the last sample came with a response, new or not.
    answered: Option<Instant>,
    /// Another registration has its address, and wrote later.
    shadowed: bool,
    /// Its load is new and the controller has not had it yet.
    fresh: bool,
    /// It was sent something since its last report.
    tried: bool,
    /// Its outcomes as of the last tick.
    counted: u32,
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
            .answered
            .is_some_and(|at| now.saturating_duration_since(at) < RESPONSES_COUNT);
        let same = node.last_seen == self.node.last_seen && node.metadata == self.node.metadata;
        self.base = base_weight(node);
        self.node = node.clone();
        self.member.set_node(node.clone());
        if outdated {
            return 0;
        }
        if let Some((response, _)) = self.response.filter(|_| by_response) {
            // What responses do not tell is still told here.
            let mut registered = self.load;
            let refused = registered.observe(node);
            let told = Load::of(&response);
            self.load = Load {
                cpu: told.cpu.or(registered.cpu),
                memory: told.memory.or(registered.memory),
                queue: told.queue.or(registered.queue),
            };
            return refused;
        }
        self.fresh |= !same;
        self.load.observe(node)
    }

    /// Takes over what came with a response.
    fn hear(&mut self, now: Instant) {
        let Some(report) = self.member.take_sample() else {
            return;
        };
        let stuck = self
            .response
            .is_some_and(|(_, at)| now.saturating_duration_since(at) > SAME_MOST);
        if !stuck {
            self.answered = Some(now);
        }
        let again =
            self.response
                .is_some_and(|(last, at)| match (last.sampled_at, report.sampled_at) {
                    (Some(last), Some(this)) => this <= last && last - this < CLOCK_SET_MS,
                    _ => {
                        Load::of(&last) == Load::of(&report)
                            && now.saturating_duration_since(at) < SAME_AGAIN
                    }
                });
        if again {
            return;
        }
        self.response = Some((report, now));
        self.answered = Some(now);
        let load = Load::of(&report);
        self.load = Load {
            cpu: load.cpu.or(self.load.cpu),
            memory: load.memory.or(self.load.memory),
            queue: load.queue.or(self.load.queue),
        };
        self.fresh = true;
    }

    fn is_near(&self, zone: Option<&str>) -> bool {
        zone.is_none() || self.node.zone.as_deref() == zone
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
    #[allow(clippy::vec_box)] // an update moves every one of them
    known: Vec<Box<Known>>,
    /// When there were nodes for the first time: those are not new.
    started: bool,
    ticked: Option<Instant>,
    trust: Trust,
    spill: Spill,
    /// The balancer's own zone.
    zone: Option<String>,
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
            trust: Trust::default(),
            spill: Spill::default(),
            zone: None,
            refused: 0,
        }
    }

    pub(super) fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Takes over the nodes of a group and weighs them. Of several registrations of one address the
    /// one written last counts: that process is there, the others are leases that have not run out
    /// yet. Forgets registrations that are gone.
    pub(crate) fn update<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) {
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
                    Box::new(Known {
                        member: Arc::new(Member::new(node, addr, &self.signals)),
                        node: node.clone(),
                        base: base_weight(node),
                        load,
                        learned: Learned::new(joined, now),
                        response: None,
                        answered: None,
                        shadowed: false,
                        fresh: true,
                        tried: false,
                        counted: 0,
                    })
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
        self.find_place();
        self.learn(now);
        self.weigh(now);
    }

    /// Where this balancer is: said, or where a node is that has registered.
    fn find_place(&mut self) {
        self.zone = match &self.config.place {
            Place::Anywhere => None,
            Place::Zone(zone) => Some(zone.clone()),
            Place::Beside(id) => {
                let own = self.known.iter().find(|known| known.node.id == *id);
                // A node that is gone for a moment has not moved.
                own.map_or(self.zone.take(), |own| own.node.zone.clone())
            }
        };
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
        let (mut heard, mut excess) = (Mean::default(), Mean::default());
        let (mut best, mut worst, mut reporting) = (None::<f32>, 1.0_f32, false);
        for known in &mut self.known {
            let learned = &mut known.learned;
            learned.age(adaptive, now, passed);
            if !self.config.sees_requests || known.member.is_active(known.counted) {
                known.tried = true;
            } else {
                learned.forget(adaptive);
            }
            learned.latencies(known.member.take_latencies(adaptive.latency_samples));
            known.counted = known.member.outcomes();
            if !known.counts() {
                continue;
            }
            let success = known.member.success();
            best = Some(best.map_or(success, |best| best.max(success)));
            worst = worst.min(success);
            reporting |= known.member.reported_since(REPORTS_COUNT, now);
            if known.learned.load.is_some() {
                heard.add(known.learned.metrics, 1.0);
            }
            if let Some(own) = known.learned.excess {
                excess.add(own, known.member.share());
            }
        }
        for known in self.known.iter_mut().filter(|known| known.counts()) {
            if known.learned.load.is_some() {
                known.learned.metrics -= heard.value();
            }
            known.learned.trim(adaptive, &excess);
        }
        self.spill();
        if !reporting {
            self.signals.no_reports();
        }
        // Of nobody, all is well: whoever comes has not failed yet.
        self.signals.settle(best.unwrap_or(1.0), worst);
        self.weigh(now);
    }

    /// How much traffic leaves the zone.
    fn spill(&mut self) {
        let zone = self.zone.as_deref();
        if zone.is_none() {
            return;
        }
        let (mut near, mut far) = (Side::default(), Side::default());
        for known in self.known.iter().filter(|known| known.counts()) {
            let is_near = known.is_near(zone);
            let side = if is_near { &mut near } else { &mut far };
            let weight = known.member.weight();
            if let Some(load) = known.learned.load {
                side.load.add(load, weight);
            }
            let fresh = known.learned.fresh;
            if let Some(latency) = known.learned.mean_latency.filter(|_| fresh) {
                side.latency.add(latency, weight);
            }
        }
        self.spill.tick(&self.config.zones, &near, &far);
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
        let mut loads = Mean::default();
        for load in self.known.iter().filter(|known| known.counts()) {
            if let Some(load) = load.learned.load {
                loads.add(load, 1.0);
            }
        }
        for known in &mut self.known {
            if std::mem::take(&mut known.fresh) && loads.count >= 2 && !known.shadowed {
                let tried = std::mem::take(&mut known.tried);
                let idle =
                    self.config.sees_requests && !tried && !known.member.is_active(known.counted);
                let success = known.member.success();
                let trust = &mut self.trust;
                known.learned.report(adaptive, trust, &loads, success, idle);
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
        let mut weights: Vec<f64> = self.known.iter().map(|known| raw(known)).collect();
        if config.policy == Policy::Adaptive {
            let mut factors = Mean::default();
            for (known, factor) in self.known.iter().zip(&weights) {
                if known.counts() {
                    factors.add(*factor, 1.0);
                }
            }
            let middle = factors.value().max(f64::MIN_POSITIVE);
            let (least, most) = (config.adaptive.weight_min, config.adaptive.weight_max);
            for (known, weight) in self.known.iter().zip(&mut weights) {
                *weight = known.base * (*weight / middle).clamp(least, most);
            }
            self.start_slowly(&mut weights, now);
        }
        let zone = self.zone.as_deref();
        let chance = |known: &Known| match config.policy {
            Policy::Adaptive => self.signals.chance(known.member.success()),
            _ => 1.0,
        };
        let mut well = Mean::default();
        for (known, weight) in self.known.iter().zip(&weights) {
            if known.counts() && known.is_near(zone) {
                let chance = self.signals.chance(known.member.success());
                well.add(f64::from(chance), *weight);
            }
        }
        let spill = self.spill.level(&config.zones, well.value());
        for (known, weight) in self.known.iter().zip(weights) {
            // A key stays where it is, whatever the pressure.
            let near = config.policy == Policy::Consistent || known.is_near(zone);
            let part = if near { 1.0 } else { spill.max(MIN_SPILL) };
            known.member.set_weight(weight, part, chance(known));
        }
    }

    /// Takes from those that joined lately, and leaves the others so much to carry at most.
    fn start_slowly(&self, weights: &mut [f64], now: Instant) {
        let adaptive = &self.config.adaptive;
        let ramp = |known: &Known| match known.learned.joined {
            Some(joined) => adaptive.slow_start(now.saturating_duration_since(joined)),
            None => 1.0,
        };
        let (mut settled, mut starting) = (0.0, 0.0);
        for (known, weight) in self.known.iter().zip(weights.iter()) {
            if !known.counts() {
                continue;
            }
            if ramp(known) < 1.0 {
                starting += weight;
            } else {
                settled += weight;
            }
        }
        if starting <= 0.0 {
            return;
        }
        let carried = (settled + starting) / adaptive.slow_start_strain;
        let least = ((carried - settled) / starting).min(1.0);
        for (known, weight) in self.known.iter().zip(weights) {
            *weight *= ramp(known).max(least);
        }
    }

    /// Up to which difference in weight idle backends are chosen by chance: any, while all say that
    /// they have little to do.
    pub(super) fn alike(&self) -> f32 {
        let adaptive = &self.config.adaptive;
        let live = self.known.iter().filter(|known| known.counts());
        let loads = live.filter_map(|known| adaptive.load(&known.load, &Load::default(), 1.0));
        let Some(busiest) = loads.reduce(f64::max) else {
            return adaptive.alike as f32;
        };
        // All of it up to the calm load, and what is configured from twice that on.
        let calm = (2.0 - busiest / adaptive.calm_load.max(1e-9)).clamp(0.0, 1.0);
        (adaptive.alike + (1.0 - adaptive.alike) * calm) as f32
    }

    /// Every address once, draining nodes too, in the order they were given in.
    #[cfg(any(test, feature = "pingora"))]
    pub(crate) fn current(&self) -> impl Iterator<Item = &Arc<Member>> {
        let seen = self.known.iter().filter(|known| !known.shadowed);
        seen.map(|known| &known.member)
    }

    /// Every address once, without draining nodes.
    pub(super) fn serving(&self) -> Vec<Arc<Member>> {
        let serving = self.known.iter().filter(|known| known.counts());
        serving.map(|known| known.member.clone()).collect()
    }

    /// Metrics refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused + self.signals.refused()
    }
}

/// What was known before an update. Nodes mostly come in the order they came in before, so the
/// next is looked for in its place first.
struct Before {
    known: Vec<Option<Box<Known>>>,
    next: usize,
    places: Option<HashMap<(SocketAddr, i64, u64), usize, Xxh3DefaultBuilder>>,
}

impl Before {
    #[allow(clippy::vec_box)]
    fn new(known: Vec<Box<Known>>) -> Self {
        Self {
            known: known.into_iter().map(Some).collect(),
            next: 0,
            places: None,
        }
    }

    fn take(&mut self, node: &Node, addr: SocketAddr) -> Option<Box<Known>> {
        let place = match self.known.get(self.next) {
            None => return self.find(node, addr),
            Some(Some(known)) if known.is_of(node, addr) => self.next,
            Some(_) => return self.find(node, addr),
        };
        self.next = place + 1;
        self.known[place].take()
    }

    fn find(&mut self, node: &Node, addr: SocketAddr) -> Option<Box<Known>> {
        if self.known.is_empty() {
            return None;
        }
        let hash = |node: &Node| xxh3_64(node.id.as_bytes());
        let places = self.places.get_or_insert_with(|| {
            let known = self.known.iter().enumerate();
            known
                .filter_map(|(place, known)| {
                    let known = known.as_ref()?;
                    let key = (
                        known.member.addr(),
                        known.node.incarnation(),
                        hash(&known.node),
                    );
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
            place: Place::Anywhere,
            default_port: 80,
            sees_requests: true,
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
            let members: Vec<_> = weigher.current().collect();
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
