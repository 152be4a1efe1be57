//! Tests that a balancer which is one of many uses a part of many backends, and that nobody notices.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{free_port, group};
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

/// A balancer with the address of its status.
struct Observed {
    balancer: Arc<Balancer>,
    status: String,
}

impl Observed {
    async fn start(setup: &Setup, fields: &str) -> Self {
        let admin = free_port();
        let fields = format!("{fields}\nadmin: {{ listen: '127.0.0.1:{admin}' }}");
        Self {
            balancer: Arc::new(setup.clone().with(&fields).serving().await),
            status: format!("http://127.0.0.1:{admin}/api/v1/status"),
        }
    }

    /// Sends some requests. Returns which nodes have a share now.
    async fn used(&self) -> BTreeSet<String> {
        load(&self.balancer).await;
        let text = client().get(&self.status).send().await.unwrap();
        let status: Value = serde_json::from_str(&text.text().await.unwrap()).unwrap();
        let nodes = status["groups"][0]["nodes"].as_array().unwrap();
        let used = nodes.iter().filter(|node| {
            let has_share = node["share"].as_f64().is_some_and(|share| share > 0.0);
            let reason = node["reason"].as_str().unwrap();
            if node["state"] == "serving" {
                assert!(has_share != reason.contains("subset_in_flight"), "{node}");
            }
            has_share
        });
        used.map(|node| node["id"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn until_uses(&self, count: usize) -> BTreeSet<String> {
        let mut used = BTreeSet::new();
        until(&format!("{count} are used"), async || {
            used = self.used().await;
            used.len() == count
        })
        .await;
        used
    }
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
    let [one, other] = [
        Observed::start(&setup, "").await,
        Observed::start(&setup, "").await,
    ];
    let off = Observed::start(&setup, "adaptive: { subset_in_flight: 0 }").await;
    let more = Observed::start(&setup, "adaptive: { subset_least: 18 }").await;
    let (used, of_other, ..) = tokio::join!(
        one.until_uses(LEAST),
        other.until_uses(LEAST),
        more.until_uses(18),
    );
    assert_ne!(used, of_other);
    assert_eq!(off.used().await.len(), COUNT);
    let counted = load(&one.balancer).await;
    assert!(counted.keys().all(|id| used.contains(id)), "{counted:?}");

    // Two of them die, and then two more, and so on. No request fails, as there are three tries, and others take their
    // places.
    let used: Vec<String> = used.into_iter().collect();
    for dead in used[..6].chunks(2) {
        for id in dead {
            backends.remove(id);
        }
        until("others have taken their places", async || {
            // Those that are dead have a part of the weight until they are asked.
            let counted = load(&one.balancer).await;
            !dead.iter().any(|id| counted.contains_key(id))
        })
        .await;
    }

    // All have little to do, so that all are used.
    for backend in backends.values() {
        put(&mut keys, &group, &backend.entry(cpu(5)), None).await;
    }
    until("all are used", async || {
        let used = one.used().await;
        backends.keys().all(|id| used.contains(id))
    })
    .await;
}
