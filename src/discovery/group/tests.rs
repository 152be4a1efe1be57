//! Listings and watch events, and what they change.

use std::collections::BTreeMap;

use super::*;
use crate::discovery::log_once::MAX_LINES;
use crate::discovery::{EntryLimits, NodeFilter};
use crate::store::LeaseId;
use proptest::prelude::*;

fn empty() -> Group {
    Group::new(keys(), Admission::default(), SelfPreservation::off())
}

fn reset(
    group: &mut Group,
    nodes: &[Entry],
    candidates: &[Entry],
    revision: Revision,
) -> Vec<Change> {
    let mut staged = Staged::default();
    // In pages of two, so that there are several.
    nodes
        .chunks(2)
        .for_each(|page| group.stage(&mut staged, page));
    group.stage_candidates(&mut staged, candidates);
    group.reset(staged, revision, Instant::now())
}

fn keys() -> GroupKeys {
    GroupKeys::new("", "g")
}

fn registration(id: &str, value: &str, revision: Revision, lease: i64) -> Entry {
    Entry {
        key: keys().registration(id),
        value: value.as_bytes().to_vec(),
        create_revision: revision,
        mod_revision: revision,
        lease: Some(LeaseId(lease)),
    }
}

fn node(id: &str, revision: Revision, lease: i64) -> Entry {
    let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1","last_seen":{revision}}}"#);
    registration(id, &value, revision, lease)
}

fn candidate(id: &str, revision: Revision, lease: i64) -> Entry {
    Entry {
        key: keys().candidacy(LeaseId(lease)),
        value: id.as_bytes().to_vec(),
        create_revision: revision,
        mod_revision: revision,
        lease: Some(LeaseId(lease)),
    }
}

fn put(entry: Entry) -> WatchEvent {
    WatchEvent::Put(entry)
}

fn delete(key: String, revision: Revision) -> WatchEvent {
    WatchEvent::Delete { key, revision }
}

fn events(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .filter_map(Change::event)
        .map(|event| event.to_string())
        .collect()
}

#[test]
fn join_update_leave() {
    let mut group = empty();
    let changes = group.apply(
        &[put(node("a", 2, 1)), put(candidate("a", 3, 1))],
        Instant::now(),
    );
    assert_eq!(
        events(&changes),
        ["node a joined at 10.0.0.1", "node a leads"]
    );
    assert_eq!(group.leader().unwrap().epoch, 3);
    let changes = group.apply(
        &[
            delete(keys().registration("a"), 4),
            delete(keys().candidacy(LeaseId(1)), 4),
        ],
        Instant::now(),
    );
    assert_eq!(events(&changes), ["node a left", "no leader"]);
    assert_eq!(group.nodes().revision(), 4);
}

#[test]
fn the_leader_counts_once_it_is_registered() {
    let mut group = empty();
    assert!(
        group
            .apply(&[put(candidate("a", 2, 1))], Instant::now())
            .is_empty()
    );
    assert!(group.leader().is_none());
    let changes = group.apply(&[put(node("a", 3, 1))], Instant::now());
    assert_eq!(
        events(&changes),
        ["node a joined at 10.0.0.1", "node a leads"]
    );
}

#[test]
fn a_relist_yields_only_the_difference() {
    let mut group = empty();
    reset(
        &mut group,
        &[node("a", 2, 1), node("b", 3, 2)],
        &[candidate("a", 4, 1)],
        5,
    );
    let changes = reset(
        &mut group,
        &[node("b", 3, 2), node("c", 8, 3)],
        &[candidate("b", 7, 2)],
        9,
    );
    assert_eq!(
        events(&changes),
        ["node a left", "node c joined at 10.0.0.1", "node b leads"]
    );
}

#[test]
fn bad_entries_are_skipped_and_harm_nobody() {
    let mut group = empty();
    let changes = reset(
        &mut group,
        &[
            registration("bad", "{", 2, 1),
            registration("liar", r#"{"id":"a","ip":"10.0.0.9"}"#, 3, 2),
            node("a", 4, 3),
        ],
        &[],
        4,
    );
    assert_eq!(events(&changes), ["node a joined at 10.0.0.1"]);
    assert_eq!(group.rejected_entries().malformed, 2);
    // A bad update of a live registration changes nothing; one of another registration removes the node.
    assert!(
        group
            .apply(&[put(registration("a", "?", 5, 3))], Instant::now())
            .is_empty()
    );
    let changes = group.apply(&[put(registration("a", "?", 6, 4))], Instant::now());
    assert_eq!(events(&changes), ["node a left"]);
    assert_eq!(group.rejected_entries().malformed, 4);
}

#[test]
fn keys_of_nested_groups_are_ignored() {
    let mut group = empty();
    let mut nested = node("a", 2, 1);
    nested.key = "registry/g/sub/a".to_owned();
    assert!(group.apply(&[put(nested)], Instant::now()).is_empty());
}

#[test]
fn an_update_of_the_time_alone_is_in_the_view_but_is_no_event() {
    let mut group = empty();
    group.apply(&[put(node("a", 2, 1))], Instant::now());
    let changes = group.apply(&[put(node("a", 7, 1))], Instant::now());
    assert_eq!(changes.len(), 1);
    assert!(events(&changes).is_empty());
    assert_eq!(group.nodes().get("a").unwrap().last_seen, 7);
}

fn preserving() -> Group {
    Group::new(keys(), Admission::default(), SelfPreservation::default())
}

fn many(count: i64) -> Vec<Entry> {
    (0..count)
        .map(|id| node(&format!("n{id:03}"), id + 2, id + 1))
        .collect()
}

#[test]
fn a_term_belongs_to_one_life_of_a_process() {
    let mut group = empty();
    let now = Instant::now();
    reset(&mut group, &[node("a", 2, 1)], &[candidate("a", 3, 1)], 3);
    assert_eq!(group.leader().unwrap().epoch, 3);
    // Restarted with the same id before the old lease has expired: nobody holds the old term.
    let moved = r#"{"id":"a","ip":"10.0.0.9"}"#;
    let mut again = registration("a", moved, 2, 9);
    again.mod_revision = 4;
    let changes = group.apply(&[put(again.clone()), put(candidate("a", 5, 9))], now);
    assert_eq!(events(&changes), ["node a updated", "no leader"]);
    assert!(group.leader().is_none());
    // The same for a reader that starts now.
    let both = [candidate("a", 3, 1), candidate("a", 5, 9)];
    reset(&mut group, &[again], &both, 6);
    assert!(group.leader().is_none());
    let changes = group.apply(&[delete(keys().candidacy(LeaseId(1)), 7)], now);
    assert_eq!(events(&changes), ["node a leads"]);
    let leader = group.leader().unwrap();
    assert_eq!(
        (leader.epoch, leader.node.ip.to_string()),
        (5, "10.0.0.9".into())
    );
}

#[test]
fn keys_without_a_lease() {
    let mut group = empty();
    let mut fixed = node("s", 2, 1);
    fixed.lease = None;
    let mut by_hand = candidate("s", 3, 1);
    by_hand.lease = None;
    reset(
        &mut group,
        &[fixed, node("a", 4, 2)],
        &[by_hand, candidate("a", 5, 2)],
        5,
    );
    // It is a backend like any other, but cannot lead, and keeps others from leading.
    let node = group.nodes().get("s").unwrap();
    assert_eq!((node.lease(), node.incarnation()), (None, -2));
    assert!(group.leader().is_none());
    let key = keys().candidacy(LeaseId(1));
    assert_eq!(group.candidates.logged_without_lease(), Some(&*key));
    group.apply(&[delete(key, 6)], Instant::now());
    assert_eq!(group.leader().unwrap().node.id, "a");
}

fn gone(entry: &Entry, revision: Revision) -> WatchEvent {
    delete(entry.key.clone(), revision)
}

#[test]
fn a_few_nodes_that_vanish_are_removed_and_many_are_kept_for_a_while() {
    let start = Instant::now();
    let nodes = many(10);
    let mut group = preserving();
    reset(&mut group, &nodes, &[candidate("n000", 50, 1)], 60);
    // Three of ten are not more than 30 %.
    for (index, entry) in nodes[..3].iter().enumerate() {
        group.apply(&[gone(entry, 61 + index as i64)], start);
    }
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (7, 0));
    // The fourth makes it a mass loss: the three before are put back.
    let changes = group.apply(&[gone(&nodes[3], 64)], start + Duration::from_secs(1));
    assert_eq!(changes.len(), 3, "{:?}", events(&changes));
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (10, 4));
    assert!(group.nodes().is_suspect("n000") && !group.nodes().is_suspect("n009"));
    assert!(group.leader().is_none(), "a suspect does not lead");
    // The rest in one batch.
    let rest: Vec<_> = nodes[4..].iter().map(|entry| gone(entry, 70)).collect();
    assert!(
        group
            .apply(&rest, start + Duration::from_secs(2))
            .is_empty()
    );
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (10, 10));
    // One comes back as an ordinary node.
    let changes = group.apply(&[put(node("n000", 80, 1))], start + Duration::from_secs(3));
    assert_eq!(events(&changes), ["node n000 leads"]);
    assert_eq!(group.nodes().suspects(), 9);
    // The others are removed, each when its time is over.
    assert!(group.expire(start + Duration::from_secs(29)).is_empty());
    assert_eq!(group.next_due(), Some(start + Duration::from_secs(30)));
    assert_eq!(group.expire(start + Duration::from_secs(30)).len(), 2);
    assert_eq!(group.expire(start + Duration::from_secs(32)).len(), 7);
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (1, 0));
    assert_eq!(group.next_due(), None);
}

#[test]
fn a_listing_that_lacks_many_nodes_is_a_mass_loss_too() {
    let nodes = many(10);
    for (kept, suspects) in [(10, 0), (7, 0), (6, 4), (0, 10)] {
        let mut group = preserving();
        reset(&mut group, &nodes, &[], 60);
        let changes = reset(&mut group, &nodes[..kept], &[], 90);
        assert_eq!(group.nodes().suspects(), suspects, "{kept}");
        let len = if suspects > 0 { 10 } else { kept };
        assert_eq!(group.nodes().len(), len);
        assert_eq!(changes.len(), 10 - len);
    }
}

#[test]
fn a_listing_of_as_many_other_nodes_is_no_mass_loss() {
    let nodes = many(10);
    let others: Vec<_> = (20..30)
        .map(|id| node(&format!("n{id:03}"), id + 2, id + 1))
        .collect();
    let mut group = preserving();
    reset(&mut group, &nodes, &[], 60);
    reset(&mut group, &others, &[], 90);
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (10, 0));
}

#[test]
fn a_registered_node_that_the_filter_rejects_is_no_suspect() {
    let admission = Admission {
        filter: NodeFilter::new().tag("x"),
        ..Admission::default()
    };
    let mut group = Group::new(keys(), admission, SelfPreservation::default());
    let tagged = |id: i64, tags: &str, revision| {
        let name = format!("n{id:03}");
        let value = format!(r#"{{"id":"{name}","ip":"10.0.0.1","tags":[{tags}]}}"#);
        registration(&name, &value, revision, id + 1)
    };
    let all = |tagged_from: i64| -> Vec<_> {
        let tags = |id| if id < tagged_from { "" } else { r#""x""# };
        (0..10).map(|id| tagged(id, tags(id), 2)).collect()
    };
    reset(&mut group, &all(0), &[], 60);
    reset(&mut group, &all(5), &[], 90);
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (5, 0));
    // A node that vanished and came back without the tag is not put back when others vanish.
    let now = Instant::now();
    group.apply(&[delete(keys().registration("n005"), 91)], now);
    group.apply(&[put(tagged(5, "", 92))], now);
    for id in 6..9 {
        group.apply(
            &[delete(keys().registration(&format!("n{id:03}")), 93)],
            now,
        );
    }
    assert!(group.nodes().get("n005").is_none());
    assert!(group.nodes().suspects() > 0);
}

#[test]
fn a_node_that_drains_before_it_vanishes_is_removed() {
    let mut group = preserving();
    let drained = |id: i64, revision| {
        let value = format!(r#"{{"id":"n{id:03}","ip":"10.0.0.1","state":"draining"}}"#);
        registration(&format!("n{id:03}"), &value, revision, id + 1)
    };
    let nodes = many(10);
    reset(&mut group, &nodes, &[], 60);
    for id in 0..10 {
        group.apply(&[put(drained(id, 70 + id))], Instant::now());
    }
    for entry in &nodes {
        group.apply(&[gone(entry, 90)], Instant::now());
    }
    assert!(group.nodes().is_empty());
}

#[test]
fn vanishing_over_a_long_time_is_no_mass_loss() {
    let start = Instant::now();
    let nodes = many(10);
    let mut group = preserving();
    reset(&mut group, &nodes, &[], 60);
    for (index, entry) in nodes.iter().enumerate() {
        let now = start + Duration::from_secs(11) * index as u32;
        group.apply(&[gone(entry, 70)], now);
    }
    // There are never three within the period.
    assert!(group.nodes().is_empty());
}

#[test]
fn a_filter_applies_to_every_write() {
    let admission = Admission {
        filter: NodeFilter::new().zone("a").tag("x"),
        ..Admission::default()
    };
    let mut group = Group::new(keys(), admission, SelfPreservation::off());
    let tagged = |zone: &str, tags: &str, revision| {
        let value = format!(r#"{{"id":"n","ip":"10.0.0.1","zone":"{zone}","tags":[{tags}]}}"#);
        put(registration("n", &value, revision, 1))
    };
    let now = Instant::now();
    assert!(group.apply(&[tagged("a", "", 2)], now).is_empty());
    assert_eq!(
        events(&group.apply(&[tagged("a", r#""x","y""#, 3)], now)),
        ["node n joined at 10.0.0.1"]
    );
    assert_eq!(
        events(&group.apply(&[tagged("b", r#""x""#, 4)], now)),
        ["node n left"]
    );
    assert_eq!(
        group.rejected_entries(),
        RejectedEntries::default(),
        "a filtered node is not counted as rejected"
    );
}

#[test]
fn entries_outside_the_networks_or_limits_are_skipped_and_counted() {
    let admission = Admission {
        networks: vec!["10.0.0.0/8".parse().unwrap()],
        limits: EntryLimits {
            nodes: 3,
            ..EntryLimits::default()
        },
        ..Admission::default()
    };
    let mut group = Group::new(keys(), admission, SelfPreservation::off());
    let at = |id: &str, ip: &str, revision| {
        put(registration(
            id,
            &format!(r#"{{"id":"{id}","ip":"{ip}"}}"#),
            revision,
            1,
        ))
    };
    let now = Instant::now();
    group.apply(&[at("a", "10.0.0.1", 2), at("b", "192.168.0.1", 3)], now);
    assert_eq!(
        (group.nodes().len(), group.rejected_entries().not_allowed),
        (1, 1)
    );
    // A node that moves out of the network is not kept at its old address.
    assert_eq!(
        events(&group.apply(&[at("a", "192.168.0.1", 4)], now)),
        ["node a left"]
    );
    let large = format!(
        r#"{{"id":"c","ip":"10.0.0.1","metadata":"{}"}}"#,
        "x".repeat(70_000)
    );
    group.apply(&[put(registration("c", &large, 5, 1))], now);
    assert_eq!(
        (group.nodes().len(), group.rejected_entries().too_large),
        (0, 1)
    );
    for id in ["d", "e", "f", "g"] {
        group.apply(&[at(id, "10.0.0.2", 6)], now);
    }
    assert_eq!(
        (group.nodes().len(), group.rejected_entries().too_large),
        (3, 2)
    );
    assert_eq!(group.rejected_entries().total(), 4);
}

#[test]
fn invalid_candidates_do_not_count_towards_the_limit() {
    let limits = EntryLimits {
        nodes: 1,
        ..EntryLimits::default()
    };
    let admission = Admission {
        limits,
        ..Admission::default()
    };
    let mut group = Group::new(keys(), admission, SelfPreservation::off());
    let mut staged = Staged::default();
    group.stage(&mut staged, &[node("a", 2, 3)]);
    let mut giant = candidate("a", 3, 1);
    giant.value = vec![b'a'; 1_000_000];
    let mut garbage = candidate("a", 4, 2);
    garbage.value = vec![0xff];
    let good = candidate("a", 5, 3);
    group.stage_candidates(&mut staged, &[giant, garbage, good]);
    assert_eq!(staged.candidates.len(), 1, "only valid candidates are kept");
    group.reset(staged, 6, Instant::now());
    assert_eq!(group.leader().unwrap().epoch, 5);
    assert_eq!(
        (
            group.rejected_entries().too_large,
            group.rejected_entries().malformed
        ),
        (1, 1)
    );
}

#[test]
fn an_unreachable_node_is_removed_and_an_invalid_weight_is_counted() {
    let mut group = empty();
    let put = |fields: &str, revision| {
        let value = format!(r#"{{"id":"n",{fields}}}"#);
        put(registration("n", &value, revision, 1))
    };
    let now = Instant::now();
    group.apply(&[put(r#""ip":"10.0.0.1""#, 2)], now);
    let changes = group.apply(&[put(r#""ip":"0.0.0.0""#, 3)], now);
    assert_eq!(
        events(&changes),
        ["node n left"],
        "not kept at its old address"
    );
    group.apply(&[put(r#""ip":"10.0.0.1","port":0"#, 4)], now);
    assert_eq!(
        (group.nodes().len(), group.rejected_entries().not_allowed),
        (0, 2)
    );
    // An invalid weight does not invalidate the rest of the entry, such as draining.
    for (weight, revision) in [("-5", 5), (r#""0""#, 6), ("[]", 7)] {
        let fields = format!(r#""ip":"10.0.0.{revision}","weight":{weight},"state":"DRAINING""#);
        group.apply(&[put(&fields, revision)], now);
        let node = group.nodes().get("n").unwrap();
        assert_eq!(node.ip, std::net::IpAddr::from([10, 0, 0, revision as u8]));
        assert!(!node.is_serving());
    }
    assert_eq!(
        (
            group.rejected_entries().weights,
            group.rejected_entries().total()
        ),
        (3, 2)
    );
    let entry = registration("n", r#"{"id":"n","ip":"10.0.0.1","weight":-1}"#, 8, 1);
    reset(&mut group, &[entry], &[], 9);
    assert_eq!(
        (group.rejected_entries().weights, group.nodes().len()),
        (4, 1)
    );
}

#[test]
fn each_reason_of_a_key_is_logged_once() {
    let mut group = empty();
    let now = Instant::now();
    let mut lines = Vec::new();
    for (fields, revision) in [
        (r#""port":"80""#, 2),
        (r#""port":"8080","last_seen":12345"#, 3),
        (r#""port":80"#, 4),
        (r#""zone":80"#, 5),
        (r#""port":"80""#, 6),
        (r#""port":80000"#, 7),
    ] {
        let value = format!(r#"{{"id":"n","ip":"10.0.0.1",{fields}}}"#);
        group.apply(&[put(registration("n", &value, revision, 1))], now);
        lines.push(group.rejections.logged_lines());
    }
    // Another text in the same field is the same reason, and so is a mistake that is repeated.
    assert_eq!(lines, [1, 1, 1, 2, 2, 3]);
    assert_eq!(group.rejected_entries().malformed, 5);
}

#[test]
fn a_limited_number_of_refused_keys_is_remembered() {
    let mut group = empty();
    for at in 0..20_000 {
        let key = format!("{at}-{}", "k".repeat(2_000));
        group.apply(&[put(registration(&key, "{}", at, 1))], Instant::now());
    }
    assert_eq!(group.rejected_entries().too_large, 20_000);
    assert_eq!(group.rejections.logged_lines(), MAX_LINES);
    let key = keys().registration(&format!("5-{}", "k".repeat(2_000)));
    group.apply(&[delete(key, 20_001)], Instant::now());
    // Not forgotten with the key: a key that comes and goes would fill the log.
    assert_eq!(group.rejections.logged_lines(), MAX_LINES);
}

#[test]
fn suspects_do_not_exceed_the_limit() {
    let limits = EntryLimits {
        nodes: 4,
        ..EntryLimits::default()
    };
    let admission = || Admission {
        limits,
        ..Admission::default()
    };
    let mut group = Group::new(keys(), admission(), SelfPreservation::default());
    let now = Instant::now();
    let event = |(id, is_there): (&str, bool)| match is_there {
        true => put(node(id, 2, 1)),
        false => delete(keys().registration(id), 3),
    };
    // Two were removed and two have joined when the mass loss becomes clear.
    let events = [("a", true), ("b", true), ("c", true), ("d", true)];
    group.apply(&events.map(event), now);
    for (id, is_there) in [("a", false), ("e", true), ("b", false), ("f", true)] {
        group.apply(&[event((id, is_there))], now);
    }
    group.apply(&[event(("c", false))], now);
    assert_eq!(group.nodes().len(), 4);
    assert!(
        ["d", "e", "f"]
            .iter()
            .all(|id| group.nodes().get(id).is_some())
    );
    // A listing may have other nodes.
    let others = ["w", "x", "y", "z"].map(|id| node(id, 9, 2));
    reset(&mut group, &others, &[], 9);
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (4, 0));
    // A file may have more nodes.
    let mut group = Group::new(keys(), admission(), SelfPreservation::default());
    let ip = "10.0.0.1".parse().unwrap();
    let nodes = ["", "a/b", "1", "2", "3", "4", "5"].map(|id| Node::new(id, ip));
    group.restore(nodes.into(), 1);
    assert!(group.nodes().get("a/b").is_none());
    assert_eq!(group.nodes().len(), 4);
}

fn history() -> impl Strategy<Value = Vec<(u8, u8)>> {
    prop::collection::vec((0_u8..3, 0_u8..5), 0..40)
}

proptest! {
    /// Following all changes leads to the same state as a single listing; applying the changes
    /// in order gives the view; and a relist at any point makes no difference.
    #[test]
    fn following_equals_listing(history in history(), relist in 0_usize..40) {
        let mut registered: BTreeMap<String, Entry> = BTreeMap::new();
        let mut queued: BTreeMap<String, Entry> = BTreeMap::new();
        let mut group = empty();
        let mut folded: BTreeMap<String, i64> = BTreeMap::new();
        for (step, (who, what)) in history.into_iter().enumerate() {
            let revision = step as Revision + 2;
            let id = format!("n{who}");
            let event = match what {
                0 => put(node(&id, revision, i64::from(who) + 1)),
                1 => put(registration(&id, "nonsense", revision, i64::from(who) + 1)),
                2 => delete(keys().registration(&id), revision),
                3 => put(candidate(&id, revision, i64::from(who) + 1)),
                _ => delete(keys().candidacy(LeaseId(i64::from(who) + 1)), revision),
            };
            let map = if keys().is_candidacy(event.key()) { &mut queued } else { &mut registered };
            match &event {
                WatchEvent::Put(entry) => map.insert(entry.key.clone(), entry.clone()),
                WatchEvent::Delete { key, .. } => map.remove(key),
            };
            let entries = |map: &BTreeMap<String, Entry>| map.values().cloned().collect::<Vec<_>>();
            let changes = if step == relist {
                reset(&mut group, &entries(&registered), &entries(&queued), revision)
            } else {
                group.apply(&[event], Instant::now())
            };
            for change in changes {
                match change {
                    Change::Joined(node) => prop_assert!(folded.insert(node.id.clone(), node.last_seen).is_none()),
                    Change::Updated { new, .. } => prop_assert!(folded.insert(new.id.clone(), new.last_seen).is_some()),
                    Change::Left(node) => prop_assert!(folded.remove(&node.id).is_some()),
                    Change::Leader(_) | Change::Reset(_) => {}
                }
            }
            let seen: BTreeMap<_, _> = group.nodes().iter().map(|node| (node.id.clone(), node.last_seen)).collect();
            prop_assert_eq!(&seen, &folded);
            for entry in registered.values().filter(|entry| entry.value != b"nonsense") {
                let id = keys().node_id(&entry.key).unwrap().into_owned();
                prop_assert_eq!(seen.get(&id), Some(&entry.mod_revision));
            }
            prop_assert!(seen.keys().all(|id| registered.contains_key(&keys().registration(id))));
            let first = queued.values().min_by_key(|entry| entry.create_revision)
                .map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
                .filter(|id| seen.contains_key(id));
            prop_assert_eq!(group.leader().map(|leader| leader.node.id.clone()), first);
        }
    }

    /// Whatever vanishes, returns and expires: the changes add up to the view, the limit holds, and
    /// suspects are nodes that are removed in time.
    #[test]
    fn suspects_are_consistent(steps in prop::collection::vec((0_u8..10, 0_u8..9), 0..120)) {
        let limits = EntryLimits { nodes: 8, ..EntryLimits::default() };
        let admission = Admission { limits, ..Admission::default() };
        let mut group = Group::new(keys(), admission, SelfPreservation::default());
        let mut folded: BTreeMap<String, Arc<Node>> = BTreeMap::new();
        let mut now = Instant::now();
        for (step, (who, what)) in steps.into_iter().enumerate() {
            let (id, revision) = (format!("n{who}"), step as Revision + 2);
            let changes = match what {
                0..=2 => group.apply(&[put(node(&id, revision, 1))], now),
                3..=5 => group.apply(&[delete(keys().registration(&id), revision)], now),
                6 => {
                    now += Duration::from_secs(u64::from(who));
                    group.expire(now)
                }
                7 => {
                    group.was_away(Duration::from_secs(u64::from(who)));
                    Vec::new()
                }
                _ => reset(&mut group, &many(i64::from(who)), &[], revision),
            };
            for change in changes {
                match change {
                    Change::Joined(node) => prop_assert!(folded.insert(node.id.clone(), node).is_none()),
                    Change::Updated { new, .. } => prop_assert!(folded.insert(new.id.clone(), new).is_some()),
                    Change::Left(node) => prop_assert!(folded.remove(&node.id).is_some()),
                    Change::Leader(_) | Change::Reset(_) => {}
                }
            }
            let nodes = group.nodes();
            prop_assert!(nodes.len() <= limits.nodes);
            prop_assert!(nodes.iter().eq(folded.values()));
            let suspects = nodes.iter().filter(|node| nodes.is_suspect(&node.id)).count();
            prop_assert_eq!(suspects, nodes.suspects());
            let times = nodes.suspects_until().map(|(_, until)| until);
            prop_assert_eq!(group.next_due(), times.min());
        }
        while let Some(due) = group.next_due() {
            prop_assert!(!group.expire(due).is_empty());
        }
        prop_assert_eq!(group.nodes().suspects(), 0);
    }
}

#[test]
fn the_nodes_of_a_host_name_follow_its_addresses() {
    use crate::discovery::format::{Format, HostNames, Places, Registry};
    use crate::discovery::names::{Names, Resolved};
    use std::net::IpAddr;

    let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
    let soon = std::time::Instant::now() + Duration::from_secs(60);
    let with = |host_names| {
        let places = Places {
            main: Registry::new(Format::GoZero).host_names(host_names),
            further: Vec::new(),
        };
        let admission = Admission {
            decoders: places.decoders("g"),
            networks: vec!["10.0.0.0/29".parse().unwrap()],
            ..Admission::default()
        };
        let names = admission.names.clone();
        let keys = places.keys("", "g").unwrap();
        (Group::new(keys, admission, SelfPreservation::off()), names)
    };
    let entry = |key: &str, value: &str, revision| Entry {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        create_revision: 1,
        mod_revision: revision,
        lease: Some(LeaseId(9)),
    };
    let shown = |group: &Group| {
        let nodes = group.nodes().iter();
        let mut nodes: Vec<_> = nodes
            .map(|node| format!("{} {}", node.id, node.addr(0)))
            .collect();
        nodes.sort();
        nodes
    };
    let ok = |addresses: &[IpAddr]| {
        Ok(Resolved {
            addresses: addresses.to_vec(),
            valid_until: soon,
            failed: None,
        })
    };
    let known = |names: &Names, addresses: &[u8]| {
        let addresses: Vec<_> = addresses.iter().map(|last| ip(*last)).collect();
        names.set("db.test", ok(&addresses), std::time::Instant::now());
    };

    let (mut group, names) = with(HostNames::All);
    let listing = [
        entry("g/1", "db.test:80", 2),
        entry("g/2", "10.0.0.6:80", 3),
    ];
    reset(&mut group, &listing, &[], 3);
    assert_eq!(
        shown(&group),
        ["2 10.0.0.6:80"],
        "not known yet, and no error"
    );
    assert_eq!(group.rejected_entries(), RejectedEntries::default());
    known(&names, &[1, 2, 99]);
    group.readdress(&names);
    let both = [
        "1@10.0.0.1 10.0.0.1:80",
        "1@10.0.0.2 10.0.0.2:80",
        "2 10.0.0.6:80",
    ];
    assert_eq!(shown(&group), both, "99 is in no allowed network");
    // One address is replaced by another, and nothing else changes.
    known(&names, &[2, 3]);
    let changes = group.readdress(&names);
    assert_eq!(
        shown(&group)[..2],
        ["1@10.0.0.2 10.0.0.2:80", "1@10.0.0.3 10.0.0.3:80"]
    );
    let lost_or_new = |change: &&Change| matches!(change, Change::Left(_) | Change::Joined(_));
    assert_eq!(changes.iter().filter(lost_or_new).count(), 2);
    // While it cannot be resolved, the last addresses stay, and say so.
    names.set("db.test", Err("away".to_owned()), std::time::Instant::now());
    group.readdress(&names);
    let node = group.nodes().get("1@10.0.0.3").unwrap().clone();
    assert_eq!(
        node.metadata.get("host_name_error"),
        Some(serde_json::json!("away")).as_ref()
    );
    assert_eq!(
        node.metadata.get("host_name"),
        Some(serde_json::json!("db.test")).as_ref()
    );
    reset(&mut group, &listing, &[], 4);
    assert_eq!(shown(&group).len(), 3, "a listing changes nothing");
    // A name that is not known yet: the former nodes stay until it is.
    group.apply(&[put(entry("g/1", "other.test:80", 5))], Instant::now());
    assert_eq!(shown(&group).len(), 3);
    names.set("other.test", ok(&[ip(5)]), std::time::Instant::now());
    group.readdress(&names);
    assert_eq!(shown(&group), ["1@10.0.0.5 10.0.0.5:80", "2 10.0.0.6:80"]);
    group.apply(&[put(entry("g/1", "10.0.0.4:80", 6))], Instant::now());
    assert_eq!(shown(&group), ["1 10.0.0.4:80", "2 10.0.0.6:80"]);
    group.apply(&[put(entry("g/1", "other.test:80", 7))], Instant::now());
    assert_eq!(shown(&group), ["1@10.0.0.5 10.0.0.5:80", "2 10.0.0.6:80"]);
    group.apply(&[delete("g/1".to_owned(), 8)], Instant::now());
    assert_eq!(shown(&group), ["2 10.0.0.6:80"]);
    group.readdress(&names);
    assert_eq!(shown(&group), ["2 10.0.0.6:80"]);

    // A name that leads to what is not allowed for a while, and an entry that is broken for a while.
    group.apply(&[put(entry("g/1", "db.test:80", 9))], Instant::now());
    known(&names, &[1, 2]);
    group.readdress(&names);
    assert_eq!(shown(&group).len(), 3);
    known(&names, &[99]);
    group.readdress(&names);
    assert_eq!(shown(&group), ["2 10.0.0.6:80"]);
    known(&names, &[1, 2]);
    group.readdress(&names);
    assert_eq!(shown(&group).len(), 3);
    group.apply(&[put(entry("g/1", "a b", 10))], Instant::now());
    assert_eq!(shown(&group), ["2 10.0.0.6:80"], "no address at all");
    group.apply(&[put(entry("g/1", "db.test:80", 11))], Instant::now());
    group.apply(
        &[put(Entry {
            value: vec![0xff],
            ..entry("g/1", "", 12)
        })],
        Instant::now(),
    );
    assert_eq!(
        shown(&group).len(),
        3,
        "an entry that cannot be read changes nothing"
    );
    let broken = Entry {
        value: vec![0xff],
        ..entry("g/1", "", 12)
    };
    reset(&mut group, &[broken, listing[1].clone()], &[], 12);
    assert_eq!(shown(&group).len(), 3);
    group.apply(&[delete("g/1".to_owned(), 13)], Instant::now());
    assert_eq!(shown(&group), ["2 10.0.0.6:80"]);

    // After a start from a file, nodes stay until their names are known.
    let stored: Vec<Node> = [1, 2]
        .map(|last| {
            Node::new(format!("1@10.0.0.{last}"), ip(last))
                .with_port(80)
                .with_metadata(serde_json::json!({ "host_name": "db.test" }))
                .with_incarnation(9)
        })
        .into();
    let (mut group, names) = with(HostNames::All);
    group.restore(stored, 5);
    reset(&mut group, &[entry("g/1", "db.test:80", 6)], &[], 6);
    assert_eq!(
        shown(&group),
        ["1@10.0.0.1 10.0.0.1:80", "1@10.0.0.2 10.0.0.2:80"]
    );
    known(&names, &[2, 3]);
    group.readdress(&names);
    assert_eq!(
        shown(&group),
        ["1@10.0.0.2 10.0.0.2:80", "1@10.0.0.3 10.0.0.3:80"]
    );

    let (mut group, names) = with(HostNames::First);
    group.apply(&[put(entry("g/1", "db.test:80", 2))], Instant::now());
    known(&names, &[2, 3]);
    group.readdress(&names);
    assert_eq!(shown(&group), ["1 10.0.0.2:80"]);
    known(&names, &[1, 2]);
    group.readdress(&names);
    assert_eq!(shown(&group), ["1 10.0.0.2:80"], "while it is among them");
    known(&names, &[1, 3]);
    group.readdress(&names);
    assert_eq!(shown(&group), ["1 10.0.0.1:80"]);
    let (mut group, _) = with(HostNames::Refused);
    group.apply(&[put(entry("g/1", "db.test:80", 2))], Instant::now());
    assert!(shown(&group).is_empty());
    assert_eq!(group.rejected_entries().not_allowed, 1);
}

/// One entry with many addresses is one loss.
#[test]
fn the_end_of_a_host_name_is_no_mass_loss() {
    use crate::discovery::format::{Format, HostNames, Places, Registry};
    use crate::discovery::names::Resolved;

    let places = Places {
        main: Registry::new(Format::GoZero).host_names(HostNames::All),
        further: Vec::new(),
    };
    let admission = Admission {
        decoders: places.decoders("g"),
        ..Admission::default()
    };
    let names = admission.names.clone();
    let keys = places.keys("", "g").unwrap();
    let mut group = Group::new(keys, admission, SelfPreservation::default());
    let entry = Entry {
        key: "g/1".to_owned(),
        value: b"db.test:80".to_vec(),
        create_revision: 1,
        mod_revision: 1,
        lease: None,
    };
    group.apply(&[put(entry)], Instant::now());
    let now = std::time::Instant::now();
    let resolved = Resolved {
        addresses: (1..6).map(|last| [10, 0, 0, last].into()).collect(),
        valid_until: now,
        failed: None,
    };
    names.set("db.test", Ok(resolved), now);
    group.readdress(&names);
    assert_eq!(group.nodes().len(), 5);
    group.apply(&[delete("g/1".to_owned(), 2)], Instant::now());
    assert_eq!((group.nodes().len(), group.nodes().suspects()), (0, 0));
}
