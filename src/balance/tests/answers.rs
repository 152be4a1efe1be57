//! Backends that answer at once without doing their work, as with 401 or 404.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;

const USUAL: Duration = Duration::from_millis(10);

/// Which part of the requests goes to the one of three backends that answers after `latency` without doing its
/// work, with so many clients that each have one request at a time.
fn part_of_refusing(policy: Policy, clients: usize, latency: Duration) -> f64 {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..3 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let start = rig.now;
    let mut ends = BinaryHeap::new();
    let mut open = BTreeMap::new();
    for client in 0..clients {
        ends.push(Reverse((start, client)));
    }
    let mut next_tick = start + TICK;
    let (mut refused, mut all) = (0, 0);
    while let Some(Reverse((at, client))) = ends.pop() {
        while at >= next_tick {
            rig.now = next_tick;
            rig.balancer.tick(next_tick);
            next_tick += TICK;
        }
        rig.now = at;
        if let Some((upstream, took)) = open.remove(&client) {
            let upstream: Upstream = upstream;
            match upstream.addr().port() {
                1_000 => upstream.answered(took, at),
                _ => upstream.succeeded(took),
            }
        }
        if at > start + 30 * TICK {
            continue;
        }
        let upstream = rig.pick();
        let is_refusing = upstream.addr().port() == 1_000;
        let took = match is_refusing {
            true => latency,
            // Not all take the same time.
            false => USUAL.mul_f64(rig.rng.f64() + 0.5),
        };
        if at > start + 10 * TICK {
            all += 1;
            refused += u32::from(is_refusing);
        }
        open.insert(client, (upstream, took));
        ends.push(Reverse((at + took, client)));
    }
    f64::from(refused) / f64::from(all)
}

#[test]
fn who_answers_at_once_without_its_work_does_not_attract_requests() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for clients in [1, 2, 4, 8, 32] {
            for latency in [Duration::from_micros(100), USUAL / 2] {
                let part = part_of_refusing(policy, clients, latency);
                let case = format!("{policy:?}, {clients} clients, {latency:?}: {part}");
                assert!((0.2..0.42).contains(&part), "{case}");
            }
        }
    }
}

#[test]
fn what_was_answered_at_once_counts_for_picks_only_and_not_for_long() {
    let mut rig = Rig::of(2);
    for _ in 0..200 {
        rig.pick().succeeded(USUAL);
    }
    rig.seconds(1);
    let in_flight = |rig: &Rig| {
        let backends = rig.balancer.backends();
        backends.iter().map(|it| it.in_flight).sum::<u32>()
    };
    // Nothing is picked for the greatest load of one of the two.
    let held: Vec<_> = (0..8).map(|_| rig.pick()).collect();
    let refusing = held[0].addr();
    for upstream in held {
        match upstream.addr() == refusing {
            true => upstream.answered(Duration::ZERO, rig.now),
            false => upstream.succeeded(USUAL),
        }
    }
    assert_eq!(in_flight(&rig), 0);
    for _ in 0..100 {
        let upstream = rig.pick();
        assert_ne!(upstream.addr(), refusing);
        assert_eq!(upstream.in_flight(), 1);
        upstream.succeeded(USUAL);
    }
    rig.now += 2 * USUAL;
    let picked = (0..100).filter(|_| rig.pick().addr() == refusing).count();
    assert!((30..70).contains(&picked), "{picked} of 100");
}

/// Nodes with weights relative to their mean after a minute, of which the first one answers this part of its requests
/// without doing its work, and the others the other part.
fn weights_after_a_minute(policy: Policy, refused: f32, of_others: f32) -> Vec<f64> {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..3 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    for second in 0..60 {
        for index in 0..3 {
            let part = if index == 0 { refused } else { of_others };
            rig.report(index, f64::from(5.0 + 55.0 * (1.0 - part)), second);
        }
        for _ in 0..60 {
            let upstream = rig.pick();
            let part = match upstream.addr().port() {
                1_000 => refused,
                _ => of_others,
            };
            match rig.rng.f32() < part {
                true => upstream.answered(USUAL, rig.now),
                false => upstream.succeeded(USUAL),
            }
        }
        rig.seconds(1);
    }
    let weights: Vec<_> = (0..3).map(|index| rig.weight(index)).collect();
    let mean = weights.iter().sum::<f64>() / 3.0;
    weights.iter().map(|weight| weight / mean).collect()
}

/// It needs little of its CPU for that.
#[test]
fn the_low_load_of_who_refuses_its_work_attracts_nothing() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let weights = weights_after_a_minute(policy, 1.0, 0.0);
        assert!((0.7..1.3).contains(&weights[0]), "{policy:?}: {weights:?}");
        let weights = weights_after_a_minute(policy, 0.9, 0.1);
        assert!((0.7..1.3).contains(&weights[0]), "{policy:?}: {weights:?}");
    }
}

/// As where half of what clients ask for is not there: the CPU in use shows who has less to do.
#[test]
fn where_all_refuse_alike_their_loads_count() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let weights = weights_after_a_minute(policy, 0.7, 0.55);
        assert!(weights[0] > 1.02, "{policy:?}: {weights:?}");
    }
}
