//! Tests workers and discoveries that lose etcd, are cut off from it, or share an id with another
//! process.
use std::time::Duration;

use pingora_etcd::{ClusterEvent, HealthStatus};

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::stalls::Stalls;
use super::common::{eventually, group, throughout, within};
use super::{EXPIRING_TTL, Running, builder, leader_id, ready};

#[tokio::test]
async fn nodes_come_back_after_etcd_restarts() {
    let etcd = Etcd::own();
    let group = group("restart");
    let first = Running::start_with_ttl(&etcd.options(), &group, "n1", EXPIRING_TTL).await;
    let before = within("the node leads", first.node.wait_for_leadership()).await;
    let second = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;
    let mut events = discovery.subscribe();

    etcd.stop();
    let lost = within("an event arrives", events.recv()).await.unwrap();
    assert_eq!(lost, ClusterEvent::Disconnected);
    eventually("leadership ends while etcd is down", || {
        !first.node.is_leader()
    })
    .await;
    throughout("the last view is kept", Duration::from_secs(3), || {
        discovery.nodes().len() == 2 && discovery.leader().is_some()
    })
    .await;

    etcd.start();
    eventually("all is well again", || {
        let leaders = [&first, &second].map(|running| running.node.is_leader());
        leaders.iter().filter(|leads| **leads).count() == 1
            && discovery.nodes().len() == 2
            && discovery.leadership().is_some_and(|term| {
                assert!(term.epoch >= before.epoch);
                let leading = if leaders[0] { &first } else { &second };
                leading.node.leadership().map(|own| own.epoch) == Some(term.epoch)
            })
    })
    .await;
    first.wait_until_healthy().await;
    second.wait_until_healthy().await;
    first.stop().await;
    second.stop().await;
    eventually("both nodes can leave", || discovery.nodes().is_empty()).await;
}

#[tokio::test]
async fn an_old_process_does_not_remove_its_successor() {
    let etcd = Etcd::shared();
    let group = group("successor");
    let discovery = ready(&etcd.options(), &group).await;
    // The TTL leaves more than enough time for renewals, because this test is not about late
    // renewals.
    let slow = || {
        Running::new(
            builder(&etcd.options(), &group, "n1")
                .ttl(6)
                .try_build()
                .unwrap(),
        )
    };
    let old = slow();
    within("the node leads", old.node.wait_for_leadership()).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let incarnation = || {
        let nodes = discovery.nodes();
        nodes.get("n1").map(|node| node.incarnation())
    };
    let first = incarnation();
    // A new process under the same id, while the old one is still running.
    let new = slow();
    eventually("the new process is registered", || incarnation() != first).await;
    let second = incarnation();
    eventually("the old process gives up", || {
        old.node.current_health() == HealthStatus::Unhealthy && !old.node.is_leader()
    })
    .await;
    within("the new process leads", new.node.wait_for_leadership()).await;
    old.stop().await;
    throughout(
        "the new process stays registered and leads",
        Duration::from_secs(7),
        || incarnation() == second && new.node.is_leader(),
    )
    .await;
    new.stop().await;
}

#[tokio::test]
async fn a_replaced_process_comes_back_when_its_successor_leaves() {
    let etcd = Etcd::shared();
    let group = group("comeback");
    let old = Running::start(&etcd.options(), &group, "n1").await;
    let new = Running::start(&etcd.options(), &group, "n1").await;
    eventually("the old process gives up", || {
        old.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    new.stop().await;
    old.wait_until_healthy().await;
    within("the node leads", old.node.wait_for_leadership()).await;
    old.stop().await;
}

#[tokio::test]
async fn shutdown_within_two_seconds_while_etcd_is_stopped() {
    let etcd = Etcd::own();
    let group = group("silent");
    let first = Running::start_with_ttl(&etcd.options(), &group, "n1", EXPIRING_TTL).await;
    let second = Running::start_with_ttl(&etcd.options(), &group, "n2", EXPIRING_TTL).await;
    etcd.pause();
    let stops = async |node: Running| {
        let stalls = Stalls::watch();
        let took = node.stop().await;
        assert!(took < Duration::from_secs(2) + stalls.so_far(), "{took:?}");
    };
    // One node is stopped at once, the other after its session has noticed the silence.
    stops(first).await;
    eventually("n2 is unhealthy", || {
        second.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    stops(second).await;
    etcd.resume();
    let discovery = ready(&etcd.options(), &group).await;
    eventually("the entries they left expire with their leases", || {
        discovery.nodes().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_leader_cut_off_gives_up_before_another_is_elected() {
    let etcd = Etcd::shared();
    let group = group("cutoff");
    let link = Link::to(etcd.address()).await;
    let cut_off = Running::start_with_ttl(&link.options(), &group, "n1", EXPIRING_TTL).await;
    within("the node leads", cut_off.node.wait_for_leadership()).await;
    let other = Running::start(&etcd.options(), &group, "n2").await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;

    link.set_silent(true);
    let (mut last_led, mut gave_up, mut elected) = (Duration::ZERO, None, None);
    let start = tokio::time::Instant::now();
    eventually("n2 leads", || {
        let asked = start.elapsed();
        // The order matters: `other` is read first, so that two true values mean two leaders at one
        // time.
        let other_leads = other.node.is_leader();
        let cut_off_leads = cut_off.node.is_leader();
        assert!(!(other_leads && cut_off_leads), "two leaders");
        if cut_off_leads {
            last_led = asked;
        } else {
            gave_up.get_or_insert_with(|| start.elapsed());
        }
        if other_leads {
            elected = Some(start.elapsed());
        }
        other_leads
    })
    .await;
    assert!(gave_up.is_some() && gave_up <= elected);
    // A busy machine may notice late that it has given up, but not that it still led.
    let ttl = Duration::from_secs(EXPIRING_TTL.unsigned_abs());
    assert!(last_led <= ttl, "{last_led:?}");
    throughout("one leader", Duration::from_secs(2), || {
        other.node.is_leader() && !cut_off.node.is_leader()
    })
    .await;

    // After the link is restored, n1 is registered again and waits for its turn.
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
    within("the node leads", leader.node.wait_for_leadership()).await;
    let candidate = Running::start_with_ttl(&link.options(), &group, "n2", EXPIRING_TTL).await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;
    link.set_silent(true);
    eventually("the lease of n2 expires", || discovery.nodes().len() == 1).await;
    eventually("n2 is unhealthy", || {
        candidate.node.current_health() == HealthStatus::Unhealthy
    })
    .await;
    link.set_silent(false);
    eventually("n2 is registered again", || discovery.nodes().len() == 2).await;
    candidate.wait_until_healthy().await;
    // It is a candidate again, too.
    leader.stop().await;
    within("the node leads", candidate.node.wait_for_leadership()).await;
    candidate.stop().await;
}

#[tokio::test]
async fn a_discovery_cut_off_silently_says_so_and_keeps_the_view() {
    let etcd = Etcd::shared();
    let group = group("deaf");
    let link = Link::to(etcd.address()).await;
    let node = Running::start(&etcd.options(), &group, "n1").await;
    let discovery = ready(&link.options(), &group).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    within("the discovery shows a leader", discovery.wait_for_leader()).await;
    let mut events = discovery.subscribe();
    let stalls = Stalls::watch();
    link.set_silent(true);
    let start = tokio::time::Instant::now();
    let event = within("an event arrives", events.recv()).await.unwrap();
    assert_eq!(event, ClusterEvent::Disconnected);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5) + stalls.so_far(), "{took:?}");
    assert_eq!(discovery.nodes().len(), 1);
    node.stop().await;
    assert_eq!(
        discovery.nodes().len(),
        1,
        "the discovery cannot know that the node left"
    );
    link.set_silent(false);
    eventually("the discovery sees that the node left", || {
        discovery.nodes().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_node_started_before_etcd_registers_when_it_comes() {
    let etcd = Etcd::own();
    let group = group("before");
    etcd.stop();
    let node = builder(&etcd.options(), &group, "n1").try_build().unwrap();
    let running = Running::new(node);
    let discovery = super::watch_group(&etcd.options(), &group);
    throughout(
        "the node is not healthy and the discovery is not ready",
        Duration::from_secs(1),
        || running.node.current_health() != HealthStatus::Healthy && !discovery.is_ready(),
    )
    .await;
    etcd.start();
    running.wait_until_healthy().await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
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
    within("the node leads", running.node.wait_for_leadership()).await;
    let discovery = ready(&etcd.options(), &group).await;
    eventually("several metrics were written", || {
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
