//! Consistent hashing with bounded loads.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Rig, balancer, bare, nodes, rng, seeded, set_nodes};
use crate::balance::{Balancer, PickOptions, Policy, Probes, Upstream};
use crate::node::Node;

#[test]
fn consistent_moves_only_the_keys_it_must() {
    for heavy in [1.0, 10.0] {
        let mut nodes = nodes(10);
        nodes[3] = Arc::new(Node::clone(&nodes[3]).with_weight(heavy));
        let before = balancer(Policy::Consistent, &nodes);
        let gone = nodes.remove(3).addr(80);
        let after = balancer(Policy::Consistent, &nodes);
        let pick = |balancer: &Balancer, key: u32| {
            let options = PickOptions {
                key: &key.to_le_bytes(),
                ..PickOptions::default()
            };
            balancer.pick_with(options).unwrap().addr()
        };
        let mut shares: BTreeMap<SocketAddr, f64> = BTreeMap::new();
        for key in 0..20_000 {
            let old = pick(&before, key);
            *shares.entry(old).or_default() += (9.0 + heavy) / 20_000.0;
            if old != gone {
                assert_eq!(pick(&after, key), old);
            }
        }
        for (addr, share) in shares {
            let fair = if addr == gone { heavy } else { 1.0 };
            let off = share / fair;
            assert!((0.75..1.34).contains(&off), "{addr}: {off} of its share");
        }
    }
}

#[test]
fn consistent_follows_weights_whatever_their_unit() {
    for unit in [1e-6, 1.0, 100.0, 1e5] {
        let weighted = [(0, unit), (1, 10.0 * unit)]
            .map(|(index, weight)| Arc::new(Node::clone(&bare(index)).with_weight(weight)));
        let balancer = balancer(Policy::Consistent, &weighted);
        let light = (0..20_000_u32).filter(|key| {
            let options = PickOptions {
                key: &key.to_le_bytes(),
                ..PickOptions::default()
            };
            balancer.pick_with(options).unwrap().addr().port() == 1000
        });
        let share = light.count() as f64 / 20_000.0;
        assert!((share - 1.0 / 11.0).abs() < 0.01, "{unit}: {share}");
    }
}

#[test]
fn consistent_finds_backends_that_own_almost_nothing() {
    let weighted = [(0, 1e6), (1, 1e-6), (2, 1e-6)]
        .map(|(index, weight)| Arc::new(Node::clone(&bare(index)).with_weight(weight)));
    let balancer = balancer(Policy::Consistent, &weighted);
    let heavy = weighted[0].addr(80);
    let pick = |key: u32| {
        let options = PickOptions {
            key: &key.to_le_bytes(),
            exclude: &[heavy],
            ..PickOptions::default()
        };
        balancer.pick_with(options).unwrap().addr()
    };
    let mut counts: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    for key in 0..1_000 {
        let addr = pick(key);
        assert_eq!(pick(key), addr, "a key stays");
        *counts.entry(addr).or_default() += 1;
    }
    assert_eq!(counts.len(), 2);
    assert!(
        counts.values().all(|count| *count > 400),
        "each by weight: {counts:?}"
    );
}

#[test]
fn requests_in_flight_count_across_other_settings() {
    let builder = Balancer::builder().policy(Policy::Consistent);
    let balancer = builder.clone().try_build().unwrap();
    set_nodes(&balancer, &nodes(10));
    let pick = || {
        let options = PickOptions {
            key: b"hot",
            ..PickOptions::default()
        };
        balancer.pick_with(options).unwrap()
    };
    let before: Vec<_> = (0..900).map(|_| pick()).collect();
    balancer.reconfigure(builder, Instant::now()).unwrap();
    let after: Vec<_> = (0..50).map(|_| pick()).collect();
    let most = balancer.backends().into_iter().map(|b| b.in_flight).max();
    // As if none were in flight, all of them would be full, and the owner would get every one.
    assert!(most <= Some(950 / 8 + 1), "{most:?}");
    drop((before, after));
}

#[test]
fn backends_that_do_not_work_have_no_part_of_the_room() {
    let builder = Balancer::builder().policy(Policy::Consistent);
    let mut rig = Rig::new(builder);
    for index in 0..10 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    for index in 0..4 {
        for _ in 0..20 {
            let upstream = rig.balancer.upstream_at(bare(index).addr(0)).unwrap();
            upstream.unreachable();
        }
    }
    rig.seconds(1);
    let pick = |rig: &Rig| {
        let options = PickOptions {
            key: b"hot",
            probes: Probes::No,
            ..PickOptions::default()
        };
        rig.balancer.pick_with(options).unwrap()
    };
    let held: Vec<_> = (0..600).map(|_| pick(&rig)).collect();
    let most = held.iter().map(Upstream::in_flight).max();
    // 1.25 times their fair part, not a part of what those have that do not work.
    assert!(most <= Some(600 * 5 / 4 / 6 + 1), "{most:?}");
    drop(held);
    // They leave, and no tick has come since: those that are left have the part of all.
    for index in 0..4 {
        rig.nodes.remove(&format!("n{index}"));
    }
    rig.update();
    let held: Vec<_> = (0..600).map(|_| pick(&rig)).collect();
    let most = held.iter().map(Upstream::in_flight).max();
    assert!(
        most <= Some(600 * 5 / 4 / 6 + 1),
        "after they left: {most:?}"
    );
}

#[test]
fn a_hot_key_overflows_and_returns() {
    let builder = Balancer::builder().policy(Policy::Consistent);
    let balancer = builder.try_build().unwrap();
    set_nodes(&balancer, &nodes(10));
    let pick = || {
        let options = PickOptions {
            key: b"hot",
            ..PickOptions::default()
        };
        balancer.pick_with(options).unwrap()
    };
    let home = pick().addr();
    let few: Vec<_> = (0..8).map(|_| pick()).collect();
    assert!(few.iter().all(|upstream| upstream.addr() == home), "slack");
    let many: Vec<_> = (0..992).map(|_| pick()).collect();
    let most = balancer.backends().into_iter().map(|b| b.in_flight).max();
    assert!(most <= Some(125 + 1), "1.25 times the fair share: {most:?}");
    drop((few, many));
    assert_eq!(pick().addr(), home);
    assert!(balancer.backends().iter().all(|b| b.in_flight == 0));
}

#[test]
fn a_key_leaves_a_backend_that_fails() {
    let balancer = balancer(Policy::Consistent, &nodes(4));
    let options = PickOptions {
        key: b"k",
        ..PickOptions::default()
    };
    let mut random = rng();
    let mut pick = || balancer.pick_with(seeded(options, &mut random)).unwrap();
    let home = pick().addr();
    let mut failed = 0;
    for _ in 0..1_000 {
        let upstream = pick();
        if upstream.addr() == home {
            failed += 1;
            upstream.failed();
        } else {
            upstream.succeeded(Duration::from_millis(1));
        }
    }
    assert!(failed > 0 && failed < 100, "{failed}");
}

#[test]
fn overflow_of_consistent_hashing_goes_to_those_that_work() {
    let balancer = balancer(Policy::Consistent, &nodes(2));
    let options = PickOptions {
        key: b"k",
        ..PickOptions::default()
    };
    let mut random = rng();
    let failing = balancer
        .pick_with(seeded(options, &mut random))
        .unwrap()
        .addr();
    let mut held = Vec::new();
    let mut failed = 0;
    for _ in 0..600 {
        let upstream = balancer.pick_with(seeded(options, &mut random)).unwrap();
        if upstream.addr() == failing {
            failed += 1;
            upstream.failed();
        } else {
            held.push(upstream);
        }
    }
    assert!(failed < 100, "{failed} of 600");
}

/// What becomes of ten backends while one key, such as that of a broken page, always fails; `is_broken` says which requests of a
/// second have it. The most that were ejected at one time, and the most requests of a second at one backend.
fn with_a_broken_key(seconds: u32, requests: u32, is_broken: impl Fn(u32) -> bool) -> (usize, u32) {
    let mut rig = Rig::new(Balancer::builder().policy(Policy::Consistent));
    for index in 0..10 {
        rig.nodes.insert(format!("n{index}"), super::bare(index));
    }
    rig.update();
    let (mut most, mut busiest) = (0, 0);
    for _ in 0..seconds {
        let mut counts = BTreeMap::<u16, u32>::new();
        for request in 0..requests {
            let key = match is_broken(request) {
                true => "broken".to_owned(),
                false => format!("key {}", rig.rng.u32(..)),
            };
            let options = PickOptions {
                key: key.as_bytes(),
                now: Some(rig.now),
                random: Some(rig.rng.u64(..)),
                ..PickOptions::default()
            };
            let upstream = rig.balancer.pick_with(options).unwrap();
            *counts.entry(upstream.addr().port()).or_default() += 1;
            match is_broken(request) {
                true => upstream.failed(),
                false => upstream.succeeded(Duration::from_millis(5)),
            }
        }
        rig.seconds(1);
        let backends = rig.balancer.backends();
        most = most.max(backends.iter().filter(|it| it.is_ejected).count());
        busiest = busiest.max(*counts.values().max().unwrap());
    }
    (most, busiest)
}

/// It is no fault of the backend that has the key.
#[test]
fn a_key_that_always_fails_takes_out_one_backend_at_most() {
    let (most, busiest) = with_a_broken_key(60, 1_000, |request| request % 20 == 0);
    assert!(most <= 1, "{most} were left out");
    assert!(busiest < 350, "{busiest} of 1,000 at one backend");
}

/// With few other requests, most backends get none in a second: they are ejected because they get nothing any more, and that counts
/// as well.
#[test]
fn a_key_that_always_fails_takes_out_one_backend_of_a_quiet_group() {
    let (most, _) = with_a_broken_key(180, 11, |request| request < 10);
    assert!(most <= 1, "{most} were left out");
}
