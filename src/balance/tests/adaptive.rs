//! What is learned from outcomes, time and metrics.

use std::time::Duration;

use super::{Rig, bare};
use crate::balance::Balancer;

#[test]
fn a_balancer_that_ticked_before_there_were_backends_learns_too() {
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
fn backends_that_all_fail_alike_are_all_tried() {
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
fn a_backend_that_joins_later_or_returns_starts_slowly() {
    let mut rig = Rig::of(10);
    assert_eq!(rig.weight(9), 1.0, "there from the start");
    let gone = rig.nodes.remove("n9").unwrap();
    rig.update();
    rig.nodes.insert("n9".to_owned(), gone);
    rig.update();
    assert!((rig.weight(9) - 0.1).abs() < 1e-9, "{}", rig.weight(9));
    rig.seconds(15);
    assert!((rig.weight(9) - 0.5).abs() < 0.05, "{}", rig.weight(9));
    // A new report does not start it again.
    rig.report(9, 50.0, 1);
    assert!((rig.weight(9) - 0.5).abs() < 0.05, "{}", rig.weight(9));
    rig.seconds(15);
    assert_eq!(rig.weight(9), 1.0);
}

#[test]
fn the_only_settled_backend_does_not_carry_all_while_others_start() {
    let mut rig = Rig::of(1);
    for index in 1..10 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let backends = rig.balancer.backends();
    let total: f64 = backends.iter().map(|backend| backend.weight).sum();
    let carries = rig.weight(0) / total * 10.0;
    assert!((carries - 1.1).abs() < 0.01, "{carries} times its share");
}

/// What this process does not see itself, others must have sent.
#[test]
fn latencies_are_followed_faster_where_others_keep_the_backends_busy() {
    let step = |cpu: f64, held_at_each: usize| {
        let mut rig = Rig::of(4);
        let at = |index: u16| bare(index).addr(80);
        let held: Vec<_> = (0..4)
            .flat_map(|index| std::iter::repeat_n(index, held_at_each))
            .map(|index| rig.balancer.upstream_at(at(index)).unwrap())
            .collect();
        for second in 1..=40 {
            for index in 0..4 {
                rig.report(index, cpu, second * 1_000);
                // In the last second the first one is slower than the others.
                let slow = if index == 0 && second == 40 { 20 } else { 2 };
                for latency in [5, 5 + slow] {
                    for _ in 0..4 {
                        let upstream = rig.balancer.upstream_at(at(index)).unwrap();
                        upstream.succeeded(Duration::from_millis(latency));
                    }
                }
            }
            rig.seconds(1);
        }
        drop(held);
        (rig.weight(1) / rig.weight(0)).ln()
    };
    let (shared, calm, own) = (step(80.0, 0), step(5.0, 0), step(80.0, 2));
    assert!(calm > 0.1 && (own - calm).abs() < 0.01, "{calm} {own}");
    assert!(shared > 1.5 * calm, "{shared} {calm}");
}

/// Answers take a fraction of a millisecond, now and then some milliseconds, as on any real machine.
#[test]
fn equal_backends_that_are_all_fast_get_equal_parts() {
    let mut rig = Rig::of(3);
    let mut rng = fastrand::Rng::with_seed(11);
    let mut got = [0; 3];
    for _ in 0..300 {
        for _ in 0..50 {
            let upstream = rig.pick();
            got[usize::from(upstream.addr().port() - 1000)] += 1;
            let pause = if rng.u32(..200) == 0 { 5_000.0 } else { 0.0 };
            let micros = pause + 200.0 - 100.0 * (1.0 - rng.f64()).ln();
            upstream.succeeded(Duration::from_micros(micros as u64));
        }
        rig.seconds(1);
        for index in 0..3 {
            let weight = rig.weight(index);
            assert!((0.85..1.15).contains(&weight), "{index} has {weight}");
        }
    }
    assert!(
        got.iter().all(|got| (4_750..5_250).contains(got)),
        "{got:?}"
    );
}

/// One of them has something else to do, so that its answers take some milliseconds: they are not all fast.
#[test]
fn a_backend_that_is_slow_beside_fast_ones_gets_less() {
    let mut rig = Rig::of(3);
    for _ in 0..30 {
        for request in 0..50 {
            let upstream = rig.pick();
            let is_slow = upstream.addr().port() == 1000 && request % 8 != 0;
            let micros = if is_slow { 6_000 } else { 300 };
            upstream.succeeded(Duration::from_micros(micros));
        }
        rig.seconds(1);
    }
    assert!(rig.weight(0) < 0.4, "{}", rig.weight(0));
}

#[test]
fn a_backend_with_more_load_than_the_others_gets_less() {
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
fn a_backend_that_gets_nothing_is_tried_again() {
    let mut rig = Rig::of(3);
    // It reports to be full, always with a new time, whatever it gets.
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
