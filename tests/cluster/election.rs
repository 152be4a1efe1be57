//! Tests elections on a real etcd: crashes, resignation, transfers, priorities, fencing and
//! draining.
use std::time::{Duration, Instant};

use etcd_client::EventType;
use pingora_etcd::{ClusterError, ClusterEvent};

use super::common::etcd::Etcd;
use super::common::stalls::Stalls;
use super::common::{DEADLINE, eventually, group, throughout, within};
use super::{EXPIRING_TTL, Running, leader_id, ready, until_candidate};

#[tokio::test]
async fn a_single_node_elects_itself() {
    let etcd = Etcd::shared();
    let group = group("self");
    let running = Running::start(&etcd.options(), &group, "n1").await;
    let leadership = within("the node leads", running.node.wait_for_leadership()).await;
    assert_eq!(leadership.node.id, "n1");
    assert!(leadership.epoch > 0);
    assert!(running.node.is_leader());

    let discovery = ready(&etcd.options(), &group).await;
    let seen = within("the discovery shows a leader", discovery.wait_for_leader()).await;
    assert_eq!(seen.id, "n1");
    assert_eq!(discovery.leadership().unwrap().epoch, leadership.epoch);
    running.stop().await;
}

#[tokio::test]
async fn a_new_leader_after_a_crash_within_the_ttl_and_a_second() {
    let etcd = Etcd::shared();
    let group = group("crash");
    let first = Running::start_with_ttl(&etcd.options(), &group, "n1", EXPIRING_TTL).await;
    within("the node leads", first.node.wait_for_leadership()).await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;
    let epoch = discovery.leadership().unwrap().epoch;
    let mut client = etcd.raw_client().await;
    let entry = format!("registry/{group}/n1");
    let mut entry = client.watch(entry, None).await.unwrap();

    let stalls = Stalls::watch();
    first.crash();
    let start = Instant::now();
    let expiry = async {
        loop {
            let told = entry.message().await.unwrap().expect("the watch goes on");
            let mut events = told.events().iter();
            if events.any(|event| event.event_type() == EventType::Delete) {
                return start.elapsed();
            }
        }
    };
    // The crashed node goes with the same lease, but the two watches are told one after the other.
    let (expired, took) = tokio::join!(
        within("etcd deletes the entry of n1", expiry),
        eventually("n2 leads, and n1 is not shown any more", || {
            leader_id(&discovery).as_deref() == Some("n2") && discovery.nodes().len() == 1
        })
    );
    // The lease of 2 s may have been renewed just before the crash.
    let stalled = stalls.so_far();
    assert!(took < Duration::from_secs(3) + stalled, "{took:?}");
    assert!(
        took < expired + Duration::from_secs(1) + stalled,
        "{took:?}, and etcd {expired:?}"
    );
    eventually("n2 knows that it leads", || second.node.is_leader()).await;
    assert!(discovery.leadership().unwrap().epoch > epoch);
    second.stop().await;
}

#[tokio::test]
async fn twenty_nodes_come_and_go_with_always_a_valid_leader() {
    const COUNT: usize = 20;
    let etcd = Etcd::shared();
    let group = group("twenty");
    let discovery = ready(&etcd.options(), &group).await;
    let mut nodes = Vec::new();
    for index in 0..COUNT {
        let id = format!("n{index:02}");
        nodes.push(Running::start(&etcd.options(), &group, &id).await);
        let count = index + 1;
        within(
            "the discovery shows the node",
            discovery.wait_for_nodes(count),
        )
        .await;
        within("the discovery shows a leader", discovery.wait_for_leader()).await;
    }
    let valid = |nodes: &[Running]| {
        let leaders: Vec<_> = nodes
            .iter()
            .filter(|running| running.node.is_leader())
            .collect();
        assert!(leaders.len() <= 1, "two leaders");
        leaders.len() == 1
            && leader_id(&discovery).as_deref() == Some(leaders[0].node.id())
            && discovery.nodes().len() == nodes.len()
    };
    assert_eq!(leader_id(&discovery).as_deref(), Some("n00"));
    // Alternately the leader and the last candidate leave, because the queue must handle both ends.
    while !nodes.is_empty() {
        let leaving = if nodes.len().is_multiple_of(2) {
            nodes.remove(0)
        } else {
            nodes.pop().unwrap()
        };
        let id = leaving.node.id().to_owned();
        leaving.stop().await;
        if !nodes.is_empty() {
            eventually(
                "exactly one leader, the one that the discovery shows",
                || valid(&nodes),
            )
            .await;
            assert!(discovery.nodes().get(&id).is_none());
        }
    }
    eventually("nobody is registered or leads", || {
        discovery.nodes().is_empty() && discovery.leader().is_none()
    })
    .await;
}

#[tokio::test]
async fn a_graceful_leave_is_seen_within_half_a_second() {
    let etcd = Etcd::shared();
    let group = group("leave");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    within("the node leads", first.node.wait_for_leadership()).await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    let mut events = discovery.subscribe();
    let stalls = Stalls::watch();
    first.stop().await;
    let start = Instant::now();
    let seen = async {
        let mut seen_events = Vec::new();
        while !["node n1 left", "node n2 leads"]
            .iter()
            .all(|event| seen_events.iter().any(|seen| seen == event))
        {
            seen_events.push(events.recv().await.unwrap().to_string());
        }
    };
    within("both events are seen", seen).await;
    let took = start.elapsed();
    assert!(
        took < Duration::from_millis(500) + stalls.so_far(),
        "{took:?}"
    );
    second.stop().await;
}

#[tokio::test]
async fn resigning_passes_leadership_on_with_a_greater_token() {
    let etcd = Etcd::shared();
    let group = group("resign");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    let before = within("the node leads", first.node.wait_for_leadership()).await;
    // The only candidate leads again, in a new term.
    first.node.resign().await.unwrap();
    assert_ne!(first.node.leadership(), Some(before.clone()));
    let again = within("the node leads", first.node.wait_for_leadership()).await;
    assert!(again.epoch > before.epoch);

    let second = Running::start(&etcd.options(), &group, "n2").await;
    first.node.resign().await.unwrap();
    let other = within("the node leads", second.node.wait_for_leadership()).await;
    assert!(other.epoch > again.epoch);
    assert!(!first.node.is_leader());
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_transfer_goes_to_any_candidate_and_is_refused_with_the_reason() {
    let etcd = Etcd::shared();
    let group = group("transfer");
    let mut nodes = Vec::new();
    for id in ["n1", "n2", "n3", "n4"] {
        nodes.push(Running::start(&etcd.options(), &group, id).await);
    }
    let discovery = ready(&etcd.options(), &group).await;
    let term = within("the node leads", nodes[0].node.wait_for_leadership()).await;
    let first = &nodes[0].node;
    let error = first.transfer_to("n9").await.unwrap_err();
    assert!(error.to_string().contains("not registered"), "{error}");
    assert_eq!(
        first.leadership().map(|term| term.epoch),
        Some(term.epoch),
        "a refused transfer does not end the term"
    );
    let error = nodes[1].node.transfer_to("n3").await.unwrap_err();
    assert!(matches!(error, ClusterError::NotLeader { .. }), "{error}");

    // Past two other candidates, which make way.
    eventually("the discovery shows n1 as leader", || {
        leader_id(&discovery).as_deref() == Some("n1")
    })
    .await;
    let mut events = discovery.subscribe();
    first.transfer_to("n4").await.unwrap();
    assert!(!first.is_leader());
    within("n4 leads", nodes[3].node.wait_for_leadership()).await;
    eventually("the discovery shows n4 as leader", || {
        leader_id(&discovery).as_deref() == Some("n4")
    })
    .await;
    // The leader changes once, without intermediate leaders.
    let mut elected = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let ClusterEvent::LeaderElected(node) = event {
            elected.push(node.id.clone());
        }
    }
    assert_eq!(elected, ["n4"]);
    // Transfers leadership back as soon as n1 is a candidate again.
    let mut client = etcd.raw_client().await;
    until_candidate(&mut client, &group, "n1").await;
    nodes[3].node.transfer_to("n1").await.unwrap();
    within("n1 leads", nodes[0].node.wait_for_leadership()).await;
    let requests = client
        .get(
            format!("handover/{group}/"),
            Some(etcd_client::GetOptions::new().with_prefix()),
        )
        .await
        .unwrap();
    assert!(requests.kvs().len() <= 1, "{requests:?}");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_transfer_past_a_node_of_the_predecessor_is_refused_and_nobody_else_leads() {
    let etcd = Etcd::shared();
    let group = group("past-a-peer");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    let term = within("the node leads", first.node.wait_for_leadership()).await;
    // As the predecessor writes it: no priority, and a candidacy under the same lease.
    let mut client = etcd.raw_client().await;
    let lease = client.lease_grant(60, None).await.unwrap().id();
    let under = || Some(etcd_client::PutOptions::new().with_lease(lease));
    let entry = r#"{"id":"peer","ip":"127.0.0.1","last_seen":1}"#;
    let registration = format!("registry/{group}/peer");
    client.put(registration, entry, under()).await.unwrap();
    let candidacy = format!("election/{group}/{lease:x}");
    client.put(candidacy, "peer", under()).await.unwrap();
    let last = Running::start(&etcd.options(), &group, "n2").await;

    let error = first.node.transfer_to("n2").await.unwrap_err().to_string();
    assert!(error.contains("\"peer\" is ahead of it"), "{error}");
    let same = first.node.leadership().map(|term| term.epoch);
    assert_eq!(same, Some(term.epoch));
    // A transfer to the peer itself succeeds, but from there leadership cannot be taken back.
    first.node.transfer_to("peer").await.unwrap();
    let discovery = ready(&etcd.options(), &group).await;
    eventually("the peer leads", || {
        leader_id(&discovery).as_deref() == Some("peer")
    })
    .await;
    assert!(!first.node.is_leader() && !last.node.is_leader());
    client.lease_revoke(lease).await.unwrap();
    eventually("one of ours leads", || {
        first.node.is_leader() || last.node.is_leader()
    })
    .await;
    first.stop().await;
    last.stop().await;
}

#[tokio::test]
async fn a_higher_priority_takes_over_once_it_has_been_there_for_a_while() {
    let etcd = Etcd::shared();
    let group = group("priority");
    let mut nodes = Vec::new();
    for id in ["n1", "n2"] {
        nodes.push(Running::start(&etcd.options(), &group, id).await);
    }
    within("the node leads", nodes[0].node.wait_for_leadership()).await;
    let after = Duration::from_secs(1);
    let discovery = ready(&etcd.options(), &group).await;
    let high = super::builder(&etcd.options(), &group, "n3")
        .priority(7)
        .takeover_after(after)
        .try_build()
        .unwrap();
    let stalls = Stalls::watch();
    let start = Instant::now();
    let high = Running::new(high);
    high.wait_until_healthy().await;
    eventually("the node leads", || high.node.is_leader()).await;
    let took = start.elapsed();
    let late = 3 * after + stalls.so_far();
    let priority = || discovery.nodes().get("n3").and_then(|node| node.priority);
    eventually("it is seen with its priority", || priority() == Some(7)).await;
    assert!(
        took >= after && took < late,
        "neither at once nor late: {took:?}"
    );
    assert!(!nodes[0].node.is_leader() && !nodes[1].node.is_leader());
    // The node keeps leading against candidates of lower priority.
    throughout("n3 keeps leading", 2 * after, || high.node.is_leader()).await;
    high.stop().await;
    eventually("somebody else leads", || {
        nodes.iter().any(|running| running.node.is_leader())
    })
    .await;
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_write_with_the_guard_of_an_ended_term_is_not_carried_out() {
    use pingora_etcd::store::{EtcdStore, Selector, Store, Txn};
    let etcd = Etcd::shared();
    let group = group("fencing");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    let old = within("the node leads", first.node.wait_for_leadership()).await;
    let store = EtcdStore::new(etcd.options()).unwrap();
    let key = format!("work/{group}");
    let write = |term: &pingora_etcd::Leadership| {
        let value = term.epoch.to_string().into_bytes();
        Txn::new().when(term.guard()).put(key.clone(), value, None)
    };
    assert!(store.txn(write(&old)).await.unwrap().is_some());
    let lost = first.node.wait_for_loss(old.epoch);
    let (_, resigned) = tokio::join!(within("the loss is reported", lost), first.node.resign());
    resigned.unwrap();
    let new = within("the node leads", first.node.wait_for_leadership()).await;
    assert!(new.epoch > old.epoch);
    assert!(store.txn(write(&old)).await.unwrap().is_none());
    assert!(store.txn(write(&new)).await.unwrap().is_some());
    // The guard of the leadership that a discovery shows is the same.
    let discovery = ready(&etcd.options(), &group).await;
    within("the discovery shows a leader", discovery.wait_for_leader()).await;
    assert_eq!(discovery.leadership().unwrap().guard(), new.guard());
    let listing = store.list(&Selector::Key(key.clone()), None).await.unwrap();
    assert_eq!(listing.entries[0].value, new.epoch.to_string().into_bytes());
    first.stop().await;
}

#[tokio::test]
async fn draining_is_announced_and_gives_up_leadership_but_not_the_registration() {
    let etcd = Etcd::shared();
    let group = group("drain");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    within("the node leads", first.node.wait_for_leadership()).await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    let mut events = discovery.subscribe();
    first.node.drain().await.unwrap();
    assert!(!first.node.is_leader());
    within("n2 leads", second.node.wait_for_leadership()).await;
    eventually("the discovery shows n1 draining and n2 as leader", || {
        let nodes = discovery.nodes();
        nodes.get("n1").is_some_and(|node| !node.is_serving())
            && leader_id(&discovery).as_deref() == Some("n2")
    })
    .await;
    let updated = async {
        loop {
            if let ClusterEvent::NodeUpdated { old, new } = events.recv().await.unwrap() {
                return old.is_serving() && !new.is_serving();
            }
        }
    };
    assert!(within("the update is reported", updated).await);
    // Draining is final: n1 does not become a candidate again when it would be the next.
    second.stop().await;
    eventually("n2 is gone", || {
        discovery.leader().is_none() && discovery.nodes().len() == 1
    })
    .await;
    throughout(
        "n1 stays registered and does not lead",
        Duration::from_secs(1),
        || !first.node.is_leader() && discovery.nodes().len() == 1,
    )
    .await;
    first.stop().await;
}

#[tokio::test]
async fn an_election_key_deleted_by_somebody_ends_the_term_and_it_stands_again() {
    let etcd = Etcd::shared();
    let group = group("deleted");
    let running = Running::start(&etcd.options(), &group, "n1").await;
    let before = within("the node leads", running.node.wait_for_leadership()).await;
    let discovery = ready(&etcd.options(), &group).await;
    let mut client = etcd.raw_client().await;
    let prefix = etcd_client::DeleteOptions::new().with_prefix();
    client
        .delete(format!("election/{group}/"), Some(prefix.clone()))
        .await
        .unwrap();
    client
        .delete(format!("registry/{group}/"), Some(prefix))
        .await
        .unwrap();
    let again = || {
        let term = running.node.leadership();
        term.is_some_and(|term| term.epoch > before.epoch)
    };
    eventually("the node leads again", again).await;
    eventually("the node is registered again", || {
        discovery.nodes().len() == 1 && discovery.leader().is_some()
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn commands_and_runs_at_the_wrong_time_are_errors() {
    let etcd = Etcd::shared();
    let group = group("misuse");
    let node = super::builder(&etcd.options(), &group, "n1")
        .try_build()
        .unwrap();
    for result in [
        node.resign().await,
        node.drain().await,
        node.transfer_to("n2").await,
    ] {
        assert!(matches!(result, Err(ClusterError::NotRunning { .. })));
    }
    let running = Running::new(node.clone());
    running.wait_until_healthy().await;
    let again = tokio::time::timeout(DEADLINE, node.run_until(std::future::pending())).await;
    assert!(matches!(
        again.unwrap(),
        Err(ClusterError::AlreadyRunning { .. })
    ));
    running.stop().await;
    // A node that has stopped can be run again.
    let running = Running::new(node);
    within("the node leads", running.node.wait_for_leadership()).await;
    running.stop().await;
}
