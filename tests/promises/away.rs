//! Tests a balancer while etcd is down, silent, or has a compacted history.

use std::time::{Duration, Instant};

use etcd_client::CompactionOptions;
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::stalls::Stalls;
use super::common::{eventually, free_port, group, local};
use super::world::{Backend, Setup, delete, put, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_view_is_served_resumed_and_listed_again_after_a_compaction() {
    let (etcd, group) = (Etcd::own(), group("away"));
    let mut keys = etcd.raw_client().await;
    let [a, b, c] = [
        Backend::start("a").await,
        Backend::start("b").await,
        Backend::start("c").await,
    ];
    put(&mut keys, &group, &a.entry(json!({})), None).await;
    let link = Link::to(etcd.address()).await;
    let setup = Setup::new(vec![format!("http://{}", link.address())], &group);
    let balancer = setup.with("policy: round_robin").serving().await;
    balancer.until_served_by(&["a"]).await;

    etcd.stop();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        assert_eq!(balancer.get().await, "a");
    }
    etcd.start();
    put(&mut keys, &group, &b.entry(json!({})), None).await;
    balancer.until_served_by(&["a", "b"]).await;

    // What happens meanwhile is compacted, so the discovery must relist.
    link.set_silent(true);
    delete(&mut keys, &group, "a").await;
    put(&mut keys, &group, &c.entry(json!({})), None).await;
    let revision = keys.get("any", None).await.unwrap();
    let revision = revision.header().unwrap().revision();
    let physical = CompactionOptions::new().with_physical();
    keys.compact(revision, Some(physical)).await.unwrap();
    assert_eq!(balancer.gets(8).await.len(), 2, "the last view is served");
    link.cut();
    // Otherwise the link would deliver what it held back.
    eventually("the connection is cut", || link.open() == 0).await;
    link.set_silent(false);
    balancer.until_served_by(&["b", "c"]).await;
    let text = balancer.log_text();
    assert!(
        text.contains("disconnected") && text.contains("missed"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_noticed_within_five_seconds_and_the_next_endpoint_is_tried() {
    let (etcd, group) = (Etcd::shared(), group("silence"));
    let mut keys = etcd.raw_client().await;
    let first = Backend::start("first").await;
    put(&mut keys, &group, &first.entry(json!({})), None).await;
    let (link, short_link) = (
        Link::to(etcd.address()).await,
        Link::to(etcd.address()).await,
    );
    let endpoints = |link: &Link| {
        let behind = format!("http://{}", link.address());
        [vec![behind], etcd.endpoints()].concat()
    };
    let setup = |link: &Link| Setup::new(endpoints(link), &group).with("policy: round_robin");
    let order = "shuffle_endpoints: false";
    let balancer = setup(&link).etcd(order).serving().await;
    let times = "silence_timeout_ms: 500, request_timeout_ms: 500, connect_timeout_ms: 500";
    let fields = format!("{times}, {order}");
    let short = setup(&short_link).etcd(&fields).serving().await;
    for balancer in [&balancer, &short] {
        balancer.until_served_by(&["first"]).await;
    }
    assert!(link.connections() > 0 && short_link.connections() > 0);
    let stalls = Stalls::watch();
    let start = Instant::now();
    link.set_silent(true);
    short_link.set_silent(true);
    let second = Backend::start("second").await;
    put(&mut keys, &group, &second.entry(json!({})), None).await;
    short.until_served_by(&["first", "second"]).await;
    let short = start.elapsed();
    let noticed = async || balancer.log_text().contains("disconnected");
    until("the silence is noticed", noticed).await;
    let noticed = start.elapsed();
    balancer.until_served_by(&["first", "second"]).await;
    let followed = start.elapsed();
    let stood = stalls.so_far();
    let case = format!("{short:?}, {noticed:?}, {followed:?}, {stood:?} still");
    assert!(noticed < Duration::from_millis(5500) + stood, "{case}");
    assert!(followed < Duration::from_millis(8000) + stood, "{case}");
    assert!(
        short < noticed && short < Duration::from_secs(4) + stood,
        "{case}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_it_answers_after_the_time_to_be_ready_and_asks_now_and_then() {
    let nowhere = vec![format!("http://{}:{}", local(), free_port())];
    let setup = Setup::new(nowhere, &group("nowhere"));
    let start = Instant::now();
    let fields = "breaker_failures: 1, breaker_pause_ms: 500";
    let balancer = setup
        .etcd(fields)
        .with("ready_timeout_ms: 1000")
        .serving()
        .await;
    let took = start.elapsed();
    assert!((1000..4000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(balancer.get().await, "503");
    until("the open circuit is logged", async || {
        balancer.log_text().contains("several times in a row")
    })
    .await;
}
