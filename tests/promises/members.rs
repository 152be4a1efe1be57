//! Workers: they come back, leave, and lead one at a time.

use std::time::{Duration, Instant};

use pingora_etcd::ServiceDiscovery;

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{eventually, group};
use super::world::{Log, Worker, registered, until, until_registered};

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
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(
        registered(&mut keys, &group, "w1").await.is_some(),
        "it is renewed"
    );

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
