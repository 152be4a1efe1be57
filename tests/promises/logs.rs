//! Tests that a log which cannot be written loses lines and costs nothing else.

use std::time::Duration;

use serde_json::json;

use super::common::etcd::Etcd;
use super::common::group;
use super::world::{Backend, Log, Setup, Worker, put, registered, until, until_registered};

/// Three kinds of logs that cannot be written: a full device, a pipe whose reader has ended, and a
/// pipe that nobody reads. Each has a worker, a balancer and a router to the leader, all of which
/// log everything. What they log when etcd stops and returns is what they cannot write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_costs_nothing_but_its_lines() {
    let etcd = Etcd::own();
    let mut keys = etcd.raw_client().await;
    let endpoint = etcd.endpoints().remove(0);
    let mut cases = Vec::new();
    for log in [Log::Full, Log::Closed, Log::Stuck] {
        let group = group("unwritable");
        let worker = Worker::with_ttl(&endpoint, &group, "w1", "6", &[], log);
        let setup = Setup::new(etcd.endpoints(), &group).log(log);
        let balancer = setup.start();
        let routing = setup.program("leader_routing").start();
        cases.push((log, group, worker, balancer, routing));
    }
    for (log, _, _, balancer, routing) in &cases {
        until(&format!("{log:?}: w1 serves"), async || {
            balancer.get().await == "w1"
        })
        .await;
        until(&format!("{log:?}: w1 leads"), async || {
            routing.post().await == "w1"
        })
        .await;
    }

    for (log, _, worker, balancer, routing) in &cases {
        for program in [&worker.program, &balancer.program, &routing.program] {
            // Requests cause log lines as well.
            let is_full = async || {
                balancer.get().await;
                routing.get().await;
                program.log_is_full()
            };
            if *log == Log::Stuck {
                until("the pipe is full", is_full).await;
            }
        }
    }
    etcd.stop();
    // One second is enough: everybody notices the outage immediately, because connections are
    // closed.
    tokio::time::sleep(Duration::from_secs(1)).await;
    etcd.start();
    let late = Backend::start("late").await;
    for (log, group, worker, balancer, routing) in &mut cases {
        put(&mut keys, group, &late.entry(json!({})), None).await;
        for balancer in [&mut *balancer, routing] {
            let follows = async || balancer.gets(16).await.contains_key("late");
            until(&format!("{log:?}: the change is served"), follows).await;
            assert!(balancer.program.lives(), "{log:?}");
        }
        assert!(worker.program.lives(), "{log:?}");
        until_registered(&mut keys, group, "w1", |_, _| true).await;
        until(&format!("{log:?}: w1 leads again"), async || {
            routing.post().await == "w1"
        })
        .await;
    }
    // For longer than a lease lasts without renewals.
    tokio::time::sleep(Duration::from_secs(8)).await;
    for (log, group, worker, _, _) in &mut cases {
        assert!(
            registered(&mut keys, group, "w1").await.is_some(),
            "{log:?}"
        );
        worker.program.signal("TERM");
        let (status, _) = worker.program.ended().await;
        assert!(status.success(), "{log:?}: {status}");
        assert!(
            registered(&mut keys, group, "w1").await.is_none(),
            "{log:?}"
        );
    }
}
