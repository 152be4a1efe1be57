//! One of many processes before many backends uses a part of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::{Rig, TICK, bare};
use crate::balance::{Adaptive, Balancer, BalancerBuilder, PickOptions, Policy};
use crate::load_report::LoadReport;
use crate::node::Node;

const MANY: u16 = 100;
/// What a process that is one of many has in flight at all backends together.
const FEW: usize = 4;

/// A balancer before many backends that are busy with what others send.
fn busy(builder: BalancerBuilder) -> Rig {
    let mut rig = Rig::new(builder);
    for index in 0..MANY {
        rig.report(index, 70.0, 1);
    }
    rig
}

impl Rig {
    /// Has a few requests in flight for some seconds. Returns where requests went in the last ten of them.
    fn few(&mut self, seconds: u32, fails: impl Fn(u16) -> bool) -> BTreeSet<u16> {
        let mut used = BTreeSet::new();
        for second in 0..seconds {
            for _ in 0..10 {
                let held: Vec<_> = (0..FEW).map(|_| self.pick()).collect();
                for upstream in held {
                    let index = upstream.addr().port() - 1000;
                    if second + 10 >= seconds {
                        used.insert(index);
                    }
                    match fails(index) {
                        true => upstream.unreachable(),
                        false => upstream.succeeded(Duration::from_millis(10)),
                    }
                }
            }
            let held: Vec<_> = (0..FEW).map(|_| self.pick()).collect();
            self.now += TICK;
            self.balancer.tick(self.now);
            for upstream in held {
                let index = upstream.addr().port() - 1000;
                match fails(index) {
                    true => upstream.unreachable(),
                    false => upstream.succeeded(Duration::from_millis(10)),
                }
            }
        }
        used
    }

    fn outside(&self) -> BTreeSet<u16> {
        let backends = self.balancer.backends();
        let outside = backends.iter().filter(|backend| backend.is_outside);
        outside.map(|backend| backend.addr.port() - 1000).collect()
    }
}

#[test]
fn it_uses_a_part_and_reaches_the_others() {
    let mut rig = busy(Balancer::builder());
    assert!(rig.few(5, |_| false).len() > 50, "not known yet");
    let used = rig.few(30, |_| false);
    assert_eq!(used.len(), 12, "{used:?}");
    let outside = rig.outside();
    assert_eq!(outside.len(), usize::from(MANY) - 12);
    assert!(used.is_disjoint(&outside));
    assert_eq!(rig.balancer.len(), usize::from(MANY));
    assert_eq!(rig.balancer.working(), usize::from(MANY));
    let shown = rig.balancer.backends();
    assert!(shown.iter().all(|it| (it.share == 0.0) == it.is_outside));

    // What has to go to a certain backend does.
    let one = *outside.first().unwrap();
    let addr = std::net::SocketAddr::from(([10, 0, 0, 1], 1000 + one));
    assert!(rig.balancer.upstream_at(addr).is_some());
    assert!(rig.balancer.works_at(addr));
    // What has been tried at all of the subset goes to others.
    let tried: Vec<_> = used
        .iter()
        .map(|index| std::net::SocketAddr::from(([10, 0, 0, 1], 1000 + index)))
        .collect();
    let options = PickOptions {
        exclude: &tried,
        ..PickOptions::default()
    };
    let further = rig.balancer.pick_with(options).unwrap();
    assert!(outside.contains(&(further.addr().port() - 1000)));
}

#[test]
fn others_take_the_places_of_those_that_fail() {
    let mut rig = busy(Balancer::builder());
    let before = rig.few(30, |_| false);
    let dead: BTreeSet<u16> = before.iter().copied().take(9).collect();
    let fails = |index: u16| dead.contains(&index);
    rig.few(3, fails);
    let mut failed = 0;
    let mut all = 0;
    for _ in 0..1_000 {
        let upstream = rig.pick();
        all += 1;
        let index = upstream.addr().port() - 1000;
        match fails(index) {
            true => {
                failed += 1;
                upstream.unreachable();
            }
            false => upstream.succeeded(Duration::from_millis(10)),
        }
    }
    assert!(failed * 20 < all, "{failed} of {all}");
    let works = rig.few(20, fails).difference(&dead).count();
    assert_eq!(works, 12);
    // Once they work again, they have their places.
    assert_eq!(rig.few(120, |_| false), before);
}

#[test]
fn nodes_that_leave_and_join_change_their_places_only() {
    let mut rig = busy(Balancer::builder());
    let before = rig.few(30, |_| false);
    let gone = *before.first().unwrap();
    rig.nodes.remove(&format!("n{gone}"));
    rig.update();
    let after = rig.few(10, |_| false);
    assert_eq!(after.len(), 12);
    assert_eq!(before.difference(&after).count(), 1);
    for index in MANY..MANY + 5 {
        rig.report(index, 70.0, 1);
    }
    // Those that are left out do not get a first request.
    let mut used = BTreeSet::new();
    for _ in 0..30 {
        used.extend(rig.few(1, |_| false));
        assert!(used.is_disjoint(&rig.outside()) || used.len() <= 12 + 5);
    }
    let joined: Vec<_> = used.iter().filter(|index| **index >= MANY).collect();
    assert!(joined.iter().all(|index| !rig.outside().contains(index)));
    assert!(used.difference(&after).count() <= 5);
}

#[test]
fn all_are_used_where_they_are_idle_or_there_is_enough_to_do() {
    let mut rig = busy(Balancer::builder());
    assert_eq!(rig.few(30, |_| false).len(), 12);
    for index in 0..MANY {
        rig.report(index, 5.0, 2);
    }
    rig.seconds(2);
    assert!(rig.outside().is_empty());

    let mut rig = busy(Balancer::builder());
    rig.few(30, |_| false);
    let held: Vec<_> = (0..200).map(|_| rig.pick()).collect();
    rig.seconds(1);
    assert!(rig.outside().is_empty());
    drop(held);
}

#[test]
fn it_can_be_switched_off_and_other_policies_use_all() {
    let off = Adaptive {
        subset_in_flight: 0.0,
        ..Adaptive::default()
    };
    let policies = [Policy::Headroom, Policy::RoundRobin, Policy::Random];
    let mut builders: Vec<_> = policies.map(|it| Balancer::builder().policy(it)).into();
    builders.push(Balancer::builder().adaptive(off));
    for builder in builders {
        let mut rig = busy(builder);
        rig.few(30, |_| false);
        assert!(rig.outside().is_empty());
    }
    // A change of settings puts an end to it at once.
    let mut rig = busy(Balancer::builder());
    rig.few(30, |_| false);
    assert!(!rig.outside().is_empty());
    let builder = Balancer::builder().policy(Policy::RoundRobin);
    rig.balancer.change_to_valid(&builder, rig.now);
    assert!(rig.outside().is_empty());
}

#[test]
fn what_all_fail_alike_ejects_nobody() {
    let mut rig = busy(Balancer::builder());
    rig.few(30, |_| false);
    let ejected = |rig: &Rig| {
        let backends = rig.balancer.backends();
        backends.iter().filter(|it| it.is_ejected).count()
    };
    // One request of ten, for a minute.
    for _ in 0..60 {
        for _ in 0..200 {
            let upstream = rig.pick();
            match rig.rng.u8(..10) {
                0 => upstream.failed(),
                _ => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.few(1, |_| false);
        // As chance has it without a subset, too.
        assert!(ejected(&rig) <= 3);
    }
    assert!(!rig.outside().is_empty());
    // All requests, for some seconds.
    for _ in 0..5 {
        for _ in 0..200 {
            rig.pick().failed();
        }
        rig.seconds(1);
        assert_eq!(ejected(&rig), 0);
    }
}

#[test]
fn a_burst_does_not_wait_for_the_next_tick() {
    let mut rig = busy(Balancer::builder());
    assert_eq!(rig.few(30, |_| false).len(), 12);
    let held: Vec<_> = (0..500).map(|_| rig.pick()).collect();
    let backends = rig.balancer.backends();
    let most = backends.iter().map(|it| it.in_flight).max();
    assert!(most < Some(12), "{most:?} instead of 5");
    drop(held);
}

/// Several processes may begin with what one has learned, and must not use the same part for that.
#[test]
fn a_successor_uses_another_part() {
    let mut rig = busy(Balancer::builder());
    let used = rig.few(30, |_| false);
    let mut next = busy(Balancer::builder());
    next.rng = fastrand::Rng::with_seed(8);
    let learned = rig.balancer.learned(rig.now);
    next.balancer
        .teach(&learned, Duration::from_secs(1), next.now);
    assert_ne!(next.few(30, |_| false), used);
}

/// A node that has lost its lease is away for a moment; meanwhile the subset ends.
#[test]
fn who_returns_after_the_subset_has_ended_is_used() {
    for other in [Policy::Adaptive, Policy::Headroom] {
        let mut rig = busy(Balancer::builder());
        for index in 0..MANY {
            let node = &rig.nodes[&format!("n{index}")];
            let node = Node::clone(node).with_run(index.into());
            rig.nodes.insert(node.id.clone(), Arc::new(node));
        }
        rig.update();
        rig.few(30, |_| false);
        let one = *rig.outside().first().unwrap();
        let node = rig.nodes.remove(&format!("n{one}")).unwrap();
        rig.update();
        match other {
            Policy::Headroom => {
                let builder = Balancer::builder().policy(other);
                rig.balancer.change_to_valid(&builder, rig.now);
            }
            _ => {
                let left: Vec<u16> = (0..MANY).filter(|index| *index != one).collect();
                for index in left {
                    rig.report(index, 5.0, 2);
                }
                rig.seconds(2);
            }
        }
        assert!(rig.outside().is_empty());
        rig.nodes.insert(node.id.clone(), node);
        rig.update();
        assert!(rig.outside().is_empty(), "{other:?}");
    }
}

/// Nobody else uses them: with few processes, chance leaves some backends to none.
#[test]
fn who_is_left_out_and_idle_is_used() {
    let mut rig = busy(Balancer::builder());
    rig.few(30, |_| false);
    let outside = rig.outside();
    assert_eq!(outside.len(), 88);
    // Every third of them has nothing to do.
    for round in 2..40 {
        for index in 0..MANY {
            let is_idle = rig.outside().contains(&index) && index % 3 == 0;
            rig.report(index, if is_idle { 1.0 } else { 70.0 }, round);
        }
        rig.few(5, |_| false);
    }
    assert!(rig.outside().len() <= 50, "{}", rig.outside().len());
}

/// As of model servers, which take one request each.
#[test]
fn where_those_that_are_used_are_full_others_are_found_at_once() {
    let mut rig = busy(Balancer::builder());
    let mut held = Vec::new();
    for _ in 0..30 {
        held.clear();
        for _ in 0..20 {
            held.push(pick_with_room(&mut rig));
        }
        rig.seconds(1);
    }
    assert!(rig.outside().len() >= 50);
    // All of the subset get one, and then the others do.
    for _ in 20..90 {
        held.push(pick_with_room(&mut rig));
    }
}

/// As the proxy does where each backend may have one request.
fn pick_with_room(rig: &mut Rig) -> crate::balance::Upstream {
    let mut full = Vec::new();
    for _ in 0..33 {
        let options = PickOptions {
            exclude: &full,
            some_full: full.len() > 3,
            random: Some(rig.rng.u64(..)),
            now: Some(rig.now),
            ..PickOptions::default()
        };
        let upstream = rig.balancer.pick_with(options).unwrap();
        if upstream.in_flight() == 1 {
            return upstream;
        }
        full.push(upstream.addr());
    }
    panic!("none was found that has room");
}

/// So many busy backends, of which the first ones are near.
fn busy_in_zones(near: u16, all: u16) -> Rig {
    let mut rig = Rig::new(Balancer::builder().zone("a"));
    for index in 0..all {
        rig.report(index, 70.0, 1);
        let node = &rig.nodes[&format!("n{index}")];
        let node = Node::clone(node).with_zone(if index < near { "a" } else { "b" });
        rig.nodes.insert(node.id.clone(), Arc::new(node));
    }
    rig.update();
    rig
}

/// A setting of eight requests in flight at each is kept, though four are much for fewer.
#[test]
fn as_many_are_in_flight_at_each_as_is_set() {
    let mut rig = busy(Balancer::builder().adaptive(Adaptive {
        subset_in_flight: 8.0,
        ..Adaptive::default()
    }));
    let mut held = std::collections::VecDeque::new();
    let (mut inside, mut all) = (0, 0);
    for second in 0..60 {
        for _ in 0..200 {
            let upstream = rig.pick();
            if second >= 40 {
                let outside = rig.balancer.backends();
                let is_there = |it: &&crate::balance::BackendStatus| it.addr == upstream.addr();
                inside += u32::from(!outside.iter().find(is_there).unwrap().is_outside);
                all += 1;
            }
            held.push_back(upstream);
            if held.len() > 200 {
                held.pop_front()
                    .unwrap()
                    .succeeded(Duration::from_millis(900));
            }
        }
        rig.seconds(1);
    }
    assert!(
        (50..=80).contains(&rig.outside().len()),
        "{}",
        rig.outside().len()
    );
    assert!(inside * 10 > all * 9, "{inside} of {all}");
}

#[test]
fn where_those_that_are_used_are_excluded_others_are_drawn_by_share() {
    let mut rig = busy_in_zones(100, 300);
    rig.few(30, |_| false);
    let outside = rig.outside();
    assert_eq!(outside.len(), 300 - 24);
    let near: Vec<u16> = (0..100).filter(|index| !outside.contains(index)).collect();
    let excluded: Vec<_> = near.iter().map(|index| bare(*index).addr(0)).collect();
    let mut stayed = 0;
    for _ in 0..2_000 {
        let options = PickOptions {
            exclude: &excluded,
            random: Some(rig.rng.u64(..)),
            now: Some(rig.now),
            ..PickOptions::default()
        };
        let upstream = rig.balancer.pick_with(options).unwrap();
        stayed += u32::from(upstream.addr().port() < 1_100);
        upstream.succeeded(Duration::from_millis(10));
    }
    assert!(stayed > 1_500, "{stayed}");
}

/// A small zone is not left for some requests that it has.
#[test]
fn a_small_zone_keeps_its_requests() {
    let mut rig = busy_in_zones(10, 210);
    rig.few(30, |_| false);
    assert!(!rig.outside().is_empty());
    let held: Vec<_> = (0..10)
        .flat_map(|index| (0..3).map(move |_| index))
        .map(|index| rig.balancer.upstream_at(bare(index).addr(0)).unwrap())
        .collect();
    let mut far = 0;
    for _ in 0..1_000 {
        let upstream = rig.pick();
        far += u32::from(upstream.addr().port() >= 1_010);
    }
    assert!(far < 50, "{far}");
    drop(held);
}

/// Loads come with responses only, so nothing is known of those that are left out.
#[test]
fn all_are_used_again_where_only_responses_tell_loads() {
    let mut rig = Rig::of(MANY);
    let answer = |rig: &mut Rig, cpu: f64, seconds: u32| {
        for _ in 0..seconds {
            for _ in 0..60 {
                let upstream = rig.pick();
                let mut report = LoadReport::new();
                report.cpu = Some(cpu);
                upstream.report(&report, rig.now);
                upstream.succeeded(Duration::from_millis(10));
            }
            let held: Vec<_> = (0..FEW).map(|_| rig.pick()).collect();
            rig.now += TICK;
            rig.balancer.tick(rig.now);
            drop(held);
        }
    };
    answer(&mut rig, 0.7, 60);
    assert!(!rig.outside().is_empty());
    answer(&mut rig, 0.05, 300);
    assert!(rig.outside().is_empty(), "{}", rig.outside().len());
}

/// A scanner gets 404 everywhere: what those that are left out answered before is not usual now.
#[test]
fn what_others_refused_before_is_not_usual() {
    let mut rig = busy(Balancer::builder());
    rig.few(30, |_| false);
    for _ in 0..30 {
        for _ in 0..100 {
            let upstream = rig.pick();
            match rig.rng.u8(..10) {
                0..6 => upstream.answered(Duration::from_millis(2), rig.now),
                _ => upstream.succeeded(Duration::from_millis(10)),
            }
        }
        rig.few(1, |_| false);
    }
    assert!(!rig.outside().is_empty());
    let usual = rig.balancer.usual_refusing();
    assert!(usual > 0.3, "{usual}");
}
