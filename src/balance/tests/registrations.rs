//! What belongs to a registration, and what to a process.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Rig, balancer, bare, joined, node, nodes, set_nodes, set_nodes_at};
use crate::balance::{Adaptive, Balancer, Policy};
use crate::node::{Node, NodeState};
use crate::view::{Change, NodeOverride};

#[test]
fn in_flight_is_counted_across_updates_and_ends_with_the_registration() {
    let balancer = balancer(Policy::Headroom, &nodes(1));
    let one = balancer.pick().unwrap();
    set_nodes(&balancer, &[node(0, 80.0)]);
    let two = balancer.pick().unwrap();
    assert_eq!(two.in_flight(), 2);
    assert_eq!(balancer.backends()[0].in_flight, 2);
    let again = Arc::new(Node::clone(&node(0, 80.0)).with_incarnation(9));
    set_nodes(&balancer, &[again]);
    assert_eq!(balancer.backends()[0].in_flight, 0);
    assert_eq!(two.in_flight(), 2, "the count of the former registration");
    drop(one);
    assert_eq!(two.in_flight(), 1);
    two.succeeded(Duration::ZERO);
    assert_eq!(balancer.backends()[0].in_flight, 0, "never below zero");
}

/// A node has lost its lease, and its process registers again.
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
                set_nodes_at(&balancer, &[of(1, 2, 8)], now + later);
            }
            assert_eq!(balancer.len(), 1);
        };
        let back = |node: Arc<Node>, later: Duration| {
            if by_changes {
                balancer.apply(&Change::Joined(node), now + later);
                balancer.publish(now + later);
            } else {
                set_nodes_at(&balancer, &[node, of(1, 2, 8)], now + later);
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
        // Without a gap: the key was replaced in one revision.
        back(of(0, 4, 7), Duration::from_secs(6));
        assert_eq!(success(&balancer), Some(failed));
        // Nothing is known about another process, and nothing is kept without limit.
        back(of(0, 4, 9), Duration::from_secs(7));
        assert_eq!(success(&balancer), Some(1.0));
        gone(Duration::from_secs(8));
        back(of(0, 5, 9), Duration::from_secs(8 + 130));
        assert_eq!(success(&balancer), Some(1.0));
    }
}

/// A worker is restarted: it is as strong as before, whatever else has changed.
#[test]
fn a_process_that_succeeds_another_one_begins_with_its_weight() {
    let adaptive = Adaptive {
        slow_start_ms: 0,
        ..Adaptive::default()
    };
    for pause in [0, 5, 700] {
        let mut rig = Rig::new(Balancer::builder().adaptive(adaptive));
        let of = |index: u16, run: u64| {
            let node = Node::clone(&bare(index));
            Arc::new(node.with_incarnation(run as i64).with_run(run))
        };
        for index in 0..4 {
            rig.nodes.insert(format!("n{index}"), of(index, 1));
        }
        rig.update();
        for _ in 0..4 {
            // The first one has less to do than the others.
            for _ in 0..40 {
                let upstream = rig.pick();
                let is_fast = upstream.addr().port() == 1000;
                let latency = 5 + rig.rng.u64(..if is_fast { 4 } else { 16 });
                upstream.succeeded(Duration::from_millis(latency));
            }
            rig.seconds(1);
        }
        let learned = rig.weight(0);
        let other = rig.weight(1);
        let failing = rig.balancer.upstream_at(bare(0).addr(80)).unwrap();
        failing.failed();
        if pause > 0 {
            rig.nodes.remove("n0");
            rig.update();
            rig.now += Duration::from_secs(pause);
        }
        rig.nodes.insert("n0".to_owned(), of(0, 2));
        rig.update();
        let (again, same) = (rig.weight(0), rig.weight(1));
        let difference = (again / same - learned / other).abs();
        assert_eq!(
            difference < 0.05,
            pause < 600,
            "after {pause} s: {again} and {same}, before {learned} and {other}"
        );
        let status = rig.balancer.backends();
        assert!(
            status
                .iter()
                .all(|backend| backend.node.id != "n0" || backend.success == 1.0)
        );
        // Whoever registers another static weight is another one.
        let heavier = Node::clone(&of(0, 3)).with_weight(2.0);
        rig.nodes.insert("n0".to_owned(), Arc::new(heavier));
        rig.update();
        let others = (1..4).map(|index| rig.weight(index)).sum::<f64>() / 3.0;
        let ratio = rig.weight(0) / others;
        assert!(
            ratio < 3.5,
            "{ratio}: twice what is a little above their mean"
        );
    }
}

#[test]
fn reports_are_ordered_by_the_store_not_by_clocks() {
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
    // Its clock was set back by half a minute.
    balancer.apply(&joined(&report(0, 95.0, 970_000, 7)), now);
    balancer.publish(now);
    let weights: Vec<f64> = balancer
        .backends()
        .iter()
        .map(|backend| backend.weight)
        .collect();
    assert!(weights.iter().any(|weight| *weight < 0.6), "{weights:?}");
    // A dead registration whose clock was ahead does not keep the address that it shares.
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

/// A node that was down, or joined and was not well yet, may be cold.
#[test]
fn who_is_found_to_be_well_starts_slowly() {
    let mut rig = Rig::of(5);
    rig.balancer.set_checks(Some(0.5));
    rig.seconds(60);
    rig.nodes.insert("n5".to_owned(), bare(5));
    rig.update();
    // It warms up for longer than a slow start takes, and is not used until then.
    rig.seconds(60);
    let share = |rig: &Rig, index: u16| {
        let backends = rig.balancer.backends();
        let found = backends.iter().find(|it| it.addr == bare(index).addr(0));
        found.map(|it| it.share)
    };
    assert_eq!(share(&rig, 5), None);
    for (index, is_well) in [(5, true), (0, false)] {
        rig.balancer.set_checked(&bare(index), is_well);
        rig.balancer.publish(rig.now);
    }
    assert!(share(&rig, 5).unwrap() < 0.6, "{:?}", share(&rig, 5));
    rig.seconds(60);
    assert_eq!((share(&rig, 0), share(&rig, 5)), (None, Some(1.0)));
    rig.balancer.set_checked(&bare(0), true);
    rig.balancer.publish(rig.now);
    assert!(share(&rig, 0).unwrap() < 0.6, "{:?}", share(&rig, 0));
    // While all are used because too few are well, none is new to traffic.
    rig.seconds(60);
    for index in 0..6 {
        rig.balancer.set_checked(&bare(index), false);
    }
    rig.balancer.publish(rig.now);
    rig.balancer.set_checked(&bare(1), true);
    rig.balancer.publish(rig.now);
    assert_eq!(share(&rig, 1), Some(1.0));
    // One that registers as draining, and serves when it is ready.
    let mut draining = Node::clone(&bare(6));
    draining.state = NodeState::Draining;
    rig.nodes.insert("n6".to_owned(), Arc::new(draining));
    rig.update();
    rig.balancer.set_checks(None);
    rig.seconds(60);
    rig.nodes.insert("n6".to_owned(), bare(6));
    rig.update();
    assert!(share(&rig, 6).unwrap() < 0.6, "{:?}", share(&rig, 6));
}

/// Only those that are used carry what a cold one does not: many that have joined and wait for their first check are no
/// reason to give much to the first of them.
#[test]
fn the_first_of_many_that_join_starts_as_slowly_as_one_alone() {
    let mut rig = Rig::of(10);
    rig.balancer.set_checks(Some(0.5));
    rig.seconds(60);
    for index in 10..20 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    rig.balancer.set_checked(&bare(10), true);
    rig.balancer.publish(rig.now);
    let backends = rig.balancer.backends();
    let first = backends.iter().find(|it| it.addr == bare(10).addr(0));
    assert!(first.unwrap().share < 0.15, "{:?}", first.unwrap().share);
}

/// The first nodes of a process are used until they have been checked, and so are those that replace all nodes: whoever
/// passes the first check would otherwise get all traffic.
#[test]
fn nodes_that_replace_all_are_used_until_they_are_checked() {
    let mut rig = Rig::of(4);
    rig.balancer.set_checks(Some(0.5));
    rig.seconds(60);
    rig.nodes.clear();
    for index in 10..14 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    rig.balancer.set_checked(&bare(10), true);
    rig.balancer.publish(rig.now);
    assert_eq!(rig.balancer.len(), 4);
    rig.balancer.set_checked(&bare(11), false);
    rig.balancer.publish(rig.now);
    assert_eq!(rig.balancer.len(), 3);
}

/// What an operator gives traffic for the first time may be cold.
#[test]
fn who_is_undrained_and_was_never_used_starts_slowly() {
    let mut rig = Rig::of(10);
    rig.seconds(60);
    rig.nodes.insert("n10".to_owned(), bare(10));
    let said = NodeOverride {
        state: NodeState::Draining,
        ..NodeOverride::of(&bare(10))
    };
    rig.balancer
        .set_overrides(&HashMap::from([("n10".to_owned(), said)]));
    rig.update();
    rig.seconds(60);
    let share = |rig: &Rig| {
        let backends = rig.balancer.backends();
        let found = backends.iter().find(|it| it.addr == bare(10).addr(0));
        found.map(|it| it.share)
    };
    assert_eq!(share(&rig), None);
    rig.balancer.set_overrides(&HashMap::new());
    rig.balancer.publish(rig.now);
    assert!(share(&rig).unwrap() < 0.6, "{:?}", share(&rig));
}
