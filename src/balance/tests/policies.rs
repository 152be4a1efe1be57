//! What holds for every policy, and the simple ones.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use serde_json::json;

use super::{POLICIES, Rig, balancer, bare, node, nodes, rng, seeded, set_nodes};
use crate::balance::{Balancer, PickOptions, Policy, Upstream};
use crate::load_report::LoadReport;
use crate::node::{Node, NodeState};
use crate::view::Change;

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
fn draining_nodes_are_not_picked_and_nodes_with_unknown_load_are() {
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

/// As in other load balancers, and like a node that drains.
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
                let upstream = balancer.pick_with(seeded(options, &mut random)).unwrap();
                counts[usize::from(upstream.addr().port() - 1000)] += 1;
            }
            counts
        };
        assert!(hits(400).iter().all(|count| *count > 50), "{policy:?}");
        let held = balancer.pick().unwrap();
        // Although it has requests in flight and reports them.
        set_nodes(&balancer, &[weighted(0, 0.0), weighted(1, 1.0)]);
        let report = LoadReport {
            in_flight: Some(3.0),
            ..LoadReport::default()
        };
        held.report(&report, Instant::now());
        balancer.tick(Instant::now());
        assert_eq!(hits(400)[0], 0, "{policy:?}");
        assert_eq!((balancer.len(), balancer.backends().len()), (1, 1));
        // Not even when all others have been tried.
        let tried = PickOptions {
            exclude: &["10.0.0.1:1001".parse().unwrap()],
            ..PickOptions::default()
        };
        assert!(balancer.pick_with(tried).is_none(), "{policy:?}");
        set_nodes(&balancer, &[weighted(0, 0.0), weighted(1, 0.0)]);
        assert!(
            balancer.pick().is_none() && balancer.is_empty(),
            "{policy:?}"
        );
        // And back: change by change, as discovery delivers them.
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
fn invalid_weights_count_as_one_and_too_great_ones_as_the_greatest() {
    for (weight, share) in [(-5.0, 0.5), (f64::NAN, 0.5), (1e9, 1.0), (1e-9, 0.0)] {
        let odd = Arc::new(Node::clone(&node(0, 50.0)).with_weight(weight));
        let balancer = balancer(Policy::Random, &[odd, node(1, 50.0)]);
        let mut random = rng();
        let hits = (0..2_000).filter(|_| {
            let picked = balancer.pick_with(seeded(PickOptions::default(), &mut random));
            picked.unwrap().addr().port() == 1000
        });
        let hits = hits.count() as f64 / 2_000.0;
        assert!((hits - share).abs() < 0.05, "{weight}: {hits}");
        assert_eq!(balancer.len(), 2);
    }
}

#[test]
fn weights_shape_traffic() {
    let nodes = [node(0, 0.0), node(1, 100.0)];
    // With one candidate weights alone decide.
    let balancer = Balancer::builder()
        .policy(Policy::Headroom)
        .candidates(1)
        .try_build()
        .unwrap();
    set_nodes(&balancer, &nodes);
    let mut random = rng();
    let mut counts = [0_u32; 2];
    for _ in 0..30_000 {
        let upstream = balancer
            .pick_with(seeded(PickOptions::default(), &mut random))
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
    // It begins anywhere, so that not all processes begin with the same backend.
    let begin = ports[0] - 1000;
    let expected: Vec<_> = (begin..begin + 6).map(|turn| 1000 + turn % 3).collect();
    assert_eq!(ports, expected);

    let mut weighted = nodes(3);
    weighted[0] = Arc::new(Node::clone(&weighted[0]).with_weight(5.0));
    let balancer = super::balancer(Policy::RoundRobin, &weighted);
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
fn busy_backends_are_avoided() {
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

/// Under policies that metrics play no part in.
#[test]
fn nothing_is_published_while_nothing_changes() {
    for policy in [Policy::RoundRobin, Policy::Random, Policy::Consistent] {
        let mut rig = Rig::new(Balancer::builder().policy(policy));
        for index in 0..4 {
            let node = Node::clone(&bare(index)).with_weight(100.0 * f64::from(index + 1));
            rig.nodes.insert(node.id.clone(), Arc::new(node));
        }
        rig.update();
        let mut published = rig.balancer.table();
        let mut is_new = |rig: &Rig| {
            let before = std::mem::replace(&mut published, rig.balancer.table());
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

proptest! {
    /// Whatever nodes report and whichever drain: a pick is a serving node, there is one whenever
    /// some node serves, and after dropping every guard nothing is in flight.
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
