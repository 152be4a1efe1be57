//! Fleets of which little changes at a time: what is not computed again, and that nothing is missed for it.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::{Rig, bare};
use crate::balance::{Adaptive, Balancer, Policy};
use crate::node::{Node, NodeState};
use crate::view::{Change, NodeOverride};

const MANY: u16 = 400;

/// What a node says of itself.
fn reporting(index: u16, cpu: f64, at: i64) -> Arc<Node> {
    let mut node = Node::clone(&bare(index)).with_metadata(json!({ "cpu_usage_percent": cpu }));
    node.last_seen = at;
    Arc::new(node)
}

impl Rig {
    fn apply(&self, node: Arc<Node>) {
        let change = Change::Updated {
            old: node.clone(),
            new: node,
        };
        self.balancer.apply(&change, self.now);
    }

    fn publish(&self) {
        self.balancer.publish(self.now);
    }

    /// Whether picks read the same table before and after this.
    fn keeps_table(&mut self, act: impl FnOnce(&mut Self)) -> bool {
        let before = self.balancer.table();
        act(self);
        Arc::ptr_eq(&before, &self.balancer.table())
    }

    fn weights(&self) -> Vec<(String, f64)> {
        let backends = self.balancer.backends();
        let weights = backends.iter().map(|it| (it.node.id.clone(), it.weight));
        let mut weights: Vec<_> = weights.collect();
        weights.sort_by(|one, other| one.0.cmp(&other.0));
        weights
    }
}

fn many(policy: Policy) -> Rig {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..MANY {
        let node = reporting(index, 50.0, 1);
        rig.nodes.insert(node.id.clone(), node);
    }
    rig.update();
    rig.seconds(1);
    rig
}

#[test]
fn what_one_of_many_reports_counts_at_once_and_costs_no_table() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let mut rig = many(policy);
        rig.traffic(u32::from(MANY) * 20, |_| false);
        let before = (rig.weight(7), rig.weight(8));
        assert!(rig.keeps_table(|rig| {
            rig.apply(reporting(7, 95.0, 1_000));
            rig.publish();
        }));
        assert!(rig.weight(7) < 0.999 * before.0, "{policy:?}");
        assert_eq!(rig.weight(8), before.1);
        // What picks compare by.
        let published = rig.balancer.table();
        let slots = &published.table.slots;
        let by = |id: &str| {
            slots
                .iter()
                .find(|slot| slot.endpoint.node().id == id)
                .unwrap()
        };
        for (id, weight) in [("n7", rig.weight(7)), ("n8", rig.weight(8))] {
            let wanted = published.table.mean_weight / weight;
            let inverse = f64::from(by(id).inverse_weight.get());
            assert!(
                (inverse / wanted - 1.0).abs() < 1e-5,
                "{id}: {inverse} {wanted}"
            );
        }
        assert_eq!(by("n7").calm.get(), by("n7").endpoint.calm());
    }
}

#[test]
fn after_many_reports_all_are_weighed_together() {
    let mut rig = many(Policy::Headroom);
    let mut reports = 0;
    while rig.keeps_table(|rig| {
        rig.apply(reporting(reports, 95.0, 1_000));
        rig.publish();
    }) {
        reports += 1;
    }
    // Each moves 9 % of 1/400 of the weight of all, at least.
    assert!((1..100).contains(&reports), "{reports}");
}

#[test]
fn whatever_else_changes_of_one_of_many_counts_at_once() {
    let changes: [fn(Node) -> Node; 4] = [
        |node| node.with_weight(0.0),
        |node| node.with_weight(3.0),
        |node| node.with_zone("b"),
        |node| node.with_metadata(json!({"health": "failing"})),
    ];
    for change in changes {
        let mut rig = many(Policy::Adaptive);
        assert!(!rig.keeps_table(|rig| {
            rig.apply(Arc::new(change(Node::clone(&reporting(7, 50.0, 2)))));
            rig.publish();
        }));
    }
    let rig = many(Policy::Adaptive);
    rig.balancer.apply(&Change::Left(bare(7)), rig.now);
    rig.publish();
    assert_eq!(rig.balancer.len(), usize::from(MANY) - 1);
    rig.balancer.apply(&Change::Joined(bare(MANY)), rig.now);
    rig.publish();
    assert_eq!(rig.balancer.len(), usize::from(MANY));
}

/// Lets the rig tick until that changes nothing any more.
fn rested(policy: Policy, count: u16) -> Rig {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..count {
        let node = reporting(index, 50.0, 1);
        rig.nodes.insert(node.id.clone(), node);
    }
    rig.update();
    rig.traffic(u32::from(count) * 20, |_| false);
    for _ in 0..600 {
        if rig.keeps_table(|rig| rig.seconds(1)) {
            return rig;
        }
    }
    panic!("it never rests");
}

#[test]
fn where_nothing_happens_ticks_do_nothing_and_miss_nothing() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for count in [10, MANY] {
            let mut rig = rested(policy, count);
            // A report.
            let before = rig.weight(7);
            rig.apply(reporting(7, 5.0, 1_000_000));
            rig.publish();
            rig.seconds(1);
            assert!(rig.weight(7) > 1.01 * before, "{policy:?}");

            // Failures: many at once, and one.
            let mut rig = rested(policy, count);
            rig.traffic(u32::from(count) * 20, |index| index == 3);
            rig.seconds(1);
            let backends = rig.balancer.backends();
            let failing = backends.iter().find(|it| it.node.id == "n3").unwrap();
            assert!(failing.is_ejected && failing.share == 0.0, "{policy:?}");

            let mut rig = rested(policy, count);
            rig.pick().failed();
            assert!(!rig.keeps_table(|rig| rig.seconds(1)), "{policy:?}");
        }
    }
}

#[test]
fn what_becomes_stale_while_nothing_happens_fades() {
    // By metrics alone, so that nothing is forgotten for the lack of requests.
    let mut rig = Rig::new(Balancer::builder());
    rig.balancer = Balancer::builder().build_valid(false);
    for index in 0..10 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    for round in 1..60_u64 {
        for index in 0..10 {
            let cpu = if index == 3 { 90.0 } else { 50.0 };
            rig.apply(reporting(index, cpu, round as i64 * 1_000));
        }
        rig.publish();
        rig.seconds(1);
    }
    let loaded = rig.weight(3) / rig.weight(4);
    assert!(loaded < 0.5, "{loaded}");
    // It holds as long as the reports are valid, without a look at it.
    let settings = Adaptive::default();
    let stale = settings.stale_after_ms / 1_000;
    let mut rests = 0;
    for _ in 0..stale - 5 {
        rests += u64::from(rig.keeps_table(|rig| rig.seconds(1)));
    }
    assert!(rests > (stale - 5) / 2, "{rests}");
    assert!((rig.weight(3) / rig.weight(4) / loaded - 1.0).abs() < 0.01);
    // Then half of it is gone after each half-life.
    rig.seconds(5 + settings.stale_half_life_ms / 1_000);
    let later = rig.weight(3) / rig.weight(4);
    assert!(
        (loaded.sqrt() / later - 1.0).abs() < 0.05,
        "{loaded} {later}"
    );
}

#[derive(Debug, Clone)]
enum Step {
    Report(u16, f64),
    Leave(u16),
    Weight(u16, f64),
    Traffic(u32),
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let index = || 0..MANY;
    prop_oneof![
        20 => (index(), 0.0..100.0).prop_map(|(index, cpu)| Step::Report(index, cpu)),
        1 => index().prop_map(Step::Leave),
        1 => (index(), 0.0..5.0).prop_map(|(index, weight)| Step::Weight(index, weight)),
        2 => (0_u32..500).prop_map(Step::Traffic),
        2 => Just(Step::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Weights that were computed for some backends only are close to those that are computed for all.
    #[test]
    fn those_weighed_alone_are_as_if_weighed_together(
        steps in proptest::collection::vec(step(), 1..200),
        is_headroom in any::<bool>(),
    ) {
        let policy = if is_headroom { Policy::Headroom } else { Policy::Adaptive };
        let mut rig = many(policy);
        for (at, step) in (2_i64..).zip(steps) {
            match step {
                Step::Report(index, cpu) => rig.apply(reporting(index, cpu, at * 1_000)),
                Step::Leave(index) => rig.balancer.apply(&Change::Left(bare(index)), rig.now),
                Step::Weight(index, weight) => {
                    let node = Node::clone(&reporting(index, 50.0, at * 1_000)).with_weight(weight);
                    rig.apply(Arc::new(node));
                }
                Step::Traffic(count) => {
                    rig.traffic(count, |_| false);
                }
                Step::Tick => rig.seconds(1),
            }
            rig.publish();
        }
        let alone = rig.weights();
        // Whatever changes the group lets all be weighed again.
        rig.balancer.apply(&Change::Joined(bare(MANY)), rig.now);
        rig.balancer.apply(&Change::Left(bare(MANY)), rig.now);
        rig.publish();
        let together = rig.weights();
        prop_assert_eq!(alone.len(), together.len());
        let total = |weights: &[(String, f64)]| weights.iter().map(|(_, weight)| weight).sum::<f64>();
        let (all_alone, all_together) = (total(&alone), total(&together));
        for ((id, alone), (_, together)) in alone.iter().zip(&together) {
            let (alone, together) = (alone / all_alone, together / all_together);
            prop_assert!((alone / together - 1.0).abs() < 0.03, "{id}: {alone} {together}");
        }
    }
}

#[test]
fn what_operators_and_checks_say_of_one_of_many_counts_at_once() {
    let mut rig = many(Policy::Adaptive);
    let said = NodeOverride {
        state: NodeState::Draining,
        ..NodeOverride::of(&bare(7))
    };
    rig.balancer
        .set_overrides(&HashMap::from([("n7".to_owned(), said)]));
    rig.publish();
    assert_eq!(rig.balancer.len(), usize::from(MANY) - 1);
    rig.balancer.set_overrides(&HashMap::new());
    rig.publish();

    rig.balancer.set_checks(Some(0.5));
    rig.publish();
    assert_eq!(rig.balancer.set_checked(&bare(8), false), Some(true));
    rig.publish();
    assert!(rig.balancer.upstream_at(bare(8).addr(0)).is_none());
    // A tick before that is published does not hide it.
    assert_eq!(rig.balancer.set_checked(&bare(8), true), Some(true));
    rig.seconds(1);
    rig.publish();
    assert!(rig.balancer.upstream_at(bare(8).addr(0)).is_some());
}
