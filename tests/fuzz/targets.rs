//! The kinds of input, and what must hold for each.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use fastrand::Rng;
use pingora_etcd::balance::{Balancer, PickOptions};
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::discovery::{EntryLimits, fuzzing};
use pingora_etcd::metrics::LoadReport;
use pingora_etcd::proxy::proxy_header_length;
use pingora_etcd::store::{Entry, LeaseId, WatchEvent};
use pingora_etcd::{Change, Metadata, Node, Nodes};
use serde_json::Value;

use crate::Trace;
use crate::corpora::{self, IDS};
use crate::mutate::Corpus;
use crate::world::{World, key};

/// A kind of input.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Feeds the inputs that follow from a seed.
    pub(crate) feed: fn(&mut Rng, &mut Trace),
    /// Its share of the seeds, relative to the others. For some kinds a seed is one input, for others a
    /// sequence of inputs.
    pub(crate) share: u64,
    /// The expected range of accepted inputs, in percent. If fewer are accepted, they fail too early to
    /// find anything; if more, they are too harmless.
    pub(crate) accepted: (f64, f64),
}

pub(crate) const TARGETS: [Target; 9] = [
    Target {
        name: "node",
        feed: node,
        share: 72,
        accepted: (15.0, 80.0),
    },
    Target {
        name: "election",
        feed: election,
        share: 143,
        accepted: (15.0, 90.0),
    },
    Target {
        name: "metadata",
        feed: metadata,
        share: 700,
        accepted: (30.0, 90.0),
    },
    Target {
        name: "registry",
        feed: registry,
        share: 500,
        accepted: (15.0, 80.0),
    },
    Target {
        name: "snapshot",
        feed: snapshot,
        share: 450,
        accepted: (15.0, 80.0),
    },
    Target {
        name: "yaml",
        feed: yaml,
        share: 330,
        accepted: (10.0, 80.0),
    },
    Target {
        name: "report",
        feed: report,
        share: 1090,
        accepted: (30.0, 95.0),
    },
    Target {
        name: "proxy_header",
        feed: proxy_header,
        share: 400,
        accepted: (10.0, 90.0),
    },
    Target {
        name: "front",
        feed: crate::front::connection,
        share: 60,
        accepted: (15.0, 80.0),
    },
];

static NODES: LazyLock<Corpus> = LazyLock::new(corpora::nodes);
static CANDIDATES: LazyLock<Corpus> = LazyLock::new(corpora::candidates);
static METADATA: LazyLock<Corpus> = LazyLock::new(corpora::metadata);
static ENTRIES: LazyLock<Corpus> = LazyLock::new(corpora::entries);
static SNAPSHOTS: LazyLock<Corpus> = LazyLock::new(corpora::snapshots);
static YAML: LazyLock<Corpus> = LazyLock::new(corpora::yaml);
static PROXY_HEADERS: LazyLock<Corpus> = LazyLock::new(corpora::proxy_headers);
static REPORTS: LazyLock<Corpus> = LazyLock::new(corpora::reports);

fn registration(world: &mut World, rng: &mut Rng) -> Entry {
    let (index, value) = NODES.next(rng);
    let id = corpora::id(index.unwrap_or_else(|| rng.usize(..IDS)));
    let key = key(rng, "registry/g/", &id);
    world.entry(rng, key, value)
}

fn node(rng: &mut Rng, trace: &mut Trace) {
    let mut world = World::new(rng);
    for _ in 0..16 {
        match rng.u8(..20) {
            0 => {
                let passed = world.group.pass(Duration::from_millis(rng.u64(..40_000)));
                world.apply(&passed, rng);
            }
            1 => {
                // A listing, in pages.
                let entries: Vec<_> = (0..rng.usize(..24))
                    .map(|_| registration(&mut world, rng))
                    .collect();
                let mut by_key = BTreeMap::new();
                for entry in entries {
                    trace.input(&entry.value);
                    by_key.insert(entry.key.clone(), entry);
                }
                // A store lists only the keys below the prefix.
                by_key.retain(|key, _| key.starts_with("registry/g/"));
                let entries: Vec<_> = by_key.into_values().collect();
                let pages: Vec<_> = entries.chunks(5).map(<[_]>::to_vec).collect();
                let revision = world.revision;
                let changes = world.group.list(pages, [], revision);
                world.apply(&changes, rng);
                for entry in &entries {
                    trace.done(world.holds(entry));
                }
            }
            2..=5 => {
                let id = corpora::id(rng.usize(..IDS));
                world.revision += 1;
                let event = WatchEvent::Delete {
                    key: key(rng, "registry/g/", &id),
                    revision: world.revision,
                };
                let changes = world.group.apply(&[event]);
                world.apply(&changes, rng);
            }
            _ => {
                let entry = registration(&mut world, rng);
                trace.input(&entry.value);
                let before = world.group.rejected_entries().total();
                let changes = world.group.apply(&[WatchEvent::Put(entry.clone())]);
                let is_new = world.group.rejected_entries().total() == before;
                world.apply(&changes, rng);
                trace.done(is_new && world.holds(&entry));
            }
        }
    }
}

/// Create revision, id, and lease.
type Candidate = (i64, String, Option<LeaseId>);

fn election(rng: &mut Rng, trace: &mut Trace) {
    let mut world = World::new(rng);
    // The expected queue.
    let mut queue: BTreeMap<String, Candidate> = BTreeMap::new();
    for index in 0..rng.usize(..IDS) {
        let value = NODES.small[index].clone();
        let entry = world.entry(rng, format!("registry/g/{}", corpora::id(index)), value);
        let changes = world.group.apply(&[WatchEvent::Put(entry)]);
        world.apply(&changes, rng);
    }
    let limits = world.limits;
    let join = |queue: &mut BTreeMap<String, Candidate>, entry: &Entry| {
        let rest = entry.key.strip_prefix("election/g/");
        if rest.is_none_or(|rest| rest.is_empty() || rest.contains('/')) {
            return false;
        }
        queue.remove(&entry.key);
        let is_short = entry.value.len() <= 512 && entry.key.len() <= limits.key_bytes;
        let id = String::from_utf8(entry.value.clone());
        let Some(id) = id.ok().filter(|_| is_short && queue.len() < limits.nodes) else {
            return false;
        };
        let candidate = (entry.create_revision, id, entry.lease);
        queue.insert(entry.key.clone(), candidate);
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
                // The nodes stay as they were.
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
                queue.clear();
                let entries: Vec<_> = entries.into_values().collect();
                let accepted: Vec<_> = entries
                    .iter()
                    .map(|entry| join(&mut queue, entry))
                    .collect();
                let pages: Vec<_> = entries.chunks(5).map(<[_]>::to_vec).collect();
                let changes = world.group.list([registrations], pages, revision);
                world.apply(&changes, rng);
                for (entry, accepted) in entries.iter().zip(accepted) {
                    trace.input(&entry.value);
                    trace.done(accepted);
                }
            }
            1..=3 => {
                let place = format!("{:x}", rng.u8(..24));
                let key = key(rng, "election/g/", &place);
                queue.remove(&key);
                world.revision += 1;
                let revision = world.revision;
                let event = WatchEvent::Delete { key, revision };
                let changes = world.group.apply(&[event]);
                world.apply(&changes, rng);
            }
            _ => {
                let entry = candidate(&mut world, rng);
                trace.input(&entry.value);
                let accepted = join(&mut queue, &entry);
                let changes = world.group.apply(&[WatchEvent::Put(entry)]);
                world.apply(&changes, rng);
                trace.done(accepted);
            }
        }
        assert_eq!(world.group.sizes().queue, queue.len(), "another queue");
        let first = queue
            .iter()
            .map(|(key, (epoch, id, lease))| (*epoch, key, id, lease))
            .min();
        let first = first.filter(|(_, _, id, lease)| {
            let nodes = world.group.nodes();
            // One lease holds both keys.
            let node = nodes.get(id).filter(|node| node.lease() == **lease);
            node.is_some() && lease.is_some() && !nodes.is_suspect(id)
        });
        assert_eq!(
            world.leader,
            first.map(|(epoch, _, id, _)| (id.clone(), epoch)),
            "another leader"
        );
    }
}

/// Entries of other registries, each also read as if another one had written it.
fn registry(rng: &mut Rng, trace: &mut Trace) {
    let (index, value) = ENTRIES.next(rng);
    trace.input(&value);
    let index = index.filter(|_| rng.u8(..4) > 0);
    let (registry, prefix) = corpora::registry(index.unwrap_or_else(|| rng.usize(..100)));
    let (_, segment) = ENTRIES.next(rng);
    let segment = match rng.bool() {
        true => "10.0.0.1:80,10.0.0.2:81".to_owned(),
        false => String::from_utf8_lossy(&segment[..segment.len().min(60)]).into_owned(),
    };
    let entry = Entry {
        key: format!("{prefix}{segment}"),
        value,
        create_revision: 3,
        mod_revision: 4,
        lease: None,
    };
    let read = fuzzing::read_foreign(&registry, &entry);
    if let Ok(node) = &read {
        assert!(!node.id.is_empty() && !node.id.contains('/'), "{}", node.id);
        assert!(
            !node.ip.is_unspecified() && node.port != Some(0),
            "{node:?}"
        );
        assert!(
            node.weight
                .is_none_or(|weight| weight.is_finite() && weight >= 0.0),
            "{node:?}"
        );
        let protocol = node
            .metadata
            .get("protocol")
            .map(|protocol| protocol.as_str().unwrap());
        let known = [None, Some("http1"), Some("https"), Some("h2c"), Some("h2")];
        assert!(known.contains(&protocol), "{node:?}");
        let text = serde_json::to_string(node).unwrap();
        let again: Node = serde_json::from_str(&text).unwrap();
        let parts = |node: &Node| {
            (
                node.port,
                node.weight.map(f64::to_bits),
                node.tags.clone(),
                node.metadata.clone(),
            )
        };
        assert_eq!(
            (&again, parts(&again)),
            (node, parts(node)),
            "a snapshot changes it: {text}"
        );
    }
    trace.done(read.is_ok());
}

fn metadata(rng: &mut Rng, trace: &mut Trace) {
    let (_, mut bytes) = METADATA.next(rng);
    // Longer inputs are refused before they are parsed.
    bytes.truncate(EntryLimits::default().value_bytes);
    trace.input(&bytes);
    let parsed = serde_json::from_slice::<Metadata>(&bytes);
    if let Ok(metadata) = &parsed {
        let again: Metadata = serde_json::from_str(metadata.as_json()).unwrap();
        assert_eq!(again, *metadata, "its own text differs");
        // Once from the text, once from the value.
        for _ in 0..2 {
            let text = serde_json::to_string(metadata).unwrap();
            let again: Metadata = serde_json::from_str(&text).unwrap();
            assert_eq!(again, *metadata, "writing and reading changes it");
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
    assert!(is_sealed || decoded.is_err(), "damage was not noticed");
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
        world.apply(&changes, rng);
        // Then the store is reached.
        for _ in 0..2 {
            let entry = registration(&mut world, rng);
            let changes = world.group.apply(&[WatchEvent::Put(entry)]);
            world.apply(&changes, rng);
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
            let message = error.to_string();
            assert!(message.starts_with("fuzz.yaml"), "{message}");
            // It quotes the surrounding lines, which may be long.
            let most = 4 * text.len() + 4_096;
            assert!(message.len() < most, "an error of {} bytes", message.len());
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
            assert_eq!(again, expected, "writing and reading changes it");
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

/// A header is the same whatever follows it, and no part of it is one.
fn proxy_header(rng: &mut Rng, trace: &mut Trace) {
    for _ in 0..4 {
        let (_, bytes) = PROXY_HEADERS.next(rng);
        trace.input(&bytes);
        let length = proxy_header_length(&bytes);
        if let Some(length) = length {
            assert_eq!(proxy_header_length(&bytes[..length]), Some(length));
            let part = rng.usize(..length);
            assert_eq!(proxy_header_length(&bytes[..part]), None, "{part}");
        }
        trace.done(length.is_some());
    }
}
