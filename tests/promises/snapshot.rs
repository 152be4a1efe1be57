//! Tests the snapshot file, from which a balancer starts without etcd.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::common::etcd::Etcd;
use super::common::programs::{COMMAND, optimised};
use super::common::stalls::Stalls;
use super::common::{eventually, free_port, group};
use super::raw::{RawBackend, ok};
use super::world::{Backend, Setup, delete, entry, put, scratch, until};

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
    let stalls = Stalls::watch();
    let took = eventually("a snapshot is written", || file.exists()).await;
    let most = Duration::from_secs(1) + stalls.so_far();
    assert!(took < most, "{took:?} of {most:?} after the start");

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
    let stalls = Stalls::watch();
    let took = eventually("the last change in the file", || {
        holds("last") && !holds("n0")
    })
    .await;
    let most = Duration::from_secs(1) + stalls.so_far();
    assert!(took < most, "{took:?} of {most:?} after the change");

    // An idle balancer must not spend CPU time on waiting. Where others take the CPU away, that may look like time that it
    // has used, so one of three tries is enough.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut used = Vec::new();
    while used.len() < 3 {
        let (before, start) = (balancer.cpu(), Instant::now());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let more = balancer.cpu().saturating_sub(before);
        used.push(more.div_f64(start.elapsed().as_secs_f64()));
        if used.last() < Some(&Duration::from_millis(10)) {
            break;
        }
    }
    assert!(
        used.last() < Some(&Duration::from_millis(10)),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_cannot_be_written_is_a_metric_and_one_line() {
    let (etcd, group) = (Etcd::shared(), group("unwritten"));
    let backend = Backend::start("b").await;
    let mut keys = etcd.raw_client().await;
    put(&mut keys, &group, &backend.entry(json!({})), None).await;
    let directory = scratch(&format!("{group}.d"));
    std::fs::create_dir(&directory).unwrap();
    let file = directory.join("nodes");
    let admin = format!("127.0.0.1:{}", free_port());
    let fields = format!(
        "snapshot: {{ file: '{}', interval_ms: 100 }}\nadmin: {{ listen: '{admin}' }}",
        file.display()
    );
    let balancer = Setup::shared(&group).with(&fields).serving().await;
    eventually("a snapshot is written", || file.exists()).await;
    let is_failing = async || {
        let answer = reqwest::get(format!("http://{admin}/metrics")).await;
        let text = answer.unwrap().text().await.unwrap();
        let name = format!("pingora_etcd_snapshot_failing{{group=\"{group}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name));
        value.expect("the metric is there") == "1"
    };
    assert!(!is_failing().await);
    std::fs::remove_dir_all(&directory).unwrap();
    // The view has to change before it is to be written.
    until("it is told", async || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let tag = json!({ "tags": [now.as_millis().to_string()] });
        put(&mut keys, &group, &backend.entry(tag), None).await;
        is_failing().await
    })
    .await;
    std::fs::create_dir(&directory).unwrap();
    until("it is written again", async || !is_failing().await).await;
    assert!(file.exists());
    // The metric changes a moment before the line is there.
    eventually("that is logged", || {
        balancer
            .log_text()
            .contains("snapshot file can be written again")
    })
    .await;
    let log = balancer.log_text();
    assert_eq!(
        log.matches("the snapshot file cannot be written").count(),
        1
    );
    assert_eq!(log.matches("snapshot file can be written again").count(), 1);
    // It writes files there as long as it runs.
    drop(balancer);
    let _ = std::fs::remove_dir_all(&directory);
}
