//! The balancer as its users see it.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::load_report::LoadReport;
use crate::node::{Node, NodeState};

fn node(index: u16, cpu: f64) -> Arc<Node> {
    let node = Node::new(format!("n{index}"), "10.0.0.1".parse().unwrap())
        .with_port(1000 + index)
        .with_metadata(json!({ "cpu_usage_percent": cpu }));
    Arc::new(node)
}

fn nodes(count: u16) -> Vec<Arc<Node>> {
    (0..count).map(|index| node(index, 50.0)).collect()
}

fn balancer(policy: Policy, nodes: &[Arc<Node>]) -> Balancer {
    let balancer = Balancer::builder().policy(policy).try_build().unwrap();
    balancer.update(nodes);
    balancer
}

fn rng() -> impl FnMut() -> u64 {
    let mut rng = fastrand::Rng::with_seed(1);
    move || rng.u64(..)
}

const POLICIES: [Policy; 5] = [
    Policy::RoundRobin,
    Policy::Random,
    Policy::Consistent,
    Policy::Headroom,
    Policy::Adaptive,
];

#[test]
fn every_policy_with_any_number_of_backends() {
    for policy in POLICIES {
        for count in [0, 1, 2, 3, 1000] {
            let nodes = nodes(count);
            let balancer = balancer(policy, &nodes);
            let mut seen = HashSet::new();
            for round in 0..u32::from(count) * 20 {
                let key = round.to_le_bytes();
                let options = PickOptions {
                    key: &key,
                    ..PickOptions::default()
                };
                seen.insert(balancer.pick_with(options).unwrap().addr());
            }
            assert!(
                seen.len() * 10 >= usize::from(count) * 9,
                "{policy:?}: {} of {count}",
                seen.len()
            );
            assert_eq!(balancer.pick().is_none(), count == 0);
        }
    }
}

#[test]
fn tried_backends_are_not_picked_again() {
    let nodes = nodes(4);
    for policy in POLICIES {
        let balancer = balancer(policy, &nodes);
        let mut tried = Vec::new();
        for _ in 0..4 {
            let options = PickOptions {
                key: b"k",
                exclude: &tried,
                ..PickOptions::default()
            };
            let addr = balancer.pick_with(options).unwrap().addr();
            assert!(!tried.contains(&addr), "{policy:?}");
            tried.push(addr);
        }
        let options = PickOptions {
            key: b"k",
            exclude: &tried,
            ..PickOptions::default()
        };
        assert!(balancer.pick_with(options).is_none(), "{policy:?}");
    }
}

#[test]
fn draining_nodes_are_not_picked_and_unknown_load_is_no_reason_not_to() {
    let serving = Arc::new(Node::new("a", "10.0.0.1".parse().unwrap()));
    let draining =
        Arc::new(Node::new("b", "10.0.0.2".parse().unwrap()).with_state(NodeState::Draining));
    for policy in POLICIES {
        let balancer = balancer(policy, &[serving.clone(), draining.clone()]);
        for _ in 0..50 {
            assert_eq!(balancer.pick().unwrap().node().id, "a");
        }
    }
}

/// As in every other balancer, and as for a node that drains.
#[test]
fn a_weight_of_zero_is_no_traffic() {
    let weighted = |index: u16, weight: f64| {
        let node = Node::clone(&node(index, 50.0)).with_weight(weight);
        Arc::new(node)
    };
    for policy in POLICIES {
        let balancer = balancer(policy, &[weighted(0, 1.0), weighted(1, 1.0)]);
        let hits = |requests: u32| {
            let mut counts = [0_u32; 2];
            let mut random = rng();
            for key in 0..requests {
                let options = PickOptions {
                    key: &key.to_le_bytes(),
                    ..PickOptions::default()
                };
                let upstream = balancer.pick_by(options, &mut random).unwrap();
                counts[usize::from(upstream.addr().port() - 1000)] += 1;
            }
            counts
        };
        assert!(hits(400).iter().all(|count| *count > 50), "{policy:?}");
        let held = balancer.pick().unwrap();
        // While it has requests in flight and reports of them.
        balancer.update(&[weighted(0, 0.0), weighted(1, 1.0)]);
        let report = LoadReport {
            in_flight: Some(3.0),
            ..LoadReport::default()
        };
        held.report(&report, Instant::now());
        balancer.tick(Instant::now());
        assert_eq!(hits(400)[0], 0, "{policy:?}");
        assert_eq!((balancer.len(), balancer.backends().len()), (1, 1));
        // Not even where all others have been tried.
        let tried = PickOptions {
            exclude: &["10.0.0.1:1001".parse().unwrap()],
            ..PickOptions::default()
        };
        assert!(balancer.pick_with(tried).is_none(), "{policy:?}");
        balancer.update(&[weighted(0, 0.0), weighted(1, 0.0)]);
        assert!(
            balancer.pick().is_none() && balancer.is_empty(),
            "{policy:?}"
        );
        // And back: one by one, as discovery tells it.
        let change = Change::Updated {
            old: weighted(0, 0.0),
            new: weighted(0, 3.0),
        };
        balancer.apply(&change, Instant::now());
        balancer.publish(Instant::now());
        assert_eq!(hits(400), [400, 0], "{policy:?}");
    }
}

#[test]
fn weights_that_are_none_count_as_one_and_great_ones_as_the_greatest() {
    for (weight, share) in [(-5.0, 0.5), (f64::NAN, 0.5), (1e9, 1.0), (1e-9, 0.0)] {
        let odd = Arc::new(Node::clone(&node(0, 50.0)).with_weight(weight));
        let balancer = balancer(Policy::Random, &[odd, node(1, 50.0)]);
        let mut random = rng();
        let hits = (0..2_000).filter(|_| {
            let picked = balancer.pick_by(PickOptions::default(), &mut random);
            picked.unwrap().addr().port() == 1000
        });
        let hits = hits.count() as f64 / 2_000.0;
        assert!((hits - share).abs() < 0.05, "{weight}: {hits}");
        assert_eq!(balancer.len(), 2);
    }
}

/// What a backend says of itself counts, though it is more than all.
#[test]
fn one_that_is_more_than_full_gets_no_more_than_one_that_is_full() {
    for policy in [Policy::Headroom, Policy::Adaptive] {
        let balancer = balancer(policy, &[node(0, 20.0), node(1, 60.0)]);
        let at = Instant::now();
        // Both have something to do: what an idle one reports is not from here.
        let _held: Vec<_> = (0..40).map(|_| balancer.pick().unwrap()).collect();
        let reported = |cpu: f64, last_seen: i64| {
            let nodes = [(0, cpu), (1, 60.0)].map(|(index, cpu)| {
                let mut node = Node::clone(&node(index, cpu));
                node.last_seen = last_seen;
                Arc::new(node)
            });
            balancer.update_at(&nodes, at);
            let weights: BTreeMap<_, _> = balancer
                .backends()
                .iter()
                .map(|backend| (backend.addr.port(), backend.weight))
                .collect();
            weights[&1000] / weights[&1001]
        };
        assert!(reported(20.0, 1) > 1.0, "{policy:?}");
        let mut ratio = f64::INFINITY;
        for last_seen in 2..20 {
            ratio = reported(130.0, last_seen);
        }
        assert!(ratio < 0.8, "{policy:?}: {ratio}");
        assert_eq!(balancer.refused_metrics(), 0);
    }
}

#[test]
fn in_flight_is_counted_across_updates_and_ends_with_the_registration() {
    let balancer = balancer(Policy::Headroom, &nodes(1));
    let one = balancer.pick().unwrap();
    balancer.update(&[node(0, 80.0)]);
    let two = balancer.pick().unwrap();
    assert_eq!(two.in_flight(), 2);
    assert_eq!(balancer.backends()[0].in_flight, 2);
    let again = Arc::new(Node::clone(&node(0, 80.0)).with_incarnation(9));
    balancer.update(&[again]);
    assert_eq!(balancer.backends()[0].in_flight, 0);
    assert_eq!(two.in_flight(), 2, "of the registration that is gone");
    drop(one);
    assert_eq!(two.in_flight(), 1);
    two.succeeded(Duration::ZERO);
    assert_eq!(balancer.backends()[0].in_flight, 0, "never below zero");
}

/// A node whose lease is lost, and whose process registers again.
#[test]
fn what_was_learned_of_a_process_outlives_its_lease() {
    let now = Instant::now();
    let of = |index: u16, lease: i64, run: u64| {
        let node = Node::clone(&node(index, 50.0));
        Arc::new(node.with_incarnation(lease).with_run(run))
    };
    for by_changes in [true, false] {
        let balancer = balancer(Policy::Adaptive, &[of(0, 1, 7), of(1, 2, 8)]);
        let success = |balancer: &Balancer| {
            let all = balancer.backends();
            let first = all.iter().find(|backend| backend.node.id == of(0, 0, 1).id);
            first.map(|backend| backend.success)
        };
        let gone = |later: Duration| {
            if by_changes {
                balancer.apply(&Change::Left(of(0, 1, 7)), now + later);
                balancer.publish(now + later);
            } else {
                balancer.update_at(&[of(1, 2, 8)], now + later);
            }
            assert_eq!(balancer.len(), 1);
        };
        let back = |node: Arc<Node>, later: Duration| {
            if by_changes {
                balancer.apply(&Change::Joined(node), now + later);
                balancer.publish(now + later);
            } else {
                balancer.update_at(&[node, of(1, 2, 8)], now + later);
            }
        };
        for _ in 0..200 {
            let upstream = balancer.pick().unwrap();
            match upstream.node().id == of(0, 0, 1).id {
                true => upstream.failed(),
                false => upstream.succeeded(Duration::from_millis(1)),
            }
        }
        let failed = success(&balancer).unwrap();
        assert!(failed < 0.9, "{failed}");
        gone(Duration::from_secs(1));
        back(of(0, 3, 7), Duration::from_secs(5));
        assert_eq!(
            success(&balancer),
            Some(failed),
            "another lease, the same process"
        );
        // Without having been away: the key was taken over in one revision.
        back(of(0, 4, 7), Duration::from_secs(6));
        assert_eq!(success(&balancer), Some(failed));
        // Another process says nothing of the one before, and nothing is kept for ever.
        back(of(0, 4, 9), Duration::from_secs(7));
        assert_eq!(success(&balancer), Some(1.0));
        gone(Duration::from_secs(8));
        back(of(0, 5, 9), Duration::from_secs(8 + 130));
        assert_eq!(success(&balancer), Some(1.0));
    }
}

#[test]
fn the_store_orders_reports_and_not_the_clocks_of_their_writers() {
    let now = Instant::now();
    let report = |index: u16, cpu: f64, clock: i64, revision: i64| {
        let mut node = Node::clone(&node(index, cpu)).with_revision(revision);
        node.last_seen = clock;
        Arc::new(node)
    };
    let balancer = balancer(
        Policy::Headroom,
        &[report(0, 10.0, 1_000_000, 5), report(1, 10.0, 1_000_000, 6)],
    );
    // Its clock is set back by half a minute.
    balancer.apply(&joined(&report(0, 95.0, 970_000, 7)), now);
    balancer.publish(now);
    let weights: Vec<f64> = balancer
        .backends()
        .iter()
        .map(|backend| backend.weight)
        .collect();
    assert!(weights.iter().any(|weight| *weight < 0.6), "{weights:?}");
    // A dead registration whose clock was ahead does not keep the address it shares.
    let dead = Node::new("dead", "10.0.0.9".parse().unwrap());
    let lives = |revision: i64, clock: i64| {
        let mut node = Node::new("lives", "10.0.0.9".parse().unwrap()).with_revision(revision);
        node.last_seen = clock;
        Arc::new(node)
    };
    let mut dead = dead.with_revision(8);
    dead.last_seen = 9_000_000;
    balancer.apply(&joined(&Arc::new(dead)), now);
    balancer.apply(&joined(&lives(9, 1_000)), now);
    balancer.publish(now);
    let shown = balancer.backends();
    assert!(shown.iter().any(|backend| backend.node.id == "lives"));
    assert!(!shown.iter().any(|backend| backend.node.id == "dead"));
}

fn joined(node: &Arc<Node>) -> Change {
    Change::Joined(node.clone())
}

#[test]
fn the_busy_one_is_avoided() {
    let balancer = balancer(Policy::Headroom, &nodes(2));
    let mut held: BTreeMap<SocketAddr, Vec<Upstream>> = BTreeMap::new();
    for _ in 0..100 {
        let upstream = balancer.pick().unwrap();
        held.entry(upstream.addr()).or_default().push(upstream);
    }
    for upstreams in held.values() {
        assert!((48..=52).contains(&upstreams.len()), "{}", upstreams.len());
    }
}

#[test]
fn weights_shape_traffic() {
    let nodes = [node(0, 0.0), node(1, 100.0)];
    // Cost per request equal and instantly over: what is left is the choice by weight.
    let balancer = Balancer::builder()
        .policy(Policy::Headroom)
        .candidates(1)
        .try_build()
        .unwrap();
    balancer.update(&nodes);
    let mut random = rng();
    let mut counts = [0_u32; 2];
    for _ in 0..30_000 {
        let upstream = balancer
            .pick_by(PickOptions::default(), &mut random)
            .unwrap();
        counts[usize::from(upstream.addr().port() - 1000)] += 1;
    }
    let ratio = f64::from(counts[0]) / f64::from(counts[1]);
    assert!((ratio - 2.0).abs() < 0.1, "1 against 0.5: {ratio}");
}

#[test]
fn round_robin_is_strict_when_equal_and_evenly_spread_when_not() {
    let balancer = balancer(Policy::RoundRobin, &nodes(3));
    let ports: Vec<_> = (0..6)
        .map(|_| balancer.pick().unwrap().addr().port())
        .collect();
    assert_eq!(ports, [1000, 1001, 1002, 1000, 1001, 1002]);

    let mut weighted = nodes(3);
    weighted[0] = Arc::new(Node::clone(&weighted[0]).with_weight(5.0));
    let balancer = self::balancer(Policy::RoundRobin, &weighted);
    let picks: Vec<_> = (0..700)
        .map(|_| balancer.pick().unwrap().addr().port())
        .collect();
    for (port, share) in [(1000, 500), (1001, 100), (1002, 100)] {
        let count = picks.iter().filter(|pick| **pick == port).count();
        assert!(count.abs_diff(share) <= 3, "{port}: {count}");
    }
    // 5,1,1 in blocks would give five in a row.
    let longest = picks.chunk_by(|a, b| a == b).map(<[u16]>::len).max();
    assert!(longest <= Some(4), "{longest:?}");
    for port in [1001, 1002] {
        let at: Vec<_> = (0..700).filter(|index| picks[*index] == port).collect();
        let widest = at.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert!(widest <= Some(13), "{widest:?}");
    }
}

#[test]
fn consistent_moves_only_what_it_must() {
    for heavy in [1.0, 10.0] {
        let mut nodes = nodes(10);
        nodes[3] = Arc::new(Node::clone(&nodes[3]).with_weight(heavy));
        let before = balancer(Policy::Consistent, &nodes);
        let gone = nodes.remove(3).addr(80);
        let after = balancer(Policy::Consistent, &nodes);
        let pick = |balancer: &Balancer, key: u32| {
            let options = PickOptions {
                key: &key.to_le_bytes(),
                ..PickOptions::default()
            };
            balancer.pick_with(options).unwrap().addr()
        };
        let mut shares: BTreeMap<SocketAddr, f64> = BTreeMap::new();
        for key in 0..20_000 {
            let old = pick(&before, key);
            *shares.entry(old).or_default() += (9.0 + heavy) / 20_000.0;
            if old != gone {
                assert_eq!(pick(&after, key), old);
            }
        }
        for (addr, share) in shares {
            let fair = if addr == gone { heavy } else { 1.0 };
            let off = share / fair;
            assert!((0.75..1.34).contains(&off), "{addr}: {off} of its share");
        }
    }
}

#[test]
fn consistent_follows_weights_whatever_their_unit() {
    for unit in [1e-6, 1.0, 100.0, 1e5] {
        let weighted = [(0, unit), (1, 10.0 * unit)]
            .map(|(index, weight)| Arc::new(Node::clone(&bare(index)).with_weight(weight)));
        let balancer = balancer(Policy::Consistent, &weighted);
        let light = (0..20_000_u32).filter(|key| {
            let options = PickOptions {
                key: &key.to_le_bytes(),
                ..PickOptions::default()
            };
            balancer.pick_with(options).unwrap().addr().port() == 1000
        });
        let share = light.count() as f64 / 20_000.0;
        assert!((share - 1.0 / 11.0).abs() < 0.01, "{unit}: {share}");
    }
}

#[test]
fn consistent_finds_those_that_own_next_to_nothing() {
    let weighted = [(0, 1e6), (1, 1e-6), (2, 1e-6)]
        .map(|(index, weight)| Arc::new(Node::clone(&bare(index)).with_weight(weight)));
    let balancer = balancer(Policy::Consistent, &weighted);
    let heavy = weighted[0].addr(80);
    let pick = |key: u32| {
        let options = PickOptions {
            key: &key.to_le_bytes(),
            exclude: &[heavy],
            ..PickOptions::default()
        };
        balancer.pick_with(options).unwrap().addr()
    };
    let mut counts: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    for key in 0..1_000 {
        let addr = pick(key);
        assert_eq!(pick(key), addr, "a key stays");
        *counts.entry(addr).or_default() += 1;
    }
    assert_eq!(counts.len(), 2);
    assert!(
        counts.values().all(|count| *count > 400),
        "each by weight: {counts:?}"
    );
}

/// Not the ring, nor any other table of a policy that metrics play no part in.
#[test]
fn nothing_is_published_while_nothing_changes() {
    for policy in [Policy::RoundRobin, Policy::Random, Policy::Consistent] {
        let mut rig = Rig::new(Balancer::builder().policy(policy));
        for index in 0..4 {
            let node = Node::clone(&bare(index)).with_weight(100.0 * f64::from(index + 1));
            rig.nodes.insert(node.id.clone(), Arc::new(node));
        }
        rig.update();
        let mut published = rig.balancer.table.load_full();
        let mut is_new = |rig: &Rig| {
            let before = std::mem::replace(&mut published, rig.balancer.table.load_full());
            !Arc::ptr_eq(&before, &published)
        };
        for round in 1..5 {
            rig.traffic(100, |index| index == 1);
            rig.seconds(1);
            assert!(!is_new(&rig), "{policy:?}: a tick");
            let old = rig.nodes["n0"].clone();
            let mut new = Node::clone(&old).with_metadata(json!({"cpu_usage_percent": 90}));
            new.last_seen = round;
            let new = Arc::new(new);
            rig.nodes.insert("n0".to_owned(), new.clone());
            rig.balancer.apply(&Change::Updated { old, new }, rig.now);
            rig.balancer.publish(rig.now);
            rig.update();
            assert!(!is_new(&rig), "{policy:?}: metrics");
        }
        let steps: [fn(Node) -> Option<Node>; 5] = [
            |node| Some(node.with_weight(401.0)),
            |node| Some(node.with_state(NodeState::Draining)),
            |node| Some(node.with_state(NodeState::Serving)),
            |node| Some(node.with_incarnation(7)),
            |_| None,
        ];
        for (step, next) in steps.into_iter().enumerate() {
            match next(Node::clone(&rig.nodes["n3"])) {
                Some(node) => rig.nodes.insert("n3".to_owned(), Arc::new(node)),
                None => rig.nodes.remove("n3"),
            };
            rig.update();
            assert!(is_new(&rig), "{policy:?}: change {step}");
            rig.seconds(1);
            assert!(!is_new(&rig), "{policy:?}: after change {step}");
        }
    }
}

#[test]
fn bad_settings_are_named() {
    for (builder, field) in [
        (Balancer::builder().default_port(0), "default_port"),
        (Balancer::builder().candidates(0), "candidates"),
        (Balancer::builder().candidates(9), "candidates"),
    ] {
        let error = builder.try_build().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}

proptest! {
    /// Whatever nodes report and whichever drain, a pick is a serving node, there is one
    /// whenever some node serves, and dropping every guard leaves nothing in flight.
    #[test]
    fn always_a_serving_node(
        loads in prop::collection::vec((any::<f64>(), any::<f64>(), any::<bool>()), 0..20),
        policy in 0_usize..5,
    ) {
        let nodes: Vec<_> = loads.iter().enumerate().map(|(index, (cpu, weight, draining))| {
            let state = if *draining { NodeState::Draining } else { NodeState::Serving };
            let node = Node::clone(&node(index as u16, *cpu)).with_weight(*weight).with_state(state);
            Arc::new(node)
        }).collect();
        let balancer = balancer(POLICIES[policy], &nodes);
        let any = loads.iter().any(|(_, weight, draining)| !draining && *weight != 0.0);
        let mut held = Vec::new();
        for _ in 0..30 {
            let picked = balancer.pick();
            prop_assert_eq!(picked.is_some(), any);
            if let Some(picked) = picked {
                prop_assert!(picked.node().is_serving() && picked.node().weight != Some(0.0));
                held.push(picked);
            }
        }
        drop(held);
        prop_assert!(balancer.backends().iter().all(|backend| backend.in_flight == 0));
    }
}

/// A balancer with a clock and chance of its own.
struct Rig {
    balancer: Balancer,
    now: Instant,
    rng: fastrand::Rng,
    nodes: BTreeMap<String, Arc<Node>>,
}

impl Rig {
    fn new(builder: BalancerBuilder) -> Self {
        Self {
            balancer: builder.try_build().unwrap(),
            now: Instant::now(),
            rng: fastrand::Rng::with_seed(7),
            nodes: BTreeMap::new(),
        }
    }

    fn of(count: u16) -> Self {
        let mut rig = Self::new(Balancer::builder());
        for index in 0..count {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        rig
    }

    fn update(&self) {
        self.balancer.update_at(self.nodes.values(), self.now);
    }

    /// A node reports that much CPU in use, in percent, at this rig's time.
    fn report(&mut self, index: u16, cpu: f64, at: i64) {
        let mut node = Node::clone(&bare(index)).with_metadata(json!({"cpu_usage_percent": cpu}));
        node.last_seen = at;
        self.nodes.insert(node.id.clone(), Arc::new(node));
        self.update();
    }

    fn seconds(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now += TICK;
            self.balancer.tick(self.now);
        }
    }

    fn pick(&mut self) -> Upstream {
        let options = PickOptions {
            now: Some(self.now),
            ..PickOptions::default()
        };
        let rng = &mut self.rng;
        self.balancer.pick_by(options, || rng.u64(..)).unwrap()
    }

    /// How many of so many requests, each answered at once, go to each backend.
    fn traffic(&mut self, requests: u32, fails: impl Fn(u16) -> bool) -> BTreeMap<u16, u32> {
        let mut counts = BTreeMap::new();
        for _ in 0..requests {
            let upstream = self.pick();
            let index = upstream.addr().port() - 1000;
            *counts.entry(index).or_default() += 1;
            if fails(index) {
                upstream.failed();
            } else {
                upstream.succeeded(Duration::from_millis(10));
            }
        }
        counts
    }

    /// Enough requests at a time for every backend to get some.
    fn burst(&mut self) {
        let held: Vec<_> = (0..40).map(|_| self.pick()).collect();
        for upstream in held {
            upstream.succeeded(Duration::from_millis(10));
        }
    }

    fn weight(&self, index: u16) -> f64 {
        let backends = self.balancer.backends();
        let own = |backend: &&BackendStatus| backend.addr.port() == 1000 + index;
        backends.iter().find(own).unwrap().weight
    }
}

fn bare(index: u16) -> Arc<Node> {
    let node = Node::new(format!("n{index}"), "10.0.0.1".parse().unwrap()).with_port(1000 + index);
    Arc::new(node)
}

#[test]
fn one_that_fails_loses_its_traffic_is_still_tried_and_comes_back() {
    let mut rig = Rig::of(5);
    rig.traffic(500, |index| index == 2);
    let counts = rig.traffic(20_000, |index| index == 2);
    let share = f64::from(counts[&2]) / 20_000.0;
    assert!(share > 0.0 && share < 0.01, "{counts:?}");
    rig.seconds(1);
    let counts = rig.traffic(20_000, |index| index == 2);
    let share = f64::from(counts[&2]) / 20_000.0;
    assert!(share > 0.0 && share < 0.01, "with a new table: {counts:?}");

    for _ in 0..200 {
        rig.traffic(500, |_| false);
        rig.seconds(1);
    }
    let counts = rig.traffic(5_000, |_| false);
    assert!(counts[&2] > 500, "{counts:?}");
}

#[test]
fn a_balancer_that_ticked_before_there_were_backends_learns_all_the_same() {
    let mut rig = Rig::new(Balancer::builder());
    rig.seconds(3);
    for index in 0..3 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    rig.traffic(500, |index| index == 0);
    let counts = rig.traffic(2_000, |index| index == 0);
    assert!(counts.get(&0).copied().unwrap_or(0) < 100, "{counts:?}");
}

#[test]
fn all_that_fail_alike_are_all_tried() {
    let mut rig = Rig::of(4);
    for _ in 0..5 {
        rig.traffic(1_000, |_| true);
        rig.seconds(1);
    }
    let counts = rig.traffic(4_000, |_| true);
    for index in 0..4 {
        assert!(counts[&index] > 400, "{counts:?}");
    }
}

#[test]
fn a_request_that_is_dropped_says_nothing() {
    let mut rig = Rig::of(1);
    for _ in 0..100 {
        drop(rig.pick());
    }
    assert_eq!(rig.balancer.backends()[0].success, 1.0);
    rig.pick().failed();
    assert!(rig.balancer.backends()[0].success < 1.0);
}

#[test]
fn who_joins_later_or_comes_back_starts_slowly() {
    let mut rig = Rig::of(10);
    assert_eq!(rig.weight(9), 1.0, "there from the start");
    let gone = rig.nodes.remove("n9").unwrap();
    rig.update();
    rig.nodes.insert("n9".to_owned(), gone);
    rig.update();
    assert!((rig.weight(9) - 0.1).abs() < 1e-9, "{}", rig.weight(9));
    rig.seconds(15);
    assert!((rig.weight(9) - 0.5).abs() < 0.05, "{}", rig.weight(9));
    // A new report is no new beginning.
    rig.report(9, 50.0, 1);
    assert!((rig.weight(9) - 0.5).abs() < 0.05, "{}", rig.weight(9));
    rig.seconds(15);
    assert_eq!(rig.weight(9), 1.0);
}

#[test]
fn the_only_one_left_does_not_carry_all_while_the_others_start() {
    let mut rig = Rig::of(1);
    for index in 1..10 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let backends = rig.balancer.backends();
    let total: f64 = backends.iter().map(|backend| backend.weight).sum();
    let carries = rig.weight(0) / total * 10.0;
    assert!((carries - 1.25).abs() < 0.01, "{carries} times its share");
}

#[test]
fn who_is_busier_than_the_others_gets_less() {
    let mut rig = Rig::of(4);
    for round in 1..=12 {
        for index in 0..4 {
            rig.burst();
            let cpu = if index == 0 { 90.0 } else { 50.0 };
            rig.report(index, cpu, round * 5_000 + i64::from(index));
        }
        rig.seconds(1);
    }
    assert!(rig.weight(0) < 0.6, "{}", rig.weight(0));
    assert!(rig.weight(1) > 1.0, "{}", rig.weight(1));
}

#[test]
fn a_report_counts_once_and_an_older_one_not_at_all() {
    let mut rig = Rig::of(2);
    rig.traffic(50, |_| false);
    rig.report(0, 90.0, 10_000);
    rig.report(1, 10.0, 10_001);
    rig.traffic(50, |_| false);
    rig.report(0, 91.0, 20_000);
    let weight = rig.weight(0);
    assert!(weight < 1.0);
    for _ in 0..20 {
        rig.update();
    }
    assert_eq!(rig.weight(0), weight, "the same report again");
    rig.traffic(50, |_| false);
    rig.report(0, 5.0, 19_000);
    assert_eq!(rig.weight(0), weight, "an older one");
    rig.traffic(50, |_| false);
    rig.report(0, 99.0, 25_000);
    assert!(rig.weight(0) < weight);
}

#[test]
fn what_was_learned_fades_without_reports() {
    let mut rig = Rig::of(2);
    for round in 1..10 {
        rig.traffic(50, |_| false);
        rig.report(0, 90.0, round * 5_000);
        rig.report(1, 30.0, round * 5_000);
    }
    let learned = |rig: &Rig| (rig.weight(0) / rig.weight(1)).ln();
    let before = learned(&rig);
    assert!(before < -0.5, "{before}");
    let with_traffic = |rig: &mut Rig, seconds| {
        for _ in 0..seconds {
            rig.burst();
            rig.seconds(1);
        }
    };
    with_traffic(&mut rig, 170);
    assert!((learned(&rig) - before).abs() < 0.1, "{}", learned(&rig));
    with_traffic(&mut rig, 190);
    let half = learned(&rig) / before;
    assert!((0.4..0.6).contains(&half), "{half} is left");
}

#[test]
fn who_gets_nothing_is_tried_again() {
    let mut rig = Rig::of(3);
    // It says that it is full, always with a new time, whatever it gets.
    for round in 1..200 {
        rig.traffic(100, |_| false);
        rig.report(0, 100.0, round * 5_000);
        rig.report(1, 20.0, round * 5_000);
        rig.report(2, 20.0, round * 5_000);
        rig.seconds(5);
    }
    let mut got = 0;
    for _ in 0..100 {
        got += rig.traffic(100, |_| false).get(&0).copied().unwrap_or(0);
        rig.seconds(5);
    }
    assert!(got > 100, "{got} of 10,000");
}

#[test]
fn reports_in_responses_move_weights_at_the_next_tick_and_count_once() {
    let mut rig = Rig::of(3);
    let answer = |rig: &mut Rig, sampled_at: u64| {
        for _ in 0..60 {
            let upstream = rig.pick();
            let index = upstream.addr().port() - 1000;
            let cpu = if index == 0 { 0.95 } else { 0.4 };
            let text = format!("TEXT cpu_utilization={cpu},named_metrics.sampled_at={sampled_at}");
            upstream.report_header(text.as_bytes(), rig.now).unwrap();
            upstream.succeeded(Duration::from_millis(10));
        }
    };
    answer(&mut rig, 1_000);
    assert_eq!(rig.weight(0), 1.0, "not before the tick");
    rig.seconds(1);
    let once = rig.weight(0);
    assert!(once < 1.0);
    answer(&mut rig, 1_000);
    rig.seconds(1);
    assert!((rig.weight(0) - once).abs() < 0.01, "the same sample again");
    for round in 2..8 {
        answer(&mut rig, round * 1_000);
        rig.seconds(1);
    }
    assert!(rig.weight(0) < 0.8, "{}", rig.weight(0));
}

#[test]
fn who_says_that_it_is_busy_is_picked_less_at_once() {
    let mut rig = Rig::of(2);
    let say = |rig: &mut Rig, busy: u16| {
        // Both are asked, whatever the pick would do.
        let held: Vec<_> = (0..20).map(|_| rig.pick()).collect();
        for upstream in held {
            let index = upstream.addr().port() - 1000;
            let in_flight = if index == busy { 50 } else { 1 };
            let text = format!("TEXT named_metrics.in_flight={in_flight}");
            upstream.report_header(text.as_bytes(), rig.now).unwrap();
        }
    };
    for busy in [0, 1] {
        say(&mut rig, busy);
        let counts = rig.traffic(400, |_| false);
        let got = counts.get(&busy).copied().unwrap_or(0);
        assert!(got < 100, "{busy}: {counts:?}");
    }
    // Long after, it means nothing.
    rig.seconds(30);
    let counts = rig.traffic(400, |_| false);
    assert!(counts[&1] > 100, "{counts:?}");
}

#[test]
fn what_is_no_report_is_refused_and_counted() {
    let mut rig = Rig::of(1);
    let upstream = rig.pick();
    let now = rig.now;
    assert!(upstream.report_header(b"nonsense", now).is_err());
    upstream
        .report_header(b"TEXT cpu_utilization=-3,mem_utilization=0.5", now)
        .unwrap();
    upstream.report(&LoadReport::new(), now);
    assert_eq!(rig.balancer.refused_metrics(), 2);
}

#[test]
fn a_hot_key_spills_and_comes_home() {
    let builder = Balancer::builder().policy(Policy::Consistent);
    let balancer = builder.try_build().unwrap();
    balancer.update(&nodes(10));
    let pick = || {
        let options = PickOptions {
            key: b"hot",
            ..PickOptions::default()
        };
        balancer.pick_with(options).unwrap()
    };
    let home = pick().addr();
    let few: Vec<_> = (0..8).map(|_| pick()).collect();
    assert!(few.iter().all(|upstream| upstream.addr() == home), "slack");
    let many: Vec<_> = (0..992).map(|_| pick()).collect();
    let most = balancer.backends().into_iter().map(|b| b.in_flight).max();
    assert!(most <= Some(125 + 1), "1.25 times the fair share: {most:?}");
    drop((few, many));
    assert_eq!(pick().addr(), home);
    assert!(balancer.backends().iter().all(|b| b.in_flight == 0));
}

#[test]
fn a_key_leaves_a_backend_that_fails() {
    let balancer = balancer(Policy::Consistent, &nodes(4));
    let options = PickOptions {
        key: b"k",
        ..PickOptions::default()
    };
    let mut random = rng();
    let mut pick = || balancer.pick_by(options, &mut random).unwrap();
    let home = pick().addr();
    let mut failed = 0;
    for _ in 0..1_000 {
        let upstream = pick();
        if upstream.addr() == home {
            failed += 1;
            upstream.failed();
        } else {
            upstream.succeeded(Duration::from_millis(1));
        }
    }
    assert!(failed > 0 && failed < 100, "{failed}");
}

#[test]
fn overflow_of_consistent_hashing_goes_to_those_that_work() {
    let balancer = balancer(Policy::Consistent, &nodes(2));
    let options = PickOptions {
        key: b"k",
        ..PickOptions::default()
    };
    let mut random = rng();
    let failing = balancer.pick_by(options, &mut random).unwrap().addr();
    let mut held = Vec::new();
    let mut failed = 0;
    for _ in 0..600 {
        let upstream = balancer.pick_by(options, &mut random).unwrap();
        if upstream.addr() == failing {
            failed += 1;
            upstream.failed();
        } else {
            held.push(upstream);
        }
    }
    assert!(failed < 100, "{failed} of 600");
}

#[test]
fn what_responses_leave_out_is_still_read_from_the_registration() {
    let mut rig = Rig::of(2);
    for round in 1..12 {
        rig.burst();
        for _ in 0..20 {
            let upstream = rig.pick();
            let text = format!("TEXT cpu_utilization=0.5,named_metrics.sampled_at={round}");
            upstream.report_header(text.as_bytes(), rig.now).unwrap();
        }
        for (index, queue) in [(0, 900), (1, 0)] {
            let mut node = Node::clone(&bare(index)).with_metadata(json!({"queue_depth": queue}));
            node.last_seen = round * 1_000;
            rig.nodes.insert(node.id.clone(), Arc::new(node));
        }
        rig.update();
        rig.seconds(1);
    }
    assert!(rig.weight(0) < 0.8 * rig.weight(1), "{}", rig.weight(0));
}

#[test]
fn a_report_that_was_put_together_wrongly_harms_nobody() {
    let mut rig = Rig::of(3);
    for value in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
        let upstream = rig.pick();
        let mut report = LoadReport::new();
        (report.cpu, report.queue, report.in_flight) = (Some(value), Some(value), Some(value));
        upstream.report(&report, rig.now);
        drop(upstream);
        rig.seconds(1);
        let counts = rig.traffic(300, |_| false);
        assert_eq!(counts.len(), 3, "{value}: {counts:?}");
    }
    // A CPU of 1e300 is a full one.
    assert_eq!(rig.balancer.refused_metrics(), 11);
    assert!(rig.balancer.backends().iter().all(|b| b.weight.is_finite()));
}

fn zoned(index: u16, zone: &str) -> (String, Arc<Node>) {
    let node = Node::clone(&bare(index)).with_zone(zone);
    (node.id.clone(), Arc::new(node))
}

#[test]
fn the_own_zone_first_and_all_zones_without_it() {
    for builder in [
        Balancer::builder().zone("a"),
        Balancer::builder().zone_of("n0"),
    ] {
        let mut rig = Rig::new(builder);
        rig.nodes
            .extend([zoned(0, "a"), zoned(1, "a"), zoned(2, "b"), zoned(3, "b")]);
        rig.update();
        let counts = rig.traffic(4_000, |_| false);
        let near = counts[&0] + counts[&1];
        assert!(near > 3_990, "{counts:?}");

        // Those in the zone fail: the others take over within a tick.
        rig.traffic(500, |index| index < 2);
        rig.seconds(1);
        let counts = rig.traffic(4_000, |index| index < 2);
        assert!(counts[&2] + counts[&3] > 3_800, "{counts:?}");

        // They are gone.
        rig.nodes
            .retain(|_, node| node.zone.as_deref() == Some("b"));
        rig.update();
        let counts = rig.traffic(400, |_| false);
        assert!(counts[&2] > 100 && counts[&3] > 100, "{counts:?}");
    }
}

#[test]
fn pressure_in_the_zone_spills() {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    rig.nodes
        .extend([zoned(0, "a"), zoned(1, "a"), zoned(2, "b"), zoned(3, "b")]);
    rig.update();
    // A queue in the own zone spills within the same second.
    let held: Vec<_> = (0..400).map(|_| rig.pick()).collect();
    let far = held
        .iter()
        .filter(|upstream| upstream.addr().port() >= 1002)
        .count();
    assert!((1..200).contains(&far), "{far} of 400");
    drop(held);
    for round in 1..12_u64 {
        for (index, zone, cpu) in [
            (0, "a", 98.0),
            (1, "a", 98.0),
            (2, "b", 30.0),
            (3, "b", 30.0),
        ] {
            let (id, node) = zoned(index, zone);
            let mut node = Node::clone(&node).with_metadata(json!({"cpu_usage_percent": cpu}));
            node.last_seen = (round * 1_000).cast_signed();
            rig.nodes.insert(id, Arc::new(node));
        }
        rig.update();
        rig.seconds(1);
    }
    let counts = rig.traffic(4_000, |_| false);
    let far: u32 = [2, 3].iter().filter_map(|index| counts.get(index)).sum();
    assert!(far > 400, "{counts:?}");
}

#[test]
fn ten_thousand_backends() {
    let nodes = nodes(10_000);
    for policy in POLICIES {
        let balancer = balancer(policy, &nodes);
        balancer.tick(Instant::now());
        assert_eq!(balancer.len(), 10_000);
        let held: Vec<_> = (0..1_000).map(|_| balancer.pick().unwrap()).collect();
        drop(held);
        assert!(
            balancer
                .backends()
                .iter()
                .all(|backend| backend.in_flight == 0)
        );
    }
}

#[test]
fn every_constant_out_of_its_range_is_named() {
    // Each field once, far out of any range.
    let fields = serde_json::json!({
        "metrics_gain": -1, "step_up": 99, "step_down": 99, "metrics_range": 0, "queue_gain": -1,
        "queue_capacity": 0, "queue_most": -1, "idle_load": 0, "memory_limit": 2, "memory_gain": -1,
        "success_limit": 2, "trust_memory": 0, "trust_floor": 2, "stale_after_ms": 0,
        "stale_half_life_ms": 0, "latency_gain": 2, "latency_keep": 2, "latency_range": 0,
        "latency_samples": 0, "latency_window_ms": 0, "idle_keep": 2, "success_gain": 0,
        "gate_below": 2, "gate_floor": 0, "own_request": 0, "alike": 2, "calm_load": 2, "weight_min": 0,
        "weight_max": 0, "slow_start_ms": 9_999_999_999_u64, "slow_start_floor": 0,
        "slow_start_strain": 0, "in_flight_fade_ms": 0, "in_flight_bound": 0,
    });
    let debug = format!("{:?}", Adaptive::default());
    for (field, value) in fields.as_object().unwrap() {
        let adaptive: Adaptive = serde_json::from_value(json!({ field: value })).unwrap();
        let error = Balancer::builder()
            .adaptive(adaptive)
            .try_build()
            .unwrap_err();
        assert!(
            error.to_string().contains(&format!("adaptive.{field}")),
            "{error}"
        );
        assert!(debug.contains(&format!("{field}: ")));
    }
    assert_eq!(
        debug.matches(": ").count(),
        fields.as_object().unwrap().len(),
        "each of them"
    );
}

/// Anything that JSON can say, and often something that could be a metric.
fn json_value() -> impl Strategy<Value = serde_json::Value> {
    let number = prop_oneof![
        any::<f64>().prop_map(|number| json!(number)),
        (-10..200_i32).prop_map(|number| json!(number)),
        any::<u64>().prop_map(|number| json!(number)),
    ];
    let leaf = prop_oneof![
        4 => number,
        1 => Just(serde_json::Value::Null),
        1 => any::<bool>().prop_map(|it| json!(it)),
        1 => ".{0,6}".prop_map(|it| json!(it)),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        let keys = prop_oneof![
            3 => prop::sample::select(vec!["cpu_usage_percent", "memory_usage_percent", "queue_depth"])
                .prop_map(str::to_owned),
            1 => ".{0,4}",
        ];
        prop_oneof![
            1 => prop::collection::vec(inner.clone(), 0..3).prop_map(|it| json!(it)),
            5 => prop::collection::btree_map(keys, inner, 0..4).prop_map(|it| json!(it)),
        ]
    })
}

#[derive(Debug, Clone)]
enum Step {
    Join {
        index: u16,
        weight: f64,
        draining: bool,
    },
    Leave {
        index: u16,
    },
    Report {
        index: u16,
        metadata: serde_json::Value,
        last_seen: i64,
    },
    Respond {
        text: String,
    },
    Pick,
    Outcome {
        ok: bool,
        micros: u64,
    },
    Cancel,
    Tick {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let index = 0..8_u16;
    let number = prop_oneof![
        any::<f64>().prop_map(|n| n.to_string()),
        "[0-9.]{1,5}",
        ".{0,5}"
    ];
    prop_oneof![
        2 => (index.clone(), prop_oneof![Just(1.0), 0.001..1000.0_f64, any::<f64>()], prop::bool::weighted(0.2))
            .prop_map(|(index, weight, draining)| Step::Join { index, weight, draining }),
        1 => index.clone().prop_map(|index| Step::Leave { index }),
        3 => (index, json_value(), 0..100_000_i64)
            .prop_map(|(index, metadata, last_seen)| Step::Report { index, metadata, last_seen }),
        2 => (number.clone(), number).prop_map(|(cpu, in_flight)| Step::Respond {
            text: format!("TEXT cpu_utilization={cpu},named_metrics.in_flight={in_flight}"),
        }),
        8 => Just(Step::Pick),
        4 => (any::<bool>(), any::<u64>()).prop_map(|(ok, micros)| Step::Outcome { ok, micros }),
        1 => Just(Step::Cancel),
        2 => (0..400_000_u64).prop_map(|millis| Step::Tick { millis }),
    ]
}

proptest! {
    /// Whatever happens in whatever order: weights stay finite and within their range, a backend
    /// that serves and does not fail can be had, and nothing stays in flight.
    #[test]
    fn whatever_happens(
        steps in prop::collection::vec(step(), 0..120),
        policy in 0_usize..POLICIES.len(),
        zone in prop::option::of(0..2_u16),
    ) {
        let policy = POLICIES[policy];
        let mut builder = Balancer::builder().policy(policy);
        if let Some(zone) = zone {
            builder = builder.zone(format!("z{zone}"));
        }
        let mut rig = Rig::new(builder);
        let mut held: Vec<Upstream> = Vec::new();
        for (incarnation, step) in steps.into_iter().enumerate() {
            match step {
                Step::Join { index, weight, draining } => {
                    let state = if draining { NodeState::Draining } else { NodeState::Serving };
                    let node = Node::clone(&bare(index))
                        .with_zone(format!("z{}", index % 2))
                        .with_weight(weight)
                        .with_state(state)
                        .with_incarnation(incarnation as i64);
                    rig.nodes.insert(node.id.clone(), Arc::new(node));
                    rig.update();
                }
                Step::Leave { index } => {
                    rig.nodes.remove(&format!("n{index}"));
                    rig.update();
                }
                Step::Report { index, metadata, last_seen } => {
                    if let Some(node) = rig.nodes.get_mut(&format!("n{index}")) {
                        let mut fresh = Node::clone(node).with_metadata(metadata);
                        fresh.last_seen = last_seen;
                        *node = Arc::new(fresh);
                        rig.update();
                    }
                }
                Step::Respond { text } => {
                    if let Some(upstream) = held.last() {
                        let _ = upstream.report_header(text.as_bytes(), rig.now);
                    }
                }
                Step::Pick => {
                    let serves = rig.nodes.values()
                        .any(|node| node.is_serving() && node.weight != Some(0.0));
                    let options = PickOptions { now: Some(rig.now), ..PickOptions::default() };
                    let rng = &mut rig.rng;
                    let picked = rig.balancer.pick_by(options, || rng.u64(..));
                    prop_assert_eq!(picked.is_some(), serves);
                    held.extend(picked);
                }
                Step::Outcome { ok, micros } => match held.pop() {
                    Some(upstream) if ok => upstream.succeeded(Duration::from_micros(micros)),
                    Some(upstream) => upstream.failed(),
                    None => {}
                },
                Step::Cancel => drop(held.pop()),
                Step::Tick { millis } => {
                    rig.now += Duration::from_millis(millis);
                    rig.balancer.tick(rig.now);
                }
            }
            let backends = rig.balancer.backends();
            for backend in &backends {
                let base = super::weight::base_weight(&backend.node);
                let part = backend.weight / base;
                let least = match (policy, zone) {
                    (Policy::Adaptive, None) => 0.1 * 0.1,
                    (Policy::Adaptive, _) => 0.1 * 0.1 * 0.02,
                    (Policy::Headroom, _) => 0.05 * 0.02,
                    _ => 0.02,
                };
                prop_assert!(part.is_finite() && part >= least * 0.999 && part <= 10.001, "{backend:?}");
                prop_assert!(backend.share > 0.0 && backend.share <= backend.weight);
                prop_assert!((0.0..=1.0).contains(&backend.success));
            }
            // Every one can be had, if the others are ruled out.
            if incarnation % 16 == 0 {
                for backend in &backends {
                    let others: Vec<_> = backends
                        .iter()
                        .map(|other| other.addr)
                        .filter(|addr| *addr != backend.addr)
                        .collect();
                    let options = PickOptions { exclude: &others, now: Some(rig.now), key: b"k" };
                    let rng = &mut rig.rng;
                    let picked = rig.balancer.pick_by(options, || rng.u64(..));
                    prop_assert_eq!(picked.map(|upstream| upstream.addr()), Some(backend.addr));
                }
            }
        }
        drop(held);
        prop_assert!(rig.balancer.backends().iter().all(|backend| backend.in_flight == 0));
    }

    /// In a table that does not change, shares of picks are within five standard deviations of the
    /// weights.
    #[test]
    fn picks_follow_weights(weights in prop::collection::vec(0.01..100.0_f64, 1..12), seed in any::<u64>()) {
        let builder = Balancer::builder().candidates(1);
        let mut rig = Rig::new(builder);
        rig.rng = fastrand::Rng::with_seed(seed);
        for (index, weight) in (0..).zip(&weights) {
            let node = Node::clone(&bare(index)).with_weight(*weight);
            rig.nodes.insert(node.id.clone(), Arc::new(node));
        }
        rig.update();
        let picks = 20_000;
        let counts = rig.traffic(picks, |_| false);
        let total: f64 = weights.iter().sum();
        for (index, weight) in (0..).zip(&weights) {
            let share = weight / total;
            let expected = share * f64::from(picks);
            let deviation = (expected * (1.0 - share)).sqrt().max(1.0);
            let count = f64::from(counts.get(&index).copied().unwrap_or(0));
            prop_assert!((count - expected).abs() < 5.0 * deviation + 1.0, "{index}: {count} of {expected}");
        }
    }

    /// Nobody whose weight is like the others' goes without, however little there is to do.
    #[test]
    fn all_get_something(count in 2..20_u16, seed in any::<u64>()) {
        let mut rig = Rig::of(count);
        rig.rng = fastrand::Rng::with_seed(seed);
        let counts = rig.traffic(u32::from(count) * 100, |_| false);
        prop_assert_eq!(counts.len(), usize::from(count));
    }
}
