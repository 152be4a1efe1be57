//! What another balancer can begin with.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::{Rig, bare};
use crate::balance::settings::Adaptive;
use crate::balance::{Balancer, Learned, Policy, TICK};
use crate::load_report::LoadReport;
use crate::node::Node;
use crate::view::Change;

/// A balancer of five whose first one is slow, and whose second one fails.
fn experienced() -> Rig {
    let mut rig = Rig::of(5);
    for second in 0..60 {
        for index in 0..5 {
            let load = if index == 0 { 90.0 } else { 40.0 };
            rig.report(index, load, second * 1_000);
        }
        rig.traffic(200, |index| index == 1);
        rig.seconds(1);
    }
    assert!(rig.weight(0) < 0.7 && is_ejected(&rig, 1));
    rig
}

fn is_ejected(rig: &Rig, index: u16) -> bool {
    let backends = rig.balancer.backends();
    let own = backends.iter().find(|it| it.node.id == format!("n{index}"));
    own.unwrap().is_ejected
}

/// As it comes out of a file.
fn stored(rig: &Rig) -> Learned {
    let json = serde_json::to_string(&rig.balancer.learned(rig.now)).unwrap();
    serde_json::from_str(&json).unwrap()
}

#[test]
fn a_balancer_begins_where_another_one_ends() {
    let old = experienced();
    let learned = stored(&old);
    assert_eq!(learned, old.balancer.learned(old.now));
    assert_eq!(learned.len(), 5);
    // Whether the nodes are there already, or come later.
    for comes_first in [true, false] {
        let mut new = Rig::new(Balancer::builder());
        for index in 0..5 {
            new.nodes.insert(format!("n{index}"), bare(index));
        }
        if comes_first {
            new.update();
        }
        new.balancer
            .teach(&learned, Duration::from_secs(3), new.now);
        new.now += TICK;
        new.update();
        let of_working = |rig: &Rig| rig.weight(0) / rig.weight(2);
        assert!((of_working(&new) / of_working(&old) - 1.0).abs() < 0.05);
        assert!(is_ejected(&new, 1));
        let counts = new.traffic(1_000, |index| index == 1);
        assert!(!counts.contains_key(&1), "{counts:?}");
        // It is tried as ever, and comes back.
        for _ in 0..10 {
            new.traffic(200, |_| false);
            new.seconds(1);
        }
        assert!(!is_ejected(&new, 1));
        let counts = new.traffic(1_000, |_| false);
        assert!(counts[&1] > 120, "{counts:?}");
    }
}

#[test]
fn what_is_old_or_of_other_processes_is_not_taken_over() {
    let learned = stored(&experienced());
    let begins_with = |change: &dyn Fn(Node) -> Node, passed: u64, now_passed: u64| {
        let mut new = Rig::new(Balancer::builder());
        new.balancer
            .teach(&learned, Duration::from_secs(passed), new.now);
        new.seconds(now_passed);
        for index in 0..5 {
            let node = change(Node::clone(&bare(index)));
            new.nodes.insert(node.id.clone(), Arc::new(node));
        }
        new.update();
        let backends = new.balancer.backends();
        let weight = |id| backends.iter().find(|it| it.node.id == id).unwrap().weight;
        (is_ejected(&new, 1), weight("n0") / weight("n2"))
    };
    let (ejected, slow) = begins_with(&|node| node, 0, 0);
    assert!(ejected && slow < 0.6, "{slow}");
    // Half of it after the half-life of three minutes.
    let (ejected, less_slow) = begins_with(&|node| node, 180, 0);
    assert!(
        ejected && (2.0 * slow..0.6).contains(&less_slow),
        "{less_slow} of {slow}"
    );
    for (what, begins) in [
        ("too old", begins_with(&|node| node, 601, 0)),
        (
            "nodes that come too late",
            begins_with(&|node| node, 0, 121),
        ),
        (
            "other processes",
            begins_with(&|node| node.with_incarnation(7), 0, 0),
        ),
        ("other addresses", begins_with(&with_another_port, 0, 0)),
    ] {
        assert_eq!(begins, (false, 1.0), "{what}");
    }
}

fn with_another_port(node: Node) -> Node {
    let port = node.port.unwrap_or_default();
    node.with_port(port + 1_000)
}

#[test]
fn what_requests_have_shown_counts_more_than_what_was_learned() {
    let learned = stored(&experienced());
    let mut new = Rig::of(5);
    for _ in 0..5 {
        new.traffic(200, |index| index == 3);
        new.seconds(1);
    }
    new.balancer.teach(&learned, Duration::ZERO, new.now);
    assert!(!is_ejected(&new, 1) && is_ejected(&new, 3));
}

#[test]
fn what_was_taken_over_is_handed_on() {
    let old = experienced();
    let mut second = Rig::of(5);
    second
        .balancer
        .teach(&stored(&old), Duration::from_secs(3), second.now);
    // A request to one of them only.
    second.pick().succeeded(Duration::from_millis(10));
    second.seconds(5);
    let learned = stored(&second);
    assert_eq!(learned.len(), 5);
    let ages = learned.backends.iter().map(|it| it.requests_age_ms / 1_000);
    let mut ages: Vec<_> = ages.collect();
    ages.sort_unstable();
    assert!(ages[0] <= 5 && ages[1] >= 8, "{ages:?}");
    let third = Rig::of(5);
    third.balancer.teach(&learned, Duration::ZERO, third.now);
    assert!(is_ejected(&third, 1) && third.weight(0) / third.weight(2) < 0.7);
}

#[test]
fn with_all_ejected_half_of_them_carry_the_load() {
    let mut learned = stored(&experienced());
    for backend in &mut learned.backends {
        backend.is_ejected = true;
        backend.success = 0.0;
    }
    let mut new = Rig::of(5);
    new.balancer.teach(&learned, Duration::ZERO, new.now);
    let ejected = |rig: &Rig| (0..5).filter(|index| is_ejected(rig, *index)).count();
    assert_eq!(ejected(&new), 2);
    for _ in 0..10 {
        new.traffic(200, |_| false);
        new.seconds(1);
    }
    assert_eq!(ejected(&new), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever a file says: nothing panics, requests are served, and after three minutes nothing of it is left that
    /// matters.
    #[test]
    fn what_is_wrong_does_little_harm(
        values in proptest::collection::vec(
            (any::<f64>(), any::<f64>(), any::<Option<f64>>(), any::<f32>(), any::<bool>(), any::<Option<u64>>(), [0_u64..700_000, 0_u64..700_000]),
            5,
        ),
    ) {
        let mut learned = stored(&experienced());
        for (backend, (metrics, latency, lowest, success, ejected, joined, ages)) in
            learned.backends.iter_mut().zip(values)
        {
            backend.weight.metrics = metrics;
            backend.weight.latency = latency;
            backend.weight.lowest_latency = lowest;
            backend.success = success;
            backend.is_ejected = ejected;
            backend.weight.joined_ms = joined;
            backend.weight.metrics_age_ms = ages[0];
            backend.requests_age_ms = ages[1];
        }
        let mut new = Rig::new(Balancer::builder().policy(Policy::Adaptive));
        new.balancer.teach(&learned, Duration::ZERO, new.now);
        for index in 0..5 {
            new.nodes.insert(format!("n{index}"), bare(index));
        }
        new.update();
        for backend in new.balancer.backends() {
            prop_assert!(backend.weight.is_finite() && backend.weight > 0.0);
        }
        let mut counts = BTreeMap::<u16, u32>::new();
        for second in 0..270 {
            let mut sent = BTreeMap::<u16, u32>::new();
            for _ in 0..100 {
                let upstream = new.pick();
                *sent.entry(upstream.addr().port() - 1000).or_default() += 1;
                upstream.succeeded(Duration::from_millis(10 + new.rng.u64(0..10)));
            }
            for index in 0..5 {
                // Who has more to do is more loaded, but not busy: one process sends all there is.
                let count = sent.get(&index).copied().unwrap_or_default();
                new.report(index, f64::from(count) / 2.0, second * 1_000);
                if second >= 210 {
                    *counts.entry(index).or_default() += count;
                }
            }
            new.seconds(1);
        }
        prop_assert!(counts.values().all(|count| (500..2_000).contains(count)), "{counts:?}");
    }
}

/// As in a rolling restart.
#[test]
fn a_process_that_is_started_again_begins_with_the_weight_of_the_one_before() {
    for with_ticks_between in [false, true] {
        let mut rig = Rig::new(Balancer::builder().adaptive(Adaptive {
            slow_start_ms: 0,
            ..Adaptive::default()
        }));
        for index in 0..3 {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        let mut report = LoadReport::new();
        for _ in 0..30 {
            for index in 0..3 {
                report.cpu = Some(if index == 0 { 1.0 } else { 0.1 });
                let addr = bare(index).addr(80);
                let upstream = rig.balancer.upstream_at(addr).unwrap();
                upstream.report(&report, rig.now);
                upstream.succeeded(Duration::from_millis(10));
            }
            rig.traffic(50, |_| false);
            rig.seconds(1);
        }
        let before = rig.weight(0) / rig.weight(1);
        assert!(before < 0.4, "{before}");
        rig.balancer.apply(&Change::Left(bare(0)), rig.now);
        rig.balancer.publish(rig.now);
        if with_ticks_between {
            for _ in 0..3 {
                rig.traffic(50, |_| false);
                rig.seconds(1);
            }
        }
        rig.balancer.apply(&Change::Joined(bare(0)), rig.now);
        rig.balancer.publish(rig.now);
        for second in 0..5 {
            let after = rig.weight(0) / rig.weight(1);
            // From then on latencies count, too.
            let most = if second == 0 { 0.4 } else { 0.5 };
            assert!(after < most, "{before} before, {after} after {second} s");
            rig.traffic(50, |_| false);
            rig.seconds(1);
        }
    }
}

/// A predecessor whose own network was broken has ejected all. Half of them are used at once, and stay so though no
/// request has come by the next tick.
#[test]
fn half_of_those_that_are_ejected_by_a_predecessor_stay_in_use() {
    let mut old = Rig::of(10);
    for _ in 0..30 {
        old.traffic(40, |index| index > 0);
        old.seconds(1);
    }
    let learned = stored(&old);
    let mut new = Rig::of(10);
    new.balancer
        .teach(&learned, Duration::from_secs(3), new.now);
    new.update();
    for _ in 0..5 {
        let used = (0..10).filter(|index| !is_ejected(&new, *index)).count();
        assert!(used >= 5, "{used}");
        new.seconds(1);
    }
}
