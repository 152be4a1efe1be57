//! What is fed, and what has to hold then.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fastrand::Rng;
use pingora_etcd::balance::{Balancer, PickOptions, Policy};
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::discovery::fuzzing::{self, Group};
use pingora_etcd::store::{Entry, LeaseId, WatchEvent};
use pingora_etcd::{
    Change, Metadata, Node, Nodes,
    discovery::{EntryLimits, NodeFilter, SelfPreservation},
    metrics::LoadReport,
};
use serde_json::Value;

use crate::Trace;
use crate::input::{self, Corpus, IDS};

/// A kind of input.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Feeds what follows from the seed.
    pub(crate) feed: fn(&mut Rng, &mut Trace),
    /// Its part of the seeds. A seed of some is one input, of others a sequence of them.
    pub(crate) part: u64,
    /// Part of the inputs that is taken in, in percent. Less: they fail too early to find anything.
    /// More: they are too good.
    pub(crate) accepted: (f64, f64),
}

pub(crate) const TARGETS: [Target; 6] = [
    Target {
        name: "node",
        feed: node,
        part: 72,
        accepted: (15.0, 80.0),
    },
    Target {
        name: "election",
        feed: election,
        part: 143,
        accepted: (15.0, 90.0),
    },
    Target {
        name: "metadata",
        feed: metadata,
        part: 700,
        accepted: (30.0, 90.0),
    },
    Target {
        name: "snapshot",
        feed: snapshot,
        part: 450,
        accepted: (15.0, 80.0),
    },
    Target {
        name: "yaml",
        feed: yaml,
        part: 330,
        accepted: (10.0, 80.0),
    },
    Target {
        name: "report",
        feed: report,
        part: 1090,
        accepted: (30.0, 95.0),
    },
];

static NODES: LazyLock<Corpus> = LazyLock::new(input::nodes);
static CANDIDATES: LazyLock<Corpus> = LazyLock::new(input::candidates);
static METADATA: LazyLock<Corpus> = LazyLock::new(input::metadata);
static SNAPSHOTS: LazyLock<Corpus> = LazyLock::new(input::snapshots);
static YAML: LazyLock<Corpus> = LazyLock::new(input::yaml);
static REPORTS: LazyLock<Corpus> = LazyLock::new(input::reports);

/// A group with a reader of its changes and a balancer, which have to agree with its view.
struct World {
    group: Group,
    limits: EntryLimits,
    is_strict: bool,
    told: BTreeMap<String, Arc<Node>>,
    leader: Option<(String, i64)>,
    balancer: Balancer,
    policy: Policy,
    now: Instant,
    revision: i64,
    /// Every key that was written.
    written: BTreeSet<String>,
}

impl World {
    fn new(rng: &mut Rng) -> Self {
        let mut limits = EntryLimits::default();
        limits.nodes = rng.usize(1..=24);
        if rng.u8(..6) == 0 {
            limits.key_bytes = 64;
            limits.value_bytes = 300;
            limits.depth = 3;
            limits.values = 20;
        }
        limits.validate("limits").unwrap();
        let is_strict = rng.u8(..5) == 0;
        let (mut filter, mut networks, mut ports) = (NodeFilter::new(), Vec::new(), Vec::new());
        if is_strict {
            filter = filter.zone("a").zone("b");
            networks = vec!["10.0.0.0/8".to_owned(), "fd00::/8".to_owned()];
            ports = vec!["8080-8100".to_owned()];
        }
        let preserve = match rng.u8(..4) {
            0 => SelfPreservation::off(),
            _ => SelfPreservation::default(),
        };
        let policies = [
            Policy::Adaptive,
            Policy::Headroom,
            Policy::Consistent,
            Policy::RoundRobin,
            Policy::Random,
        ];
        let policy = rng.choice(policies).unwrap_or_default();
        Self {
            group: Group::new(limits, filter, &networks, &ports, preserve).unwrap(),
            limits,
            is_strict,
            told: BTreeMap::new(),
            leader: None,
            balancer: Balancer::builder().policy(policy).try_build().unwrap(),
            policy,
            now: Instant::now(),
            revision: 1,
            written: BTreeSet::new(),
        }
    }

    fn entry(&mut self, rng: &mut Rng, key: String, value: Vec<u8>) -> Entry {
        self.revision += 1;
        self.written.insert(key.clone());
        let lease = rng.i64(-1..5);
        Entry {
            key,
            value,
            create_revision: match rng.u8(..20) {
                0 => rng.i64(..),
                1..10 => rng.i64(1..=self.revision),
                _ => self.revision,
            },
            mod_revision: self.revision,
            lease: (lease > 0).then_some(LeaseId(lease)),
        }
    }

    /// Takes over what is told, and looks at whether it is what the view says.
    fn tell(&mut self, changes: &[Change], rng: &mut Rng) {
        for change in changes {
            match change {
                Change::Joined(node) => {
                    let before = self.told.insert(node.id.clone(), node.clone());
                    assert!(before.is_none(), "{:?} joins twice", node.id);
                }
                Change::Updated { old, new } => {
                    let before = self.told.insert(new.id.clone(), new.clone());
                    let is_old = before.is_some_and(|before| Arc::ptr_eq(&before, old));
                    assert!(is_old, "{:?} is updated from something else", new.id);
                }
                Change::Left(node) => {
                    let before = self.told.remove(&node.id);
                    let is_old = before.is_some_and(|before| Arc::ptr_eq(&before, node));
                    assert!(is_old, "{:?} leaves, and was not there", node.id);
                }
                Change::Leader(leadership) => {
                    self.leader = leadership
                        .as_ref()
                        .map(|leadership| (leadership.node.id.clone(), leadership.epoch));
                }
                other => panic!("{other:?}"),
            }
            self.balancer.apply(change, self.now);
        }
        if rng.u8(..4) == 0 {
            self.now += Duration::from_millis(rng.u64(..5_000));
            self.balancer.tick(self.now);
        } else {
            self.balancer.publish(self.now);
        }
        self.check();
        self.pick(rng);
    }

    fn check(&self) {
        let nodes = self.group.nodes();
        assert!(
            nodes.len() <= self.limits.nodes,
            "{} nodes, and {} are allowed",
            nodes.len(),
            self.limits.nodes
        );
        assert_eq!(
            nodes.len(),
            self.told.len(),
            "what was told is not the view"
        );
        let mut suspects = 0;
        for (node, (id, told)) in nodes.iter().zip(&self.told) {
            assert!(Arc::ptr_eq(node, told) && node.id == *id, "{id:?}");
            assert!(!id.is_empty() && !id.contains('/'), "{id:?}");
            let key = format!("registry/g/{id}");
            assert!(self.written.contains(&key), "nobody wrote {key:?}");
            suspects += usize::from(nodes.is_suspect(id));
            let is_nowhere = node.ip.is_unspecified() || node.ip.is_multicast();
            assert!(!is_nowhere && node.port != Some(0), "{id:?} is nowhere");
            if self.is_strict {
                let is_allowed = match node.ip.to_canonical() {
                    IpAddr::V4(ip) => ip.octets()[0] == 10,
                    IpAddr::V6(ip) => ip.octets()[0] == 0xfd,
                };
                let port = node.port;
                let is_allowed =
                    is_allowed && port.is_none_or(|port| (8080..=8100).contains(&port));
                assert!(is_allowed, "{id:?} is at {}:{port:?}", node.ip);
                let zone = node.zone.as_deref();
                assert!(matches!(zone, Some("a" | "b")), "{id:?} is in {zone:?}");
            }
        }
        assert_eq!(suspects, nodes.suspects(), "suspects that are no nodes");
        let leader = self.group.leader();
        assert_eq!(
            leader.map(|leader| (leader.node.id.clone(), leader.epoch)),
            self.leader,
            "the leader that was told is not the view's"
        );
        if let Some(leader) = leader {
            let id = &leader.node.id;
            let is_there = nodes.get(id).is_some() && !nodes.is_suspect(id);
            assert!(is_there, "{id:?} leads, and is not there");
        }
        let sizes = self.group.sizes();
        assert!(sizes.queue == sizes.places && sizes.queue <= self.limits.nodes);
        assert!(sizes.refused <= 10_000, "{} keys remembered", sizes.refused);
    }

    fn pick(&self, rng: &mut Rng) {
        let backends = self.balancer.backends();
        // Of several at one address the one that wrote last counts, and it may be draining, or
        // have a weight of 0.
        let takes_traffic = |node: &Node| node.is_serving() && node.weight != Some(0.0);
        let (mut serving, mut draining) = (BTreeSet::new(), BTreeSet::new());
        for node in self.told.values() {
            let at = node.addr(80);
            (if takes_traffic(node) {
                &mut serving
            } else {
                &mut draining
            })
            .insert(at);
        }
        let addresses: BTreeSet<_> = backends.iter().map(|backend| backend.addr).collect();
        assert_eq!(addresses.len(), backends.len(), "an address comes twice");
        assert!(addresses.is_subset(&serving), "backends that are no nodes");
        assert!(
            serving
                .difference(&draining)
                .all(|at| addresses.contains(at)),
            "nodes that are no backends"
        );
        for backend in &backends {
            let (id, weight, share) = (&backend.node.id, backend.weight, backend.share);
            assert!(weight.is_finite() && weight > 0.0, "{id:?} weighs {weight}");
            assert!(share.is_finite() && share >= 0.0, "{id:?}: share {share}");
        }
        let key = rng.u64(..).to_le_bytes();
        let options = PickOptions {
            key: &key,
            now: Some(self.now),
            random: Some(rng.u64(..)),
            ..PickOptions::default()
        };
        match self.balancer.pick_with(options) {
            None => assert!(backends.is_empty(), "{:?} picks nothing", self.policy),
            Some(upstream) => {
                let node = upstream.node();
                let told = &self.told[&node.id];
                assert!(Arc::ptr_eq(told, &node) && takes_traffic(told));
                assert_eq!(upstream.addr(), told.addr(80));
                match rng.u8(..3) {
                    0 => upstream.succeeded(Duration::from_micros(rng.u64(..))),
                    1 => upstream.failed(),
                    _ => {}
                }
            }
        }
    }

    fn holds(&self, entry: &Entry) -> bool {
        let id = entry.key.rsplit('/').next().unwrap_or_default();
        let without = -entry.create_revision.saturating_abs();
        let incarnation = entry.lease.map_or(without, |lease| lease.0);
        // Deleted and written again with a broken value, it has another incarnation.
        self.told
            .get(id)
            .is_some_and(|node| node.incarnation() == incarnation)
    }
}

/// Most keys are right, so that values matter.
fn key(rng: &mut Rng, prefix: &str, id: &str) -> String {
    match rng.u8(..60) {
        0 => format!(
            "{prefix}{}",
            rng.choice(["", "/", "a/b", "\u{0}", "\n", "é"])
                .unwrap_or("")
        ),
        1 => format!("{prefix}{}", "k".repeat(rng.usize(..3_000))),
        2 => {
            let other = [
                "registry/g",
                "registry/g-2/",
                "registry/",
                "",
                "election/g/",
                "handover/g/",
            ];
            format!("{}{id}", rng.choice(other).unwrap_or(""))
        }
        3 => (0..rng.usize(..30)).map(|_| rng.char(..)).collect(),
        _ => format!("{prefix}{id}"),
    }
}

fn registration(world: &mut World, rng: &mut Rng) -> Entry {
    let (index, value) = NODES.next(rng);
    let id = input::id(index.unwrap_or_else(|| rng.usize(..IDS)));
    let key = key(rng, "registry/g/", &id);
    world.entry(rng, key, value)
}

fn node(rng: &mut Rng, trace: &mut Trace) {
    let mut world = World::new(rng);
    for _ in 0..16 {
        match rng.u8(..20) {
            0 => {
                let passed = world.group.pass(Duration::from_millis(rng.u64(..40_000)));
                world.tell(&passed, rng);
            }
            1 => {
                // All of them at once, in pages.
                let entries: Vec<_> = (0..rng.usize(..24))
                    .map(|_| registration(&mut world, rng))
                    .collect();
                let mut by_key = BTreeMap::new();
                for entry in entries {
                    trace.input(&entry.value);
                    by_key.insert(entry.key.clone(), entry);
                }
                // A store gives what the prefix selects.
                by_key.retain(|key, _| key.starts_with("registry/g/"));
                let entries: Vec<_> = by_key.into_values().collect();
                let pages: Vec<_> = entries.chunks(5).map(<[_]>::to_vec).collect();
                let revision = world.revision;
                let changes = world.group.list(pages, [], revision);
                world.tell(&changes, rng);
                for entry in &entries {
                    trace.done(world.holds(entry));
                }
            }
            2..=5 => {
                let id = input::id(rng.usize(..IDS));
                world.revision += 1;
                let event = WatchEvent::Delete {
                    key: key(rng, "registry/g/", &id),
                    revision: world.revision,
                };
                let changes = world.group.apply(&[event]);
                world.tell(&changes, rng);
            }
            _ => {
                let entry = registration(&mut world, rng);
                trace.input(&entry.value);
                let before = world.group.rejected_entries().total();
                let changes = world.group.apply(&[WatchEvent::Put(entry.clone())]);
                let is_new = world.group.rejected_entries().total() == before;
                world.tell(&changes, rng);
                trace.done(is_new && world.holds(&entry));
            }
        }
    }
}

/// When it queued, its id, and its lease.
type Candidate = (i64, String, Option<LeaseId>);

fn election(rng: &mut Rng, trace: &mut Trace) {
    let mut world = World::new(rng);
    // What the line has to be.
    let mut line: BTreeMap<String, Candidate> = BTreeMap::new();
    for index in 0..rng.usize(..IDS) {
        let value = NODES.small[index].clone();
        let entry = world.entry(rng, format!("registry/g/{}", input::id(index)), value);
        let changes = world.group.apply(&[WatchEvent::Put(entry)]);
        world.tell(&changes, rng);
    }
    let limits = world.limits;
    let join = |line: &mut BTreeMap<String, Candidate>, entry: &Entry| {
        let rest = entry.key.strip_prefix("election/g/");
        if rest.is_none_or(|rest| rest.is_empty() || rest.contains('/')) {
            return false;
        }
        line.remove(&entry.key);
        let is_short = entry.value.len() <= 512 && entry.key.len() <= limits.key_bytes;
        let id = String::from_utf8(entry.value.clone());
        let Some(id) = id.ok().filter(|_| is_short && line.len() < limits.nodes) else {
            return false;
        };
        let candidate = (entry.create_revision, id, entry.lease);
        line.insert(entry.key.clone(), candidate);
        true
    };
    for _ in 0..16 {
        let candidate = |world: &mut World, rng: &mut Rng| {
            let (_, value) = CANDIDATES.next(rng);
            let place = format!("{:x}", rng.u8(..24));
            let key = key(rng, "election/g/", &place);
            world.entry(rng, key, value)
        };
        match rng.u8(..16) {
            0 => {
                let entries: BTreeMap<_, _> = (0..rng.usize(..24))
                    .map(|_| candidate(&mut world, rng))
                    .map(|entry| (entry.key.clone(), entry))
                    .collect();
                // Nodes are as they were.
                let nodes: Vec<_> = world.group.nodes().iter().cloned().collect();
                let mut registrations = Vec::new();
                for node in nodes {
                    let key = format!("registry/g/{}", node.id);
                    let value = serde_json::to_vec(&*node).unwrap();
                    let mut entry = world.entry(rng, key, value);
                    entry.lease = node.lease();
                    registrations.push(entry);
                }
                let revision = world.revision;
                line.clear();
                let entries: Vec<_> = entries.into_values().collect();
                let accepted: Vec<_> = entries.iter().map(|entry| join(&mut line, entry)).collect();
                let pages: Vec<_> = entries.chunks(5).map(<[_]>::to_vec).collect();
                let changes = world.group.list([registrations], pages, revision);
                world.tell(&changes, rng);
                for (entry, accepted) in entries.iter().zip(accepted) {
                    trace.input(&entry.value);
                    trace.done(accepted);
                }
            }
            1..=3 => {
                let place = format!("{:x}", rng.u8(..24));
                let key = key(rng, "election/g/", &place);
                line.remove(&key);
                world.revision += 1;
                let revision = world.revision;
                let event = WatchEvent::Delete { key, revision };
                let changes = world.group.apply(&[event]);
                world.tell(&changes, rng);
            }
            _ => {
                let entry = candidate(&mut world, rng);
                trace.input(&entry.value);
                let accepted = join(&mut line, &entry);
                let changes = world.group.apply(&[WatchEvent::Put(entry)]);
                world.tell(&changes, rng);
                trace.done(accepted);
            }
        }
        assert_eq!(world.group.sizes().queue, line.len(), "the line is another");
        let first = line
            .iter()
            .map(|(key, (epoch, id, lease))| (*epoch, key, id, lease))
            .min();
        let first = first.filter(|(_, _, id, lease)| {
            let nodes = world.group.nodes();
            // Of one life: one lease holds both keys.
            let node = nodes.get(id).filter(|node| node.lease() == **lease);
            node.is_some() && lease.is_some() && !nodes.is_suspect(id)
        });
        assert_eq!(
            world.leader,
            first.map(|(epoch, _, id, _)| (id.clone(), epoch)),
            "another leads"
        );
    }
}

fn metadata(rng: &mut Rng, trace: &mut Trace) {
    let (_, mut bytes) = METADATA.next(rng);
    // More is refused before it is parsed.
    bytes.truncate(EntryLimits::default().value_bytes);
    trace.input(&bytes);
    let parsed = serde_json::from_slice::<Metadata>(&bytes);
    if let Ok(metadata) = &parsed {
        let again: Metadata = serde_json::from_str(metadata.as_json()).unwrap();
        assert_eq!(again, *metadata, "its own text is something else");
        // Once from the text, once from the value.
        for _ in 0..2 {
            let text = serde_json::to_string(metadata).unwrap();
            let again: Metadata = serde_json::from_str(&text).unwrap();
            assert_eq!(again, *metadata, "it does not survive being written");
            let value: &Value = metadata;
            assert_eq!(value.is_null(), metadata.is_null());
        }
        let value: &Value = metadata;
        assert_eq!(Metadata::from(value.clone()), *metadata);
        assert_eq!(metadata.clone(), *value);
        if let Value::Object(fields) = value {
            for (key, value) in fields.iter().take(8) {
                let (number, expected) = (metadata.number(key), value.as_f64());
                assert_eq!(number, expected, "{key:?}");
                assert!(number.is_none_or(f64::is_finite), "{key:?} is {number:?}");
            }
        }
        assert_eq!(metadata.number("no such key"), None);
        in_range(&LoadReport::from_metadata(value));
    }
    trace.done(parsed.is_ok());
}

fn snapshot(rng: &mut Rng, trace: &mut Trace) {
    let (_, mut bytes) = SNAPSHOTS.next(rng);
    let is_sealed = rng.u8(..8) != 0;
    if is_sealed {
        bytes = fuzzing::seal(&bytes);
    } else {
        bytes = fuzzing::seal(&bytes);
        match (rng.u8(..3), bytes.len()) {
            (0, length) => bytes.truncate(rng.usize(..length)),
            (1, length) => bytes[rng.usize(..length)] ^= 1 << rng.u8(..8),
            _ => bytes.push(rng.u8(..)),
        }
    }
    trace.input(&bytes);
    let decoded = fuzzing::decode(&bytes);
    assert!(is_sealed || decoded.is_err(), "damage goes unnoticed");
    let accepted = decoded.is_ok();
    if let Ok(nodes) = decoded {
        let mut world = World::new(rng);
        for node in &nodes {
            world.written.insert(format!("registry/g/{}", node.id));
            let text = serde_json::to_string(node).unwrap();
            let again: Node = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&again).unwrap(), text);
        }
        let changes = world.group.restore(nodes);
        world.tell(&changes, rng);
        // Then the store is heard again.
        for _ in 0..2 {
            let entry = registration(&mut world, rng);
            let changes = world.group.apply(&[WatchEvent::Put(entry)]);
            world.tell(&changes, rng);
        }
    }
    trace.done(accepted);
}

fn yaml(rng: &mut Rng, trace: &mut Trace) {
    let (_, bytes) = YAML.next(rng);
    trace.input(&bytes);
    let text = String::from_utf8_lossy(&bytes);
    let parsed = ClusterConfig::from_yaml(&text, "fuzz.yaml");
    match &parsed {
        Ok(config) => {
            config.validate().unwrap();
            config.balancer().unwrap();
            assert!(!format!("{config:?}").is_empty());
        }
        Err(error) => {
            let told = error.to_string();
            assert!(told.starts_with("fuzz.yaml"), "{told}");
            // With the lines around, which may be long.
            let most = 4 * text.len() + 4_096;
            assert!(told.len() < most, "an error of {} bytes", told.len());
        }
    }
    #[cfg(feature = "pingora")]
    if let Ok(conf) = pingora_etcd::config::server_conf(&text, "fuzz.yaml") {
        assert!(conf.threads > 0 && conf.max_retries > 0);
    }
    trace.done(parsed.is_ok());
}

fn in_range(report: &LoadReport) {
    let is_in = |value: Option<f64>, most: f64| value.is_none_or(|it| (0.0..=most).contains(&it));
    let is_sane = is_in(report.cpu, 1.0)
        && is_in(report.memory, 1.0)
        && is_in(report.queue, 1e9)
        && is_in(report.in_flight, 1e9)
        && report.sampled_at.is_none_or(|at| at <= 100_000_000_000_000);
    assert!(is_sane, "{report:?}");
}

fn report(rng: &mut Rng, trace: &mut Trace) {
    let balancer = Balancer::builder().try_build().unwrap();
    let nodes: Nodes = (1..4_u8)
        .map(|at| Arc::new(Node::new(at.to_string(), [10, 0, 0, at].into())))
        .collect();
    let mut now = Instant::now();
    balancer.apply(&Change::Reset(Arc::new(nodes)), now);
    balancer.publish(now);
    for _ in 0..4 {
        let (_, bytes) = REPORTS.next(rng);
        trace.input(&bytes);
        let options = PickOptions {
            now: Some(now),
            random: Some(rng.u64(..)),
            ..PickOptions::default()
        };
        let upstream = balancer.pick_with(options).unwrap();
        let parsed = LoadReport::parse(&bytes);
        assert_eq!(upstream.report_header(&bytes, now).is_ok(), parsed.is_ok());
        if let Ok(report) = &parsed {
            in_range(report);
            let again = LoadReport::parse(report.to_string()).unwrap();
            let mut expected = *report;
            expected.refused = 0;
            assert_eq!(again, expected, "it does not survive being written");
        }
        drop(upstream);
        now += Duration::from_millis(rng.u64(..2_000));
        balancer.tick(now);
        for backend in balancer.backends() {
            let weight = backend.weight;
            assert!(weight.is_finite() && weight > 0.0, "a weight of {weight}");
        }
        trace.done(parsed.is_ok());
    }
}
