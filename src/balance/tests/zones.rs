//! How much traffic leaves the zone.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::{Rig, bare};
use crate::balance::Balancer;
use crate::node::Node;

fn zoned(index: u16, zone: &str) -> (String, Arc<Node>) {
    let node = Node::clone(&bare(index)).with_zone(zone);
    (node.id.clone(), Arc::new(node))
}

#[test]
fn the_own_zone_is_preferred_and_all_zones_are_used_without_it() {
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

        // The backends in the zone fail: the others take over within a tick.
        rig.traffic(500, |index| index < 2);
        rig.seconds(1);
        let counts = rig.traffic(4_000, |index| index < 2);
        assert!(counts[&2] + counts[&3] > 3_800, "{counts:?}");

        // They leave.
        rig.nodes
            .retain(|_, node| node.zone.as_deref() == Some("b"));
        rig.update();
        let counts = rig.traffic(400, |_| false);
        assert!(counts[&2] > 100 && counts[&3] > 100, "{counts:?}");
    }
}

#[test]
fn pressure_lets_traffic_leave_the_zone() {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    rig.nodes
        .extend([zoned(0, "a"), zoned(1, "a"), zoned(2, "b"), zoned(3, "b")]);
    rig.update();
    // A queue in the own zone lets traffic out within the same second.
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

/// Nine of ten in the zone are taken out by health checks: the last one does not get what was theirs.
#[test]
fn who_is_taken_out_by_checks_is_lost_for_the_zone() {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    for index in 0..30 {
        let zone = ["a", "b", "c"][usize::from(index) / 10];
        rig.nodes.extend([zoned(index, zone)]);
    }
    rig.update();
    rig.balancer.set_checks(Some(0.5));
    rig.seconds(1);
    for index in 1..10 {
        rig.balancer.set_checked(&bare(index), false);
    }
    rig.balancer.publish(rig.now);
    let counts = rig.traffic(4_000, |_| false);
    // A part of 1 of 20 or so; it was 4,000.
    assert!((50..600).contains(&counts[&0]), "{counts:?}");
}

/// A process that was stopped takes its own pause for the latency of its backends, unless it notices.
#[test]
fn a_process_that_was_stopped_does_not_blame_its_zone() {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    rig.nodes
        .extend([zoned(0, "a"), zoned(1, "a"), zoned(2, "b"), zoned(3, "b")]);
    rig.update();
    for _ in 0..60 {
        rig.traffic(200, |_| false);
        rig.seconds(1);
    }
    let held: Vec<_> = (0..20).map(|_| rig.pick()).collect();
    rig.now += Duration::from_secs(30);
    // It goes on with a tick or with the responses, whatever comes first.
    rig.balancer.tick(rig.now);
    for upstream in held {
        upstream.succeeded(Duration::from_secs(30));
    }
    let weights: Vec<_> = (0..4).map(|index| rig.weight(index)).collect();
    for _ in 0..10 {
        rig.seconds(1);
        let counts = rig.traffic(200, |_| false);
        let near = counts[&0] + counts[&1];
        assert!(near > 190, "{counts:?}");
        for (index, before) in (0..4).zip(&weights) {
            let now = rig.weight(index);
            assert!((now / before - 1.0).abs() < 0.1, "{index}: {before} {now}");
        }
    }
}

/// A request that takes minutes, of a few, is one slow request.
#[test]
fn one_slow_request_does_not_open_the_zone() {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    for index in 0..24 {
        rig.nodes
            .extend([zoned(index, if index < 12 { "a" } else { "b" })]);
    }
    rig.update();
    let near = |rig: &mut Rig, slow: Option<Duration>| {
        let mut slow = slow;
        let mut near = 0;
        for _ in 0..50 {
            let upstream = rig.pick();
            near += u32::from(upstream.addr().port() < 1_012);
            upstream.succeeded(slow.take().unwrap_or(Duration::from_millis(10)));
        }
        rig.seconds(1);
        near
    };
    for _ in 0..60 {
        near(&mut rig, None);
    }
    near(&mut rig, Some(Duration::from_secs(20)));
    for _ in 0..30 {
        let near = near(&mut rig, None);
        assert!(near >= 45, "{near} of 50");
    }
}
