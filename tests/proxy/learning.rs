//! Tests what `ClusterProxy` learns from its requests: outcomes, load reports and zones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use axum::response::IntoResponse;
use pingora_etcd::balance::BackendStatus;
use pingora_etcd::metrics::LOAD_REPORT_HEADER;

use super::bundled::{Proxy, proxy};
use super::common::etcd::Etcd;
use super::common::link::Link;
use super::common::{DEADLINE, eventually, group, local};
use super::{Backend, client, load};

/// Starts an HTTP server that responds with the result of `answer`; returns its port.
async fn serve<A, R>(answer: A) -> u16
where
    A: Fn() -> R + Clone + Send + Sync + 'static,
    R: Future<Output = axum::response::Response> + Send + 'static,
{
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let app = axum::Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, app).await });
    port
}

fn status(proxy: &Proxy, id: &str) -> BackendStatus {
    let backends = proxy.balancer.backends();
    let own = backends.into_iter().find(|backend| backend.node.id == id);
    own.unwrap_or_else(|| panic!("no backend {id}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_answers_5xx_loses_its_traffic_and_gets_it_back() {
    let etcd = Etcd::shared();
    let group = group("fails");
    let broken = Arc::new(AtomicBool::new(true));
    let answer = {
        let broken = broken.clone();
        move || {
            let broken = broken.load(Ordering::SeqCst);
            async move {
                if broken {
                    StatusCode::INTERNAL_SERVER_ERROR.into_response()
                } else {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    "ok".into_response()
                }
            }
        }
    };
    let port = serve(answer).await;
    let _bad = Backend::register(&etcd.options(), &group, "bad", port, |builder| builder);
    let _good = [
        Backend::start(&etcd.options(), &group, "g1").await,
        Backend::start(&etcd.options(), &group, "g2").await,
    ];
    let proxy = proxy(&etcd.options(), &group, false, "").await;
    proxy.until_it_has(3).await;
    load(&proxy.url, 1_000, 8).await;
    let failed = load(&proxy.url, 1_000, 8).await;
    assert!(
        failed.len() < 50,
        "{} of 1,000 requests failed",
        failed.len()
    );
    assert!(status(&proxy, "bad").success <= 0.5);
    assert_eq!(status(&proxy, "g1").success, 1.0);

    broken.store(false, Ordering::SeqCst);
    let start = Instant::now();
    while status(&proxy, "bad").success <= 0.98 {
        assert!(start.elapsed() < DEADLINE, "{:?}", status(&proxy, "bad"));
        load(&proxy.url, 1_000, 8).await;
    }
}

/// The same as after an outage of etcd, or when a process registers again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_that_are_lost_all_at_once_cost_neither_what_was_learned_nor_connections() {
    let etcd = Etcd::shared();
    let group = group("lost-leases");
    let broken = Arc::new(AtomicBool::new(false));
    let answer = |fails: Arc<AtomicBool>| {
        move || {
            let status = match fails.load(Ordering::SeqCst) {
                true => StatusCode::INTERNAL_SERVER_ERROR,
                false => StatusCode::OK,
            };
            async move { (status, "answered").into_response() }
        }
    };
    let (good, bad) = (
        serve(answer(Arc::default())).await,
        serve(answer(broken.clone())).await,
    );
    let links = [
        Link::to(format!("{}:{good}", local())).await,
        Link::to(format!("{}:{bad}", local())).await,
    ];
    let nodes = ["good", "bad"].iter().zip(&links).map(|(id, link)| {
        let port = link.address().port();
        Backend::register(&etcd.options(), &group, id, port, |builder| builder)
    });
    let nodes: Vec<_> = nodes.collect();
    // Longer than it takes to register again.
    let keeps = "  timeouts: { pool_idle_ms: 60000 }\n";
    let proxy = proxy(&etcd.options(), &group, false, keeps).await;
    proxy.until_it_has(2).await;
    // More connections are pooled than requests one after the other can need at a time: a
    // connection returns to the pool only after its response has reached the client.
    let connections = || links.iter().map(Link::connections).collect::<Vec<_>>();
    let start = Instant::now();
    while connections().iter().any(|count| *count < 3) {
        assert!(start.elapsed() < DEADLINE, "{:?}", connections());
        load(&proxy.url, 100, 8).await;
    }
    broken.store(true, Ordering::SeqCst);
    load(&proxy.url, 500, 2).await;
    let learned = status(&proxy, "bad").success;
    assert!(learned <= 0.5, "{learned}");
    let before = connections();

    let entries = || {
        let backends = proxy.balancer.backends();
        let leases = backends.iter().map(|backend| backend.node.lease());
        leases.collect::<Vec<_>>()
    };
    let first = entries();
    let mut client = etcd.raw_client().await;
    for lease in first.iter().flatten() {
        client.lease_revoke(lease.0).await.unwrap();
    }
    eventually("both are registered with another lease", || {
        let now = entries();
        now.len() == 2 && now.iter().all(|lease| !first.contains(lease))
    })
    .await;
    let after = status(&proxy, "bad").success;
    assert!(after <= 0.5, "{learned} before, {after} after");
    assert_eq!(status(&proxy, "good").success, 1.0);
    load(&proxy.url, 20, 1).await;
    assert_eq!(connections(), before, "pooled connections must be reused");
    drop(nodes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_outs_and_refused_connections_are_failures_and_a_client_that_leaves_is_not() {
    let etcd = Etcd::shared();
    let group = group("outcomes");
    let port = serve(|| async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        "late".into_response()
    })
    .await;
    let _slow = Backend::register(&etcd.options(), &group, "slow", port, |builder| builder);
    let waiting = proxy(&etcd.options(), &group, false, "").await;
    waiting.until_it_has(1).await;
    // The client gives up before the response.
    for _ in 0..3 {
        let short = reqwest::Client::builder().timeout(Duration::from_millis(100));
        let answer = short.build().unwrap().get(&waiting.url).send().await;
        assert!(answer.is_err_and(|error| error.is_timeout()));
    }
    eventually("the requests have ended", || {
        status(&waiting, "slow").in_flight == 0
    })
    .await;
    assert_eq!(status(&waiting, "slow").success, 1.0);

    // The proxy gives up before the response.
    let more = "  timeouts: { response_ms: 100 }\n  retries: 0\n";
    let limited = proxy(&etcd.options(), &group, false, more).await;
    limited.until_it_has(1).await;
    let response = client().get(&limited.url).send().await.unwrap();
    assert_eq!(response.status(), 504);
    eventually("the time-out counts as a failure", || {
        status(&limited, "slow").success < 1.0
    })
    .await;

    let _dead = Backend::dead(&etcd.options(), &group, "dead");
    waiting.until_it_has(2).await;
    load(&waiting.url, 20, 4).await;
    assert!(status(&waiting, "dead").success < 1.0);
    assert_eq!(status(&waiting, "slow").success, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_reports_move_weights_and_do_not_reach_the_client() {
    let etcd = Etcd::shared();
    let group = group("reports");
    let mut backends = Vec::new();
    for (id, cpu) in [("busy", "0.95"), ("idle", "0.2")] {
        let port = serve(move || async move {
            static TIME: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
            // Each response carries a new sample.
            let sampled = TIME.fetch_add(1, Ordering::SeqCst);
            let report = format!("TEXT cpu_utilization={cpu},named_metrics.sampled_at={sampled}");
            tokio::time::sleep(Duration::from_millis(5)).await;
            ([(LOAD_REPORT_HEADER, report)], "ok").into_response()
        })
        .await;
        let silent = |builder: pingora_etcd::ClusterNodeBuilder| builder.metrics_update_interval(0);
        backends.push(Backend::register(&etcd.options(), &group, id, port, silent));
    }
    let reads = proxy(&etcd.options(), &group, false, "").await;
    reads.until_it_has(2).await;
    let response = client().get(&reads.url).send().await.unwrap();
    assert!(!response.headers().contains_key(LOAD_REPORT_HEADER));
    let mut rounds = 0;
    while status(&reads, "busy").weight > 0.7 * status(&reads, "idle").weight {
        load(&reads.url, 400, 16).await;
        rounds += 1;
        assert!(rounds < 60, "{:?}", reads.balancer.backends());
    }

    // Without `load_reports` the header belongs to the client and is forwarded.
    let ignores = proxy(&etcd.options(), &group, false, "  load_reports: false\n").await;
    ignores.until_it_has(2).await;
    let response = client().get(&ignores.url).send().await.unwrap();
    assert!(response.headers().contains_key(LOAD_REPORT_HEADER));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_own_zone_is_preferred_while_it_lives() {
    let etcd = Etcd::shared();
    let group = group("zones");
    let mut backends = Vec::new();
    for (id, zone) in [("a1", "a"), ("a2", "a"), ("b1", "b")] {
        let zoned = |builder: pingora_etcd::ClusterNodeBuilder| builder.zone(zone);
        backends.push(Backend::start_with(&etcd.options(), &group, id, zoned).await);
    }
    // Neither the speed nor the load of a busy test machine may matter.
    let more = "  zone: a\n  zones: { stretch_limit: 100, load_limit: 4 }\n";
    let proxy = proxy(&etcd.options(), &group, false, more).await;
    proxy.until_it_has(3).await;
    assert_eq!(load(&proxy.url, 400, 4).await, Vec::<String>::new());
    let far = backends[2].take_requests();
    // Without regard to zones it would be a third, 133.
    assert!(far < 40, "{far} of 400 left the zone");
    backends[0].leave();
    backends[1].leave();
    proxy.until_it_has(1).await;
    assert_eq!(load(&proxy.url, 100, 4).await, Vec::<String>::new());
    assert!(backends[2].take_requests() >= 100);
}
