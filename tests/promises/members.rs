//! Workers: they come back, leave, and lead one at a time.

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
    // Without a time for what it has in flight: that comes before the two seconds.
    let endpoint = &etcd.endpoints()[0];
    let mut worker = Worker::start(endpoint, &group, "w1", &["--grace", "0"], Log::File);
    let (_, lease) = until_registered(&mut keys, &group, "w1", |_, _| true).await;
    // One that has lasted shows that the store works.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let start = Instant::now();
    keys.lease_revoke(lease).await.unwrap();
    until_registered(&mut keys, &group, "w1", |_, now| now != lease).await;
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );

    // Away for longer than the lease lasts.
    etcd.stop();
    tokio::time::sleep(Duration::from_secs(4)).await;
    etcd.start();
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let entry = registered(&mut keys, &group, "w1").await;
        assert!(entry.is_some(), "it is renewed");
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
    until("its lease has run out", async || {
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
        let (entry, _) = registered(&mut keys, &group, "w1").await.expect("it stays");
        assert_eq!(entry["port"], port);
    }
}

/// As a worker itself sees it: with a token of its own it refuses the least one there is.
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
    let leads_it = |id: &str| leader().is_some_and(|(leader, _)| leader == id);
    let first = worker(&etcd, &group, "w1");
    eventually("w1 leads", || leads_it("w1")).await;
    let (_, epoch) = leader().unwrap();
    let second = worker(&etcd, &group, "w2");
    eventually("w2 is there", || discovery.nodes().len() == 2).await;

    first.program.signal("STOP");
    let start = Instant::now();
    eventually("w2 leads", || leads_it("w2")).await;
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "{:?}",
        start.elapsed()
    );
    first.program.signal("CONT");
    assert!(!leads(&first).await, "at no time from here on");
    let (_, next) = leader().unwrap();
    assert!(next > epoch, "{next} after {epoch}");
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
    let says_so = |told: &str| {
        let lines = told.lines().filter(|line| line.contains("has no lease"));
        lines.filter(|line| line.contains(&key)).count()
    };
    let said = || {
        let told = workers.iter().map(Worker::told);
        let counts = told.chain([routing.told()]).map(|told| says_so(&told));
        counts.collect::<Vec<_>>()
    };
    eventually("all say so", || said().iter().all(|count| *count > 0)).await;
    // The line is read again when it changes, and whenever somebody comes or goes.
    for id in ["w3", "w4"] {
        let more = worker(&etcd, &group, id);
        until_registered(&mut keys, &group, id, |_, _| true).await;
        drop(more);
        until("it is gone", async || {
            registered(&mut keys, &group, id).await.is_none()
        })
        .await;
    }
    keys.put(key.clone(), "somebody else", None).await.unwrap();
    routing.until_served_by(&["w1", "w2"]).await;
    assert_eq!(routing.post().await, "503");
    assert_eq!(said(), [1, 1, 1]);
    keys.delete(key, None).await.unwrap();
    until("somebody leads", async || {
        ["w1", "w2"].contains(&&*routing.post().await)
    })
    .await;
}
