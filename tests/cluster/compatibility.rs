//! In one group with the predecessor: by its keys, its JSON and its way of campaigning.

use super::common::etcd::Etcd;
use super::common::{eventually, group, throughout, within};
use super::{Running, leader_id, ready};

#[tokio::test]
async fn a_peer_that_campaigns_by_the_election_rpcs_shares_the_queue() {
    let etcd = Etcd::shared();
    let group = group("peer");
    let mut peer = etcd.raw_client().await;
    let lease = peer.lease_grant(60, None).await.unwrap().id();
    let under = etcd_client::PutOptions::new().with_lease(lease);
    let entry = r#"{"id":"peer","ip":"192.168.1.10","last_seen":1234567890}"#;
    peer.put(format!("registry/{group}/peer"), entry, Some(under))
        .await
        .unwrap();
    let election = format!("election/{group}");
    let won = peer
        .campaign(election.as_str(), "peer", lease)
        .await
        .unwrap();
    let key = won.leader().unwrap().key().to_vec();
    assert_eq!(
        String::from_utf8(key).unwrap(),
        format!("election/{group}/{lease:x}"),
        "the key layout is the one this crate uses"
    );

    let ours = Running::start(&etcd.options(), &group, "ours").await;
    let discovery = ready(&etcd.options(), &group).await;
    eventually("the peer leads", || {
        leader_id(&discovery).as_deref() == Some("peer") && discovery.nodes().len() == 2
    })
    .await;
    throughout("ours waits", std::time::Duration::from_millis(500), || {
        !ours.node.is_leader()
    })
    .await;

    // It resigns: ours leads, and the peer, which queues again, sees that.
    let resign = etcd_client::ResignOptions::new().with_leader(won.leader().unwrap().clone());
    peer.resign(Some(resign)).await.unwrap();
    within("ours leads", ours.node.wait_for_leadership()).await;
    let seen = peer.leader(election.as_str()).await.unwrap();
    assert_eq!(seen.kv().unwrap().value(), b"ours");
    let mut waiting = peer.clone();
    let again = tokio::spawn(async move {
        let won = waiting.campaign(election.as_str(), "peer", lease).await;
        won.map(drop)
    });
    eventually("the peer is in line", || !again.is_finished()).await;
    ours.stop().await;
    within("the peer wins again", again).await.unwrap().unwrap();
    eventually("seen", || leader_id(&discovery).as_deref() == Some("peer")).await;
    peer.lease_revoke(lease).await.unwrap();
}

#[tokio::test]
async fn what_is_written_is_what_the_predecessor_reads() {
    let etcd = Etcd::shared();
    let group = group("wire");
    let running = Running::start(&etcd.options(), &group, "n1").await;
    within("leadership", running.node.wait_for_leadership()).await;
    let mut client = etcd.raw_client().await;
    let entry = client
        .get(format!("registry/{group}/n1"), None)
        .await
        .unwrap();
    let entry = &entry.kvs()[0];
    let value: serde_json::Value = serde_json::from_slice(entry.value()).unwrap();
    let fields: Vec<_> = value.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["id", "ip", "last_seen"]);
    let candidacy = format!("election/{group}/{:x}", entry.lease());
    let candidate = client.get(candidacy, None).await.unwrap();
    assert_eq!(candidate.kvs()[0].value(), b"n1");
    assert_eq!(
        candidate.kvs()[0].lease(),
        entry.lease(),
        "one lease for both"
    );
    running.stop().await;
}
