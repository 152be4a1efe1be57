use std::time::Instant;

use super::super::weights::LiveWeights;
use super::*;
use crate::balance::{Balancer, BalancerBuilder, Policy};
use crate::node::Node;
use serde_json::json;

fn headroom() -> BalancerBuilder {
    Balancer::builder().policy(Policy::Headroom)
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
    let weights = LiveWeights::from_valid(&headroom());
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
    let weights = LiveWeights::from_valid(&headroom());
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
    let weights = LiveWeights::from_valid(&Balancer::builder().policy(Policy::RoundRobin));
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
    let weights = LiveWeights::from_valid(&headroom());
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
        let weights = LiveWeights::from_valid(&Balancer::builder().policy(policy));
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
    let weights = LiveWeights::from_valid(&headroom());
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
