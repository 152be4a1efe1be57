//! The ranges of the settings.

use serde_json::json;

use crate::balance::{Adaptive, Balancer};

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
        "every field is listed above"
    );
}
