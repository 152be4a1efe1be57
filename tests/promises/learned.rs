//! Tests that what a balancer has learned of its backends outlives the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{free_port, group};
use super::raw::{RawBackend, ok, register};
use super::world::{Balancer, Setup, delete, entry, put, scratch, until};

/// Three backends that work and one that answers with errors.
struct Fleet {
    group: String,
    /// How many requests the one that fails got.
    failed: Arc<AtomicUsize>,
    _etcd: Arc<Etcd>,
    _backends: Vec<RawBackend>,
}

impl Fleet {
    async fn start(name: &str) -> Self {
        let (etcd, group) = (Etcd::shared(), group(name));
        let failed = Arc::<AtomicUsize>::default();
        let counted = failed.clone();
        let bad = move |_: &str| {
            counted.fetch_add(1, Ordering::SeqCst);
            b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n".to_vec()
        };
        let mut backends = vec![RawBackend::start(bad).await];
        for _ in 0..3 {
            backends.push(RawBackend::start(ok).await);
        }
        register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
        Self {
            group,
            failed,
            _etcd: etcd,
            _backends: backends,
        }
    }

    /// How many of 100 requests go to the one that fails, which is a quarter of them if nobody knows.
    async fn wasted_by(&self, balancer: &Balancer) -> usize {
        let before = self.failed.load(Ordering::SeqCst);
        balancer.gets(100).await;
        self.failed.load(Ordering::SeqCst) - before
    }

    /// Sends requests until the balancer knows which one fails.
    async fn is_learned_by(&self, balancer: &Balancer) {
        let first = self.wasted_by(balancer).await;
        assert!(
            first > 3,
            "a balancer that knows nothing finds out: {first}"
        );
        until("it is ejected", async || {
            balancer.gets(20).await;
            balancer.log_text().contains("a backend fails")
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_begins_with_what_the_last_process_has_learned() {
    let fleet = Fleet::start("learned").await;
    let nodes = scratch(&format!("{}.nodes", fleet.group));
    let learned = scratch(&format!("{}.nodes.learned", fleet.group));
    let snapshot = format!(
        "snapshot: {{ file: '{}', interval_ms: 100 }}",
        nodes.display()
    );
    let setup = Setup::shared(&fleet.group).with(&snapshot);
    let mut balancer = setup.listening().await;
    fleet.is_learned_by(&balancer).await;
    until("what was learned is written", async || {
        let text = std::fs::read_to_string(&learned).unwrap_or_default();
        text.contains(r#""is_ejected":true"#)
    })
    .await;
    let text = std::fs::read_to_string(&learned).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let of_group = &json["groups"][&fleet.group]["backends"];
    assert_eq!(of_group.as_array().unwrap().len(), 4, "{text}");

    // As when a machine loses its power.
    balancer.program.signal("KILL");
    balancer.program.ended().await;
    let mut balancer = setup.listening().await;
    let wasted = fleet.wasted_by(&balancer).await;
    assert!(wasted <= 3, "{wasted}\n{}", balancer.log_text());
    assert!(
        (balancer.log_text()).contains("begins with what a former process has learned"),
        "{}",
        balancer.log_text()
    );

    // With something else in the file, it begins anew, and says so.
    balancer.program.signal("KILL");
    balancer.program.ended().await;
    std::fs::write(&learned, "nothing of the kind").unwrap();
    let balancer = setup.listening().await;
    fleet.is_learned_by(&balancer).await;
    assert!(
        balancer
            .log_text()
            .contains("cannot be read; the balancer begins anew"),
        "{}",
        balancer.log_text()
    );
    until("the file is written again", async || {
        let text = std::fs::read_to_string(&learned).unwrap_or_default();
        text.contains(r#""is_ejected":true"#)
    })
    .await;
    drop(balancer);
    for file in [nodes, learned] {
        let _ = std::fs::remove_file(file);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_begins_with_what_its_predecessor_has_learned() {
    let fleet = Fleet::start("learned-over").await;
    let setup = Setup::shared(&fleet.group).server("grace_period_seconds: 20");
    let mut old = setup.listening().await;
    fleet.is_learned_by(&old).await;
    let setup = setup.listen(&old.listen).argument("--upgrade");
    let new = setup.start();
    until("it waits for the sockets", async || {
        new.log_text().contains("ready to take the sockets over")
    })
    .await;
    old.program.signal("QUIT");
    let (status, _) = old.program.ended().await;
    assert!(status.success(), "{status}\n{}", old.log_text());
    let wasted = fleet.wasted_by(&new).await;
    assert!(wasted <= 3, "{wasted}\n{}", new.log_text());
    assert!(
        (new.log_text()).contains("begins with what a former process has learned"),
        "{}",
        new.log_text()
    );
    let left = std::fs::read_dir(scratch("")).unwrap().flatten();
    let own = new.listen.replace(':', "-");
    let left: Vec<_> = left
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(&own) && name.ends_with(".learned"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The share of the first backend, as the status of the balancer has it.
async fn share_of_first(admin: u16) -> Option<f64> {
    let url = format!("http://127.0.0.1:{admin}/api/v1/status");
    let text = client().get(url).send().await.ok()?.text().await.ok()?;
    let status: Value = serde_json::from_str(&text).ok()?;
    let nodes = status["groups"][0]["nodes"].as_array()?;
    nodes.iter().find(|node| node["id"] == "n0")?["share"].as_f64()
}

/// The default is 2 ms, which a busy machine that runs tests is far from.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn latencies_that_are_small_enough_move_no_weights() {
    let (etcd, group) = (Etcd::shared(), group("small-latencies"));
    let answers = AtomicUsize::new(0);
    let slow = move |request: &str| {
        // The quick ones show that it is not far away.
        if !answers.fetch_add(1, Ordering::SeqCst).is_multiple_of(8) {
            std::thread::sleep(Duration::from_millis(20));
        }
        ok(request)
    };
    let backends = [
        RawBackend::start(slow).await,
        RawBackend::start(ok).await,
        RawBackend::start(ok).await,
    ];
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let start = async |idle_latency_ms: u32| {
        let admin = free_port();
        let fields = format!(
            "adaptive: {{ idle_latency_ms: {idle_latency_ms} }}\n\
             admin: {{ listen: '127.0.0.1:{admin}' }}"
        );
        (Setup::shared(&group).with(&fields).serving().await, admin)
    };
    let (sensitive, tolerant) = (start(0).await, start(10_000).await);
    until("the slow one has a small share", async || {
        sensitive.0.gets(50).await;
        tolerant.0.gets(50).await;
        share_of_first(sensitive.1)
            .await
            .is_some_and(|share| share < 0.2)
    })
    .await;
    let share = share_of_first(tolerant.1).await.unwrap();
    assert!((0.32..0.35).contains(&share), "{share}");
}

/// A node that is restarted, as in a rolling restart, is mostly as strong as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_started_again_begins_with_its_weight() {
    let (etcd, group) = (Etcd::shared(), group("started-again"));
    let reports = Arc::new(AtomicBool::new(true));
    let mut backends = Vec::new();
    for cpu in ["1", "0.1", "0.1"] {
        let reports = reports.clone();
        let answer = move |request: &str| match reports.load(Ordering::SeqCst) {
            true => format!(
                "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\
                 endpoint-load-metrics: TEXT cpu_utilization={cpu}\r\n\r\nok\n"
            )
            .into_bytes(),
            false => ok(request),
        };
        backends.push(RawBackend::start(answer).await);
    }
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let admin = free_port();
    let fields = format!(
        "adaptive: {{ slow_start_ms: 0, metrics_gain: 0.5, latency_gain: 0 }}\n\
         admin: {{ listen: '127.0.0.1:{admin}' }}"
    );
    let balancer = Setup::shared(&group).with(&fields).serving().await;
    let share = async || share_of_first(admin).await;
    until("the loaded one has a small share", async || {
        balancer.gets(100).await;
        share().await.is_some_and(|share| share < 0.15)
    })
    .await;

    // From now on nothing is learned of anybody's load.
    reports.store(false, Ordering::SeqCst);
    let mut keys = etcd.raw_client().await;
    let share_again = async |more: Value, keys: &mut etcd_client::Client| {
        delete(keys, &group, "n0").await;
        balancer.until_served_by(&["n1", "n2"]).await;
        let port = Some(backends[0].address.port());
        put(keys, &group, &entry("n0", port, more), None).await;
        let mut again = None;
        until("it is there again", async || {
            again = share().await;
            again.is_some()
        })
        .await;
        again.unwrap()
    };
    let with_its_weight = share_again(json!({}), &mut keys).await;
    // A node with another static weight counts as another one, and begins without what was learned.
    let as_another = share_again(json!({ "weight": 1 }), &mut keys).await;
    assert!(
        with_its_weight < 0.17 && as_another > 0.21,
        "{with_its_weight} and {as_another}"
    );
}
