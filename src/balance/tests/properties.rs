//! Any sequence of steps.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::{POLICIES, Rig, bare};
use crate::balance::weight::BaseWeight;
use crate::balance::{Balancer, PickOptions, Policy, Upstream};
use crate::node::{Node, NodeState};

/// Any JSON value, and often one that could be a metric.
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
    /// Whatever happens in whatever order: weights stay finite and within their range, every backend
    /// can be picked, and nothing stays in flight.
    #[test]
    fn any_sequence_of_steps(
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
                    let options = PickOptions {
                        now: Some(rig.now),
                        random: Some(rig.rng.u64(..)),
                        ..PickOptions::default()
                    };
                    let picked = rig.balancer.pick_with(options);
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
                let base = BaseWeight::new(backend.node.weight).get();
                let part = backend.weight / base;
                let least = match (policy, zone) {
                    (Policy::Adaptive, None) => 0.1 * 0.1,
                    (Policy::Adaptive, _) => 0.1 * 0.1 * 0.02,
                    (Policy::Headroom, _) => 0.05 * 0.02,
                    _ => 0.02,
                };
                prop_assert!(part.is_finite() && part >= least * 0.999 && part <= 10.001, "{backend:?}");
                prop_assert!(backend.share > 0.0 || backend.is_ejected);
                prop_assert!((0.0..=backend.weight).contains(&backend.share));
                prop_assert!((0.0..=1.0).contains(&backend.success));
            }
            // Every backend is picked if the others are excluded.
            if incarnation % 16 == 0 {
                for backend in &backends {
                    let others: Vec<_> = backends
                        .iter()
                        .map(|other| other.addr)
                        .filter(|addr| *addr != backend.addr)
                        .collect();
                    let options = PickOptions {
                        exclude: &others,
                        now: Some(rig.now),
                        key: b"k",
                        random: Some(rig.rng.u64(..)),
                        ..PickOptions::default()
                    };
                    let picked = rig.balancer.pick_with(options);
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

    /// Every backend of equal weight gets something, however little traffic there is.
    #[test]
    fn all_get_something(count in 2..20_u16, seed in any::<u64>()) {
        let mut rig = Rig::of(count);
        rig.rng = fastrand::Rng::with_seed(seed);
        let counts = rig.traffic(u32::from(count) * 100, |_| false);
        prop_assert_eq!(counts.len(), usize::from(count));
    }
}
