//! Tests that each of hundreds of backends is followed: where there are 256 or more, other code takes changes over.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::group;
use super::world::{Backend, Balancer, Setup, delete, put, until};

const COUNT: usize = 300;
/// What is registered with this weight gets a third of the requests, as the others have a weight of 1.
const THIRD: u32 = 150;

fn of(counted: &BTreeMap<String, usize>, id: &str) -> usize {
    counted.get(id).copied().unwrap_or(0)
}

fn cpu(percent: u32) -> Value {
    json!({ "metadata": { "cpu_usage_percent": percent } })
}

/// Waits until both balancers send so many of a hundred requests to this node.
async fn until_gets(
    balancers: [&Balancer; 2],
    what: &str,
    id: &str,
    wanted: std::ops::RangeInclusive<usize>,
) {
    for balancer in balancers {
        until(what, async || {
            let counted = balancer.gets(100).await;
            wanted.contains(&of(&counted, id))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn each_of_hundreds_of_backends_is_followed() {
    let (etcd, group) = (Etcd::shared(), group("hundreds"));
    let mut keys = etcd.raw_client().await;
    let mut backends = Vec::new();
    for index in 0..COUNT {
        let backend = Backend::start(&format!("n{index:03}")).await;
        put(&mut keys, &group, &backend.entry(cpu(50)), None).await;
        backends.push(backend);
    }
    let setup = Setup::shared(&group);
    let adaptive = setup.clone().serving().await;
    let headroom = "policy: headroom\nheadroom: { cpu: 1, memory: 0, queue: 0 }";
    let headroom = setup.with(headroom).serving().await;
    let both = [&adaptive, &headroom];
    for balancer in both {
        let counted = balancer.gets(3 * COUNT).await;
        let most = counted.values().max();
        assert!(
            counted.len() >= COUNT * 9 / 10 && most.is_some_and(|most| *most <= 20),
            "{counted:?}"
        );
    }

    // A static weight, and then a report of that node alone.
    let mut heavy = json!({ "weight": THIRD });
    put(&mut keys, &group, &backends[0].entry(heavy.clone()), None).await;
    until_gets(both, "a weight counts", "n000", 20..=50).await;
    heavy["metadata"] = json!({ "cpu_usage_percent": 100 });
    put(&mut keys, &group, &backends[0].entry(heavy.clone()), None).await;
    until("a report counts", async || {
        of(&headroom.gets(100).await, "n000") <= 12
    })
    .await;
    heavy["metadata"] = json!({ "cpu_usage_percent": 50 });
    put(&mut keys, &group, &backends[0].entry(heavy.clone()), None).await;
    until_gets(both, "the next report counts", "n000", 20..=50).await;

    // It drains, is back, and leaves.
    heavy["state"] = json!("draining");
    put(&mut keys, &group, &backends[0].entry(heavy.clone()), None).await;
    until_gets(both, "nothing goes to what drains", "n000", 0..=0).await;
    heavy["state"] = json!("serving");
    put(&mut keys, &group, &backends[0].entry(heavy), None).await;
    until_gets(both, "it is back", "n000", 20..=50).await;
    delete(&mut keys, &group, "n000").await;
    until_gets(both, "nothing goes to what has left", "n000", 0..=0).await;

    // Another one joins, and fails later.
    let last = Backend::start("last").await;
    let entry = last.entry(json!({ "weight": THIRD }));
    put(&mut keys, &group, &entry, None).await;
    until_gets(both, "the new one gets its part", "last", 20..=50).await;
    last.set_status(500);
    until("nothing but probes goes to what fails", async || {
        let counted = adaptive.gets(200).await;
        of(&counted, "500") <= 2
    })
    .await;
    last.set_status(200);
    until("it works again", async || {
        of(&adaptive.gets(100).await, "last") >= 20
    })
    .await;
}
