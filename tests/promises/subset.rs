//! Tests that a balancer which is one of many uses a part of many backends, and that nobody notices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::group;
use super::world::{Backend, Balancer, Setup, put, until};

const COUNT: usize = 40;
/// How many a balancer uses at least.
const LEAST: usize = 12;
/// How many requests each client has sent when it is looked at what served them.
const EACH: usize = 50;

fn cpu(percent: u32) -> Value {
    json!({ "metadata": { "cpu_usage_percent": percent } })
}

/// Some requests, of which four are always in flight, counted by node.
async fn load(balancer: &Arc<Balancer>) -> BTreeMap<String, usize> {
    let clients = (0..4).map(|_| {
        let balancer = balancer.clone();
        tokio::spawn(async move { balancer.gets(EACH).await })
    });
    let mut counted = BTreeMap::new();
    for client in clients.collect::<Vec<_>>() {
        for (node, count) in client.await.unwrap() {
            *counted.entry(node).or_default() += count;
        }
    }
    assert!(
        counted.keys().all(|node| node.starts_with('n')),
        "{counted:?}"
    );
    counted
}

async fn until_part(balancer: &Arc<Balancer>) -> BTreeMap<String, usize> {
    let mut used = BTreeMap::new();
    until("a part is used", async || {
        used = load(balancer).await;
        (LEAST..=LEAST + 1).contains(&used.len())
    })
    .await;
    used
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_balancers_uses_a_part_and_nobody_notices() {
    let (etcd, group) = (Etcd::shared(), group("subset"));
    let mut keys = etcd.raw_client().await;
    let mut backends = BTreeMap::new();
    for index in 0..COUNT {
        let backend = Backend::start(&format!("n{index:02}")).await;
        backend.set_delay(Duration::from_millis(20));
        put(&mut keys, &group, &backend.entry(cpu(70)), None).await;
        backends.insert(backend.id.clone(), backend);
    }
    let setup = Setup::shared(&group);
    let off = "adaptive: { subset_in_flight: 0 }";
    let more = "adaptive: { subset_least: 18 }";
    let [one, other] = [setup.clone().serving().await, setup.clone().serving().await].map(Arc::new);
    let [off, more] = [setup.clone().with(off), setup.with(more)];
    let [off, more] = [off.serving().await, more.serving().await].map(Arc::new);
    let (used, of_other) = tokio::join!(until_part(&one), until_part(&other));
    assert!(!used.keys().eq(of_other.keys()), "{used:?} {of_other:?}");
    until("as many as the file says", async || {
        (18..=19).contains(&load(&more).await.len())
    })
    .await;
    for _ in 0..3 {
        assert!(load(&off).await.len() > COUNT / 2);
    }

    // Two of them die, and then two more, and so on. No request fails, as there are three tries, and others take their
    // places.
    let used: Vec<String> = used.into_keys().collect();
    for dead in used[..8].chunks(2) {
        for id in dead {
            backends.remove(id);
        }
        until("others have taken their places", async || {
            let used = load(&one).await;
            used.len() >= LEAST && !dead.iter().any(|id| used.contains_key(id))
        })
        .await;
    }

    // All have little to do, so that all are used.
    for backend in backends.values() {
        put(&mut keys, &group, &backend.entry(cpu(5)), None).await;
    }
    until("all are used", async || {
        load(&one).await.len() == backends.len()
    })
    .await;
}
