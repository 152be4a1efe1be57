//! Tests that nodes and discoveries of several groups share one connection, one lease and one watch
//! stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pingora_etcd::{Cluster, ClusterError, HealthStatus, MetricsCollector, NodeMetadata};

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::{eventually, group, local, throughout, within};
use super::{Running, leader_id, ready};

const TTL: i64 = 3;

fn cluster(link: &Link) -> Cluster {
    Cluster::builder(link.options())
        .ttl(TTL)
        .try_build()
        .unwrap()
}

struct Counts(Arc<AtomicU32>);

impl MetricsCollector for Counts {
    fn collect(&self) -> NodeMetadata {
        let depth = 10 * self.0.fetch_add(1, Ordering::Relaxed);
        serde_json::json!({ "queue_depth": depth })
    }

    fn may_block(&self) -> bool {
        false
    }
}

/// The leases that these keys are attached to.
async fn leases(etcd: &Etcd, keys: &[String]) -> Vec<i64> {
    let mut client = etcd.raw_client().await;
    let mut leases = Vec::new();
    for key in keys {
        let response = client.get(key.as_str(), None).await.unwrap();
        leases.extend(response.kvs().iter().map(etcd_client::KeyValue::lease));
    }
    leases
}

/// How many watch streams are open, according to etcd.
async fn watch_streams(etcd: &Etcd) -> f64 {
    let metrics = reqwest::get(format!("{}/metrics", etcd.endpoints()[0]));
    let metrics = metrics.await.unwrap().text().await.unwrap();
    let mut lines = metrics.lines();
    let count = lines.find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watch_stream_total "));
    count.expect("etcd reports this metric").parse().unwrap()
}

#[tokio::test]
async fn five_groups_have_one_connection_one_lease_and_leave_one_by_one() {
    // An etcd of its own, so that watches of other tests are not counted.
    let etcd = Etcd::own();
    let link = Link::to(etcd.address()).await;
    let cluster = cluster(&link);
    let groups: Vec<String> = (0..5)
        .map(|index| group(&format!("shared-{index}")))
        .collect();
    let mut nodes = Vec::new();
    let mut discoveries = Vec::new();
    for group in &groups {
        let node = cluster
            .node("n1", local(), group)
            .metrics_collector(Counts(Arc::default()))
            .metrics_update_interval(1);
        nodes.push(Running::new(node.try_build().unwrap()));
        let discovery = cluster.discovery(group).try_build().unwrap();
        let running = discovery.clone();
        tokio::spawn(async move { running.run(None).await });
        discoveries.push(discovery);
    }
    for (node, discovery) in nodes.iter().zip(&discoveries) {
        within("the node leads", node.node.wait_for_leadership()).await;
        within("the discovery shows the node", discovery.wait_for_leader()).await;
    }
    let keys: Vec<_> = groups
        .iter()
        .map(|group| format!("registry/{group}/n1"))
        .collect();
    assert!(watch_streams(&etcd).await <= 1.0);
    let held = leases(&etcd, &keys).await;
    assert_eq!(held.len(), 5);
    assert!(held.iter().all(|lease| *lease == held[0]), "{held:?}");

    // The node that renews the lease leaves; the others continue with it.
    let first = nodes.remove(0);
    let left = first.stop().await;
    assert!(left < Duration::from_secs(1), "{left:?}");
    eventually("the node is gone", || discoveries[0].nodes().is_empty()).await;
    let ttl = Duration::from_secs(TTL.unsigned_abs());
    throughout("the other nodes stay", 2 * ttl, || {
        nodes.iter().all(|running| running.node.is_leader())
            && discoveries[1..]
                .iter()
                .all(|discovery| discovery.nodes().len() == 1)
    })
    .await;
    // The entries of a node that crashes must not be kept alive by the renewals of the others.
    nodes.remove(0).crash();
    eventually("the keys of the crashed node are removed", || {
        discoveries[1].nodes().is_empty() && discoveries[1].leader().is_none()
    })
    .await;
    assert_eq!(link.connections(), 1);
    assert!((watch_streams(&etcd).await - 1.0).abs() < 0.5);
    let same = leases(&etcd, &keys[2..]).await;
    assert_eq!(same, vec![held[0]; 3]);
    for node in nodes {
        node.stop().await;
    }
    assert!(leases(&etcd, &keys).await.is_empty());
    let mut client = etcd.raw_client().await;
    let left = client.leases().await.unwrap();
    assert!(left.leases().iter().all(|lease| lease.id() != held[0]));
}

#[tokio::test]
async fn two_nodes_of_one_group_have_two_leases_on_one_connection() {
    let etcd = Etcd::shared();
    let link = Link::to(etcd.address()).await;
    let cluster = cluster(&link);
    let group = group("twice");
    let run = |id: &str| {
        let node = cluster.node(id, local(), &group);
        Running::new(node.try_build().unwrap())
    };
    let (first, second) = (run("n1"), run("n2"));
    first.wait_until_healthy().await;
    second.wait_until_healthy().await;
    let discovery = ready(&etcd.options(), &group).await;
    within(
        "the discovery shows both nodes",
        discovery.wait_for_nodes(2),
    )
    .await;
    let leads = |running: &Running| running.node.is_leader();
    eventually("one node leads", || leads(&first) != leads(&second)).await;
    let (leading, waiting) = if leads(&first) {
        (first, second)
    } else {
        (second, first)
    };
    leading.stop().await;
    eventually("the other node leads", || leads(&waiting)).await;
    eventually("the discovery shows the other leader", || {
        leader_id(&discovery).as_deref() == Some(waiting.node.id())
    })
    .await;
    assert_eq!(link.connections(), 1);
    waiting.stop().await;
}

#[tokio::test]
async fn a_lost_lease_is_lost_for_all_and_replaced_for_all() {
    let etcd = Etcd::shared();
    let link = Link::to(etcd.address()).await;
    let cluster = cluster(&link);
    let groups = [group("lost-a"), group("lost-b")];
    let nodes = groups.each_ref().map(|group| {
        let node = cluster.node("n1", local(), group);
        Running::new(node.try_build().unwrap())
    });
    for running in &nodes {
        within("the node leads", running.node.wait_for_leadership()).await;
    }
    let keys = groups
        .each_ref()
        .map(|group| format!("registry/{group}/n1"));
    let before = leases(&etcd, &keys).await;
    etcd.raw_client()
        .await
        .lease_revoke(before[0])
        .await
        .unwrap();
    eventually("both nodes lead again", || {
        nodes.iter().all(|running| {
            running.node.is_leader() && running.node.current_health() == HealthStatus::Healthy
        })
    })
    .await;
    let after = async {
        loop {
            let after = leases(&etcd, &keys).await;
            if after.len() == 2 && after[0] == after[1] && after[0] != before[0] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within("both nodes share a new lease", after).await;
    for running in nodes {
        running.stop().await;
    }
}

#[test]
fn what_a_cluster_decides_cannot_be_decided_otherwise() {
    let cluster = Cluster::connect(vec!["http://127.0.0.1:1".to_owned()]).unwrap();
    let refused = |result: Result<_, ClusterError>, field: &str| {
        let error = result.map(drop).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    };
    refused(cluster.node("n", local(), "g").ttl(9).try_build(), "ttl");
    let store = Arc::new(pingora_etcd::store::MemoryStore::new());
    refused(
        cluster.node("n", local(), "g").store(store).try_build(),
        "store",
    );
    let error = Cluster::builder(vec!["h:1".to_owned()]).ttl(0).try_build();
    assert!(error.unwrap_err().to_string().contains("ttl"));
    let error = Cluster::connect(Vec::<String>::new()).unwrap_err();
    assert!(error.to_string().contains("endpoints"), "{error}");
}
