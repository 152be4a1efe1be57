//! Tests that requests succeed while etcd is down for longer than the leases last, and when every
//! lease is lost afterwards.
//!
//! `OUTAGE_SECONDS` sets the duration; `make outage` sets it to five minutes.

use std::time::{Duration, Instant};

use pingora_etcd::discovery::DiscoveryStatus;
use pingora_etcd::{ClusterNodeBuilder, HealthStatus};

use super::bundled::proxy;
use super::common::etcd::Etcd;
use super::common::{eventually, group};
use super::{Backend, Load};

const BACKENDS: usize = 6;
/// Of the leases, in seconds: less than the outage lasts.
const TTL: i64 = 5;

fn outage() -> Duration {
    let seconds = std::env::var("OUTAGE_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("OUTAGE_SECONDS is a number"));
    Duration::from_secs(seconds.unwrap_or(10))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_etcd_and_a_mass_expiry_cost_no_request() {
    let etcd = Etcd::own();
    let group = group("outage");
    let mut backends = Vec::new();
    for index in 0..BACKENDS {
        let (id, short) = (format!("b{index}"), |it: ClusterNodeBuilder| it.ttl(TTL));
        backends.push(Backend::start_with(&etcd.options(), &group, &id, short).await);
    }
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    proxy.until_it_has(BACKENDS).await;
    let discovery = proxy.balancer.discovery();
    let load = Load::start(&proxy.url, 4);
    load.goes_on(100).await;

    // No lease lasts for this long without a renewal.
    etcd.stop();
    eventually("the discovery is stale", || {
        matches!(discovery.status(), DiscoveryStatus::Stale { .. })
    })
    .await;
    let start = Instant::now();
    let mut least = usize::MAX;
    while start.elapsed() < outage() {
        least = least.min(proxy.balancer.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    etcd.start();
    let back = Instant::now();
    eventually("all nodes are registered again", || {
        least = least.min(proxy.balancer.len());
        let nodes = discovery.nodes();
        discovery.status() == DiscoveryStatus::Live
            && nodes.len() == BACKENDS
            && nodes.suspects() == 0
            && discovery.leader().is_some()
    })
    .await;
    let epoch = discovery.leadership().unwrap().epoch;
    println!(
        "etcd was down for {:?}; all {BACKENDS} nodes were registered again {:?} later; {} requests so far, never fewer than {least} backends",
        start.elapsed() - back.elapsed(),
        back.elapsed(),
        load.sent()
    );

    // Every lease ends at once, as when etcd has lost its data, or when the workers reach etcd
    // later than the balancer.
    eventually(
        "all nodes are healthy, with the leases they will keep",
        || {
            let mut nodes = backends.iter().map(|backend| &backend.node);
            nodes.all(|node| node.current_health() == HealthStatus::Healthy)
        },
    )
    .await;
    let mut client = etcd.raw_client().await;
    let leases: Vec<i64> = client
        .leases()
        .await
        .unwrap()
        .leases()
        .iter()
        .map(etcd_client::LeaseStatus::id)
        .collect();
    assert!(leases.len() >= BACKENDS);
    for lease in leases {
        match client.lease_revoke(lease).await {
            // It was left from before, and has expired by itself.
            Err(error) if error.to_string().contains("lease not found") => {}
            revoked => drop(revoked.unwrap()),
        }
    }
    let start = Instant::now();
    let mut most = 0;
    eventually("all nodes are registered again and one leads", || {
        least = least.min(proxy.balancer.len());
        let nodes = discovery.nodes();
        most = most.max(nodes.suspects());
        nodes.len() == BACKENDS
            && nodes.suspects() == 0
            && most > 0
            && discovery
                .leadership()
                .is_some_and(|term| term.epoch > epoch)
    })
    .await;
    load.goes_on(500).await;
    println!(
        "{BACKENDS} leases revoked: up to {most} suspects, all registered again after {:?}, never fewer than {least} backends",
        start.elapsed()
    );
    // On a busy machine one or two leases may expire normally, which is too few for
    // self-preservation.
    assert!(least >= BACKENDS - 2, "the pool shrank to {least} backends");
    let sent = load.sent();
    let failed = load.stop().await;
    println!("{sent} requests, {} failed", failed.len());
    assert_eq!(failed, Vec::<String>::new());
    assert!(backends.iter().all(|backend| backend.take_requests() > 0));
}
