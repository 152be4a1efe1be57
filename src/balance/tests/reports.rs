//! Loads that nodes and responses report.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Rig, balancer, bare, node, set_nodes_at};
use crate::balance::{Balancer, Policy, Upstream};
use crate::load_report::LoadReport;
use crate::node::{Node, NodeState};
use crate::view::NodeOverride;

/// A report above 100 % still counts.
#[test]
fn a_report_above_100_percent_counts_as_full() {
    for policy in [Policy::Headroom, Policy::Adaptive] {
        let balancer = balancer(policy, &[node(0, 20.0), node(1, 60.0)]);
        let at = Instant::now();
        // Both have something to do: the load of an idle backend does not come from this process.
        let _held: Vec<_> = (0..40).map(|_| balancer.pick().unwrap()).collect();
        let reported = |cpu: f64, last_seen: i64| {
            let nodes = [(0, cpu), (1, 60.0)].map(|(index, cpu)| {
                let mut node = Node::clone(&node(index, cpu));
                node.last_seen = last_seen;
                Arc::new(node)
            });
            set_nodes_at(&balancer, &nodes, at);
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

/// A hundred backends that are not so idle that all take their turns.
fn busy_hundred() -> Rig {
    let mut rig = Rig::of(100);
    for index in 0..100 {
        rig.report(index, 60.0, 1);
    }
    rig
}

fn says_in_flight(rig: &Rig, upstream: &Upstream, in_flight: u32) {
    let mut report = LoadReport::new();
    report.in_flight = Some(in_flight.into());
    upstream.report(&report, rig.now);
}

/// Among a hundred backends it would hardly ever be drawn.
#[test]
fn who_has_just_said_to_have_nothing_to_do_is_considered_by_the_next_pick() {
    let mut rig = busy_hundred();
    let mut all = Vec::new();
    for index in 0..100 {
        let addr = bare(index).addr(80);
        all.push(rig.balancer.upstream_at(addr).unwrap());
    }
    let say_all = |rig: &Rig| {
        for upstream in &all {
            says_in_flight(rig, upstream, 8);
        }
    };
    say_all(&rig);
    rig.seconds(1);
    let mut followed = (0, 0);
    for turn in 0..200 {
        say_all(&rig);
        let idle = &all[turn % 100];
        says_in_flight(&rig, idle, 0);
        followed.0 += u32::from(rig.pick().addr() == idle.addr());
        // What was said before is no news.
        rig.now += Duration::from_millis(500);
        followed.1 += u32::from(rig.pick().addr() == idle.addr());
        rig.now += Duration::from_millis(500);
    }
    assert!(followed.0 > 180 && followed.1 < 40, "{followed:?} of 200");
}

#[test]
fn the_only_one_that_reports_its_requests_is_not_preferred_for_that() {
    let mut rig = busy_hundred();
    let mut picked = 0;
    for request in 0..4_000 {
        let upstream = rig.pick();
        if upstream.addr().port() == 1_000 {
            says_in_flight(&rig, &upstream, 3);
            picked += 1;
        }
        upstream.answered(Duration::ZERO, rig.now);
        if request % 100 == 0 {
            rig.seconds(1);
        }
    }
    assert!((10..120).contains(&picked), "{picked} of 4,000");
}

/// It answers at once, and has nothing in flight: but less is all that it may get.
#[test]
fn who_is_overloaded_is_not_preferred_because_it_has_just_reported() {
    let mut rig = busy_hundred();
    let mut late = [0, 0];
    for request in 0..20_000 {
        let upstream = rig.pick();
        let is_overloaded = upstream.addr().port() == 1_000;
        says_in_flight(&rig, &upstream, if is_overloaded { 0 } else { 6 });
        match is_overloaded && rig.rng.bool() {
            true => upstream.overloaded(),
            false => upstream.answered(Duration::ZERO, rig.now),
        }
        if request >= 10_000 {
            late[usize::from(is_overloaded)] += 1;
        }
        if request % 200 == 0 {
            rig.seconds(1);
        } else {
            rig.now += Duration::from_millis(2);
        }
    }
    let share = f64::from(late[1]) / f64::from(late[0] + late[1]);
    // Drawn for five in a hundred picks, accepted for a fourth of them, and then the one with the least to do.
    assert!(share < 0.02, "{share}");
}

#[test]
fn a_backend_that_reports_to_be_busy_is_picked_less_at_once() {
    let mut rig = Rig::of(2);
    let say = |rig: &mut Rig, busy: u16| {
        // Enough requests for both to report.
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
    // Much later the report has no effect.
    rig.seconds(30);
    let counts = rig.traffic(400, |_| false);
    assert!(counts[&1] > 100, "{counts:?}");
}

#[test]
fn invalid_reports_are_refused_and_counted() {
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
fn metrics_missing_in_responses_are_read_from_the_registration() {
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
fn what_a_backend_writes_counts_when_its_responses_have_ceased() {
    let mut rig = Rig::new(Balancer::builder().policy(Policy::Headroom));
    for index in 0..2 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    rig.report(1, 0.0, 1_000);
    let loaded = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
    loaded
        .report_header(
            b"TEXT cpu_utilization=0.95,named_metrics.sampled_at=1000",
            rig.now,
        )
        .unwrap();
    rig.seconds(1);
    assert!(rig.weight(0) < 0.7 * rig.weight(1));
    // It has nothing to do any more, says so once, and gets no requests whose responses would say it.
    rig.report(0, 0.0, 2_000);
    rig.seconds(5);
    assert!(
        rig.weight(0) < 0.7 * rig.weight(1),
        "responses are preferred"
    );
    rig.seconds(6);
    assert!(rig.weight(0) > 0.9 * rig.weight(1), "{}", rig.weight(0));
}

#[test]
fn an_invalid_report_built_by_hand_does_no_harm() {
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
    // A CPU usage of 1e300 counts as 100 %.
    assert_eq!(rig.balancer.refused_metrics(), 11);
    assert!(rig.balancer.backends().iter().all(|b| b.weight.is_finite()));
}

/// What nodes say of their own health: a degraded one has a quarter of its weight, a failing one is left out, unless
/// too few are well.
#[test]
fn nodes_say_themselves_that_they_are_not_well() {
    let mut rig = Rig::of(4);
    let say = |rig: &mut Rig, index: u16, health: &str| {
        let node = Node::clone(&bare(index)).with_metadata(json!({ "health": health }));
        rig.nodes.insert(node.id.clone(), Arc::new(node));
        rig.update();
    };
    say(&mut rig, 0, "degraded");
    let (degraded, well) = (rig.weight(0), rig.weight(1));
    assert!((degraded / well - 0.25).abs() < 0.01, "{degraded} {well}");
    say(&mut rig, 0, "failing");
    assert_eq!(rig.balancer.len(), 3);
    assert!(!rig.balancer.is_panicking());
    // Half of them are well: still without those that are not.
    say(&mut rig, 1, "failing");
    assert_eq!(rig.balancer.len(), 2);
    say(&mut rig, 2, "failing");
    assert_eq!(rig.balancer.len(), 4);
    assert!(rig.balancer.is_panicking());
    for index in 0..3 {
        say(&mut rig, index, "well");
    }
    assert_eq!(rig.balancer.len(), 4);
    assert!(!rig.balancer.is_panicking());
}

/// A server that names its queue only while there is one.
#[test]
fn a_metric_that_responses_no_longer_contain_is_no_longer_believed() {
    let mut rig = Rig::of(3);
    let report = |rig: &mut Rig, queue: Option<f64>| {
        for index in 0..3 {
            let mut report = LoadReport::new();
            report.cpu = Some(0.5);
            report.queue = if index == 0 { queue } else { Some(0.0) };
            let upstream = rig.balancer.upstream_at(bare(index).addr(0)).unwrap();
            upstream.report(&report, rig.now);
            upstream.succeeded(Duration::from_millis(10));
        }
        rig.seconds(6);
    };
    let load = |rig: &Rig| {
        rig.balancer
            .backends()
            .iter()
            .map(|it| it.weight)
            .fold(9.0, f64::min)
    };
    for _ in 0..10 {
        report(&mut rig, Some(300.0));
    }
    let before = load(&rig);
    for _ in 0..30 {
        report(&mut rig, None);
    }
    let after = load(&rig);
    assert!(before < 0.7 && after > before + 0.05, "{before} {after}");
}

/// Static weights may be in any unit: cores, or thousands.
#[test]
fn reports_of_requests_in_flight_count_whatever_the_unit_of_weights() {
    for unit in [0.01, 1.0, 100.0] {
        let mut rig = Rig::new(Balancer::builder());
        for index in 0..5 {
            let node = Node::clone(&bare(index)).with_weight(unit);
            rig.nodes.insert(format!("n{index}"), Arc::new(node));
        }
        rig.update();
        rig.seconds(2);
        let mut counts = std::collections::BTreeMap::<u16, u32>::new();
        // All are busy for others. One has fewer requests from here, but many more in all.
        let mut held = Vec::new();
        for index in [0, 1, 2, 3, 4, 1, 2, 3, 4] {
            let upstream = rig.balancer.upstream_at(bare(index).addr(0)).unwrap();
            held.push(upstream);
        }
        for _ in 0..2_000 {
            for (at, upstream) in held[..5].iter().enumerate() {
                let mut report = LoadReport::new();
                report.in_flight = Some(if at == 0 { 20.0 } else { 6.0 });
                upstream.report(&report, rig.now);
            }
            let upstream = rig.pick();
            *counts.entry(upstream.addr().port() - 1_000).or_default() += 1;
        }
        let of_busy = counts.get(&0).copied().unwrap_or_default();
        assert!(of_busy < 100, "unit {unit}: {counts:?}");
    }
}

/// The mean of all would be wrong by orders of magnitude, so that nobody who tells the truth looked busy.
#[test]
fn one_that_reports_a_billion_requests_does_not_hide_what_others_report() {
    let mut rig = Rig::of(5);
    let at = |rig: &Rig, index| rig.balancer.upstream_at(bare(index).addr(0)).unwrap();
    let say = |upstream: &Upstream, in_flight: f64, now| {
        let mut report = LoadReport::new();
        report.in_flight = Some(in_flight);
        upstream.report(&report, now);
    };
    say(&at(&rig, 4), 1e9, rig.now);
    let mut counts = [0_u32; 5];
    for _ in 0..400 {
        for index in 0..4 {
            let in_flight = if index == 0 { 60.0 } else { 2.0 };
            say(&at(&rig, index), in_flight, rig.now);
        }
        let upstream = rig.pick();
        counts[usize::from(upstream.addr().port() - 1_000)] += 1;
    }
    assert!(counts[0] < 20, "{counts:?}");
}

/// A backend without traffic is idle, whatever its capacity.
#[test]
fn who_gets_no_traffic_earns_no_weight_by_being_idle() {
    let mut rig = Rig::of(4);
    let said = NodeOverride {
        state: NodeState::Draining,
        ..NodeOverride::of(&bare(0))
    };
    let drained = HashMap::from([("n0".to_owned(), said)]);
    rig.traffic(400, |_| false);
    rig.balancer.set_overrides(&drained);
    for second in 0..120 {
        rig.report(0, 1.0, second * 1_000);
        for index in 1..4 {
            rig.report(index, 60.0, second * 1_000);
        }
        rig.traffic(100, |_| false);
        rig.seconds(1);
    }
    rig.balancer.set_overrides(&HashMap::new());
    rig.balancer.publish(rig.now);
    let (own, others) = (rig.weight(0), rig.weight(1));
    assert!(own / others < 1.2, "{own} {others}");
}
