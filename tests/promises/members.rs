//! Tests that worker processes come back after losing their lease, leave in time, and lead one at a
//! time.

use std::time::{Duration, Instant};

use pingora_etcd::ServiceDiscovery;

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{eventually, group};
use super::world::{Log, Setup, Worker, registered, until, until_registered};

fn worker(etcd: &Etcd, group: &str, id: &str) -> Worker {
    Worker::start(&etcd.endpoints()[0], group, id, &[], Log::File)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_comes_back_whatever_took_its_lease_and_leaves_within_two_seconds() {
    let (etcd, group) = (Etcd::own(), group("back"));
    let mut keys = etcd.raw_client().await;
    // With no grace period for requests in flight, which would come before the two seconds.
    let endpoint = &etcd.endpoints()[0];
    let mut worker = Worker::start(endpoint, &group, "w1", &["--grace", "0"], Log::File);
    let (_, lease) = until_registered(&mut keys, &group, "w1", |_, _| true).await;
    // A lease that has lasted for a while shows the worker that the store works.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let start = Instant::now();
    keys.lease_revoke(lease).await.unwrap();
    until_registered(&mut keys, &group, "w1", |_, now| now != lease).await;
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );

    // etcd is down for longer than the lease lasts.
    etcd.stop();
    tokio::time::sleep(Duration::from_secs(4)).await;
    etcd.start();
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let entry = registered(&mut keys, &group, "w1").await;
        assert!(entry.is_some(), "the lease must be renewed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    etcd.pause();
    worker.program.signal("TERM");
    let (_, took) = worker.program.ended().await;
    assert!(took < Duration::from_millis(2500), "{took:?}");
    etcd.resume();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_does_not_remove_who_took_its_id_over() {
    let (etcd, group) = (Etcd::shared(), group("taken-over"));
    let mut keys = etcd.raw_client().await;
    let mut old = worker(&etcd, &group, "w1");
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    old.program.signal("STOP");
    until("the lease of the stopped worker has expired", async || {
        registered(&mut keys, &group, "w1").await.is_none()
    })
    .await;
    let new = worker(&etcd, &group, "w1");
    let port = new.port;
    until_registered(&mut keys, &group, "w1", |entry, _| entry["port"] == port).await;
    old.program.signal("CONT");
    old.program.signal("TERM");
    old.program.ended().await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        let (entry, _) = registered(&mut keys, &group, "w1")
            .await
            .expect("the new process stays registered");
        assert_eq!(entry["port"], port);
    }
}

/// Whether the worker considers itself the leader: it then refuses the smallest possible token.
async fn leads(worker: &Worker) -> bool {
    let request = client().get(&worker.url).header("x-leader-epoch", "1");
    request.send().await.unwrap().status() == 409
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stood_still_does_not_lead_when_it_goes_on() {
    let (etcd, group) = (Etcd::shared(), group("leads"));
    let discovery = ServiceDiscovery::new(etcd.endpoints(), group.clone());
    let running = discovery.clone();
    let mut following = tokio::task::JoinSet::new();
    following.spawn(async move { running.run_until(std::future::pending()).await });
    let leader = || {
        discovery
            .leadership()
            .map(|term| (term.node.id.clone(), term.epoch))
    };
    let is_leader = |id: &str| leader().is_some_and(|(leader, _)| leader == id);
    let first = worker(&etcd, &group, "w1");
    eventually("w1 leads", || is_leader("w1")).await;
    let (_, epoch) = leader().unwrap();
    let second = worker(&etcd, &group, "w2");
    eventually("w2 is registered", || discovery.nodes().len() == 2).await;

    first.program.signal("STOP");
    let start = Instant::now();
    eventually("w2 leads", || is_leader("w2")).await;
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
    first.program.signal("CONT");
    assert!(
        !leads(&first).await,
        "a resumed leader must not lead, not even for a moment"
    );
    let (_, next) = leader().unwrap();
    assert!(next > epoch, "token {next} is not greater than {epoch}");
    assert!(leads(&second).await);
    assert!(!leads(&first).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_key_without_a_lease_is_named_once_and_nobody_leads_until_it_is_deleted() {
    let (etcd, group) = (Etcd::shared(), group("by-hand"));
    let mut keys = etcd.raw_client().await;
    let key = format!("election/{group}/by-hand");
    keys.put(key.clone(), "somebody", None).await.unwrap();
    let workers = ["w1", "w2"].map(|id| worker(&etcd, &group, id));
    let routing = Setup::shared(&group).program("leader_routing");
    let routing = routing.with("leader_wait_ms: 300").serving().await;
    routing.until_served_by(&["w1", "w2"]).await;
    assert_eq!(routing.post().await, "503");
    let count_in = |text: &str| {
        let lines = text.lines().filter(|line| line.contains("has no lease"));
        lines.filter(|line| line.contains(&key)).count()
    };
    let counts = || {
        let logs = workers.iter().map(Worker::log_text);
        let counts = logs.chain([routing.log_text()]).map(|text| count_in(&text));
        counts.collect::<Vec<_>>()
    };
    eventually("all of them name the key", || {
        counts().iter().all(|count| *count > 0)
    })
    .await;
    // The key is read again when it changes, and whenever a candidate comes or goes.
    for id in ["w3", "w4"] {
        let more = worker(&etcd, &group, id);
        until_registered(&mut keys, &group, id, |_, _| true).await;
        drop(more);
        until("the worker has left", async || {
            registered(&mut keys, &group, id).await.is_none()
        })
        .await;
    }
    keys.put(key.clone(), "somebody else", None).await.unwrap();
    routing.until_served_by(&["w1", "w2"]).await;
    assert_eq!(routing.post().await, "503");
    assert_eq!(counts(), [1, 1, 1]);
    keys.delete(key, None).await.unwrap();
    until("a worker leads", async || {
        ["w1", "w2"].contains(&&*routing.post().await)
    })
    .await;
}
