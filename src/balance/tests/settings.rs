//! The ranges of the settings.

use std::sync::Arc;

use serde_json::json;

use super::Rig;
use crate::balance::{Adaptive, Balancer, Policy, TICK};
use crate::node::Node;

#[test]
fn every_constant_out_of_its_range_is_named() {
    // Each field once, far out of any range.
    let fields = serde_json::json!({
        "metrics_gain": -1, "step_up": 99, "step_down": 99, "metrics_range": 0, "queue_gain": -1,
        "queue_capacity": 0, "queue_most": -1, "idle_load": 0, "memory_limit": 2, "memory_gain": -1,
        "success_limit": 2, "trust_memory": 0, "trust_floor": 2, "stale_after_ms": 0,
        "stale_half_life_ms": 0, "latency_gain": 2, "idle_latency_ms": -1, "latency_keep": 2, "latency_range": 0,
        "latency_samples": 0, "latency_window_ms": 0, "idle_keep": 2, "success_gain": 0,
        "gate_below": 2, "eject_below": 2, "probe_part": 0, "probe_most_ms": 0, "own_request": 0, "alike": 2, "calm_load": 2, "subset_in_flight": 101, "subset_least": 1, "weight_min": 0,
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
        "every field is listed above"
    );
}

/// Other settings change how nodes are picked, and nothing of what is known of them.
#[test]
fn a_balancer_that_is_configured_anew_forgets_nothing() {
    let mut rig = Rig::new(Balancer::builder().policy(Policy::Headroom));
    for index in 0..4 {
        let node = Node::new(format!("n{index}"), [10, 0, 0, index].into());
        rig.nodes.insert(node.id.clone(), Arc::new(node));
    }
    rig.update();
    // The first one fails all the time.
    for _ in 0..2_000 {
        let upstream = rig.pick();
        match upstream.node().id == "n0" {
            true => upstream.failed(),
            false => upstream.succeeded(TICK / 100),
        }
    }
    rig.seconds(1);
    let success = |rig: &Rig| {
        let backends = rig.balancer.backends();
        let first = backends.iter().find(|backend| backend.node.id == "n0");
        first.map(|backend| backend.success).unwrap()
    };
    assert!(success(&rig) <= 0.5);
    let held = rig.balancer.pick().unwrap();
    let in_flight = |rig: &Rig| {
        let backends = rig.balancer.backends();
        backends
            .iter()
            .map(|backend| backend.in_flight)
            .sum::<u32>()
    };
    let settings = Balancer::builder().policy(Policy::Adaptive).candidates(3);
    rig.balancer.reconfigure(settings, rig.now).unwrap();
    assert!(success(&rig) <= 0.5);
    assert_eq!(in_flight(&rig), 1);
    drop(held);
    assert_eq!(in_flight(&rig), 0);

    // In turns from now on.
    let settings = Balancer::builder().policy(Policy::RoundRobin);
    rig.balancer.reconfigure(settings, rig.now).unwrap();
    let mut picked: Vec<_> = (0..4)
        .map(|_| rig.balancer.pick().unwrap().addr())
        .collect();
    picked.sort_unstable();
    picked.dedup();
    assert_eq!(picked.len(), 4);

    // Another port is another backend, for those that registered none.
    let settings = Balancer::builder().default_port(8_080);
    rig.balancer.reconfigure(settings, rig.now).unwrap();
    assert!(
        rig.balancer
            .backends()
            .iter()
            .all(|backend| backend.addr.port() == 8_080)
    );
    assert_eq!(rig.balancer.len(), 4);

    let wrong = Balancer::builder().candidates(99);
    let error = rig.balancer.reconfigure(wrong, rig.now).unwrap_err();
    assert!(error.to_string().contains("candidates"), "{error}");
    assert_eq!(rig.balancer.len(), 4);
}
