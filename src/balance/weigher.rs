//! From the nodes of a group to their weights: what is shared by everything that routes.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashTable;
use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use super::Policy;
use super::adaptive::{Adaptive, Learned, Mean, Trust};
use super::member::{Member, Signals};
use super::weight::{Headroom, Load, LoadSum, base_weight};
use super::zone::{Place, Side, Spill, Zones};
use crate::load_report::LoadReport;
use crate::node::Node;
use crate::store::Revision;

/// A load that comes with responses is newer than the one in the registration, for so long.
const RESPONSES_COUNT: Duration = Duration::from_secs(10);
/// A load that comes with responses and does not say when it was sampled counts again after so
/// long, though nothing in it has changed.
const SAME_AGAIN: Duration = Duration::from_secs(5);
/// A sample that has been the same for longer than this keeps out the registration no more.
const SAME_MOST: Duration = Duration::from_secs(60);
/// A sample older than the last one by more than this is not late: its sender's clock was set. For
/// responses that overtake each other are nearly of one time.
const CLOCK_SET_MS: i64 = 2_000;
/// What was learned of a process whose registration is gone is kept for so long: it may have lost
/// its lease only.
const REMEMBERED_FOR: Duration = Duration::from_secs(120);
/// Of so many at most.
const MOST_REMEMBERED: usize = 10_000;

/// How long requests in flight count that were reported.
const REPORTS_COUNT: Duration = Duration::from_secs(5);
/// A weight above 0 stays above 0.
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
    /// What came with responses, if anything did.
    responses: Option<Box<Responses>>,
    /// Another registration has its address, and wrote later.
    shadowed: bool,
    /// Its load is new and the controller has not had it yet.
    fresh: bool,
    /// It was sent something since its last report.
    tried: bool,
    /// Which update had it last.
    update: u32,
    /// Its outcomes as of the last tick.
    counted: u32,
}

#[derive(Debug)]
struct Responses {
    /// The last new sample, and when.
    sample: LoadReport,
    at: Instant,
    /// When the last sample came, new or not.
    answered: Instant,
}

/// Those that are gone, by the runs of their processes, for they may come back under another lease.
#[derive(Debug, Default)]
struct Parted {
    by_run: HashMap<u64, (Instant, f32, Known), Xxh3DefaultBuilder>,
    /// In the order in which they went; some may be back.
    order: VecDeque<(Instant, u64)>,
}

impl Parted {
    /// Keeps what is known of one that has gone without a goodbye; `success` is what it was then.
    fn keep(&mut self, known: Known, success: f32, now: Instant) {
        self.forget(now);
        let Some(run) = known.node.run().filter(|_| !known.node.is_leaving()) else {
            return;
        };
        if self.order.len() >= MOST_REMEMBERED {
            self.forget_oldest();
        }
        self.order.push_back((now, run));
        self.by_run.insert(run, (now, success, known));
    }

    /// What is known of this process, if it has been here lately.
    fn recall(&mut self, node: &Node, addr: SocketAddr, now: Instant) -> Option<Known> {
        self.forget(now);
        let run = node.run()?;
        let (_, success, known) = self.by_run.remove(&run)?;
        let known = Some(known).filter(|known| known.is_of(node, addr))?;
        known.member.revive(success);
        Some(known)
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, _)) = self.order.front() {
            if now.saturating_duration_since(*at) < REMEMBERED_FOR {
                return;
            }
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        // It may have come back since, and gone again.
        if let Some((at, run)) = self.order.pop_front()
            && self
                .by_run
                .get(&run)
                .is_some_and(|(since, ..)| *since == at)
        {
            self.by_run.remove(&run);
        }
    }
}

impl Known {
    /// A process that has lost its lease, and registered again, is the same one.
    fn is_of(&self, node: &Node, addr: SocketAddr) -> bool {
        self.member.addr() == addr && self.node.is_same_life(node)
    }

    /// Takes over a registration that was written again. Answers how many metrics were refused.
    fn observe(&mut self, node: &Arc<Node>, now: Instant) -> u32 {
        // A store tells its writes in their order. Without one the writer's clock has to do.
        let late = self.node.last_seen.saturating_sub(node.last_seen);
        let outdated = node.revision() == 0 && late > 0 && late < CLOCK_SET_MS;
        let same = node.last_seen == self.node.last_seen && node.metadata == self.node.metadata;
        self.base = base_weight(node);
        self.node = node.clone();
        self.member.set_node(node.clone());
        if outdated {
            return 0;
        }
        if let Some(responses) = &self.responses
            && now.saturating_duration_since(responses.answered) < RESPONSES_COUNT
        {
            // What responses do not tell is still told here.
            let mut registered = self.load;
            let refused = registered.observe(node);
            let told = Load::of(&responses.sample);
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
    fn hear(&mut self, report: LoadReport, now: Instant) {
        let Some(responses) = &mut self.responses else {
            self.responses = Some(Box::new(Responses {
                sample: report,
                at: now,
                answered: now,
            }));
            self.take_sample(&report);
            return;
        };
        let age = now.saturating_duration_since(responses.at);
        if age <= SAME_MOST {
            responses.answered = now;
        }
        let again = match (responses.sample.sampled_at, report.sampled_at) {
            (Some(last), Some(this)) => this <= last && last - this < CLOCK_SET_MS.unsigned_abs(),
            _ => Load::of(&responses.sample) == Load::of(&report) && age < SAME_AGAIN,
        };
        if again {
            return;
        }
        **responses = Responses {
            sample: report,
            at: now,
            answered: now,
        };
        self.take_sample(&report);
    }

    fn take_sample(&mut self, report: &LoadReport) {
        let load = Load::of(report);
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

    /// What right it has to its address. One that drains or leaves has less than one that serves;
    /// of two that serve the one has more that was written last, by the store's order, whatever the
    /// clocks of the two say.
    fn rank(&self) -> (bool, Revision, i64) {
        let node = &self.node;
        (node.is_serving(), node.revision(), node.last_seen)
    }

    fn counts(&self) -> bool {
        !self.shadowed && self.node.is_serving() && self.base > 0.0
    }
}

/// Sums over the registrations that count, kept while they change, so that one change costs as
/// much as one.
#[derive(Debug, Default)]
struct Totals {
    loads: LoadSum,
    /// Of the loads that the controller works with.
    learned: Mean,
}

impl Totals {
    fn add(&mut self, known: &Known) {
        if known.counts() {
            self.loads.add(&known.load);
            if let Some(load) = known.learned.load {
                self.learned.add(load, 1.0);
            }
        }
    }

    fn remove(&mut self, known: &Known) {
        if known.counts() {
            self.loads.remove(&known.load);
            if let Some(load) = known.learned.load {
                self.learned.remove(load);
            }
        }
    }
}

/// Weighs nodes, and remembers of each registration what a single report does not tell.
#[derive(Debug)]
pub(crate) struct Weigher {
    config: Weighing,
    signals: Arc<Signals>,
    known: Vec<Known>,
    index: Index,
    /// How many are shadowed at an address, where any is.
    shadowed: HashMap<SocketAddr, u32, Xxh3DefaultBuilder>,
    totals: Totals,
    /// Where those are whose load is new; some may have moved on since.
    fresh: Vec<u32>,
    updates: u32,
    /// When there were nodes for the first time: those are not new.
    started: bool,
    ticked: Option<Instant>,
    parted: Parted,
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
            index: Index::default(),
            shadowed: HashMap::default(),
            totals: Totals::default(),
            fresh: Vec::new(),
            updates: 0,
            started: false,
            ticked: None,
            parted: Parted::default(),
            trust: Trust::default(),
            spill: Spill::default(),
            zone: None,
            refused: 0,
        }
    }

    pub(super) fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    /// Takes over all the nodes of a group and weighs them. Forgets registrations that are gone.
    pub(crate) fn update<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
        now: Instant,
    ) {
        self.updates = self.updates.wrapping_add(1);
        let joined = self.started.then_some(now);
        for node in nodes {
            self.upsert(node, joined, now);
        }
        for at in (0..self.known.len()).rev() {
            if self.known[at].update != self.updates {
                let success = self.known[at].member.success();
                let gone = self.remove_at(at);
                self.parted.keep(gone, success, now);
            }
        }
        // What a burst has left behind, of a group that may have shrunk.
        self.known.shrink_to_fit();
        self.started |= !self.known.is_empty();
        self.settle(now);
    }

    /// Takes over one node that is new or has written again. Costs the same whatever the number of
    /// nodes; takes effect with the next [`settle`](Self::settle).
    pub(crate) fn insert(&mut self, node: &Arc<Node>, now: Instant) {
        let joined = self.started.then_some(now);
        self.upsert(node, joined, now);
        self.started = true;
    }

    /// Lets a node go. Requests avoid it from now on, before it is out of the table. Should its
    /// process be back before long, what was learned of it still holds.
    pub(crate) fn remove(&mut self, id: &str, now: Instant) {
        if let Some(at) = self.index.of_id(&self.known, id) {
            let success = self.known[at].member.success();
            self.known[at].member.retire();
            let gone = self.remove_at(at);
            self.parted.keep(gone, success, now);
        }
    }

    /// Of several registrations of one address one that serves counts, and of those the one written
    /// last: that process is there, the others are leases that have not run out yet.
    fn upsert(&mut self, node: &Arc<Node>, joined: Option<Instant>, now: Instant) {
        let addr = node.addr(self.config.default_port);
        let mut before = None;
        let at = match self.index.of_id(&self.known, &node.id) {
            Some(at) if self.known[at].is_of(node, addr) => {
                let known = &mut self.known[at];
                // Each report counts once, however often the group changes in the meantime.
                if !Arc::ptr_eq(&known.node, node) {
                    before = Some(known.rank());
                    self.totals.remove(known);
                    self.refused += u64::from(known.observe(node, now));
                    self.totals.add(known);
                    if known.fresh {
                        self.fresh.push(at as u32);
                    }
                }
                at
            }
            of_id => {
                let known = match self.parted.recall(node, addr, now) {
                    Some(mut known) => {
                        self.refused += u64::from(known.observe(node, now));
                        known.shadowed = false;
                        known.fresh = true;
                        known
                    }
                    None => self.unknown(node, addr, joined, now),
                };
                // Another process, or it has moved: nothing is known of that one.
                if let Some(at) = of_id {
                    self.remove_at(at);
                }
                self.totals.add(&known);
                let at = self.known.len();
                self.known.push(known);
                self.index.insert_id(&self.known, at);
                self.fresh.push(at as u32);
                at
            }
        };
        self.known[at].update = self.updates;
        let fell = before.is_some_and(|before| self.known[at].rank() < before);
        self.claim(at, fell);
    }

    /// One of which nothing is known.
    fn unknown(
        &mut self,
        node: &Arc<Node>,
        addr: SocketAddr,
        joined: Option<Instant>,
        now: Instant,
    ) -> Known {
        let mut load = Load::default();
        self.refused += u64::from(load.observe(node));
        Known {
            member: Arc::new(Member::new(node, addr, &self.signals)),
            node: node.clone(),
            base: base_weight(node),
            load,
            learned: Learned::new(joined, now),
            responses: None,
            shadowed: false,
            fresh: true,
            tried: false,
            update: self.updates,
            counted: 0,
        }
    }

    fn remove_at(&mut self, at: usize) -> Known {
        self.index.remove_id(&self.known, at);
        let is_holder = self.index.holder(&self.known, self.known[at].member.addr()) == Some(at);
        if is_holder {
            self.index.release(&self.known, at);
        }
        let removed = self.known.swap_remove(at);
        self.totals.remove(&removed);
        if removed.shadowed {
            self.count_shadow(removed.member.addr(), false);
        }
        if at < self.known.len() {
            self.index.moved(&self.known, self.known.len(), at);
            if self.known[at].fresh {
                self.fresh.push(at as u32);
            }
        }
        if is_holder && let Some(heir) = self.heir(removed.member.addr()) {
            self.shadow(heir, false);
            self.index.hold(&self.known, heir);
        }
        removed
    }

    /// Of those in the shadow at an address the one that wrote last.
    fn heir(&self, addr: SocketAddr) -> Option<usize> {
        if !self.shadowed.contains_key(&addr) {
            return None;
        }
        let rivals = self.known.iter().enumerate();
        let heir = rivals
            .filter(|(_, known)| known.shadowed && known.member.addr() == addr)
            .max_by_key(|(_, known)| known.rank())?;
        Some(heir.0)
    }

    /// Lets a registration have its address, if no other has more right to it; `fell`: it had more
    /// before.
    fn claim(&mut self, at: usize, fell: bool) {
        let addr = self.known[at].member.addr();
        let rank = |at: usize| self.known[at].rank();
        match self.index.holder(&self.known, addr) {
            None => self.index.hold(&self.known, at),
            Some(holder) if holder == at => {
                let heir = if fell { self.heir(addr) } else { None };
                if let Some(heir) = heir.filter(|heir| rank(*heir) > rank(at)) {
                    self.hand_over(at, heir);
                }
            }
            Some(holder) if rank(holder) < rank(at) => self.hand_over(holder, at),
            Some(_) => self.shadow(at, true),
        }
    }

    fn hand_over(&mut self, holder: usize, heir: usize) {
        self.index.release(&self.known, holder);
        self.shadow(holder, true);
        self.shadow(heir, false);
        self.index.hold(&self.known, heir);
    }

    fn shadow(&mut self, at: usize, shadowed: bool) {
        let known = &mut self.known[at];
        if known.shadowed == shadowed {
            return;
        }
        self.totals.remove(known);
        known.shadowed = shadowed;
        self.totals.add(known);
        let addr = known.member.addr();
        self.count_shadow(addr, shadowed);
    }

    fn count_shadow(&mut self, addr: SocketAddr, more: bool) {
        let count = self.shadowed.entry(addr).or_default();
        if more {
            *count += 1;
        } else {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.shadowed.remove(&addr);
            }
        }
    }

    /// Works out what the changes so far come to. Costs time in proportion to the number of nodes.
    pub(crate) fn settle(&mut self, now: Instant) {
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
                let own = self.index.of_id(&self.known, id);
                // A node that is gone for a moment has not moved.
                own.map_or(self.zone.take(), |at| self.known[at].node.zone.clone())
            }
        };
    }

    /// What time and requests bring, once a second.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.parted.forget(now);
        let passed = self
            .ticked
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.ticked = Some(now);
        // Added up anew now and then: sums that only change would be off in the end.
        self.totals = Totals::default();
        for (at, known) in self.known.iter_mut().enumerate() {
            if let Some(report) = known.member.take_sample() {
                known.hear(report, now);
                if known.fresh {
                    self.fresh.push(at as u32);
                }
            }
            self.totals.add(known);
        }
        self.find_place();
        self.learn(now);
        let adaptive = &self.config.adaptive;
        let (mut heard, mut excess) = (Mean::default(), Mean::default());
        let (mut best, mut worst, mut reporting) = (None::<f32>, 1.0_f32, false);
        let mut learned_loads = Mean::default();
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
            if let Some(load) = known.learned.load {
                heard.add(known.learned.metrics, 1.0);
                learned_loads.add(load, 1.0);
            }
            if let Some(own) = known.learned.excess {
                excess.add(own, known.member.share());
            }
        }
        // Loads that have become stale are forgotten.
        self.totals.learned = learned_loads;
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
        let fresh = std::mem::take(&mut self.fresh);
        let mean = self.totals.loads.mean();
        for at in &fresh {
            let Some(known) = self.known.get_mut(*at as usize).filter(|known| known.fresh) else {
                continue;
            };
            let load = adaptive.load(&known.load, &mean, known.member.success());
            self.totals.remove(known);
            known.learned.heard(load, now);
            self.totals.add(known);
        }
        let loads = &self.totals.learned;
        for at in fresh {
            let Some(known) = self.known.get_mut(at as usize) else {
                continue;
            };
            if std::mem::take(&mut known.fresh) && loads.count >= 2 && !known.shadowed {
                let tried = std::mem::take(&mut known.tried);
                let idle =
                    self.config.sees_requests && !tried && !known.member.is_active(known.counted);
                let success = known.member.success();
                let trust = &mut self.trust;
                known.learned.report(adaptive, trust, loads, success, idle);
            }
        }
    }

    /// Publishes what is known as weights.
    fn weigh(&mut self, now: Instant) {
        let config = &self.config;
        let mean = self.totals.loads.mean();
        let raw = |known: &Known| match config.policy {
            Policy::Headroom => config.headroom.weight(known.base, &known.load, &mean),
            Policy::Adaptive => (known.learned.metrics + known.learned.latency).exp(),
            Policy::RoundRobin | Policy::Random | Policy::Consistent => known.base,
        };
        let mut weights: Vec<f64> = self.known.iter().map(raw).collect();
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

    /// Every address once, without nodes that are to get nothing.
    pub(super) fn serving(&self) -> impl Iterator<Item = &Arc<Member>> + Clone {
        let serving = self.known.iter().filter(|known| known.counts());
        serving.map(|known| &known.member)
    }

    /// Metrics refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused + self.signals.refused()
    }
}

/// Where a registration is, by its id and, for the one that has it, by its address.
#[derive(Debug, Default)]
struct Index {
    ids: HashTable<u32>,
    holders: HashTable<u32>,
}

fn id_hash(known: &Known) -> u64 {
    xxh3_64(known.node.id.as_bytes())
}

fn addr_hash(addr: SocketAddr) -> u64 {
    Xxh3DefaultBuilder.hash_one(addr)
}

impl Index {
    fn of_id(&self, all: &[Known], id: &str) -> Option<usize> {
        let hash = xxh3_64(id.as_bytes());
        let found = self.ids.find(hash, |at| all[*at as usize].node.id == id)?;
        Some(*found as usize)
    }

    /// The one just pushed.
    fn insert_id(&mut self, all: &[Known], at: usize) {
        let hash = |at: &u32| id_hash(&all[*at as usize]);
        self.ids.insert_unique(id_hash(&all[at]), at as u32, hash);
    }

    fn remove_id(&mut self, all: &[Known], at: usize) {
        let found = self.ids.find_entry(id_hash(&all[at]), is(at));
        if let Ok(found) = found {
            found.remove();
        }
    }

    fn holder(&self, all: &[Known], addr: SocketAddr) -> Option<usize> {
        let same = |at: &u32| all[*at as usize].member.addr() == addr;
        let found = self.holders.find(addr_hash(addr), same)?;
        Some(*found as usize)
    }

    /// Of an address that nobody has.
    fn hold(&mut self, all: &[Known], at: usize) {
        let hash = |at: &u32| addr_hash(all[*at as usize].member.addr());
        self.holders
            .insert_unique(hash(&(at as u32)), at as u32, hash);
    }

    fn release(&mut self, all: &[Known], at: usize) {
        let hash = addr_hash(all[at].member.addr());
        if let Ok(found) = self.holders.find_entry(hash, is(at)) {
            found.remove();
        }
    }

    /// The one that was at `from` is at `to` now.
    fn moved(&mut self, all: &[Known], from: usize, to: usize) {
        if let Some(place) = self.ids.find_mut(id_hash(&all[to]), is(from)) {
            *place = to as u32;
        }
        let hash = addr_hash(all[to].member.addr());
        if let Some(place) = self.holders.find_mut(hash, is(from)) {
            *place = to as u32;
        }
    }
}

fn is(place: usize) -> impl Fn(&u32) -> bool {
    move |at| *at as usize == place
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::node::NodeState;
    use proptest::prelude::*;

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

    proptest! {
        /// Changes one by one come to the same as all the nodes at once, whatever they are: the same
        /// addresses by the same registrations, and the same sums.
        #[test]
        fn changes_come_to_what_an_update_does(
            steps in prop::collection::vec((0_u8..6, 0_u8..4, 0_u8..3, 0_i64..9, 0.0..100.0_f64), 0..60),
        ) {
            let now = Instant::now();
            let (mut single, mut whole) = (weigher(), weigher());
            let mut nodes: BTreeMap<String, Arc<Node>> = BTreeMap::new();
            for (who, host, what, last_seen, cpu) in steps {
                let id = format!("n{who}");
                if what == 0 {
                    nodes.remove(&id);
                    single.remove(&id, now);
                } else {
                    let mut node = Node::new(&id, format!("10.0.0.{host}").parse().unwrap())
                        .with_metadata(serde_json::json!({ "cpu_usage_percent": cpu }))
                        .with_incarnation(i64::from(what));
                    if cpu < 20.0 {
                        node.state = NodeState::Draining;
                    }
                    node.last_seen = last_seen * 100_000;
                    let node = Arc::new(node);
                    nodes.insert(id, node.clone());
                    single.insert(&node, now);
                }
                single.settle(now);
                let addrs = |weigher: &Weigher| {
                    let mut addrs: Vec<_> = weigher.current().map(|member| member.addr()).collect();
                    addrs.sort_unstable();
                    addrs
                };
                whole.update(nodes.values(), now);
                prop_assert_eq!(addrs(&single), addrs(&whole));
                let of_all: BTreeSet<_> = nodes.values().map(|node| node.addr(80)).collect();
                prop_assert_eq!(addrs(&single), of_all.into_iter().collect::<Vec<_>>());
                prop_assert_eq!(single.known.len(), nodes.len());
                let shadowed = single.known.iter().filter(|known| known.shadowed).count();
                prop_assert_eq!(single.shadowed.values().sum::<u32>() as usize, shadowed);
                for known in &single.known {
                    let at = single.index.of_id(&single.known, &known.node.id).unwrap();
                    prop_assert!(std::ptr::eq(&single.known[at], known));
                    let holder = single.index.holder(&single.known, known.member.addr()).unwrap();
                    prop_assert_eq!(holder == at, !known.shadowed);
                    // Nobody who is in the shadow has more right than who has the address.
                    prop_assert!(single.known[holder].rank() >= known.rank());
                }
                let mut sums = Totals::default();
                single.known.iter().for_each(|known| sums.add(known));
                let (kept, new) = (single.totals.loads.mean(), sums.loads.mean());
                prop_assert_eq!(kept.cpu.is_some(), new.cpu.is_some());
                prop_assert!((kept.cpu.unwrap_or(0.0) - new.cpu.unwrap_or(0.0)).abs() < 1e-9);
                prop_assert_eq!(single.totals.learned.count, sums.learned.count);
            }
        }
    }
}
