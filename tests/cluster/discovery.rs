//! Tests discoveries on a real etcd: groups and key prefixes, bad entries, compaction, resuming,
//! and the streams of changes and events.
use std::collections::BTreeMap;
use std::time::Duration;

use pingora_etcd::{Change, ClusterError, ClusterEvent, ServiceDiscovery};

use super::common::etcd::Etcd;
use super::common::{eventually, group, throughout, within};
use super::{Running, leader_id, ready, watch_group};

#[tokio::test]
async fn groups_whose_names_begin_alike_do_not_see_each_other() {
    let etcd = Etcd::shared();
    let (app, app2) = {
        let app = group("app");
        (app.clone(), format!("{app}-2"))
    };
    let two = Running::start(&etcd.options(), &app2, "two").await;
    within("the node leads", two.node.wait_for_leadership()).await;
    let of_app = ready(&etcd.options(), &app).await;
    let of_app2 = ready(&etcd.options(), &app2).await;
    assert!(of_app.nodes().is_empty());
    assert!(of_app.leader().is_none());

    let one = Running::start(&etcd.options(), &app, "one").await;
    within("the node leads", one.node.wait_for_leadership()).await;
    eventually("each discovery shows its own leader", || {
        leader_id(&of_app).as_deref() == Some("one")
            && leader_id(&of_app2).as_deref() == Some("two")
    })
    .await;
    two.stop().await;
    eventually("two is gone", || of_app2.nodes().is_empty()).await;
    assert_eq!(leader_id(&of_app).as_deref(), Some("one"));
    assert_eq!(of_app.nodes().len(), 1);
    one.stop().await;
}

#[tokio::test]
async fn a_key_prefix_keeps_installations_apart() {
    let etcd = Etcd::shared();
    let group = group("prefix");
    let prefixed = etcd.options().key_prefix("blue/");
    let node = Running::start(&prefixed, &group, "n1").await;
    let plain = ready(&etcd.options(), &group).await;
    let blue = ready(&prefixed, &group).await;
    within("the discovery shows the node", blue.wait_for_nodes(1)).await;
    assert!(plain.nodes().is_empty());
    node.stop().await;
}

#[tokio::test]
async fn bad_entries_are_skipped_and_the_others_are_served() {
    let etcd = Etcd::shared();
    let group = group("bad");
    let mut client = etcd.raw_client().await;
    let key = |id: &str| format!("registry/{group}/{id}");
    client.put(key("broken"), "{not json", None).await.unwrap();
    let foreign = r#"{"id":"n1","ip":"10.9.9.9","last_seen":1}"#;
    client.put(key("liar"), foreign, None).await.unwrap();
    client.put(key("binary"), [0xff, 0xfe], None).await.unwrap();
    let node = Running::start(&etcd.options(), &group, "n1").await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows the valid entry",
        discovery.wait_for_nodes(1),
    )
    .await;
    assert_eq!(discovery.rejected_entries().total(), 3);
    // The same for an entry that arrives by the watch.
    client.put(key("late"), "[]", None).await.unwrap();
    eventually("the rejected entry is counted", || {
        discovery.rejected_entries().total() == 4
    })
    .await;
    assert_eq!(discovery.nodes().len(), 1);
    assert!(discovery.nodes().get("n1").unwrap().ip.is_loopback());
    // A rejected entry that becomes valid is accepted.
    let good = r#"{"id":"late","ip":"10.9.9.9","last_seen":1}"#;
    client.put(key("late"), good, None).await.unwrap();
    eventually("the corrected entry is accepted", || {
        discovery.nodes().len() == 2
    })
    .await;
    node.stop().await;
}

#[tokio::test]
async fn a_compaction_between_list_and_watch_is_survived() {
    let etcd = Etcd::own();
    let group = group("compact");
    let link = super::common::link::Link::to(etcd.address()).await;
    let discovery = ready(&link.options(), &group).await;
    let mut events = discovery.subscribe();
    let old = Running::start(&etcd.options(), &group, "old").await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    // The discovery receives nothing while the group changes and its history is compacted.
    link.set_silent(true);
    old.stop().await;
    let new = Running::start(&etcd.options(), &group, "new").await;
    let mut client = etcd.raw_client().await;
    let mut revision = 0;
    for _ in 0..10 {
        let put = client.put("elsewhere", "", None).await.unwrap();
        revision = put.header().unwrap().revision();
    }
    client.compact(revision, None).await.unwrap();
    assert!(
        discovery.nodes().get("old").is_some(),
        "the last view is kept"
    );
    // Its connection breaks, and the missed events are compacted: it relists and reports the
    // difference.
    link.cut();
    link.set_silent(false);
    eventually("the discovery shows the new state", || {
        let nodes = discovery.nodes();
        nodes.len() == 1
            && nodes.get("new").is_some()
            && leader_id(&discovery).as_deref() == Some("new")
    })
    .await;
    let mut events_seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        events_seen.push(event.to_string());
    }
    for expected in [
        "disconnected",
        "node old left",
        "node new joined at 127.0.0.1",
        "node new leads",
    ] {
        assert!(
            events_seen.iter().any(|event| event == expected),
            "{expected}: {events_seen:?}"
        );
    }
    // It continues to receive events.
    new.stop().await;
    eventually("the last node has left", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn after_a_break_it_resumes_without_a_relist() {
    let etcd = Etcd::shared();
    let group = group("resume");
    let link = super::common::link::Link::to(etcd.address()).await;
    let discovery = ready(&link.options(), &group).await;
    let mut changes = discovery.changes();
    assert!(matches!(changes.next().await, Change::Reset(_)));
    assert!(matches!(changes.next().await, Change::Leader(None)));
    let mut events = discovery.subscribe();
    link.cut();
    let node = Running::start(&etcd.options(), &group, "n1").await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let first = within("a change arrives", changes.next()).await;
    assert!(matches!(first, Change::Joined(_)), "{first:?}");
    let mut events_seen = Vec::new();
    while events_seen.len() < 3 {
        events_seen.push(
            within("an event arrives", events.recv())
                .await
                .unwrap()
                .to_string(),
        );
    }
    assert_eq!(events_seen[..2], ["disconnected", "reconnected"]);
    node.stop().await;
}

#[tokio::test]
async fn folding_the_changes_gives_the_view_even_for_a_reader_too_slow() {
    let etcd = Etcd::shared();
    let group = group("fold");
    let discovery = ready(&etcd.options(), &group).await;
    let mut slow = discovery.changes();
    let mut client = etcd.raw_client().await;
    for round in 0..3_000 {
        let id = format!("n{}", round % 7);
        let key = format!("registry/{group}/{id}");
        if round % 5 == 4 {
            client.delete(key, None).await.unwrap();
        } else {
            let value = format!(r#"{{"id":"{id}","ip":"10.0.0.1","last_seen":{round}}}"#);
            client.put(key, value, None).await.unwrap();
        }
    }
    // A change that certainly belongs to this group, because other tests write as well.
    let (key, value) = (
        format!("registry/{group}/last"),
        r#"{"id":"last","ip":"10.0.0.1"}"#,
    );
    let put = client.put(key, value, None).await.unwrap();
    let last = put.header().unwrap().revision();
    eventually("the discovery has seen all changes", || {
        discovery.nodes().revision() >= last
    })
    .await;
    let mut folded = BTreeMap::new();
    let mut resets = 0;
    let expected: BTreeMap<_, _> = discovery
        .nodes()
        .iter()
        .map(|node| (node.id.clone(), node.last_seen))
        .collect();
    while folded != expected || resets < 2 {
        match within("a change arrives", slow.next()).await {
            Change::Reset(nodes) => {
                resets += 1;
                folded = nodes
                    .iter()
                    .map(|node| (node.id.clone(), node.last_seen))
                    .collect();
            }
            Change::Joined(node) | Change::Updated { new: node, .. } => {
                folded.insert(node.id.clone(), node.last_seen);
            }
            Change::Left(node) => {
                folded.remove(&node.id);
            }
            _ => {}
        }
    }
    assert_eq!(
        resets, 2,
        "once at the start and once because the reader was too slow"
    );
}

#[tokio::test]
async fn wrong_endpoints_are_errors_and_never_panics() {
    let build = |endpoints: &[&str]| {
        let endpoints: Vec<String> = endpoints.iter().map(|e| (*e).to_owned()).collect();
        (
            ServiceDiscovery::builder(endpoints.clone(), "g")
                .try_build()
                .map(drop),
            ServiceDiscovery::new(endpoints, "g".to_owned()),
        )
    };
    for (endpoints, named) in [
        (vec![], "endpoints"),
        (vec!["http://"], "http://"),
        (vec!["no port"], "no port"),
        (vec!["https://etcd"], "https://etcd"),
    ] {
        let (checked, unchecked) = build(&endpoints);
        let error = checked.unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
        assert_eq!(unchecked.run(None).await.unwrap_err(), error);
    }
    let error = ServiceDiscovery::builder(vec!["http://h:1".to_owned()], "a//b")
        .try_build()
        .unwrap_err();
    assert!(matches!(error, ClusterError::InvalidConfig { .. }));
}

#[tokio::test]
async fn with_nobody_listening_it_keeps_trying_and_stops_when_asked() {
    let dead = vec![format!("http://127.0.0.1:{}", super::common::free_port())];
    let discovery = watch_group(&dead.into(), "g");
    throughout("not ready", Duration::from_secs(1), || {
        !discovery.is_ready()
    })
    .await;
    assert!(discovery.is_running());
    let mut events = discovery.subscribe();
    assert!(events.try_recv().is_err());

    let node = super::builder(&vec!["http://127.0.0.1:1".to_owned()].into(), "g", "n");
    let running = Running::new(node.try_build().unwrap());
    assert!(running.stop().await < Duration::from_secs(2));
}

#[tokio::test]
async fn the_predecessors_events_in_their_order() {
    let etcd = Etcd::shared();
    let group = group("events");
    let discovery = ServiceDiscovery::new(etcd.endpoints(), group.clone());
    let mut events = discovery.subscribe();
    let (stop, mut stopped) = tokio::sync::broadcast::channel(1);
    let running = discovery.clone();
    let task = tokio::spawn(async move { running.run(Some(&mut stopped)).await });
    let mut next = async || within("an event arrives", events.recv()).await.unwrap();
    assert_eq!(next().await, ClusterEvent::Ready);
    let node = Running::start(&etcd.options(), &group, "n1").await;
    let joined = next().await;
    let ClusterEvent::NodeJoined(joined) = joined else {
        panic!("{joined}")
    };
    assert_eq!(joined.id, "n1");
    assert_eq!(next().await, ClusterEvent::LeaderElected(joined.clone()));
    node.stop().await;
    let mut ends = [next().await, next().await];
    ends.sort_by_key(|event| matches!(event, ClusterEvent::LeaderLost));
    assert_eq!(
        ends,
        [ClusterEvent::NodeLeft(joined), ClusterEvent::LeaderLost]
    );
    stop.send(()).unwrap();
    within("run returns", task).await.unwrap().unwrap();
}
