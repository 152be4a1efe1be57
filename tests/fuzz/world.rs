//! A group, a reader of its changes, and a balancer, which must agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use pingora_etcd::balance::{Balancer, PickOptions, Policy};
use pingora_etcd::discovery::fuzzing::Group;
use pingora_etcd::discovery::{EntryLimits, NodeFilter, SelfPreservation};
use pingora_etcd::store::{Entry, LeaseId};
use pingora_etcd::{Change, Node};

/// A group with a reader of its changes and a balancer, which must agree with its view.
pub(crate) struct World {
    pub(crate) group: Group,
    pub(crate) limits: EntryLimits,
    /// Whether addresses, ports and zones are restricted.
    is_strict: bool,
    /// The nodes according to the changes.
    nodes: BTreeMap<String, Arc<Node>>,
    /// The leader and its term according to the changes.
    pub(crate) leader: Option<(String, i64)>,
    balancer: Balancer,
    policy: Policy,
    now: Instant,
    pub(crate) revision: i64,
    /// Every key that was written.
    pub(crate) written: BTreeSet<String>,
}

impl World {
    pub(crate) fn new(rng: &mut Rng) -> Self {
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
            nodes: BTreeMap::new(),
            leader: None,
            balancer: Balancer::builder().policy(policy).try_build().unwrap(),
            policy,
            now: Instant::now(),
            revision: 1,
            written: BTreeSet::new(),
        }
    }

    pub(crate) fn entry(&mut self, rng: &mut Rng, key: String, value: Vec<u8>) -> Entry {
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

    /// Applies changes to the reader and the balancer, and checks that they agree with the view.
    pub(crate) fn apply(&mut self, changes: &[Change], rng: &mut Rng) {
        for change in changes {
            match change {
                Change::Joined(node) => {
                    let before = self.nodes.insert(node.id.clone(), node.clone());
                    assert!(before.is_none(), "{:?} joins twice", node.id);
                }
                Change::Updated { old, new } => {
                    let before = self.nodes.insert(new.id.clone(), new.clone());
                    let is_old = before.is_some_and(|before| Arc::ptr_eq(&before, old));
                    assert!(is_old, "{:?} is updated from something else", new.id);
                }
                Change::Left(node) => {
                    let before = self.nodes.remove(&node.id);
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
        self.check_backends();
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
            self.nodes.len(),
            "the changes do not add up to the view"
        );
        let mut suspects = 0;
        for (node, (id, known)) in nodes.iter().zip(&self.nodes) {
            assert!(Arc::ptr_eq(node, known) && node.id == *id, "{id:?}");
            assert!(!id.is_empty() && !id.contains('/'), "{id:?}");
            let key = format!("registry/g/{id}");
            assert!(self.written.contains(&key), "nobody wrote {key:?}");
            suspects += usize::from(nodes.is_suspect(id));
            let is_unreachable = node.ip.is_unspecified() || node.ip.is_multicast();
            assert!(
                !is_unreachable && node.port != Some(0),
                "nobody can connect to {id:?}"
            );
            if self.is_strict {
                Self::check_restrictions(node);
            }
        }
        assert_eq!(suspects, nodes.suspects(), "suspects that are not nodes");
        let leader = self.group.leader();
        assert_eq!(
            leader.map(|leader| (leader.node.id.clone(), leader.epoch)),
            self.leader,
            "the leader according to the changes is not that of the view"
        );
        if let Some(leader) = leader {
            let id = &leader.node.id;
            let is_there = nodes.get(id).is_some() && !nodes.is_suspect(id);
            assert!(is_there, "{id:?} leads, but is not a node of the view");
        }
        let sizes = self.group.sizes();
        assert!(sizes.queue == sizes.index && sizes.queue <= self.limits.nodes);
        assert!(sizes.logged <= 10_000, "{} lines remembered", sizes.logged);
    }

    fn check_restrictions(node: &Node) {
        let id = &node.id;
        let is_allowed = match node.ip.to_canonical() {
            IpAddr::V4(ip) => ip.octets()[0] == 10,
            IpAddr::V6(ip) => ip.octets()[0] == 0xfd,
        };
        let port = node.port;
        let is_allowed = is_allowed && port.is_none_or(|port| (8080..=8100).contains(&port));
        assert!(is_allowed, "{id:?} is at {}:{port:?}", node.ip);
        let zone = node.zone.as_deref();
        assert!(matches!(zone, Some("a" | "b")), "{id:?} is in {zone:?}");
    }

    fn check_backends(&self) {
        let backends = self.balancer.backends();
        // If several nodes have the same address, the one that wrote last counts. It may be draining,
        // or have a weight of 0.
        let (mut serving, mut draining) = (BTreeSet::new(), BTreeSet::new());
        for node in self.nodes.values() {
            let at = node.addr(80);
            (if takes_traffic(node) {
                &mut serving
            } else {
                &mut draining
            })
            .insert(at);
        }
        let addresses: BTreeSet<_> = backends.iter().map(|backend| backend.addr).collect();
        assert_eq!(addresses.len(), backends.len(), "an address appears twice");
        assert!(addresses.is_subset(&serving), "backends that are not nodes");
        assert!(
            serving
                .difference(&draining)
                .all(|at| addresses.contains(at)),
            "nodes that are not backends"
        );
        for backend in &backends {
            let (id, weight, share) = (&backend.node.id, backend.weight, backend.share);
            assert!(weight.is_finite() && weight > 0.0, "{id:?} weighs {weight}");
            assert!(share.is_finite() && share >= 0.0, "{id:?}: share {share}");
        }
    }

    fn pick(&self, rng: &mut Rng) {
        let key = rng.u64(..).to_le_bytes();
        let options = PickOptions {
            key: &key,
            now: Some(self.now),
            random: Some(rng.u64(..)),
            ..PickOptions::default()
        };
        match self.balancer.pick_with(options) {
            None => assert!(
                self.balancer.backends().is_empty(),
                "{:?} picks nothing",
                self.policy
            ),
            Some(upstream) => {
                let node = upstream.node();
                let known = &self.nodes[&node.id];
                assert!(Arc::ptr_eq(known, &node) && takes_traffic(known));
                assert_eq!(upstream.addr(), known.addr(80));
                match rng.u8(..3) {
                    0 => upstream.succeeded(Duration::from_micros(rng.u64(..))),
                    1 => upstream.failed(),
                    _ => {}
                }
            }
        }
    }

    /// Whether the node of this registration is in the view.
    pub(crate) fn holds(&self, entry: &Entry) -> bool {
        let id = entry.key.rsplit('/').next().unwrap_or_default();
        let without = -entry.create_revision.saturating_abs();
        let incarnation = entry.lease.map_or(without, |lease| lease.0);
        // A key that was deleted and written again with an unusable value has another incarnation.
        self.nodes
            .get(id)
            .is_some_and(|node| node.incarnation() == incarnation)
    }
}

/// A key below the prefix; most keys are valid, so that the values matter.
pub(crate) fn key(rng: &mut Rng, prefix: &str, id: &str) -> String {
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

fn takes_traffic(node: &Node) -> bool {
    node.is_serving() && node.weight != Some(0.0)
}
