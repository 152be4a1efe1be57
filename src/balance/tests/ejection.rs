//! Backends that fail: how much they get, how they are tried, and how fast they are back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::{Rig, bare};
use crate::balance::{Adaptive, Balancer, PickOptions, Policy, Probes, Upstream};

/// How a backend answers.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Works,
    Fails,
    Refuses,
    Overloaded,
}

/// What came of requests that were sent one after the other, each at most three times.
#[derive(Debug, Default)]
struct Sent {
    requests: u32,
    failed: u32,
    /// Tries, by backend.
    tries: BTreeMap<u16, u32>,
}

impl Sent {
    fn part(&self, backends: impl IntoIterator<Item = u16>) -> f64 {
        let tries = backends
            .into_iter()
            .filter_map(|index| self.tries.get(&index));
        f64::from(tries.sum::<u32>()) / f64::from(self.requests)
    }
}

fn report(upstream: Upstream, answer: Answer) {
    match answer {
        Answer::Works => upstream.succeeded(Duration::from_millis(10)),
        Answer::Fails => upstream.failed(),
        Answer::Refuses => upstream.unreachable(),
        Answer::Overloaded => upstream.overloaded(),
    }
}

impl Rig {
    /// Sends requests for some seconds, this many in each.
    fn send(
        &mut self,
        seconds: u32,
        per_second: u32,
        mut answer: impl FnMut(u16) -> Answer,
    ) -> Sent {
        let mut sent = Sent::default();
        for _ in 0..seconds {
            for _ in 0..per_second {
                sent.requests += 1;
                let mut tried: Vec<SocketAddr> = Vec::new();
                let works = (0..3).any(|_| {
                    let options = PickOptions {
                        exclude: &tried,
                        now: Some(self.now),
                        random: Some(self.rng.u64(..)),
                        ..PickOptions::default()
                    };
                    let Some(upstream) = self.balancer.pick_with(options) else {
                        return false;
                    };
                    let index = upstream.addr().port() - 1000;
                    *sent.tries.entry(index).or_default() += 1;
                    tried.push(upstream.addr());
                    let answer = answer(index);
                    report(upstream, answer);
                    answer == Answer::Works
                });
                sent.failed += u32::from(!works);
            }
            self.seconds(1);
        }
        sent
    }

    fn ejected(&self) -> usize {
        let backends = self.balancer.backends();
        backends.iter().filter(|backend| backend.is_ejected).count()
    }
}

#[test]
fn however_many_refuse_connections_requests_are_served_by_those_that_work() {
    for policy in [Policy::Adaptive, Policy::Headroom] {
        for (alive, dead) in [(3, 3), (3, 9), (3, 27), (3, 97), (1, 200)] {
            let mut rig = Rig::new(Balancer::builder().policy(policy));
            for index in 0..alive + dead {
                rig.nodes.insert(format!("n{index:03}"), bare(index));
            }
            rig.update();
            let answer = |index| match index < alive {
                true => Answer::Works,
                false => Answer::Refuses,
            };
            rig.send(5, 200, answer);
            let sent = rig.send(60, 200, answer);
            let of_dead = sent.part(alive..alive + dead);
            assert_eq!(sent.failed, 0, "{policy:?}: {alive} and {dead}");
            assert!(
                of_dead <= 0.011,
                "{policy:?}: {alive} and {dead}: {of_dead}"
            );
            assert!(of_dead > 0.0, "{policy:?}: nobody looks whether they work");
        }
    }
}

#[test]
fn a_backend_that_works_again_is_back_within_seconds() {
    for answer in [Answer::Fails, Answer::Refuses, Answer::Overloaded] {
        let mut rig = Rig::of(5);
        rig.send(60, 200, |index| match index {
            2 => answer,
            _ => Answer::Works,
        });
        assert_eq!(rig.ejected(), 1, "{answer:?}");
        rig.send(10, 200, |_| Answer::Works);
        let sent = rig.send(20, 200, |_| Answer::Works);
        let part = sent.part([2]);
        assert!(part > 0.18, "{answer:?}: {part}");
        assert_eq!(rig.ejected(), 0, "{answer:?}");
    }
}

#[test]
fn a_backend_that_fails_now_and_then_gets_next_to_nothing() {
    for every in [2, 3] {
        let mut rig = Rig::of(10);
        let mut count = 0;
        let sent = rig.send(80, 750, |index| {
            count += u32::from(index == 4);
            match index == 4 && count % every == 0 {
                true => Answer::Fails,
                false => Answer::Works,
            }
        });
        let part = sent.part([4]);
        assert!(part < 0.003, "one of {every} fails: {part}");
    }
}

#[test]
fn a_backend_that_is_overloaded_in_part_gets_less_and_is_not_ejected() {
    let mut rig = Rig::of(5);
    let mut count = 0;
    let sent = rig.send(60, 200, |index| {
        count += u32::from(index == 1);
        match index == 1 && count % 3 == 0 {
            true => Answer::Overloaded,
            false => Answer::Works,
        }
    });
    assert_eq!(rig.ejected(), 0);
    let part = sent.part([1]);
    assert!((0.02..0.18).contains(&part), "{part}");
}

#[test]
fn backends_that_all_fail_by_chance_are_not_ejected() {
    let mut rig = Rig::of(10);
    let mut random = fastrand::Rng::with_seed(3);
    let mut fails = || match random.f64() < 0.3 {
        true => Answer::Fails,
        false => Answer::Works,
    };
    rig.send(10, 500, |_| fails());
    let mut ejected = 0;
    for _ in 0..60 {
        rig.send(1, 500, |_| fails());
        ejected += rig.ejected();
    }
    assert!(ejected < 60, "{ejected} of 600");
}

#[test]
fn a_request_that_cannot_be_sent_again_is_no_probe_while_others_come() {
    let mut rig = Rig::of(3);
    let fails = |index| match index == 0 {
        true => Answer::Fails,
        false => Answer::Works,
    };
    rig.send(2, 100, fails);
    assert_eq!(rig.ejected(), 1);
    let post = |rig: &mut Rig, seconds, gets: bool| {
        let mut probes = 0;
        for _ in 0..seconds {
            for _ in 0..100 {
                let options = PickOptions {
                    probes: Probes::IfNoOther,
                    now: Some(rig.now),
                    random: Some(rig.rng.u64(..)),
                    ..PickOptions::default()
                };
                let upstream = rig.balancer.pick_with(options).unwrap();
                probes += u32::from(upstream.is_probe());
                let index = upstream.addr().port() - 1000;
                report(upstream, fails(index));
            }
            match gets {
                true => drop(rig.send(1, 1, fails)),
                false => rig.seconds(1),
            }
        }
        probes
    };
    assert_eq!(post(&mut rig, 30, true), 0);
    let probes = post(&mut rig, 30, false);
    assert!((1..10).contains(&probes), "{probes}");
}

/// A probe is one request; until its outcome is known there is no other.
#[test]
fn there_is_one_probe_at_a_time() {
    let mut rig = Rig::of(3);
    let fails = |index| match index == 0 {
        true => Answer::Refuses,
        false => Answer::Works,
    };
    rig.send(2, 100, fails);
    let mut held = Vec::new();
    for _ in 0..30 {
        for _ in 0..100 {
            let upstream = rig.pick();
            match upstream.is_probe() {
                true => held.push(upstream),
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.seconds(1);
    }
    assert_eq!(held.len(), 1);
    // One that is dropped says nothing, and is followed by another one.
    held.clear();
    let next = rig.pick();
    assert!(next.is_probe());
    next.unreachable();
    assert!(!rig.pick().is_probe(), "a failure is followed by a pause");
}

/// A response that begins may still break off.
#[test]
fn a_probe_that_begins_well_and_then_fails_has_failed() {
    let mut rig = Rig::of(3);
    let fails = |index| match index == 0 {
        true => Answer::Refuses,
        false => Answer::Works,
    };
    rig.send(2, 100, fails);
    assert_eq!(rig.ejected(), 1);
    let (mut probes, mut requests) = (0, 0);
    let mut send = |rig: &mut Rig, breaks_off: bool| {
        let mut begun = Vec::new();
        for _ in 0..100 {
            let mut upstream = rig.pick();
            requests += 1;
            match upstream.is_probe() {
                true => {
                    probes += 1;
                    upstream.begins_to_answer();
                    begun.push(upstream);
                }
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        for upstream in begun {
            match breaks_off {
                true => upstream.failed(),
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.seconds(1);
        (probes, requests)
    };
    for _ in 0..60 {
        send(&mut rig, true);
    }
    assert_eq!(rig.ejected(), 1);
    let (probes, requests) = send(&mut rig, true);
    assert!(
        probes >= 10 && probes <= requests / 100 + 2,
        "{probes} of {requests}"
    );
    // Once they end well, it is back, though few of them may be open at a time.
    let mut rounds = 0;
    while rig.ejected() == 1 {
        rounds += 1;
        assert!(rounds < 20, "it is not used again");
        send(&mut rig, false);
    }
}

#[test]
fn what_was_in_flight_before_says_nothing_of_a_backend_that_is_ejected() {
    let mut rig = Rig::of(3);
    rig.seconds(1);
    let held: Vec<_> = (0..300).map(|_| rig.pick()).collect();
    let (of_first, others): (Vec<_>, Vec<_>) = held
        .into_iter()
        .partition(|upstream| upstream.addr().port() == 1000);
    drop(others);
    let mut of_first = of_first.into_iter();
    for upstream in of_first.by_ref().take(2) {
        upstream.unreachable();
    }
    assert_eq!(rig.ejected(), 1);
    for upstream in of_first.by_ref().take(50) {
        upstream.succeeded(Duration::from_millis(10));
    }
    assert_eq!(rig.ejected(), 1);
    // Requests that stay there for ever do not keep probes away.
    assert!(of_first.len() > 0);
    let sent = rig.send(10, 100, |_| Answer::Works);
    assert!(sent.tries[&0] >= 8, "{sent:?}");
    assert_eq!(rig.ejected(), 0);
}

#[test]
fn only_those_that_work_are_picked_where_that_is_asked_for() {
    for policy in [Policy::Adaptive, Policy::Headroom, Policy::Consistent] {
        let mut rig = Rig::new(Balancer::builder().policy(policy));
        for index in 0..3 {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        for _ in 0..3 {
            for key in 0..100_u32 {
                let options = PickOptions {
                    key: &key.to_le_bytes(),
                    now: Some(rig.now),
                    ..PickOptions::default()
                };
                let upstream = rig.balancer.pick_with(options).unwrap();
                match upstream.addr().port() {
                    1000 => upstream.unreachable(),
                    _ => upstream.succeeded(Duration::from_millis(10)),
                }
            }
            rig.seconds(1);
        }
        assert_eq!(rig.ejected(), 1, "{policy:?}");
        let working: [SocketAddr; 2] =
            ["10.0.0.1:1001", "10.0.0.1:1002"].map(|addr| addr.parse().unwrap());
        for only_working in [true, false] {
            for key in 0..50_u32 {
                let options = PickOptions {
                    key: &key.to_le_bytes(),
                    exclude: &working,
                    only_working,
                    now: Some(rig.now),
                    random: Some(rig.rng.u64(..)),
                    ..PickOptions::default()
                };
                let picked = rig.balancer.pick_with(options);
                assert_eq!(picked.is_none(), only_working, "{policy:?}");
            }
        }
    }
}

/// Where outcomes play no part, or not that part.
#[test]
fn nobody_is_ejected_where_that_is_not_wanted() {
    let never = Adaptive {
        eject_below: 0.0,
        ..Adaptive::default()
    };
    for (name, builder) in [
        ("turns", Balancer::builder().policy(Policy::RoundRobin)),
        ("random", Balancer::builder().policy(Policy::Random)),
        ("never", Balancer::builder().adaptive(never)),
    ] {
        let mut rig = Rig::new(builder);
        for index in 0..4 {
            rig.nodes.insert(format!("n{index}"), bare(index));
        }
        rig.update();
        rig.send(10, 200, |index| match index {
            0 => Answer::Fails,
            _ => Answer::Works,
        });
        assert_eq!(rig.ejected(), 0, "{name}");
    }
}

#[test]
fn backends_that_all_refuse_are_not_ejected_and_used_again_for_ever() {
    let mut rig = Rig::of(3);
    rig.send(10, 100, |_| Answer::Refuses);
    for _ in 0..10 {
        let sent = rig.send(1, 100, |_| Answer::Refuses);
        assert_eq!(sent.tries.len(), 3, "{sent:?}");
        assert_eq!(rig.ejected(), 0);
    }
    // When they work again, so does everything.
    let sent = rig.send(2, 100, |_| Answer::Works);
    assert_eq!(sent.failed, 0);
}

#[test]
fn after_a_failure_of_all_none_is_avoided_for_ever() {
    for refuses in [false, true] {
        let mut rig = Rig::of(10);
        let answer = if refuses {
            Answer::Refuses
        } else {
            Answer::Fails
        };
        rig.send(60, 50, |_| answer);
        // All work again, and the one that shows it first must not be the only one that is used.
        for _ in 0..100 {
            let upstream = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
            report(upstream, Answer::Works);
        }
        rig.send(20, 10, |_| Answer::Works);
        let sent = rig.send(60, 10, |_| Answer::Works);
        for index in 0..10 {
            assert!(sent.part([index]) > 0.05, "{refuses} {index}: {sent:?}");
        }
    }
}

#[test]
fn backends_that_are_at_work_are_not_ejected_for_what_was() {
    let mut rig = Rig::of(10);
    rig.send(60, 50, |_| Answer::Fails);
    // All work again, and answer after two seconds, but for the first one.
    let held: Vec<_> = (1..10)
        .map(|index| rig.balancer.upstream_at(bare(index).addr(0)).unwrap())
        .collect();
    for _ in 0..100 {
        let upstream = rig.balancer.upstream_at(bare(0).addr(0)).unwrap();
        report(upstream, Answer::Works);
    }
    rig.seconds(2);
    assert_eq!(rig.ejected(), 0);
    for upstream in held {
        upstream.succeeded(Duration::from_secs(2));
    }
}

#[test]
fn consistent_hashing_probes_with_the_keys_of_the_backend() {
    let mut rig = Rig::new(Balancer::builder().policy(Policy::Consistent));
    for index in 0..4 {
        rig.nodes.insert(format!("n{index}"), bare(index));
    }
    rig.update();
    let round = |rig: &mut Rig, works: bool| {
        let mut tries = BTreeMap::new();
        for key in 0..400_u32 {
            let options = PickOptions {
                key: &key.to_le_bytes(),
                now: Some(rig.now),
                random: Some(rig.rng.u64(..)),
                ..PickOptions::default()
            };
            let upstream = rig.balancer.pick_with(options).unwrap();
            let index = upstream.addr().port() - 1000;
            *tries.entry(index).or_default() += 1_u32;
            match index == 1 && !works {
                true => upstream.failed(),
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.seconds(1);
        tries
    };
    let before = round(&mut rig, true);
    for _ in 0..3 {
        round(&mut rig, false);
    }
    let failing = (0..40).map(|_| round(&mut rig, false).get(&1).copied().unwrap_or(0));
    let failing: u32 = failing.sum();
    assert!((1..=160).contains(&failing), "{failing} of 16,000");
    for _ in 0..10 {
        round(&mut rig, true);
    }
    assert_eq!(round(&mut rig, true), before, "each key is where it was");
}

/// A database that all of them share fails for half a second, or longer and across ticks.
#[test]
fn a_moment_in_which_all_fail_leaves_nobody_out() {
    all_fail(10, &[100..500, 0..0]);
    all_fail(6, &[700..1_000, 0..400]);
    all_fail(6, &[970..1_000, 0..1_000, 0..600]);
    for length in [60, 100, 130, 150, 180, 250] {
        all_fail(6, &[600..1_000, 0..length]);
    }
}

fn all_fail(count: u16, seconds: &[std::ops::Range<u32>]) {
    let mut rig = Rig::of(count);
    rig.send(5, 100, |_| Answer::Works);
    let one_second = |rig: &mut Rig, failing: std::ops::Range<u32>| {
        for request in 0..1_000 {
            let upstream = rig.pick();
            match failing.contains(&request) {
                true => upstream.failed(),
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.seconds(1);
    };
    for failing in seconds {
        one_second(&mut rig, failing.clone());
        let backends = rig.balancer.backends();
        let ejected = backends.iter().filter(|it| it.is_ejected).count();
        assert_eq!(ejected, 0, "{count}, {seconds:?}");
    }
    let expected = 1_000 / u32::from(count);
    for second in 0..5 {
        let counts = rig.traffic(1_000, |_| false);
        rig.seconds(1);
        assert!(
            counts.len() == usize::from(count) && counts.values().all(|got| *got > expected / 2),
            "{count}, {seconds:?}, {second}: {counts:?}"
        );
    }
    // A third that fails on its own is left out.
    let third = |index: u16| match index < count / 3 {
        true => Answer::Fails,
        false => Answer::Works,
    };
    rig.send(5, 100, third);
    let ejected = rig
        .balancer
        .backends()
        .into_iter()
        .filter(|it| it.is_ejected);
    assert_eq!(ejected.count(), usize::from(count / 3));
}

/// `POST`s are probes only if nothing else comes, which takes a moment to find out, but not again for each.
#[test]
fn without_other_requests_probes_follow_each_other() {
    let mut rig = Rig::of(3);
    rig.send(3, 100, |index| match index {
        0 => Answer::Fails,
        _ => Answer::Works,
    });
    let mut under_way = std::collections::VecDeque::new();
    for second in 0..40 {
        for _ in 0..20 {
            let options = PickOptions {
                probes: Probes::IfNoOther,
                now: Some(rig.now),
                random: Some(rig.rng.u64(..)),
                ..PickOptions::default()
            };
            let upstream = rig.balancer.pick_with(options).unwrap();
            match upstream.is_probe() {
                true => under_way.push_back((second + 2, upstream)),
                false => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        while under_way.front().is_some_and(|(until, _)| *until <= second) {
            let (_, probe) = under_way.pop_front().unwrap();
            probe.succeeded(Duration::from_secs(2));
        }
        rig.seconds(1);
        let backends = rig.balancer.backends();
        if backends.iter().all(|it| !it.is_ejected) {
            assert!(second < 32, "{second}");
            return;
        }
    }
    panic!("it is still left out");
}

/// The heaviest one fails before the next table: the others get its part by their weights.
#[test]
fn who_takes_the_place_of_a_heavy_backend_goes_by_weight() {
    let mut rig = Rig::new(Balancer::builder());
    for (index, weight) in [(0, 1_000.0), (1, 100.0), (2, 1.0)] {
        let node = super::Node::clone(&bare(index)).with_weight(weight);
        rig.nodes
            .insert(format!("n{index}"), std::sync::Arc::new(node));
    }
    rig.update();
    let tried = [bare(0).addr(0)];
    let mut counts = BTreeMap::<u16, u32>::new();
    for _ in 0..10_000 {
        let options = PickOptions {
            exclude: &tried,
            probes: Probes::No,
            now: Some(rig.now),
            random: Some(rig.rng.u64(..)),
            ..PickOptions::default()
        };
        let upstream = rig.balancer.pick_with(options).unwrap();
        *counts.entry(upstream.addr().port() - 1_000).or_default() += 1;
    }
    assert!(
        counts.get(&2).is_none_or(|count| *count < 300),
        "{counts:?}"
    );
}

/// As where a part of what is asked for needs a database that is away: they all fail alike, and none is left out for
/// chance. One that fails altogether is.
#[test]
fn where_all_fail_a_part_for_long_nobody_is_left_out_by_chance_but_who_fails_altogether() {
    for (count, failing, is_one_dead) in [(50, 0.3, false), (10, 0.3, false), (5, 0.5, true)] {
        let mut rig = Rig::of(count);
        rig.send(5, 100, |_| Answer::Works);
        let (mut ejected, mut of_dead) = (0, 0);
        for second in 0..40 {
            for _ in 0..100 * u32::from(count) {
                let upstream = rig.pick();
                let is_dead = is_one_dead && upstream.addr().port() == 1_000;
                of_dead += u32::from(is_dead && second >= 10);
                match is_dead || rig.rng.f64() < failing {
                    true => upstream.failed(),
                    false => upstream.succeeded(Duration::from_millis(10)),
                }
            }
            rig.seconds(1);
            let backends = rig.balancer.backends();
            let of_chance = backends
                .iter()
                .filter(|it| it.is_ejected && !(is_one_dead && it.addr.port() == 1_000));
            ejected += of_chance.count();
        }
        let case = format!("{count}, {failing}, {is_one_dead}: {ejected} ejected, {of_dead}");
        assert!(ejected < 20 && of_dead < 30, "{case}");
    }
}
