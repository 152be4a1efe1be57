//! Tests the snapshot file, from which a balancer starts without etcd.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::common::etcd::Etcd;
use super::common::programs::{COMMAND, optimised};
use super::common::{eventually, group};
use super::raw::{RawBackend, ok};
use super::world::{Backend, Setup, delete, entry, put, scratch};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_snapshot_is_there_within_a_second_and_serves_a_start_without_etcd() {
    let (etcd, group) = (Etcd::own(), group("snapshot"));
    let mut keys = etcd.raw_client().await;
    let [first, last] = [Backend::start("first").await, Backend::start("last").await];
    put(&mut keys, &group, &first.entry(json!({})), None).await;
    let file = scratch(&format!("{group}.nodes"));
    let snapshot = format!(
        "snapshot: {{ file: '{}', interval_ms: 100 }}\nready_timeout_ms: 300\n\
         self_preservation: {{ enabled: false }}",
        file.display()
    );
    let setup = Setup::new(etcd.endpoints(), &group).with(&snapshot);
    let mut balancer = setup.serving().await;
    let took = eventually("a snapshot is written", || file.exists()).await;
    assert!(took < Duration::from_secs(1), "{took:?} after the start");

    // Frequent changes must not keep the snapshot from being written.
    let start = Instant::now();
    for change in 0..40 {
        let id = format!("n{}", change % 5);
        put(
            &mut keys,
            &group,
            &entry(&id, Some(1), json!({"tags": [change.to_string()]})),
            None,
        )
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(start.elapsed() > Duration::from_secs(2));
    for node in 0..5 {
        delete(&mut keys, &group, &format!("n{node}")).await;
    }
    put(&mut keys, &group, &last.entry(json!({})), None).await;
    let holds = |id: &str| {
        let text = std::fs::read_to_string(&file).unwrap();
        text.contains(&format!("\"id\":\"{id}\""))
    };
    let took = eventually("the last change in the file", || {
        holds("last") && !holds("n0")
    })
    .await;
    assert!(took < Duration::from_secs(1), "{took:?} after the change");

    // An idle balancer must not spend CPU time on waiting.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, start) = (balancer.cpu(), Instant::now());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = (balancer.cpu() - before).div_f64(start.elapsed().as_secs_f64());
    assert!(
        used < Duration::from_millis(10),
        "{used:?} of CPU time per second while idle"
    );

    balancer.program.signal("TERM");
    balancer.program.ended().await;
    etcd.stop();
    // As Kubernetes leaves it with `fsGroup`: the own group may write it.
    allow(&file, 0o660);
    let balancer = setup.serving().await;
    balancer.until_served_by(&["first", "last"]).await;
    drop(balancer);
    // A file that anybody may have written names no nodes.
    allow(&file, 0o666);
    let balancer = setup.clone().listening().await;
    eventually("it says so", || {
        let log = balancer.log_text();
        let mut lines = log.lines();
        lines.any(|line| {
            line.contains("the snapshot file cannot be used")
                && line.contains(&file.display().to_string())
        })
    })
    .await;
    assert_eq!(balancer.post().await, "503");
    drop(balancer);
    allow(&file, 0o600);
    // A snapshot never contains a leader.
    let routing = setup
        .clone()
        .program("leader_routing")
        .with("leader_wait_ms: 100");
    let routing = routing.serving().await;
    routing.until_served_by(&["first", "last"]).await;
    assert_eq!(routing.post().await, "503");
    let _ = std::fs::remove_file(file);
}

fn allow(file: &Path, mode: u32) {
    std::fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
}

/// Whoever is drained is out of order, whether etcd is there or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_drained_stays_so_in_a_start_without_etcd() {
    let (etcd, group) = (Etcd::own(), group("drained"));
    let mut keys = etcd.raw_client().await;
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    for (index, backend) in backends.iter().enumerate() {
        let lease = keys.lease_grant(600, None).await.unwrap().id();
        let entry = entry(
            &format!("n{index}"),
            Some(backend.address.port()),
            json!({}),
        );
        put(&mut keys, &group, &entry, Some(lease)).await;
    }
    let file = scratch(&format!("{group}.nodes"));
    let of_operators = scratch(&format!("{group}.nodes.overrides"));
    let fields = format!(
        "snapshot: {{ file: '{}', interval_ms: 100 }}\nready_timeout_ms: 300\npolicy: round_robin",
        file.display()
    );
    let setup = Setup::new(etcd.endpoints(), &group).with(&fields);
    let mut balancer = setup.serving().await;
    balancer.until_served_by(&["n0", "n1"]).await;
    let drained = Command::new(optimised(COMMAND))
        .args([
            "drain",
            "--endpoints",
            &etcd.endpoints().join(","),
            "--group",
            &group,
            "n1",
        ])
        .output();
    assert!(drained.unwrap().status.success());
    balancer.until_served_by(&["n0"]).await;
    eventually("both are in files", || {
        let holds =
            |file: &Path| std::fs::read_to_string(file).is_ok_and(|text| text.contains("n1"));
        holds(&file) && holds(&of_operators)
    })
    .await;
    balancer.program.signal("TERM");
    balancer.program.ended().await;
    etcd.stop();
    let balancer = setup.serving().await;
    balancer.until_served_by(&["n0"]).await;
    let served = balancer.gets(40).await;
    assert_eq!(served.keys().collect::<Vec<_>>(), ["n0"], "{served:?}");
    for file in [file, of_operators] {
        let _ = std::fs::remove_file(file);
    }
}
