//! Tests silence, several endpoints, a start without etcd, mass expiry, and very large groups.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use etcd_client::{Client, DeleteOptions, GetOptions, Txn, TxnOp};
use pingora_etcd::store::{Circuit, EtcdStore, Selector, Store};
use pingora_etcd::{
    Change, ClusterError, ClusterEvent, EtcdOptions, ServiceDiscovery, ServiceDiscoveryBuilder,
    discovery::{DiscoveryStatus, EntryLimits, SelfPreservation, SnapshotFile},
};
use tokio::task::JoinHandle;

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::stalls::Stalls;
use super::common::{eventually, free_port, group, local, skipped, throughout, within};
use super::etcd_cluster::Cluster as EtcdCluster;
use super::{Running, leader_id, put_node, ready};

/// A discovery that runs until it is stopped.
struct Following {
    discovery: ServiceDiscovery,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ClusterError>>,
}

impl Following {
    fn start(builder: ServiceDiscoveryBuilder) -> Self {
        let discovery = builder.try_build().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let running = discovery.clone();
        let task = tokio::spawn(async move {
            running
                .run_until(async {
                    let _ = stopped.await;
                })
                .await
        });
        Self {
            discovery,
            stop: Some(stop),
            task,
        }
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        let ended = within("run returns", &mut self.task).await;
        ended.unwrap().unwrap();
    }
}

fn is_stale(discovery: &ServiceDiscovery) -> bool {
    matches!(discovery.status(), DiscoveryStatus::Stale { .. })
}

async fn delete(client: &mut Client, group: &str, id: &str) {
    let key = format!("registry/{group}/{id}");
    client.delete(key, None).await.unwrap();
}

#[tokio::test]
async fn silence_is_noticed_within_five_seconds_and_following_resumes() {
    let etcd = Etcd::shared();
    for busy in [false, true] {
        let group = group("silence");
        let mut client = etcd.raw_client().await;
        put_node(&mut client, &group, "a").await;
        let link = Link::to(etcd.address()).await;
        let discovery = ready(&link.options(), &group).await;
        let mut changes = discovery.changes();
        let mut events = discovery.subscribe();
        let writing = busy.then(|| {
            let (mut client, group) = (client.clone(), group.clone());
            tokio::spawn(async move {
                loop {
                    put_node(&mut client, &group, "busy").await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
        });
        if busy {
            within(
                "the discovery shows the busy node",
                discovery.wait_for_nodes(2),
            )
            .await;
        }
        let stalls = Stalls::watch();
        link.set_silent(true);
        let took = eventually("the discovery is stale", || is_stale(&discovery)).await;
        println!("silence, busy {busy}: noticed after {took:?}");
        assert!(
            took < Duration::from_secs(5) + stalls.so_far(),
            "busy {busy}: {took:?}"
        );
        let before = discovery.nodes().len();
        assert!(before > 0, "the last view is kept");
        put_node(&mut client, &group, "meanwhile").await;
        throughout("the last view is kept", Duration::from_secs(1), || {
            discovery.nodes().len() == before && is_stale(&discovery)
        })
        .await;
        link.set_silent(false);
        eventually("the discovery is live", || {
            discovery.status() == DiscoveryStatus::Live
        })
        .await;
        within(
            "the discovery shows the missed change",
            discovery.wait_for_nodes(before + 1),
        )
        .await;
        if let Some(writing) = writing {
            writing.abort();
        }
        let mut events_seen = Vec::new();
        while let Ok(event) = events.try_recv() {
            events_seen.push(event);
        }
        let of = |event| {
            events_seen
                .iter()
                .filter(|events_seen| **events_seen == event)
                .count()
        };
        assert_eq!(of(ClusterEvent::Disconnected), 1, "{events_seen:?}");
        assert_eq!(of(ClusterEvent::Reconnected), 1, "{events_seen:?}");
        // No relist: one complete state at the start, and only changes after it.
        let mut resets = 0;
        let fold = async {
            loop {
                match changes.next().await {
                    Change::Reset(_) => resets += 1,
                    Change::Joined(node) if node.id == "meanwhile" => break,
                    _ => {}
                }
            }
        };
        within("the missed change", fold).await;
        assert_eq!(resets, 1);
    }
}

/// Makes the store behave as with a server that does not respond to progress requests.
#[cfg(feature = "test-util")]
fn without_progress(options: EtcdOptions) -> EtcdOptions {
    options.without_progress_requests()
}

#[cfg(not(feature = "test-util"))]
fn without_progress(_: EtcdOptions) -> EtcdOptions {
    unreachable!("only with the feature test-util")
}

#[tokio::test]
async fn a_quiet_group_stays_live_whether_the_server_answers_progress_or_not() {
    let etcd = Etcd::shared();
    let without = cfg!(feature = "test-util").then_some(false);
    for asks in [true].into_iter().chain(without) {
        let group = group("quiet");
        let mut client = etcd.raw_client().await;
        put_node(&mut client, &group, "a").await;
        let link = Link::to(etcd.address()).await;
        let options = link.options().silence_timeout(Duration::from_secs(2));
        let options = if asks {
            options
        } else {
            without_progress(options)
        };
        let discovery = ready(&options, &group).await;
        throughout("the discovery stays live", Duration::from_secs(6), || {
            discovery.status() == DiscoveryStatus::Live
        })
        .await;
        assert_eq!(link.connections(), 1);
        // Although the watches were created again several times, no change is missed or reported
        // twice.
        let mut changes = discovery.changes();
        put_node(&mut client, &group, "b").await;
        within("b joins", discovery.wait_for_nodes(2)).await;
        delete(&mut client, &group, "a").await;
        eventually("a leaves", || discovery.nodes().len() == 1).await;
        let mut events_seen = Vec::new();
        for _ in 0..4 {
            events_seen.push(match within("a change arrives", changes.next()).await {
                Change::Reset(nodes) => format!("{} nodes", nodes.len()),
                Change::Joined(node) => format!("{} joined", node.id),
                Change::Left(node) => format!("{} left", node.id),
                Change::Leader(_) => "leader".to_owned(),
                other => format!("{other:?}"),
            });
        }
        assert_eq!(events_seen, ["1 nodes", "leader", "b joined", "a left"]);
        let stalls = Stalls::watch();
        link.set_silent(true);
        let took = eventually("the discovery is stale", || is_stale(&discovery)).await;
        assert!(took < Duration::from_secs(3) + stalls.so_far(), "{took:?}");
    }
}

#[tokio::test]
async fn a_silent_endpoint_is_left_for_the_next_one_which_is_remembered() {
    let etcd = Etcd::shared();
    let group = group("rotate");
    let mut client = etcd.raw_client().await;
    let (bad, good) = (
        Link::to(etcd.address()).await,
        Link::to(etcd.address()).await,
    );
    let endpoints = [bad.address(), good.address()].map(|address| format!("http://{address}"));
    let options = EtcdOptions::new(endpoints.clone())
        .connect_timeout(Duration::from_secs(2))
        .shuffle_endpoints(false);
    let discovery = ready(&options, &group).await;
    assert_eq!(
        discovery.store_status().endpoint.as_ref(),
        Some(&endpoints[0])
    );
    bad.set_silent(true);
    eventually("the discovery is stale", || is_stale(&discovery)).await;
    eventually("the discovery is live again", || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    assert_eq!(
        discovery.store_status().endpoint.as_ref(),
        Some(&endpoints[1])
    );
    put_node(&mut client, &group, "a").await;
    within(
        "the discovery receives changes",
        discovery.wait_for_nodes(1),
    )
    .await;
    // The first endpoint responds again, but is not used as long as the second one works.
    bad.set_silent(false);
    let before = bad.connections();
    throughout(
        "the discovery stays at the second endpoint",
        Duration::from_secs(1),
        || {
            bad.connections() == before
                && discovery.store_status().endpoint.as_ref() == Some(&endpoints[1])
        },
    )
    .await;
    // When the second endpoint fails, the first one is used again.
    good.cut();
    put_node(&mut client, &group, "b").await;
    within(
        "the discovery receives changes again",
        discovery.wait_for_nodes(2),
    )
    .await;
    assert_eq!(
        discovery.store_status().endpoint.as_ref(),
        Some(&endpoints[0])
    );
}

#[tokio::test]
async fn after_failures_calls_fail_at_once_and_one_finds_out_when_it_is_over() {
    let etcd = Etcd::own();
    let options = etcd
        .options()
        .breaker(3, Duration::from_millis(300))
        .connect_timeout(Duration::from_millis(500))
        .request_timeout(Duration::from_millis(500));
    let store = Arc::new(EtcdStore::new(options).unwrap());
    let any = Selector::Key("any".to_owned());
    store.list(&any, None).await.unwrap();
    assert_eq!(store.status().circuit, Circuit::Closed);
    // etcd is silent, so every call that is tried takes its full time limit.
    etcd.pause();
    let open = async {
        while store.status().circuit == Circuit::Closed {
            assert!(store.list(&any, None).await.is_err());
        }
    };
    within("the circuit opens", open).await;
    let start = Instant::now();
    let (mut at_once, mut tried) = (0, 0);
    while start.elapsed() < Duration::from_secs(3) {
        let call = Instant::now();
        match store.list(&any, None).await {
            Err(ClusterError::CircuitOpen { failures, last, .. }) => {
                assert!(failures >= 3 && !last.is_empty());
                assert!(call.elapsed() < Duration::from_millis(100));
                at_once += 1;
            }
            Err(_) => tried += 1,
            Ok(_) => panic!("etcd is stopped"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(
        tried <= 5,
        "too many calls were tried while the circuit was open: {tried}"
    );
    assert!(at_once > 20, "{at_once}");
    etcd.resume();
    let answered = async {
        while store.list(&any, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("a call succeeds", answered).await;
    assert_eq!(store.status().circuit, Circuit::Closed);
}

#[tokio::test]
async fn a_hundred_thousand_nodes_load_and_the_old_view_stays_until_the_new_one_is_there() {
    const NODES: usize = 100_000;
    let etcd = Etcd::own();
    let group = group("large");
    let mut client = etcd.raw_client().await;
    let value = |index: usize| {
        // About 500 bytes, as in the group that the predecessor cannot read with 9,000 nodes.
        let text = "x".repeat(300);
        format!(
            r#"{{"id":"n{index:06}","ip":"10.0.0.1","last_seen":1,"metadata":{{"cpu_usage_percent":{}.5,"memory_usage_percent":40,"queue_depth":3,"text":"{text}"}},"port":8080}}"#,
            index % 100
        )
    };
    for first in (0..NODES).step_by(125) {
        let puts = (first..NODES.min(first + 125))
            .map(|index| TxnOp::put(format!("registry/{group}/n{index:06}"), value(index), None));
        let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
        client.txn(txn).await.unwrap();
    }
    let start = Instant::now();
    let discovery = ready(&etcd.options(), &group).await;
    println!("{NODES} nodes loaded in {:?}", start.elapsed());
    assert_eq!(discovery.nodes().len(), NODES);
    assert_eq!(
        discovery
            .nodes()
            .get("n099999")
            .unwrap()
            .metric("queue_depth"),
        Some(3.0)
    );
    // The history moves on while the discovery is cut off. Whether it resumes or relists, the view
    // must stay complete.
    let mut events = discovery.subscribe();
    etcd.stop();
    eventually("the discovery is stale", || is_stale(&discovery)).await;
    etcd.start();
    let mut client = etcd.raw_client().await;
    put_node(&mut client, &group, "new").await;
    throughout("the view never shrinks", Duration::from_secs(2), || {
        discovery.nodes().len() >= NODES
    })
    .await;
    within(
        "the discovery shows the new node",
        discovery.wait_for_nodes(NODES + 1),
    )
    .await;
    let events_seen = async {
        loop {
            match events.recv().await.unwrap() {
                ClusterEvent::Disconnected | ClusterEvent::Reconnected => {}
                ClusterEvent::NodeJoined(node) if node.id == "new" => return,
                other => panic!("{other}"),
            }
        }
    };
    within("only the difference is reported", events_seen).await;
}

fn snapshot(group: &str) -> SnapshotFile {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("nodes-{group}"));
    let _ = std::fs::remove_file(&path);
    SnapshotFile::new(path).interval(Duration::from_millis(100))
}

#[tokio::test]
async fn a_start_without_etcd_is_served_from_the_snapshot() {
    let etcd = Etcd::own();
    let group = group("cold");
    let file = snapshot(&group);
    let builder = || ServiceDiscovery::builder(etcd.options(), &group).snapshot_file(file.clone());
    let first = Following::start(builder());
    let node = Running::start(&etcd.options(), &group, "n1").await;
    within("the node leads", node.node.wait_for_leadership()).await;
    let mut client = etcd.raw_client().await;
    for id in ["a", "b", "c"] {
        put_node(&mut client, &group, id).await;
    }
    within(
        "the discovery shows all nodes",
        first.discovery.wait_for_nodes(4),
    )
    .await;
    // The last change is written to the file when the run ends.
    first.stop().await;
    let written = std::fs::metadata(&file.path).unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(written.permissions().mode() & 0o777, 0o600);
    }
    assert!(written.len() > 0);

    // Refused connections and silence: in both cases etcd cannot be reached.
    for silent in [false, true] {
        if silent {
            etcd.start();
            etcd.pause();
        } else {
            etcd.stop();
        }
        let start = Instant::now();
        let cold = Following::start(builder());
        within("the discovery is ready", cold.discovery.wait_ready()).await;
        println!(
            "silent {silent}: served from disk after {:?}",
            start.elapsed()
        );
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        let DiscoveryStatus::FromDisk { written } = cold.discovery.status() else {
            panic!("{:?}", cold.discovery.status());
        };
        assert!(SystemTime::now().duration_since(written).unwrap() < Duration::from_secs(60));
        assert_eq!(cold.discovery.nodes().len(), 4);
        let incarnation = |id| cold.discovery.nodes().get(id).unwrap().incarnation();
        assert_ne!(
            incarnation("n1"),
            0,
            "the snapshot keeps the lease of the node"
        );
        assert!(
            cold.discovery.leadership().is_none(),
            "a snapshot must not name a leader"
        );
        if silent {
            etcd.resume();
            eventually("the discovery is live", || {
                cold.discovery.status() == DiscoveryStatus::Live
            })
            .await;
            eventually("the discovery shows a leader", || {
                leader_id(&cold.discovery).is_some()
            })
            .await;
            assert_eq!(cold.discovery.nodes().len(), 4);
        }
        cold.stop().await;
    }
    node.stop().await;
}

#[tokio::test]
async fn a_file_that_must_not_be_used_is_left_where_it_is() {
    let group = group("damaged");
    let file = snapshot(&group);
    let dead = vec![format!("http://{}:{}", local(), free_port())];
    for text in [
        "",
        "something else\n",
        "pingora-etcd snapshot 1\n{}\n0000000000000000\n",
    ] {
        std::fs::write(&file.path, text).unwrap();
        let builder = ServiceDiscovery::builder(dead.clone(), &group).snapshot_file(file.clone());
        let following = Following::start(builder);
        throughout("the file is not used", Duration::from_millis(1500), || {
            following.discovery.status() == DiscoveryStatus::Connecting
                && following.discovery.nodes().is_empty()
        })
        .await;
        following.stop().await;
        assert_eq!(std::fs::read_to_string(&file.path).unwrap(), text);
    }
}

#[tokio::test]
async fn when_everything_is_gone_from_etcd_the_pool_is_not() {
    let etcd = Etcd::shared();
    let group = group("mass");
    let mut client = etcd.raw_client().await;
    for id in 0..10 {
        put_node(&mut client, &group, &format!("n{id}")).await;
    }
    let mut preserve = SelfPreservation::default();
    preserve.hold_ms = 10_000;
    let hold = Duration::from_millis(preserve.hold_ms);
    let builder = ServiceDiscovery::builder(etcd.options(), &group).self_preservation(preserve);
    let following = Following::start(builder);
    let discovery = &following.discovery;
    let without = Following::start(
        ServiceDiscovery::builder(etcd.options(), &group)
            .self_preservation(SelfPreservation::off()),
    );
    within(
        "the discovery shows all nodes",
        discovery.wait_for_nodes(10),
    )
    .await;
    within(
        "the discovery shows all nodes",
        without.discovery.wait_for_nodes(10),
    )
    .await;
    let prefix = DeleteOptions::new().with_prefix();
    let start = Instant::now();
    client
        .delete(format!("registry/{group}/"), Some(prefix))
        .await
        .unwrap();
    eventually("without self-preservation all nodes are gone", || {
        without.discovery.nodes().is_empty()
    })
    .await;
    // Nobody goes before their time is over.
    let are_held = |nodes: usize| {
        assert!(
            nodes == 10 || start.elapsed() >= hold,
            "{nodes} nodes after {:?}",
            start.elapsed()
        );
    };
    eventually("all nodes are suspects", || {
        discovery.nodes().suspects() == 10
    })
    .await;
    are_held(discovery.nodes().len());
    for id in ["n1", "n2"] {
        put_node(&mut client, &group, id).await;
    }
    eventually("two nodes are back", || discovery.nodes().suspects() == 8).await;
    are_held(discovery.nodes().len());
    assert!(!discovery.nodes().is_suspect("n1") && discovery.nodes().is_suspect("n3"));
    eventually("the other suspects are dropped", || {
        let nodes = discovery.nodes();
        are_held(nodes.len());
        nodes.len() == 2 && nodes.suspects() == 0
    })
    .await;
    following.stop().await;
    without.stop().await;
}

#[tokio::test]
async fn strangers_are_kept_out() {
    let etcd = Etcd::shared();
    let group = group("strangers");
    let mut client = etcd.raw_client().await;
    put_node(&mut client, &group, "inside").await;
    let outside = r#"{"id":"outside","ip":"169.254.169.254","port":80}"#;
    client
        .put(format!("registry/{group}/outside"), outside, None)
        .await
        .unwrap();
    let mut limits = EntryLimits::default();
    limits.value_bytes = 1_000;
    let builder = ServiceDiscovery::builder(etcd.options(), &group)
        .allowed_networks(["10.0.0.0/8"])
        .allowed_ports(["8080"])
        .limits(limits);
    let following = Following::start(builder);
    let discovery = &following.discovery;
    within("the discovery is ready", discovery.wait_ready()).await;
    assert_eq!(discovery.nodes().len(), 1);
    assert_eq!(discovery.rejected_entries().not_allowed, 1);
    let giant = format!(
        r#"{{"id":"giant","ip":"10.0.0.1","metadata":"{}"}}"#,
        "x".repeat(1_000)
    );
    client
        .put(format!("registry/{group}/giant"), giant, None)
        .await
        .unwrap();
    eventually("the rejected entry is counted", || {
        discovery.rejected_entries().too_large == 1
    })
    .await;
    assert_eq!(discovery.nodes().len(), 1);
    following.stop().await;
}

#[tokio::test]
async fn without_a_quorum_one_member_gives_what_it_has_if_that_is_asked_for() {
    let Some(binary) = super::common::etcd::binary() else {
        skipped("a cluster of three needs an etcd binary, and ETCD_IMAGE is set");
        return;
    };
    let group = group("borrowed");
    let mut cluster = EtcdCluster::start(&binary, 3, None).await;
    put_node(&mut cluster.client(0), &group, "a").await;
    put_node(&mut cluster.client(1), &group, "b").await;
    let endpoints = cluster.addresses();
    let options = EtcdOptions::new(endpoints)
        .connect_timeout(Duration::from_millis(500))
        .request_timeout(Duration::from_millis(500));
    // This discovery was live before, so it keeps its own view.
    let before = ready(&options.clone().serializable_fallback(true), &group).await;
    assert_eq!(before.nodes().len(), 2);
    let node = Running::start(&options, &group, "n1").await;
    within("the node leads", node.node.wait_for_leadership()).await;
    within("the discovery shows all nodes", before.wait_for_nodes(3)).await;
    within("the discovery shows a leader", before.wait_for_leader()).await;
    // A member that is left alone gives only what it has applied.
    let mut client = cluster.client(0);
    within("member 0 has all nodes", async {
        loop {
            let own = GetOptions::new().with_prefix().with_serializable();
            let found = client.get(format!("registry/{group}/"), Some(own)).await;
            if found.is_ok_and(|found| found.kvs().len() == 3) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    cluster.kill(1);
    cluster.kill(2);
    eventually("the discovery is stale", || is_stale(&before)).await;
    let with = Following::start(ServiceDiscovery::builder(
        options.clone().serializable_fallback(true),
        &group,
    ));
    let without = Following::start(ServiceDiscovery::builder(options, &group));
    within("the discovery is ready", with.discovery.wait_ready()).await;
    assert!(is_stale(&with.discovery), "{:?}", with.discovery.status());
    assert_eq!(with.discovery.nodes().len(), 3);
    assert!(
        with.discovery.leadership().is_none(),
        "a serializable read must not name a leader"
    );
    assert!(!without.discovery.is_ready());
    assert!(before.leadership().is_some(), "the last view is kept");
    cluster.launch(1);
    cluster.launch(2);
    for discovery in [&before, &with.discovery, &without.discovery] {
        eventually("the discovery is live", || {
            discovery.status() == DiscoveryStatus::Live
        })
        .await;
        eventually("the discovery shows all nodes and a leader", || {
            discovery.nodes().len() == 3 && discovery.leadership().is_some()
        })
        .await;
    }
    node.stop().await;
    with.stop().await;
    without.stop().await;
}
