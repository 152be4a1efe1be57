//! Little traffic: one request at a time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::{Rig, bare};
use crate::balance::{Balancer, Headroom, PickOptions, Policy, TICK, Upstream};
use crate::load_report::LoadReport;
use crate::node::Node;

/// Sends requests one after the other, with a pause after each, and returns how many each backend got
/// and should have got by its weight.
fn send(rig: &mut Rig, requests: u32, pause: Duration) -> BTreeMap<u16, (f64, f64)> {
    let mut got: BTreeMap<u16, (f64, f64)> = BTreeMap::new();
    let mut ticked = rig.now;
    for _ in 0..requests {
        let backends = rig.balancer.backends();
        let total: f64 = backends.iter().map(|backend| backend.weight).sum();
        for backend in &backends {
            let index = backend.addr.port() - 1000;
            got.entry(index).or_default().1 += backend.weight / total;
        }
        let upstream = rig.pick();
        got.entry(upstream.addr().port() - 1000).or_default().0 += 1.0;
        upstream.succeeded(Duration::from_millis(5));
        rig.now += pause;
        while ticked + TICK <= rig.now {
            ticked += TICK;
            rig.balancer.tick(ticked);
        }
    }
    got
}

fn loaded(index: u16, cpu: f64, seconds: i64) -> Arc<Node> {
    let mut node = Node::clone(&bare(index)).with_metadata(json!({ "cpu_usage_percent": cpu }));
    node.last_seen = seconds * 1_000;
    Arc::new(node)
}

#[test]
fn idle_backends_share_by_weight_whatever_others_report() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for count in [2, 3, 10, 100] {
            for (with_metrics, pause) in [(true, 10), (true, 500), (true, 3_000), (false, 200)] {
                let mut rig = Rig::new(Balancer::builder().policy(policy));
                // The first one is loaded by others, and the rest is idle, and not equally so.
                for round in 0..20 {
                    for index in 0..count {
                        let cpu = if index == 0 {
                            90.0
                        } else {
                            f64::from(2 + index % 5)
                        };
                        let node = match with_metrics {
                            true => loaded(index, cpu, round * 5),
                            false => bare(index),
                        };
                        rig.nodes.insert(format!("n{index}"), node);
                    }
                    rig.update();
                    send(&mut rig, 20, Duration::from_millis(250));
                }
                let pause = Duration::from_millis(pause);
                let mut got = send(&mut rig, 300, pause);
                if with_metrics {
                    // Whoever is loaded gets no more than its share.
                    let (of_loaded, share) = got.remove(&0).unwrap();
                    assert!(of_loaded <= share + 2.5, "{of_loaded} instead of {share}");
                }
                let case =
                    format!("{policy:?}, {count} backends, metrics {with_metrics}, {pause:?}");
                check_shares(&got, &case);
            }
        }
    }
}

/// By chance, one of nine would get too much or too little in every seventeenth process.
#[test]
fn the_turns_of_a_loaded_backend_are_shared_as_evenly_as_all_others() {
    for seed in 0..300 {
        let mut rig = Rig::new(Balancer::builder());
        rig.rng = fastrand::Rng::with_seed(seed);
        for index in 0..10 {
            let cpu = match index {
                0 => 90.0,
                _ => f64::from(2 + index % 5),
            };
            rig.nodes.insert(format!("n{index}"), loaded(index, cpu, 5));
        }
        rig.update();
        send(&mut rig, 20, Duration::from_millis(10));
        let mut got = send(&mut rig, 300, Duration::from_millis(10));
        got.remove(&0);
        check_shares(&got, &format!("seed {seed}"));
    }
}

/// With 100 backends, 300 requests are three for each: whether their parts are right shows over ten times as many.
#[test]
fn a_hundred_backends_share_by_weight_as_soon_as_that_shows() {
    let mut rig = Rig::new(Balancer::builder());
    for index in 0..100 {
        rig.nodes.insert(
            format!("n{index}"),
            loaded(index, f64::from(2 + index % 5), 5),
        );
    }
    rig.update();
    let got = send(&mut rig, 3_000, Duration::from_millis(10));
    for (index, (got, share)) in got {
        assert!(
            (got - share).abs() <= 0.15 * share,
            "{index}: {got} instead of {share}"
        );
    }
}

/// The one to which its turn is passed on is excluded, as in a retry: then it is compared with others.
#[test]
fn a_loaded_backend_keeps_no_turn_because_another_one_is_excluded() {
    let mut rig = Rig::new(Balancer::builder());
    for (index, cpu) in [90.0, 3.0, 3.0, 3.0].into_iter().enumerate() {
        let index = u16::try_from(index).unwrap();
        rig.nodes.insert(format!("n{index}"), loaded(index, cpu, 5));
    }
    rig.update();
    let backends = rig.balancer.backends();
    let exclude = [backends
        .iter()
        .find(|it| it.addr.port() == 1001)
        .unwrap()
        .addr];
    let loaded = backends.iter().find(|it| it.addr.port() == 1000).unwrap();
    let total: f64 = backends.iter().map(|it| it.weight).sum();
    let mut got = 0;
    for _ in 0..300 {
        let options = PickOptions {
            exclude: &exclude,
            ..PickOptions::default()
        };
        let upstream = rig.balancer.pick_with(options).unwrap();
        assert_ne!(upstream.addr(), exclude[0]);
        got += i32::from(upstream.addr() == loaded.addr);
        upstream.succeeded(Duration::from_millis(5));
    }
    let share = 300.0 * loaded.weight / total;
    assert!(f64::from(got) < share / 3.0, "{got} of {share}");
}

/// Each has its share of what all of these got.
fn check_shares(all: &BTreeMap<u16, (f64, f64)>, case: &str) {
    let sum = |of: fn(&(f64, f64)) -> f64| all.values().map(of).sum::<f64>();
    let (requests, shares) = (sum(|it| it.0), sum(|it| it.1));
    for (index, (got, share)) in all {
        let expected = share * requests / shares;
        // Turns are whole, and by up to 2.6 too many or too few: the most of 300 seeds with 100 backends.
        let tolerance = (0.15 * expected).max(3.0);
        assert!(
            (got - expected).abs() <= tolerance,
            "{case}: {index} got {got} instead of {expected}"
        );
    }
}

/// All are busy with something else, which requests here change nothing about.
#[test]
fn static_weights_are_followed_whatever_all_report() {
    let twenty = [&[30.0][..], &[1.0; 19]].concat();
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for cpu in [0.0, 30.0, 50.0, 90.0] {
            for weights in [&[1.0, 9.0][..], &[1.0, 2.0, 3.0], &twenty] {
                for (at_once, is_told) in [(1, false), (1, true), (4, false)] {
                    let mut rig = Rig::new(Balancer::builder().policy(policy));
                    let total: f64 = weights.iter().sum();
                    let mut got = vec![0.0; weights.len()];
                    let mut in_flight = VecDeque::new();
                    for round in 0..30 {
                        for (index, weight) in (0..).zip(weights) {
                            let node = Node::clone(&loaded(index, cpu, round * 5));
                            let node = node.with_weight(*weight);
                            rig.nodes.insert(format!("n{index}"), Arc::new(node));
                        }
                        rig.update();
                        for _ in 0..20 {
                            let upstream = rig.pick();
                            got[usize::from(upstream.addr().port() - 1_000)] += 1.0;
                            in_flight.push_back(upstream);
                            if in_flight.len() == at_once {
                                let done: Upstream = in_flight.pop_front().unwrap();
                                if is_told {
                                    let mut report = LoadReport::new();
                                    report.in_flight = Some((done.in_flight() - 1).into());
                                    done.report(&report, rig.now);
                                }
                                done.succeeded(Duration::from_millis(5));
                            }
                        }
                        rig.now += TICK;
                        rig.balancer.tick(rig.now);
                    }
                    for (got, weight) in got.into_iter().zip(weights) {
                        let expected = 600.0 * weight / total;
                        // With several at once, requests in flight count, too.
                        let part = if at_once == 1 { 0.15 } else { 0.55 };
                        let tolerance = (part * expected).max(6.0);
                        assert!(
                            (got - expected).abs() <= tolerance,
                            "{policy:?}, CPU {cpu} %, {at_once} at once, told {is_told}: weight {weight} \
                             got {got} instead of {expected}"
                        );
                    }
                }
            }
        }
    }
}

/// All are busy with something else, and one has been slow. It is not forgotten.
#[test]
fn who_has_the_least_weight_gets_requests_one_after_the_other_too() {
    for count in [2, 3, 10] {
        for pause in [5, 50, 500] {
            let mut rig = Rig::new(Balancer::builder());
            let (mut last, mut most) = (vec![0_u32; count.into()], 0);
            let mut ticked = rig.now;
            for request in 0..3_000_u32 {
                if request % 100 == 0 {
                    let nodes = (0..count).map(|index| loaded(index, 90.0, request.into()));
                    let nodes = nodes.map(|node| (node.id.clone(), node));
                    rig.nodes = nodes.collect();
                    rig.update();
                }
                let upstream = rig.pick();
                let index = upstream.addr().port() - 1_000;
                // The first one is slow for some time.
                let latency = if index == 0 && request < 500 { 60 } else { 2 };
                upstream.succeeded(Duration::from_millis(latency));
                if request >= 1_000 {
                    last[usize::from(index)] = request;
                    let waits = last.iter().map(|last| request - (*last).max(1_000)).max();
                    most = most.max(waits.unwrap_or(0));
                }
                rig.now += Duration::from_millis(pause);
                while ticked + TICK <= rig.now {
                    ticked += TICK;
                    rig.balancer.tick(ticked);
                }
            }
            let weights: Vec<_> = rig.balancer.backends().iter().map(|it| it.weight).collect();
            let per_tick = 1_000 / pause as u32;
            assert!(
                most < 60 * u32::from(count) + 2 * per_tick,
                "{count} backends, {pause} ms: one got none of {most} requests, weights {weights:?}"
            );
        }
    }
}

/// One gets nothing, because all requests are for the other: it is asked for one when sixteen would have been its part,
/// and not before.
#[test]
fn who_misses_sixteen_requests_is_asked_for_one() {
    // Fewer than make a mean latency, just as many, and more.
    for per_tick in [1, 3, 4, 5, 40] {
        for has_tunnel in [false, true] {
            let mut rig = Rig::of(2);
            // After the first requests of both, neither is new.
            rig.burst();
            let mut tunnel = rig.balancer.upstream_at(bare(1).addr(0));
            match has_tunnel {
                true => tunnel.as_mut().unwrap().becomes_tunnel(),
                false => tunnel = None,
            }
            rig.seconds(2);
            let mut sent = 0;
            while !rig.balancer.is_any_on_trial() && sent < 1_000 {
                for _ in 0..per_tick {
                    let upstream = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
                    upstream.succeeded(Duration::from_millis(10));
                }
                sent += per_tick;
                rig.seconds(1);
            }
            assert!(
                (28..=36 + per_tick).contains(&sent),
                "{sent}, {per_tick} in each tick, tunnel {has_tunnel}"
            );
            // It gets the next one, and is not asked for again.
            let upstream = rig.pick();
            assert_eq!(upstream.addr(), bare(1).addr(0));
            upstream.succeeded(Duration::from_millis(10));
            rig.seconds(1);
            assert!(!rig.balancer.is_any_on_trial());
            drop(tunnel);
        }
    }
}

/// Whoever works on a request for long, as one that hangs, is not asked for more.
#[test]
fn who_has_a_request_misses_none() {
    let mut rig = Rig::of(2);
    rig.burst();
    let held = rig.balancer.upstream_at(bare(1).addr(0)).unwrap();
    for _ in 0..1000 {
        let upstream = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
        upstream.succeeded(Duration::from_millis(10));
        rig.seconds(1);
        assert!(!rig.balancer.is_any_on_trial());
    }
    drop(held);
}

/// A policy for which CPU does not matter treats all alike.
#[test]
fn headroom_follows_its_own_weights() {
    let headroom = Headroom {
        cpu: 0.0,
        memory: 1.0,
        ..Headroom::default()
    };
    let builder = Balancer::builder().policy(Policy::Headroom);
    let mut rig = Rig::new(builder.headroom(headroom));
    for (index, cpu) in [(0, 100.0), (1, 0.0)] {
        rig.nodes.insert(format!("n{index}"), loaded(index, cpu, 1));
    }
    rig.update();
    let got = send(&mut rig, 100, Duration::from_millis(10));
    assert!((45.0..=55.0).contains(&got[&0].0), "{got:?}");
}

/// Many others load the backends, and its weights say how much: nobody with nothing in flight here is passed over.
#[test]
fn headroom_follows_its_weights_at_any_load() {
    let mut rig = Rig::new(Balancer::builder().policy(Policy::Headroom));
    for (index, cpu) in [(0, 85.0), (1, 70.0), (2, 55.0)] {
        rig.nodes.insert(format!("n{index}"), loaded(index, cpu, 1));
    }
    rig.update();
    send(&mut rig, 100, Duration::from_millis(500));
    for (index, (got, expected)) in send(&mut rig, 300, Duration::from_millis(10)) {
        let tolerance = 0.15 * expected;
        assert!(
            (got - expected).abs() <= tolerance,
            "{index} got {got} instead of {expected}"
        );
    }
}

#[test]
fn who_joins_gets_a_request_at_once_but_not_all_of_them() {
    let mut rig = Rig::of(3);
    send(&mut rig, 10, TICK);
    rig.nodes.insert("n3".to_owned(), bare(3));
    rig.update();
    let got = send(&mut rig, 2, TICK);
    assert_eq!(got[&3].0, 1.0, "{got:?}");
    // Many at once: every second request at most.
    for index in 4..24 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let got = send(&mut rig, 44, Duration::from_millis(20));
    let of_old: f64 = (0..4).map(|index| got[&index].0).sum();
    assert!(of_old >= 3.0, "{got:?}");
    assert!((4..24).all(|index| got[&index].0 >= 1.0), "{got:?}");
}

#[test]
fn several_balancers_do_not_begin_with_the_same_backend() {
    let mut first = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let mut rig = Rig::of(10);
        rig.rng = fastrand::Rng::with_seed(seed);
        first.insert(rig.pick().addr());
    }
    assert!(first.len() >= 5, "{first:?}");
}

/// As for a server of language models: it names its queue, and not its CPU.
#[test]
fn a_queue_that_is_empty_shows_that_a_backend_is_idle() {
    let mut rig = Rig::new(Balancer::builder());
    for round in 0..40 {
        for (index, queue) in [(0, 1_000), (1, 0), (2, 0)] {
            let mut node = Node::clone(&bare(index)).with_metadata(json!({
                "queue_depth": if round < 30 { queue } else { 0 },
            }));
            node.last_seen = round * 5_000;
            rig.nodes.insert(format!("n{index}"), Arc::new(node));
        }
        rig.update();
        send(&mut rig, 10, Duration::from_millis(500));
    }
    let weights: Vec<_> = rig.balancer.backends().iter().map(|it| it.weight).collect();
    let least = weights.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(
        least < 0.8,
        "{weights:?}: the weights are too alike to show anything"
    );
    for (index, (got, expected)) in send(&mut rig, 300, Duration::from_millis(10)) {
        let tolerance = 0.15 * expected + 2.0;
        assert!(
            (got - expected).abs() <= tolerance,
            "{index} got {got} instead of {expected}, weights {weights:?}"
        );
    }
}

/// As they do with all requests in flight that are no tunnels.
#[test]
fn new_tunnels_go_where_there_are_few_whatever_the_static_weights() {
    for policy in [Policy::Adaptive, Policy::Headroom, Policy::Consistent] {
        let mut rig = Rig::new(Balancer::builder().policy(policy));
        for (index, weight) in [(0, 1.0), (1, 2.0)] {
            let node = Node::clone(&bare(index)).with_weight(weight);
            rig.nodes.insert(format!("n{index}"), Arc::new(node));
        }
        rig.update();
        let mut tunnels = Vec::new();
        for _ in 0..1000 {
            let mut upstream = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
            upstream.becomes_tunnel();
            tunnels.push(upstream);
        }
        let mut at_second = 0;
        for request in 0..120_u32 {
            let key = match policy {
                // One key for all of them, as behind one address.
                Policy::Consistent => 7,
                _ => request,
            };
            let options = PickOptions {
                key: &key.to_le_bytes(),
                for_tunnel: true,
                now: Some(rig.now),
                random: Some(rig.rng.u64(..)),
                ..PickOptions::default()
            };
            let mut upstream = rig.balancer.pick_with(options).unwrap();
            at_second += u32::from(upstream.addr() == bare(1).addr(0));
            upstream.becomes_tunnel();
            tunnels.push(upstream);
        }
        match policy {
            // Up to what is fair for its weight, and a quarter more.
            Policy::Consistent => assert!((40..=120).contains(&at_second), "{at_second}"),
            _ => assert!(at_second > 100, "{policy:?}: {at_second}"),
        }
    }
}

/// A WebSocket may be silent for hours.
#[test]
fn tunnels_are_no_work_that_requests_make_way_for() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        let mut rig = Rig::new(Balancer::builder().policy(policy));
        for index in 0..3 {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        // The third one has just been started again, so all tunnels are at the two others.
        let mut tunnels = Vec::new();
        for index in [0, 1] {
            for _ in 0..200 {
                let mut upstream = rig.balancer.upstream_at(bare(index).addr(0)).unwrap();
                upstream.becomes_tunnel();
                tunnels.push(upstream);
            }
        }
        for (index, (got, expected)) in send(&mut rig, 300, Duration::from_millis(10)) {
            assert!(
                (got - expected).abs() < 15.0,
                "{index} got {got} instead of {expected}"
            );
        }
        assert_eq!(tunnels[0].in_flight(), 200);
        // The next ones make up for it.
        for _ in 0..190 {
            let options = PickOptions {
                for_tunnel: true,
                now: Some(rig.now),
                random: Some(rig.rng.u64(..)),
                ..PickOptions::default()
            };
            let mut upstream = rig.balancer.pick_with(options).unwrap();
            upstream.becomes_tunnel();
            tunnels.push(upstream);
        }
        let at_third = tunnels
            .iter()
            .filter(|it| it.addr() == bare(2).addr(0))
            .count();
        assert!(at_third > 150, "{at_third}");
        drop(tunnels);
        let backends = rig.balancer.backends();
        assert!(backends.iter().all(|it| it.in_flight == 0), "{backends:?}");
    }
}
