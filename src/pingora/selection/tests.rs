use std::time::{Duration, Instant};

use super::super::weights::LiveWeights;
use super::*;
use crate::balance::{Balancer, BalancerBuilder, Policy};
use crate::node::{Node, NodeState};
use crate::view::Change;
use serde_json::json;

fn headroom() -> BalancerBuilder {
    Balancer::builder().policy(Policy::Headroom)
}

fn live(settings: &BalancerBuilder) -> Arc<LiveWeights> {
    LiveWeights::try_new(settings).unwrap()
}

fn refresh(weights: &Arc<LiveWeights>, nodes: &[Arc<Node>]) -> bool {
    weights.update(nodes, Instant::now())
}

fn node(port: u16, cpu: f64) -> Arc<Node> {
    let node = Node::new(format!("n{port}"), "127.0.0.1".parse().unwrap())
        .with_port(port)
        .with_metadata(json!({ "cpu_usage_percent": cpu }));
    Arc::new(node)
}

fn selection(weights: &Arc<LiveWeights>) -> Arc<MetricsWeighted> {
    let backends = weights.backends().into_iter().map(|(backend, _)| backend);
    Arc::new(MetricsWeighted::build(&backends.collect()))
}

fn first_ports(selection: &Arc<MetricsWeighted>, count: usize) -> Vec<u16> {
    let port = |_| {
        let mut iter = selection.iter(b"");
        iter.next().unwrap().addr.as_inet().unwrap().port()
    };
    (0..count).map(port).collect()
}

fn share(ports: &[u16], port: u16) -> f64 {
    ports.iter().filter(|other| **other == port).count() as f64 / ports.len() as f64
}

#[test]
fn a_weight_change_takes_effect_without_a_build() {
    let weights = live(&headroom());
    assert!(refresh(&weights, &[node(1, 0.0), node(2, 0.0)]));
    let selection = selection(&weights);
    assert!((share(&first_ports(&selection, 1000), 1) - 0.5).abs() < 0.01);
    assert!(
        !refresh(&weights, &[node(1, 100.0), node(2, 0.0)]),
        "the membership is the same"
    );
    let share = share(&first_ports(&selection, 3000), 1);
    assert!((share - 1.0 / 3.0).abs() < 0.01, "0.5 against 1: {share}");
}

#[test]
fn picks_are_spread_evenly() {
    let weights = live(&headroom());
    let heavy = Arc::new(Node::clone(&node(1, 0.0)).with_weight(5.0));
    refresh(&weights, &[heavy, node(2, 0.0), node(3, 0.0)]);
    let ports = first_ports(&selection(&weights), 700);
    for port in [2, 3] {
        assert!((share(&ports, port) - 1.0 / 7.0).abs() < 0.01);
    }
    let longest = ports.chunk_by(|a, b| a == b).map(<[u16]>::len).max();
    assert!(
        longest <= Some(4),
        "5,1,1 in blocks gives five: {longest:?}"
    );
}

#[test]
fn nothing_is_published_while_nothing_changes() {
    let weights = live(&Balancer::builder().policy(Policy::RoundRobin));
    let heavy = |weight| Arc::new(Node::clone(&node(1, 50.0)).with_weight(weight));
    refresh(&weights, &[heavy(3.0), node(2, 50.0)]);
    let selection = selection(&weights);
    let published = || selection.shared.published.load_full();
    let before = published();
    weights.tick(Instant::now());
    refresh(&weights, &[heavy(3.0), node(2, 90.0)]);
    assert!(Arc::ptr_eq(&before, &published()));
    refresh(&weights, &[heavy(4.0), node(2, 90.0)]);
    assert!(!Arc::ptr_eq(&before, &published()));
}

#[test]
fn later_choices_never_repeat_and_come_to_an_end() {
    let weights = live(&headroom());
    let nodes: Vec<_> = (1..=20).map(|port| node(port, f64::from(port))).collect();
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    let mut iter = selection.iter(b"");
    let mut seen = BTreeSet::new();
    while let Some(backend) = iter.next() {
        assert!(seen.insert(backend.addr.clone()), "repeated");
    }
    assert_eq!(seen.len(), 20);
}

#[test]
fn no_backends_and_foreign_backends() {
    let none = Arc::new(MetricsWeighted::build(&BTreeSet::new()));
    assert!(none.iter(b"").next().is_none());
    let zero =
        ["127.0.0.1:1", "127.0.0.1:2"].map(|addr| Backend::new_with_weight(addr, 0).unwrap());
    let selection = Arc::new(MetricsWeighted::build(&zero.into()));
    assert!(selection.iter(b"").next().is_none());
    let some = [("127.0.0.1:1", 0), ("127.0.0.1:2", 2)]
        .map(|(addr, weight)| Backend::new_with_weight(addr, weight).unwrap());
    let selection = Arc::new(MetricsWeighted::build(&some.into()));
    assert_eq!(share(&first_ports(&selection, 100), 2), 1.0);
}

#[test]
fn a_weight_of_zero_is_no_traffic() {
    for policy in [Policy::Adaptive, Policy::Headroom, Policy::RoundRobin] {
        let weights = live(&Balancer::builder().policy(policy));
        let weighted =
            |port: u16, weight: f64| Arc::new(Node::clone(&node(port, 50.0)).with_weight(weight));
        let enabled = || {
            let serving = |(backend, serving): &(Backend, bool)| {
                let port = backend.addr.as_inet().unwrap().port();
                serving.then_some(port)
            };
            let mut ports: Vec<_> = weights.backends().iter().filter_map(serving).collect();
            ports.sort_unstable();
            ports
        };
        refresh(&weights, &[weighted(1, 1.0), weighted(2, 1.0)]);
        let selection = selection(&weights);
        assert_eq!(enabled(), [1, 2]);
        assert!(
            refresh(&weights, &[weighted(1, 0.0), weighted(2, 1.0)]),
            "Pingora has to discover again"
        );
        assert_eq!(enabled(), [2]);
        assert_eq!(share(&first_ports(&selection, 200), 2), 1.0, "{policy:?}");
        let mut iter = selection.iter(b"");
        assert!(iter.next().is_some() && iter.next().is_none());
        refresh(&weights, &[weighted(1, 0.0), weighted(2, 0.0)]);
        assert!(selection.iter(b"").next().is_none(), "{policy:?}");
        assert!(enabled().is_empty());
        refresh(&weights, &[weighted(1, 1.0), weighted(2, 0.0)]);
        assert_eq!(share(&first_ports(&selection, 200), 1), 1.0, "{policy:?}");
    }
}

#[test]
fn of_two_registrations_at_one_address_the_newer_holds_it() {
    let weights = live(&headroom());
    let mut old = Node::clone(&node(1, 0.0));
    old.last_seen = 1;
    let mut new = Node::clone(&node(1, 0.0));
    new.id = "new".to_owned();
    new.last_seen = 2;
    refresh(&weights, &[Arc::new(new), Arc::new(old)]);
    let backends = weights.backends();
    assert_eq!(backends.len(), 1);
    let node = BackendNode::of(&backends[0].0).unwrap().node();
    assert_eq!(node.id, "new");
}

fn draining(port: u16) -> Arc<Node> {
    Arc::new(Node::clone(&node(port, 0.0)).with_state(NodeState::Draining))
}

#[test]
fn who_drains_or_is_gone_gets_nothing_before_pingora_discovers_again() {
    for policy in [Policy::Adaptive, Policy::Headroom, Policy::RoundRobin] {
        let weights = live(&Balancer::builder().policy(policy));
        refresh(&weights, &[node(1, 0.0), node(2, 0.0), node(3, 0.0)]);
        let selection = selection(&weights);
        let offered = || {
            let mut iter = selection.iter(b"");
            let mut ports = BTreeSet::new();
            while let Some(backend) = iter.next() {
                ports.insert(backend.addr.as_inet().unwrap().port());
            }
            ports
        };
        assert_eq!(offered(), [1, 2, 3].into());
        assert!(refresh(
            &weights,
            &[draining(1), node(2, 0.0), node(3, 0.0)]
        ));
        for _ in 0..20 {
            assert_eq!(offered(), [2, 3].into());
        }
        assert!(refresh(&weights, &[node(1, 0.0), node(3, 0.0)]));
        for _ in 0..20 {
            assert_eq!(offered(), [1, 3].into());
        }
        // It is back before Pingora has discovered that it was gone.
        assert!(refresh(
            &weights,
            &[node(1, 0.0), node(2, 0.0), node(3, 0.0)]
        ));
        assert_eq!(offered(), [1, 2, 3].into());
        refresh(&weights, &[]);
        assert!(offered().is_empty());
    }
}

#[test]
fn an_operator_can_drain_what_pingora_selects_from() {
    let weights = live(&headroom());
    let nodes =
        [node(1, 0.0), node(2, 0.0)].map(|node| Arc::new(Node::clone(&node).with_incarnation(5)));
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    let said = crate::view::NodeOverride {
        state: NodeState::Draining,
        ..crate::view::NodeOverride::of(&nodes[0])
    };
    assert!(weights.set_overrides(&[(nodes[0].id.clone(), said)].into()));
    assert_eq!(share(&first_ports(&selection, 100), 2), 1.0);
    let said = crate::view::NodeOverride {
        state: NodeState::Serving,
        ..said
    };
    assert!(weights.set_overrides(&[(nodes[0].id.clone(), said)].into()));
    assert!(share(&first_ports(&selection, 100), 2) < 0.6);
}

/// What a selection of Pingora's own sees.
fn whole_weights(weights: &Arc<LiveWeights>) -> Vec<usize> {
    let mut backends = weights.backends();
    backends.sort_by_key(|(backend, _)| backend.addr.clone());
    backends.iter().map(|(backend, _)| backend.weight).collect()
}

#[test]
fn selections_of_pingoras_own_see_the_registered_weights() {
    use ::pingora::lb::selection::{Consistent, RoundRobin};

    fn parts<S: BackendSelection>(backends: &BTreeSet<Backend>) -> f64
    where
        S::Iter: BackendIter,
    {
        let selection = Arc::new(S::build(backends));
        let is_heavy = |key: u32| {
            let mut iter = selection.iter(format!("key {key}").as_bytes());
            iter.next().unwrap().addr.as_inet().unwrap().port() == 2
        };
        f64::from((0..2_000).map(|key| u32::from(is_heavy(key))).sum::<u32>()) / 2_000.0
    }

    let weighted =
        |port: u16, weight: f64| Arc::new(Node::clone(&node(port, 0.0)).with_weight(weight));
    let weights = live(&headroom());
    assert!(refresh(&weights, &[node(1, 0.0), weighted(2, 9.0)]));
    assert_eq!(whole_weights(&weights), [1, 9]);
    let backends = weights.backends().into_iter().map(|(backend, _)| backend);
    let backends: BTreeSet<_> = backends.collect();
    assert!((parts::<RoundRobin>(&backends) - 0.9).abs() < 0.01);
    assert!((parts::<Consistent>(&backends) - 0.9).abs() < 0.05);
    // Another weight is another backend, for Pingora; metrics change nothing.
    assert!(refresh(&weights, &[node(1, 0.0), weighted(2, 4.0)]));
    assert!(!refresh(&weights, &[node(1, 90.0), weighted(2, 4.0)]));
    // What they have in common makes no requests in a row.
    assert!(refresh(&weights, &[weighted(1, 100.0), weighted(2, 300.0)]));
    assert_eq!(whole_weights(&weights), [1, 3]);
    // An operator's word holds over what a node says.
    let leased = Arc::new(Node::clone(&weighted(2, 300.0)).with_incarnation(5));
    refresh(&weights, &[weighted(1, 100.0), leased.clone()]);
    let said = crate::view::NodeOverride {
        weight: Some(200.0),
        ..crate::view::NodeOverride::of(&leased)
    };
    assert!(weights.set_overrides(&[("n2".to_owned(), said)].into()));
    assert_eq!(whole_weights(&weights), [1, 2]);
    // From the lowest to the highest.
    refresh(&weights, &[weighted(1, 0.2), weighted(2, 5e4)]);
    assert_eq!(whole_weights(&weights), [1, 1_000]);
    let told = || {
        let mut told = Vec::new();
        weights.tell_inexact(|node, weight| told.push((node.id.clone(), weight)));
        told.sort();
        told
    };
    assert_eq!(told(), [("n1".to_owned(), 1), ("n2".to_owned(), 1_000)]);
    assert!(told().is_empty(), "once is enough");
    // While a selection follows the weights themselves, backends stay what they are.
    refresh(&weights, &[weighted(1, 1.0), weighted(2, 1.0)]);
    let _selection = selection(&weights);
    assert!(!refresh(&weights, &[weighted(1, 1.0), weighted(2, 7.0)]));
    assert_eq!(whole_weights(&weights), [1, 1]);
}

/// Pingora forgets what health checks have found of a backend with another weight.
#[test]
fn one_node_with_another_weight_does_not_make_all_others_new() {
    let weighted =
        |port: u16, weight: f64| Arc::new(Node::clone(&node(port, 0.0)).with_weight(weight));
    let weights = live(&headroom());
    refresh(&weights, &[weighted(1, 100.0), weighted(2, 100.0)]);
    assert_eq!(whole_weights(&weights), [1, 1]);
    refresh(
        &weights,
        &[weighted(1, 100.0), weighted(2, 100.0), weighted(3, 0.0)],
    );
    assert_eq!(whole_weights(&weights)[..2], [1, 1]);
    // One that does not fit, and leaves again.
    let weights = live(&headroom());
    refresh(&weights, &[weighted(1, 8.0), weighted(2, 8.0)]);
    refresh(
        &weights,
        &[weighted(1, 8.0), weighted(2, 8.0), weighted(3, 12.0)],
    );
    assert_eq!(whole_weights(&weights), [2, 2, 3]);
    refresh(&weights, &[weighted(1, 8.0), weighted(2, 8.0)]);
    assert_eq!(whole_weights(&weights), [2, 2]);
    // A little more or less is not worth it, half is.
    let weights = live(&headroom());
    for (weight, expected) in [
        (100.0, [1, 1]),
        (95.0, [1, 1]),
        (100.0, [1, 1]),
        (50.0, [2, 1]),
    ] {
        refresh(&weights, &[weighted(1, 100.0), weighted(2, weight)]);
        assert_eq!(whole_weights(&weights), expected, "{weight}");
    }
}

/// A canary gets little beside others, whatever was seen of them before.
#[test]
fn a_small_weight_that_joins_is_not_as_large_as_the_others() {
    let weighted =
        |port: u16, weight: f64| Arc::new(Node::clone(&node(port, 0.0)).with_weight(weight));
    let weights = live(&headroom());
    let mut nodes: Vec<_> = (1..=30).map(|port| weighted(port, 1_000.0)).collect();
    refresh(&weights, &nodes);
    assert_eq!(whole_weights(&weights)[0], 1);
    nodes.push(weighted(99, 1.0));
    refresh(&weights, &nodes);
    let seen = whole_weights(&weights);
    assert!(seen[0] >= 400 && seen[30] == 1, "{seen:?}");
    // As one of those that are large leaves, the others stay what they are.
    nodes.remove(0);
    refresh(&weights, &nodes);
    assert_eq!(whole_weights(&weights), seen[1..]);
}

/// Consistent hashing has 160 points for each unit.
#[test]
fn weights_without_a_common_divisor_have_few_units() {
    let weighted = |port: u16| {
        let weight = 850.0 + f64::from(port % 150);
        Arc::new(Node::clone(&node(port, 0.0)).with_weight(weight))
    };
    let nodes: Vec<_> = (1..=100).map(weighted).collect();
    let weights = live(&headroom());
    refresh(&weights, &nodes);
    let seen = whole_weights(&weights);
    let all: usize = seen.iter().sum();
    assert!((10_000..21_000).contains(&all), "{all}");
    let registered: f64 = nodes.iter().filter_map(|node| node.weight).sum();
    for (seen, node) in seen.iter().zip(&nodes) {
        let ratio = *seen as f64 / all as f64 / (node.weight.unwrap() / registered);
        assert!((ratio - 1.0).abs() < 0.02, "{ratio}");
    }
}

/// A new version is there and the old one drains, before Pingora has discovered the new one.
#[test]
fn who_drains_serves_until_pingora_knows_those_that_take_its_place() {
    let weights = live(&headroom());
    refresh(&weights, &[node(1, 0.0), node(2, 0.0)]);
    let before = selection(&weights);
    refresh(&weights, &[draining(1), draining(2), node(3, 0.0)]);
    let ports: BTreeSet<_> = first_ports(&before, 100).into_iter().collect();
    assert_eq!(ports, [1, 2].into());
    // Discovered.
    let after = selection(&weights);
    assert_eq!(share(&first_ports(&after, 100), 3), 1.0);
    // Nobody serves: then nobody is to.
    refresh(&weights, &[draining(1), draining(2)]);
    assert!(before.iter(b"").next().is_none());
    assert!(after.iter(b"").next().is_none());
}

/// Requests that are begun and end at once; how many each port gets.
fn requests(
    selection: &Arc<MetricsWeighted>,
    count: usize,
    fails: impl Fn(u16) -> bool,
) -> HashMap<u16, usize> {
    let mut counts = HashMap::new();
    for _ in 0..count {
        let mut iter = selection.iter(b"");
        let backend = iter.next().unwrap();
        let port = backend.addr.as_inet().unwrap().port();
        *counts.entry(port).or_default() += 1;
        let request = BackendNode::of(backend).unwrap().begin();
        match fails(port) {
            true => request.failed(),
            false => request.succeeded(std::time::Duration::from_millis(10)),
        }
    }
    counts
}

#[test]
fn outcomes_keep_requests_from_who_fails_until_it_works_again() {
    let weights = live(&Balancer::builder());
    let nodes: Vec<_> = (1..=5).map(|port| node(port, 50.0)).collect();
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    let mut now = Instant::now();
    let mut second = |fails: &dyn Fn(u16) -> bool| {
        now += crate::balance::TICK;
        weights.tick(now);
        requests(&selection, 200, fails)
    };
    let fails = |port| port == 2;
    for _ in 0..5 {
        second(&fails);
    }
    let wasted: usize = (0..30).filter_map(|_| second(&fails).remove(&2)).sum();
    assert!(
        (1..=60).contains(&wasted),
        "probes, and nothing else: {wasted}"
    );
    for _ in 0..12 {
        second(&|_| false);
    }
    let counts = second(&|_| false);
    assert!(counts[&2] >= 25, "{counts:?}");
}

#[test]
fn requests_in_flight_keep_others_away_and_so_do_probes_that_nobody_began() {
    let weights = live(&Balancer::builder());
    let nodes: Vec<_> = (1..=3).map(|port| node(port, 50.0)).collect();
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    let begin = |port| weights.begin_at(format!("127.0.0.1:{port}").parse().unwrap());
    assert!(begin(9).is_none());
    let held: Vec<_> = (0..20).filter_map(|_| begin(1)).collect();
    assert_eq!(held.len(), 20);
    let mut now = Instant::now();
    weights.tick(now);
    assert!(share(&first_ports(&selection, 1_000), 1) < 0.05);
    drop(held);
    assert!(share(&first_ports(&selection, 1_000), 1) > 0.25);
    // It fails, and then those who select it send nothing: that is no reason not to try it again.
    for _ in 0..20 {
        begin(2).unwrap().unreachable();
    }
    let mut offered = 0;
    for _ in 0..60 {
        now += crate::balance::TICK;
        weights.tick(now);
        offered += first_ports(&selection, 200)
            .iter()
            .filter(|port| **port == 2)
            .count();
    }
    assert!((5..=60).contains(&offered), "{offered}");
}

#[test]
fn whoever_pingora_finds_unhealthy_leaves_the_choice_among_the_others_to_requests_in_flight() {
    let weights = live(&Balancer::builder());
    let nodes: Vec<_> = (1..=4).map(|port| node(port, 50.0)).collect();
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    let addr = |port| format!("127.0.0.1:{port}").parse().unwrap();
    // Pingora rejects the first one, so that it never has anything in flight, and two of the others are busy.
    let busy: Vec<_> = (0..20)
        .flat_map(|_| [2, 3].map(|port| weights.begin_at(addr(port))))
        .collect();
    weights.tick(Instant::now());
    let accepted = || {
        let mut iter = selection.iter(b"");
        loop {
            match iter.next().unwrap().addr.as_inet().unwrap().port() {
                1 => {}
                port => return port,
            }
        }
    };
    let idle = (0..1_000).filter(|_| accepted() == 4).count();
    assert!(idle > 800, "{idle}");
    drop(busy);
    // All of them come, each once, however many there are.
    let nodes: Vec<_> = (1..=30).map(|port| node(port, 50.0)).collect();
    refresh(&weights, &nodes);
    let selection = self::selection(&weights);
    let mut iter = selection.iter(b"");
    let mut seen = BTreeSet::new();
    while let Some(backend) = iter.next() {
        assert!(seen.insert(backend.addr.clone()), "repeated");
    }
    assert_eq!(seen.len(), 30);
}

#[test]
fn an_ejected_backend_is_the_last_to_be_tried_and_is_tried() {
    let weights = live(&Balancer::builder());
    let nodes: Vec<_> = (1..=3).map(|port| node(port, 50.0)).collect();
    refresh(&weights, &nodes);
    let selection = selection(&weights);
    weights.begin_at("127.0.0.1:2".parse().unwrap());
    weights.tick(Instant::now());
    for _ in 0..10 {
        let request = weights.begin_at("127.0.0.1:2".parse().unwrap());
        request.unwrap().unreachable();
    }
    for _ in 0..50 {
        let mut iter = selection.iter(b"");
        let mut order = Vec::new();
        while let Some(backend) = iter.next() {
            order.push(backend.addr.as_inet().unwrap().port());
        }
        assert_eq!(order.len(), 3);
        assert_eq!(order[2], 2, "{order:?}");
    }
}

#[test]
fn among_backends_of_several_kinds_all_have_their_turns() {
    let weights = live(&Balancer::builder());
    refresh(&weights, &[node(1, 50.0), node(2, 50.0)]);
    let of_group = weights.backends().into_iter().map(|(backend, _)| backend);
    let other = Backend::new_with_weight("127.0.0.1:9", 1).unwrap();
    let selection = Arc::new(MetricsWeighted::build(&of_group.chain([other]).collect()));
    weights.begin_at("127.0.0.1:1".parse().unwrap());
    weights.tick(Instant::now());
    assert!((share(&first_ports(&selection, 300), 9) - 1.0 / 3.0).abs() < 0.05);
}

#[test]
fn a_tick_hides_no_change_of_many_nodes() {
    let weights = live(&headroom());
    let nodes: Vec<_> = (1..=300).map(|port| node(port, 10.0)).collect();
    let mut now = Instant::now();
    weights.update(&nodes, now);
    let selection = selection(&weights);
    let used = || {
        weights
            .backends()
            .into_iter()
            .filter(|(_, is_used)| *is_used)
            .count()
    };
    let mut apply_and_tick = |change: Change| {
        now += Duration::from_secs(1);
        weights.apply(&change, now);
        weights.tick(now);
        weights.publish(now)
    };
    assert!(apply_and_tick(Change::Left(nodes[6].clone())));
    assert_eq!((weights.backends().len(), used()), (299, 299));
    let draining = Arc::new(Node::clone(&nodes[7]).with_state(NodeState::Draining));
    let change = |new: Arc<Node>| Change::Updated {
        old: new.clone(),
        new,
    };
    assert!(apply_and_tick(change(draining)));
    assert_eq!((weights.backends().len(), used()), (299, 298));
    assert!(
        !apply_and_tick(change(node(9, 90.0))),
        "it is the same for Pingora"
    );
    let ports = first_ports(&selection, 30_000);
    assert!(!ports.contains(&7) && !ports.contains(&8));
    assert!(
        share(&ports, 9) < 0.8 * share(&ports, 10),
        "{} {}",
        share(&ports, 9),
        share(&ports, 10)
    );
}
