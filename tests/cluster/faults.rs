use std::time::Duration;

use pingora_etcd::{ClusterEvent, HealthStatus};

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::{eventually, group, throughout, within};
use super::{Running, builder, leader_id, ready};

#[tokio::test]
async fn nodes_come_back_after_etcd_restarts() {
    let etcd = Etcd::own();
    let group = group("restart");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    let before = within("leadership", first.node.wait_for_leadership()).await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within("both", discovery.wait_for_nodes(2)).await;
    let mut events = discovery.subscribe();

    etcd.stop();
    let lost = within("an event", events.recv()).await.unwrap();
    assert_eq!(lost, ClusterEvent::Disconnected);
    eventually("leadership ends without etcd", || !first.node.is_leader()).await;
    throughout("the last view stays", Duration::from_secs(3), || {
        discovery.nodes().len() == 2 && discovery.leader().is_some()
    })
    .await;

    etcd.start();
    eventually("all is well again", || {
        let leaders = [&first, &second].map(|running| running.node.is_leader());
        leaders.iter().filter(|leads| **leads).count() == 1
            && discovery.nodes().len() == 2
            && discovery.leadership().is_some_and(|term| {
                let leading = if leaders[0] { &first } else { &second };
                leading.node.leadership().map(|own| own.epoch) == Some(term.epoch)
            })
    })
    .await;
    first.wait_until_healthy().await;
    second.wait_until_healthy().await;
    assert!(discovery.leadership().unwrap().epoch >= before.epoch);
    first.stop().await;
    second.stop().await;
    eventually("they can leave", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn an_old_process_does_not_remove_its_successor() {
    let etcd = Etcd::shared();
    let group = group("successor");
    let discovery = ready(&etcd.options(), &group).await;
    // With more than enough time for renewals: what is looked for here is not lateness.
    let slow = || {
        Running::new(
            builder(&etcd.options(), &group, "n1")
                .ttl(6)
                .try_build()
                .unwrap(),
        )
    };
    let old = slow();
    within("leadership", old.node.wait_for_leadership()).await;
    within("it is seen", discovery.wait_for_nodes(1)).await;
    let incarnation = || {
        let nodes = discovery.nodes();
        nodes.get("n1").map(|node| node.incarnation())
    };
    let first = incarnation();
    // A new process under the same id, while the old one still runs.
    let new = slow();
    eventually("the new one is registered", || incarnation() != first).await;
    let second = incarnation();
    eventually("the old one stands back", || {
        old.node.current_health() == HealthStatus::Unhealthy && !old.node.is_leader()
    })
    .await;
    within("the new one leads", new.node.wait_for_leadership()).await;
    old.stop().await;
    throughout("it stays", Duration::from_secs(7), || {
        incarnation() == second && new.node.is_leader()
    })
    .await;
    new.stop().await;
}

#[tokio::test]
async fn a_replaced_process_comes_back_when_its_successor_leaves() {
    let etcd = Etcd::shared();
    let group = group("comeback");
    let old = Running::start(&etcd.options(), &group, "n1").await;
    let new = Running::start(&etcd.options(), &group, "n1").await;
    eventually("the old one stands back", || {
        old.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    new.stop().await;
    old.wait_until_healthy().await;
    within("it leads", old.node.wait_for_leadership()).await;
    old.stop().await;
}

#[tokio::test]
async fn shutdown_within_two_seconds_while_etcd_is_stopped() {
    let etcd = Etcd::own();
    let group = group("silent");
    let first = Running::start(&etcd.options(), &group, "n1").await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    etcd.pause();
    // At once, and after the session has noticed.
    let took = first.stop().await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    eventually("unhealthy", || {
        second.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    let took = second.stop().await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    etcd.resume();
    let discovery = ready(&etcd.options(), &group).await;
    eventually("what they left behind ends with its leases", || {
        discovery.nodes().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_leader_cut_off_gives_up_before_another_is_elected() {
    let etcd = Etcd::shared();
    let group = group("cutoff");
    let link = Link::to(etcd.address()).await;
    let cut_off = Running::start(&link.options(), &group, "n1").await;
    within("leadership", cut_off.node.wait_for_leadership()).await;
    let other = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within("both", discovery.wait_for_nodes(2)).await;

    link.set_silent(true);
    let mut gave_up = None;
    let start = tokio::time::Instant::now();
    let elected = eventually("n2 leads", || {
        // In this order: the other is asked first, so that both true is truly both.
        let other_leads = other.node.is_leader();
        let cut_off_leads = cut_off.node.is_leader();
        assert!(!(other_leads && cut_off_leads), "two leaders");
        if !cut_off_leads && gave_up.is_none() {
            gave_up = Some(start.elapsed());
        }
        other_leads
    })
    .await;
    let gave_up = gave_up.expect("it gave up first");
    assert!(gave_up < elected);
    assert!(gave_up <= Duration::from_secs(2), "{gave_up:?}");
    throughout("one leader", Duration::from_secs(2), || {
        other.node.is_leader() && !cut_off.node.is_leader()
    })
    .await;

    // Healed, it is registered again and waits its turn.
    link.set_silent(false);
    eventually("n1 is back", || discovery.nodes().len() == 2).await;
    cut_off.wait_until_healthy().await;
    assert!(other.node.is_leader() && !cut_off.node.is_leader());
    assert_eq!(leader_id(&discovery).as_deref(), Some("n2"));
    other.stop().await;
    within("n1 leads", cut_off.node.wait_for_leadership()).await;
    cut_off.stop().await;
}

#[tokio::test]
async fn a_candidate_cut_off_for_longer_than_the_ttl_is_registered_again() {
    let etcd = Etcd::shared();
    let group = group("candidate");
    let link = Link::to(etcd.address()).await;
    let leader = Running::start(&etcd.options(), &group, "n1").await;
    within("leadership", leader.node.wait_for_leadership()).await;
    let candidate = Running::start(&link.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within("both", discovery.wait_for_nodes(2)).await;
    link.set_silent(true);
    eventually("its lease runs out", || discovery.nodes().len() == 1).await;
    eventually("it says unhealthy", || {
        candidate.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    link.set_silent(false);
    eventually("it is back", || discovery.nodes().len() == 2).await;
    candidate.wait_until_healthy().await;
    // As a candidate too.
    leader.stop().await;
    within("it leads", candidate.node.wait_for_leadership()).await;
    candidate.stop().await;
}

#[tokio::test]
async fn a_discovery_cut_off_silently_says_so_and_keeps_the_view() {
    let etcd = Etcd::shared();
    let group = group("deaf");
    let link = Link::to(etcd.address()).await;
    let node = Running::start(&etcd.options(), &group, "n1").await;
    let discovery = ready(&link.options(), &group).await;
    within("it is seen", discovery.wait_for_nodes(1)).await;
    within("a leader", discovery.wait_for_leader()).await;
    let mut events = discovery.subscribe();
    link.set_silent(true);
    let start = tokio::time::Instant::now();
    let event = within("an event", events.recv()).await.unwrap();
    assert_eq!(event, ClusterEvent::Disconnected);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(discovery.nodes().len(), 1);
    node.stop().await;
    assert_eq!(discovery.nodes().len(), 1, "it has not heard");
    link.set_silent(false);
    eventually("it has heard", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn a_node_started_before_etcd_registers_when_it_comes() {
    let etcd = Etcd::own();
    let group = group("before");
    etcd.stop();
    let node = builder(&etcd.options(), &group, "n1").try_build().unwrap();
    let running = Running::new(node);
    let discovery = super::watch_group(&etcd.options(), &group);
    throughout("unknown or unhealthy", Duration::from_secs(1), || {
        running.node.current_health() != HealthStatus::Healthy && !discovery.is_ready()
    })
    .await;
    etcd.start();
    running.wait_until_healthy().await;
    within("seen", discovery.wait_for_nodes(1)).await;
    running.stop().await;
}

#[tokio::test]
async fn one_connection_for_registration_renewals_election_and_metrics() {
    let etcd = Etcd::shared();
    let group = group("one");
    let link = Link::to(etcd.address()).await;
    struct Ticks(std::sync::atomic::AtomicU32);
    impl pingora_etcd::MetricsCollector for Ticks {
        fn collect(&self) -> pingora_etcd::NodeMetadata {
            let tick = self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            serde_json::json!({ "queue_depth": tick })
        }
    }
    let node = builder(&link.options(), &group, "n1")
        .ttl(10)
        .metrics_collector(Ticks(0.into()))
        .metrics_update_interval(1);
    let running = Running::new(node.try_build().unwrap());
    within("leadership", running.node.wait_for_leadership()).await;
    let discovery = ready(&etcd.options(), &group).await;
    eventually("several metrics later", || {
        discovery
            .nodes()
            .get("n1")
            .and_then(|node| node.metric("queue_depth"))
            .is_some_and(|tick| tick >= 3.0)
    })
    .await;
    running.stop().await;
    assert_eq!(link.connections(), 1);
}
