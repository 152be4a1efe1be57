use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::balance::settings::Adaptive;
use crate::node::NodeState;
use proptest::prelude::*;

fn roster() -> Roster {
    Roster::new(80, Arc::new(Fleet::new(&Adaptive::default())))
}

#[test]
fn of_two_registrations_of_one_address_the_newer_holds_it() {
    let node = |id: &str, last_seen| {
        let mut node = Node::new(id, "10.0.0.1".parse().unwrap());
        node.last_seen = last_seen;
        Arc::new(node)
    };
    for nodes in [
        [node("old", 1), node("new", 2)],
        [node("new", 2), node("old", 1)],
    ] {
        let mut roster = roster();
        roster.reset(&nodes, Instant::now());
        let holders: Vec<_> = roster.holders().collect();
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].endpoint.node().id, "new");
        assert!(holders[0].is_used);
    }
}

#[test]
fn a_report_is_counted_once() {
    let bad = serde_json::json!({ "cpu_usage_percent": -1 });
    let node = Arc::new(Node::new("n", "10.0.0.1".parse().unwrap()).with_metadata(bad));
    let mut roster = roster();
    for _ in 0..3 {
        roster.reset([&node], Instant::now());
    }
    assert_eq!(roster.refused(), 1);
}

fn addrs(roster: &Roster) -> Vec<SocketAddr> {
    let mut addrs: Vec<_> = roster
        .holders()
        .map(|holder| holder.endpoint.addr())
        .collect();
    addrs.sort_unstable();
    addrs
}

/// The index, the shadowed registrations and the sums fit the list of registrations.
fn check(roster: &Roster) -> Result<(), TestCaseError> {
    let all = &roster.registrations;
    let shadowed = all.iter().filter(|it| it.is_shadowed).count();
    let counted = roster.shadowed_at.values().sum::<u32>() as usize;
    prop_assert_eq!(counted, shadowed);
    for registration in all {
        let at = roster
            .index
            .position_of(all, &registration.node().id)
            .unwrap();
        prop_assert!(std::ptr::eq(&all[at], registration));
        let holder = roster.index.holder(all, registration.addr()).unwrap();
        prop_assert_eq!(holder == at, !registration.is_shadowed);
        // No shadowed registration has a stronger claim than the holder.
        prop_assert!(all[holder].claim() >= registration.claim());
    }
    let mut sums = Totals::default();
    all.iter().for_each(|registration| sums.add(registration));
    let (kept, new) = (roster.mean_load(), sums.loads.mean());
    prop_assert_eq!(kept.cpu.is_some(), new.cpu.is_some());
    prop_assert!((kept.cpu.unwrap_or(0.0) - new.cpu.unwrap_or(0.0)).abs() < 1e-9);
    let controlled = roster.controlled_load().count();
    prop_assert_eq!(controlled, sums.controlled.count());
    Ok(())
}

proptest! {
    /// Changes one by one lead to the same result as all the nodes at once, whatever the changes
    /// are: the same addresses held by the same registrations, and the same sums.
    #[test]
    fn changes_lead_to_the_same_as_a_reset(
        steps in prop::collection::vec((0_u8..6, 0_u8..4, 0_u8..3, 0_i64..9, 0.0..100.0_f64), 0..60),
    ) {
        let now = Instant::now();
        let (mut single, mut whole) = (roster(), roster());
        let mut nodes: BTreeMap<String, Arc<Node>> = BTreeMap::new();
        for (number, host, what, last_seen, cpu) in steps {
            let id = format!("n{number}");
            if what == 0 {
                nodes.remove(&id);
                single.remove(&id, now);
            } else {
                let mut node = Node::new(&id, format!("10.0.0.{host}").parse().unwrap())
                    .with_metadata(serde_json::json!({ "cpu_usage_percent": cpu }))
                    .with_incarnation(i64::from(what));
                if cpu < 20.0 {
                    node.state = NodeState::Draining;
                }
                node.last_seen = last_seen * 100_000;
                let node = Arc::new(node);
                nodes.insert(id, node.clone());
                single.insert(&node, now);
            }
            for at in single.take_new_loads() {
                single.set_controlled_load(at as usize, Some(cpu), now);
            }
            whole.reset(nodes.values(), now);
            prop_assert_eq!(addrs(&single), addrs(&whole));
            let expected: BTreeSet<_> = nodes.values().map(|node| node.addr(80)).collect();
            prop_assert_eq!(addrs(&single), expected.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(single.registrations.len(), nodes.len());
            check(&single)?;
            check(&whole)?;
        }
    }
}
