//! Backends that answer at once without doing their work, as with 401 or 404.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;

const USUAL: Duration = Duration::from_millis(10);

/// A backend that refuses this part of its requests, at once, and takes this time for the others.
#[derive(Debug, Clone, Copy)]
struct Kind {
    refused: f64,
    refusal: Duration,
    usual: Duration,
}

const WORKING: Kind = Kind {
    refused: 0.0,
    refusal: Duration::from_micros(100),
    usual: USUAL,
};

/// Which part of the requests each of these backends gets, from so many clients that each have one request at a time.
fn parts(policy: Policy, clients: usize, kinds: &[Kind]) -> Vec<f64> {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..kinds.len() as u16 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let start = rig.now;
    let mut ends = BinaryHeap::new();
    let mut open: BTreeMap<usize, (Upstream, Duration, bool)> = BTreeMap::new();
    for client in 0..clients {
        ends.push(Reverse((start, client)));
    }
    let mut next_tick = start + TICK;
    let mut counts = vec![0_u32; kinds.len()];
    while let Some(Reverse((at, client))) = ends.pop() {
        while at >= next_tick {
            rig.now = next_tick;
            rig.balancer.tick(next_tick);
            next_tick += TICK;
        }
        rig.now = at;
        if let Some((upstream, took, is_refused)) = open.remove(&client) {
            match is_refused {
                true => upstream.answered(took, at),
                false => upstream.succeeded(took),
            }
        }
        if at > start + 30 * TICK {
            continue;
        }
        let upstream = rig.pick();
        let index = usize::from(upstream.addr().port() - 1_000);
        let kind = kinds[index];
        let is_refused = rig.rng.f64() < kind.refused;
        let took = match is_refused {
            true => kind.refusal,
            // Not all take the same time.
            false => kind.usual.mul_f64(rig.rng.f64() + 0.5),
        };
        if at > start + 10 * TICK {
            counts[index] += 1;
        }
        open.insert(client, (upstream, took, is_refused));
        ends.push(Reverse((at + took, client)));
    }
    let all = f64::from(counts.iter().sum::<u32>());
    counts.iter().map(|count| f64::from(*count) / all).collect()
}

#[test]
fn who_answers_at_once_without_its_work_does_not_attract_requests() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for clients in [1, 2, 4, 8, 32] {
            for refusal in [Duration::from_micros(100), USUAL / 2] {
                let refusing = Kind {
                    refused: 1.0,
                    refusal,
                    ..WORKING
                };
                let parts = parts(policy, clients, &[refusing, WORKING, WORKING]);
                let case = format!("{policy:?}, {clients} clients, {refusal:?}: {parts:?}");
                assert!((0.2..0.42).contains(&parts[0]), "{case}");
            }
        }
    }
}

/// Half of what clients ask for is not there, at any of them. One is slow.
#[test]
fn where_all_refuse_alike_requests_in_flight_count() {
    let usual = Kind {
        refused: 0.5,
        ..WORKING
    };
    let slow = Kind {
        usual: 4 * USUAL,
        ..usual
    };
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let parts = parts(policy, 32, &[slow, usual, usual, usual]);
        assert!(parts[0] < 0.13, "{policy:?}: {parts:?}");
    }
}

/// What is usual is not what the slowest one takes.
#[test]
fn one_that_is_very_slow_does_not_make_those_wait_that_refuse_now_and_then() {
    let usual = Kind {
        refused: 0.1,
        usual: Duration::from_millis(5),
        ..WORKING
    };
    let slow = Kind {
        usual: Duration::from_secs(1),
        ..WORKING
    };
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let parts = parts(policy, 64, &[slow, usual]);
        assert!(parts[0] < 0.02, "{policy:?}: {parts:?}");
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

/// The weights of nodes relative to their mean after a minute, of which the first one refuses this part of its requests,
/// and the others the other part; with the loads of one that refuses nothing, and all.
fn weights(
    policy: Policy,
    count: u16,
    refused: [f32; 2],
    load: impl Fn(u16, f32) -> f32,
) -> Vec<f64> {
    let mut rig = Rig::new(Balancer::builder().policy(policy));
    for index in 0..count {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let part = |index: u16| refused[usize::from(index > 0)];
    for second in 0..60 {
        for index in 0..count {
            rig.report(index, load(index, part(index)).into(), second);
        }
        for _ in 0..20 * count {
            let upstream = rig.pick();
            match rig.rng.f32() < part(upstream.addr().port() - 1_000) {
                true => upstream.answered(USUAL, rig.now),
                false => upstream.succeeded(USUAL),
            }
        }
        rig.seconds(1);
    }
    let weights: Vec<_> = (0..count).map(|index| rig.weight(index)).collect();
    let mean = weights.iter().sum::<f64>() / f64::from(count);
    weights.iter().map(|weight| weight / mean).collect()
}

/// Little of the CPU is needed to refuse.
fn less_if_refused(_: u16, part: f32) -> f32 {
    5.0 + 55.0 * (1.0 - part)
}

#[test]
fn the_low_load_of_who_refuses_its_work_attracts_nothing() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for (count, refused) in [
            (3, [1.0, 0.0]),
            (3, [0.9, 0.1]),
            (2, [1.0, 0.0]),
            (2, [0.9, 0.2]),
            (20, [1.0, 0.3]),
        ] {
            let weights = weights(policy, count, refused, less_if_refused);
            let case = format!("{policy:?}, {count}, {refused:?}: {weights:?}");
            assert!((0.8..1.15).contains(&weights[0]), "{case}");
        }
    }
}

/// As where half of what clients ask for is not there: the CPU in use shows who has less to do.
#[test]
fn where_all_refuse_alike_their_loads_count() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let weights = weights(policy, 3, [0.7, 0.55], less_if_refused);
        assert!(weights[0] > 1.02, "{policy:?}: {weights:?}");
    }
}

/// As where it is asked more for what is not there.
#[test]
fn the_high_load_of_who_refuses_its_work_counts() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let load = |index: u16, _: f32| if index == 0 { 95.0 } else { 40.0 };
        let weights = weights(policy, 3, [0.9, 0.0], load);
        assert!(weights[0] < 0.8, "{policy:?}: {weights:?}");
    }
}
