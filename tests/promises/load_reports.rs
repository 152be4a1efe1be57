//! Tests of load reports in responses: which forms are read, what backends are asked for, and what a client
//! sees of it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::HeaderMap;
use pingora_etcd::metrics::{LoadReport, LoadReporter, MetricNames};
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::{group, local};
use super::echo::{EchoClient, EchoServer};
use super::raw::{Raw, RawBackend, in_front_of, register};
use super::world::{Setup, entry, put, until};

/// Weights by reported CPU and queue only, and no wait for a start.
const POLICY: &str = "policy: headroom\nheadroom: { cpu: 1, memory: 0, queue: 1, floor: 0.05 }";

fn with(fields: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n{fields}\r\nok\n").into_bytes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_are_taken_and_not_passed_on() {
    let report =
        "endpoint-load-metrics: TEXT cpu_utilization=0.3\r\nEndpoint-Load-Metrics-Bin: CQ==\r\n";
    let backend = RawBackend::start(move |_| with(report)).await;
    for (fields, is_passed) in [
        ("", false),
        ("load_reports: true", false),
        ("load_reports_to_clients: true", true),
        ("load_reports: false", true),
    ] {
        let balancer = in_front_of(&backend, "reports", fields).await;
        let answer = Raw::to(&balancer).await.get("").await.to_lowercase();
        for name in ["endpoint-load-metrics:", "endpoint-load-metrics-bin:"] {
            assert_eq!(answer.contains(name), is_passed, "{fields}: {answer}");
        }
        assert!(!backend.last().contains("endpoint-load-metrics-format"));
    }
}

/// Two backends, of which the first answers with this field and the second one with another; the traffic
/// turns to the second one.
async fn is_left_for_the_other(name: &str, loaded: &'static str, idle: &'static str) {
    let (etcd, group) = (Etcd::shared(), group(name));
    let backends = [
        RawBackend::start(move |_| with(loaded)).await,
        RawBackend::start(move |_| with(idle)).await,
    ];
    register(&etcd, &group, &[&backends[0], &backends[1]]).await;
    let balancer = Setup::shared(&group).with(POLICY).serving().await;
    until(&format!("{loaded}: the other one is used"), async || {
        let counted = balancer.gets(50).await;
        counted.get("n1").is_some_and(|n1| *n1 > 40)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_form_is_read() {
    let mut loaded = LoadReport::new();
    loaded.application = Some(1.0);
    let binary = format!(
        "endpoint-load-metrics-bin: {}\r\n",
        loaded.to_binary_header()
    );
    let in_field = format!(
        "endpoint-load-metrics: BIN {}\r\n",
        loaded.to_binary_header()
    );
    for (name, report) in [
        (
            "orca-text",
            "endpoint-load-metrics: TEXT cpu_utilization=1\r\n",
        ),
        (
            "orca-json",
            "endpoint-load-metrics: JSON {\"cpuUtilization\": \"1\"}\r\n",
        ),
        (
            "orca-application",
            "endpoint-load-metrics: JSON {\"application_utilization\": 1.5, \"cpu_utilization\": 0.1}\r\n",
        ),
        ("orca-bin", binary.leak()),
        ("orca-bin-field", in_field.leak()),
    ] {
        let idle = "endpoint-load-metrics: TEXT cpu_utilization=0.1\r\n";
        is_left_for_the_other(name, report, idle).await;
    }
}

/// As vLLM does: it reports only if it is asked, by names of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inference_server_is_balanced_by_its_queue() {
    let (etcd, group) = (Etcd::shared(), group("inference"));
    let queues: [Arc<AtomicU32>; 2] = Default::default();
    let server = |queue: Arc<AtomicU32>| {
        RawBackend::start(move |request| {
            let queue = queue.load(Ordering::Relaxed);
            let asked = request.to_lowercase();
            let report = format!(
                "endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.5, \
                 named_metrics.num_requests_waiting={queue}.0\r\n"
            );
            match asked.contains("\r\nendpoint-load-metrics-format: text\r\n") {
                true => with(&report),
                false => with(""),
            }
        })
    };
    let [a, b] = [server(queues[0].clone()), server(queues[1].clone())];
    let (a, b) = (a.await, b.await);
    register(&etcd, &group, &[&a, &b]).await;
    let fields = "load_report_format: text\nload_report_metrics: { queue_depth: num_requests_waiting, \
                  mem_utilization: kv_cache_usage_perc }";
    let balancer = Setup::shared(&group).with(POLICY).with(fields);
    let balancer = balancer.serving().await;
    for (loaded, idle) in [(0, "n1"), (1, "n0")] {
        queues[loaded].store(100, Ordering::Relaxed);
        queues[1 - loaded].store(0, Ordering::Relaxed);
        until("the shorter queue is used", async || {
            let counted = balancer.gets(50).await;
            counted.get(idle).is_some_and(|idle| *idle > 40)
        })
        .await;
    }
}

/// gRPC reports in the trailers of a call, in the binary form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_trailers_of_a_call_are_read_and_not_passed_on() {
    let (etcd, group) = (Etcd::shared(), group("orca-grpc"));
    let mut keys = etcd.raw_client().await;
    let (loaded, idle) = (LoadReporter::new(), LoadReporter::new());
    let servers = [
        EchoServer::start_reporting("loaded", &loaded).await,
        EchoServer::start_reporting("idle", &idle).await,
    ];
    loaded.sampled(&json!({ "cpu_usage_percent": 100 }));
    idle.sampled(&json!({ "cpu_usage_percent": 10 }));
    for (index, server) in servers.iter().enumerate() {
        let entry = entry(&format!("n{index}"), Some(server.address.port()), json!({}));
        put(&mut keys, &group, &entry, None).await;
    }
    for is_passed in [false, true] {
        let fields = format!("backends: {{ protocol: h2c }}\nload_reports_to_clients: {is_passed}");
        let setup = Setup::shared(&group).with(POLICY).with(&fields);
        let balancer = setup.serving().await;
        let mut client = EchoClient::to(&balancer.url).await;
        until("the idle one is used", async || {
            let mut idle = 0;
            for _ in 0..50 {
                let answer = client.call("x").await.unwrap();
                idle += u32::from(answer.starts_with("idle"));
            }
            idle > 40
        })
        .await;
        let trailers = client.trailers_of("x").await;
        let report = LoadReport::from_headers(&trailers, &MetricNames::default());
        assert_eq!(report.is_some(), is_passed, "{trailers:?}");
    }
}

/// A worker of this crate answers in the form that it is asked for, and reports what others compute weights
/// from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_reports_what_others_compute_weights_from() {
    let reporter = LoadReporter::new();
    reporter.set_capacity(4);
    let app = axum::Router::new()
        .route("/", axum::routing::get(async || "ok"))
        .layer(reporter.layer());
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let client = super::common::load::client();
    let last: Mutex<HeaderMap> = Mutex::default();
    let report = async |form: &str| {
        let request = client
            .get(&url)
            .header("endpoint-load-metrics-format", form);
        let response = request.send().await.unwrap();
        *last.lock().unwrap() = response.headers().clone();
        LoadReport::from_headers(response.headers(), &MetricNames::default())
            .unwrap()
            .unwrap()
    };
    until("rates are known", async || {
        report("text").await.rps.is_some()
    })
    .await;
    for form in ["text", "json", "bin"] {
        let report = report(form).await;
        assert!(report.rps.unwrap() > 0.0, "{report:?}");
        assert!(
            report.application.is_some_and(|part| part < 0.9),
            "{report:?}"
        );
        let value = last.lock().unwrap()["endpoint-load-metrics"].clone();
        let value = value.to_str().unwrap().to_lowercase();
        assert!(value.starts_with(form), "{value}");
    }
}

/// A static weight is in whatever unit its operators like, such as megabytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_elsewhere_count_whatever_the_unit_of_static_weights() {
    for weight in [1, 4_000] {
        let (etcd, group) = (Etcd::shared(), group("told-units"));
        let mut keys = etcd.raw_client().await;
        let busy = with("endpoint-load-metrics: TEXT named_metrics.in_flight=60\r\n");
        let idle = with("endpoint-load-metrics: TEXT named_metrics.in_flight=1\r\n");
        let backends = [
            RawBackend::start(move |_| busy.clone()).await,
            RawBackend::start(move |_| idle.clone()).await,
        ];
        for (id, backend) in ["busy", "idle"].iter().zip(&backends) {
            let more = json!({ "weight": weight });
            let entry = entry(id, Some(backend.address.port()), more);
            put(&mut keys, &group, &entry, None).await;
        }
        let fields = "adaptive: { slow_start_ms: 0 }";
        let balancer = Setup::shared(&group).with(fields).serving().await;
        until("the other one is used", async || {
            let counted = balancer.gets(100).await;
            counted.get("idle").is_some_and(|idle| *idle > 75)
        })
        .await;
    }
}

/// As after a bad deployment: it does not know its paths any more, needs next to no CPU for that, and must not get
/// more and more requests because of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_low_load_of_a_backend_that_refuses_its_work_attracts_nothing() {
    for got in of_one_that_refuses(0.02, 0.7).await {
        assert!((100..300).contains(&got), "{got} of 600");
    }
}

/// As where it is asked more for what is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_high_load_of_a_backend_that_refuses_its_work_counts() {
    for got in of_one_that_refuses(0.95, 0.4).await {
        assert!(got < 140, "{got} of 600");
    }
}

/// How many of 600 requests one of three backends gets that answers 404, with this load, while the two others work with
/// the other one: under both policies that follow loads.
async fn of_one_that_refuses(load: f32, load_of_others: f32) -> [usize; 2] {
    let adaptive = "policy: adaptive\nadaptive: { slow_start_ms: 0 }";
    tokio::join!(
        of_refusing(adaptive, load, load_of_others),
        of_refusing(POLICY, load, load_of_others),
    )
    .into()
}

async fn of_refusing(fields: &str, load: f32, load_of_others: f32) -> usize {
    let (etcd, group) = (Etcd::shared(), group("refuses"));
    // Never quite the same: each is a new sample.
    let answer = |head: &'static str, load: f32| {
        move |_: &str| {
            let load = load + 0.01 * fastrand::f32();
            let report = format!("endpoint-load-metrics: TEXT cpu_utilization={load}");
            format!("HTTP/1.1 {head}\r\nContent-Length: 0\r\n{report}\r\n\r\n").into_bytes()
        }
    };
    let backends = [
        RawBackend::start(answer("404 Not Found", load)).await,
        RawBackend::start(answer("200 OK", load_of_others)).await,
        RawBackend::start(answer("200 OK", load_of_others)).await,
    ];
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    let balancer = Setup::shared(&group).with(fields).serving().await;
    // Weights have long been as great as they become.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(15) {
        balancer.gets(20).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let before = backends[0].requests().len();
    balancer.gets(600).await;
    backends[0].requests().len() - before
}

/// As for a server of language models: it names its queue, and not its CPU.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_adaptive_too_a_queue_without_cpu_weighs_and_an_empty_one_shows_that_a_backend_is_idle()
 {
    let (etcd, group) = (Etcd::shared(), group("queues"));
    let queued = Arc::new(AtomicU32::new(1_000));
    let report = |queue: Arc<AtomicU32>| {
        move |_: &str| {
            let queue = queue.load(Ordering::Relaxed);
            // A long one is never quite the same: each is a new sample.
            let queue = queue + fastrand::u32(..=queue / 100);
            with(&format!(
                "endpoint-load-metrics: TEXT named_metrics.queue_depth={queue}\r\n"
            ))
        }
    };
    let backends = [
        RawBackend::start(report(queued.clone())).await,
        RawBackend::start(report(Arc::default())).await,
        RawBackend::start(report(Arc::default())).await,
    ];
    register(&etcd, &group, &backends.iter().collect::<Vec<_>>()).await;
    // That one of them is a little slower must not matter.
    let fields = "adaptive: { slow_start_ms: 0, idle_latency_ms: 10000 }";
    let balancer = Setup::shared(&group).with(fields).serving().await;
    until("the long queue is left alone", async || {
        let counted = balancer.gets(60).await;
        counted.get("n0").is_none_or(|its| *its < 12)
    })
    .await;
    // The others are idle, and share what is left.
    let counted = balancer.gets(200).await;
    let [one, two] = ["n1", "n2"].map(|id| counted.get(id).copied().unwrap_or_default());
    assert!(one.abs_diff(two) < 40, "{counted:?}");
    queued.store(0, Ordering::Relaxed);
    until("all share alike", async || {
        let counted = balancer.gets(60).await;
        counted.get("n0").is_some_and(|its| *its >= 16)
    })
    .await;
}
