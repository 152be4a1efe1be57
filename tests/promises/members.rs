//! Tests that worker processes come back after losing their lease, leave in time, and lead one at a
//! time.

use std::time::{Duration, Instant};

use pingora_etcd::ServiceDiscovery;
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::stalls::Stalls;
use super::common::{eventually, group};
use super::world::{Log, Setup, Worker, entry, put, registered, until, until_registered};

fn worker(etcd: &Etcd, group: &str, id: &str) -> Worker {
    Worker::start(&etcd.endpoints()[0], group, id, &[], Log::File)
}

/// One whose lease is to expire soon after it stops.
fn with_short_lease(etcd: &Etcd, group: &str, id: &str) -> Worker {
    Worker::with_ttl(&etcd.endpoints()[0], group, id, "2", &[], Log::File)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_comes_back_whatever_took_its_lease_and_leaves_within_two_seconds() {
    let (etcd, group) = (Etcd::own(), group("back"));
    let mut keys = etcd.raw_client().await;
    // With no grace period for requests in flight, which would come before the two seconds.
    let endpoint = &etcd.endpoints()[0];
    let more = ["--grace", "0"];
    let mut worker = Worker::with_ttl(endpoint, &group, "w1", "6", &more, Log::File);
    let (_, lease) = until_registered(&mut keys, &group, "w1", |_, _| true).await;
    // A lease that has lasted for its TTL shows the worker that the store works.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let stalls = Stalls::watch();
    let start = Instant::now();
    keys.lease_revoke(lease).await.unwrap();
    until_registered(&mut keys, &group, "w1", |_, now| now != lease).await;
    let (took, stood) = (start.elapsed(), stalls.so_far());
    assert!(
        took < Duration::from_secs(2) + stood,
        "{took:?}, {stood:?} still"
    );

    // etcd is down for longer than the lease lasts.
    etcd.stop();
    tokio::time::sleep(Duration::from_secs(8)).await;
    etcd.start();
    until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(15) {
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
async fn a_worker_whose_lease_was_revoked_does_not_wait_for_its_next_renewal() {
    let (etcd, group) = (Etcd::shared(), group("revoked"));
    let mut keys = etcd.raw_client().await;
    // The next renewal is due in 100 seconds.
    let endpoint = &etcd.endpoints()[0];
    let worker = Worker::with_ttl(endpoint, &group, "w1", "300", &[], Log::File);
    let balancer = Setup::shared(&group).program("leader_routing");
    let balancer = balancer.with("leader_wait_ms: 300").serving().await;
    until("w1 leads", async || balancer.post().await == "w1").await;
    let (_, lease) = until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let start = Instant::now();
    keys.lease_revoke(lease).await.unwrap();
    until_registered(&mut keys, &group, "w1", |_, now| now != lease).await;
    until("w1 leads again", async || balancer.post().await == "w1").await;
    let took = start.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(leads(&worker).await);
}

/// The candidacy outlives its process, and the id has been registered again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_does_not_make_way_for_a_candidate_whose_process_has_ended() {
    let (etcd, group) = (Etcd::shared(), group("ended"));
    let mut keys = etcd.raw_client().await;
    let leader = worker(&etcd, &group, "w1");
    let routing = Setup::shared(&group).program("leader_routing");
    let routing = routing.with("leader_wait_ms: 100").serving().await;
    until("w1 leads", async || routing.post().await == "w1").await;
    let token = |answer: &etcd_client::GetResponse| answer.kvs()[0].create_revision();
    let (_, lease) = until_registered(&mut keys, &group, "w1", |_, _| true).await;
    let of_leader = format!("election/{group}/{lease:x}");
    let before = token(&keys.get(of_leader.clone(), None).await.unwrap());

    let [former, now] = [
        keys.lease_grant(60, None).await,
        keys.lease_grant(60, None).await,
    ];
    let [former, now] = [former, now].map(|lease| lease.unwrap().id());
    // A node without a port gets no requests.
    let node = entry("p", None, json!({ "priority": 10 }));
    put(&mut keys, &group, &node, Some(now)).await;
    let candidacy = format!("election/{group}/{former:x}");
    let held = |lease| Some(etcd_client::PutOptions::new().with_lease(lease));
    keys.put(candidacy.clone(), "p", held(former))
        .await
        .unwrap();
    let created = token(&keys.get(candidacy.clone(), None).await.unwrap());
    let wanted = json!({ "to": candidacy, "created": created, "priority": 10 }).to_string();
    let request = format!("handover/{group}/{former:x}");
    keys.put(request, wanted, held(former)).await.unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert_eq!(routing.post().await, "w1");
    }
    let after = token(&keys.get(of_leader, None).await.unwrap());
    assert_eq!(after, before, "its term goes on");
    assert!(leads(&leader).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_leaves_does_not_remove_who_took_its_id_over() {
    let (etcd, group) = (Etcd::shared(), group("taken-over"));
    let mut keys = etcd.raw_client().await;
    let mut old = with_short_lease(&etcd, &group, "w1");
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
    let first = with_short_lease(&etcd, &group, "w1");
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
        let more = with_short_lease(&etcd, &group, id);
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
