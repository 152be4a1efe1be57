//! A test of memory under load, with everything on that a process shows and writes of itself.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::programs::COMMAND;
use super::common::{DEADLINE, free_port, group};
use super::raw::{Raw, status};
use super::world::{Backend, Setup, entry, put, scratch, until};

/// How long; `make memory` says ten minutes.
fn length() -> Duration {
    let seconds = std::env::var("MEMORY_SECONDS").ok();
    let seconds = seconds.map_or(9, |text| {
        text.parse().expect("MEMORY_SECONDS is a number of seconds")
    });
    Duration::from_secs(seconds)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_flat_under_load_with_page_metrics_and_log() {
    let (etcd, group) = (Etcd::shared(), group("memory"));
    let mut keys = etcd.raw_client().await;
    let backends = [Backend::start("n0").await, Backend::start("n1").await];
    for backend in &backends {
        put(&mut keys, &group, &backend.entry(json!({})), None).await;
    }
    let admin = format!("127.0.0.1:{}", free_port());
    let log = scratch(&format!("{group}.access"));
    let fields = format!(
        "admin: {{ listen: '{admin}' }}\naccess_log: {{ file: {} }}\n\
         health_check: {{ interval_ms: 500 }}\nroutes:\n- {{ path: /, group: default }}",
        log.display()
    );
    let balancer = Setup::shared(&group)
        .program(COMMAND)
        .with(&fields)
        .listening()
        .await;
    let page = format!("http://{admin}");
    until("the page is there", async || {
        client().get(&page).send().await.is_ok()
    })
    .await;
    let mut others = JoinSet::new();
    // Somebody looks at the page all the time, and Prometheus comes every second.
    let events = format!("{page}/api/v1/events");
    others.spawn(async move {
        let mut stream = client()
            .get(events)
            .timeout(Duration::MAX)
            .send()
            .await
            .unwrap();
        while let Ok(Some(_)) = stream.chunk().await {}
    });
    let metrics = format!("{page}/metrics");
    others.spawn(async move {
        loop {
            client().get(&metrics).send().await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    // And nodes write their entries.
    let (entries, mut writer) = (
        backends.each_ref().map(|backend| backend.port),
        keys.clone(),
    );
    let of_group = group.clone();
    others.spawn(async move {
        for index in 0.. {
            let metadata = json!({ "metadata": { "cpu_usage_percent": index % 90 } });
            let entry = entry(
                &format!("n{}", index % 2),
                Some(entries[index % 2]),
                metadata,
            );
            put(&mut writer, &of_group, &entry, None).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });

    let (mut start, length) = (Instant::now(), length());
    let (mut client, mut requests, mut warm) = (Raw::to(&balancer).await, 0_u64, None);
    let (mut memory, mut looked) = (balancer.memory(), Instant::now());
    while warm.is_none() || start.elapsed() < length {
        if requests % 50 == 0 {
            // New connections, too.
            client = Raw::to(&balancer).await;
        }
        assert_eq!(status(&client.get("").await), "200");
        requests += 1;
        // It is warm once it has hardly changed for a second. The time begins then.
        if warm.is_none() && looked.elapsed() >= Duration::from_secs(1) {
            let before = std::mem::replace(&mut memory, balancer.memory());
            looked = Instant::now();
            if memory.abs_diff(before) < 256 {
                warm = Some((memory, requests));
                start = looked;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "{before} KiB, {memory} KiB: it goes on growing"
            );
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    let (warm, before) = warm.unwrap();
    let after = balancer.memory();
    println!(
        "{requests} requests in {length:?} with page, metrics and log: {warm} KiB after {before}, {after} KiB at the end"
    );
    assert!(after < warm + 2_048, "{warm} KiB, {after} KiB");
    let written = std::fs::read_to_string(&log).unwrap().lines().count() as u64;
    assert!(
        written >= requests * 9 / 10,
        "{written} lines for {requests} requests"
    );
    std::fs::remove_file(log).unwrap();
}
