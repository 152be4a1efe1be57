//! Tests of spans, with a collector of OpenTelemetry.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use super::common::certificates::{Authority, Directory};
use super::common::etcd::Etcd;
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, ok, register, status};
use super::world::{Balancer, Setup, entry, put, until};

/// What a collector has got.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    resources: Arc<Mutex<Vec<KeyValue>>>,
    keys: Arc<Mutex<Vec<String>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        if let Some(key) = request.metadata().get("x-key") {
            let key = key.to_str().unwrap().to_owned();
            self.keys.lock().unwrap().push(key);
        }
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.unwrap().attributes;
            *self.resources.lock().unwrap() = attributes;
            for of_scope in of_resource.scope_spans {
                self.spans.lock().unwrap().extend(of_scope.spans);
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start(port: u16) -> Self {
        Self::start_with(port, Server::builder()).await
    }

    async fn start_with(port: u16, mut server: Server) -> Self {
        let collector = Self::default();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let service = TraceServiceServer::new(collector.clone());
        let server = server.add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        collector
    }

    fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    async fn until_it_has(&self, path: &str) -> Span {
        let found = || {
            let mut spans = self.spans().into_iter();
            spans.find(|span| text(&span.attributes, "url.path") == path)
        };
        until(path, async || found().is_some()).await;
        found().unwrap()
    }
}

fn text(attributes: &[KeyValue], name: &str) -> String {
    let named: HashMap<_, _> = attributes
        .iter()
        .map(|attribute| (attribute.key.as_str(), attribute.value.clone()))
        .collect();
    match named.get(name).cloned().flatten() {
        Some(AnyValue {
            value: Some(Value::StringValue(text)),
        }) => text,
        Some(AnyValue {
            value: Some(Value::IntValue(number)),
        }) => number.to_string(),
        _ => String::new(),
    }
}

async fn balancer(name: &str, backend: &RawBackend, collector: u16, more: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let mut keys = etcd.raw_client().await;
    let node = entry("n0", Some(backend.address.port()), json!({}));
    put(&mut keys, &group, &node, None).await;
    let endpoint = format!("http://127.0.0.1:{collector}");
    let fields = format!("opentelemetry: {{ endpoint: '{endpoint}'{more} }}\n");
    let fields = format!("{fields}clients: {{ trusted_proxies: [127.77.0.3] }}\n");
    let setup = Setup::shared(&group).with(&fields);
    let setup = setup.variable("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret");
    setup.listening().await
}

async fn get(balancer: &Balancer, path: &str, head: &str) -> String {
    let mut client = Raw::to(balancer).await;
    let request = format!("GET {path} HTTP/1.1\r\nHost: a.test\r\n{head}\r\n");
    client.send(request.as_bytes()).await;
    status(&client.response().await).to_owned()
}

/// Makes requests until one has a span: the first ones come before anything can be sent.
async fn until_it_sends(balancer: &Balancer, collector: &Collector) {
    until("spans are sent", async || {
        get(balancer, "/first", "").await;
        !collector.spans().is_empty()
    })
    .await;
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_is_a_span_with_its_node_and_the_backend_continues_it() {
    let backend = RawBackend::start(|request| match request.contains("/bad") {
        true => b"HTTP/1.1 500 Bad\r\nContent-Length: 0\r\n\r\n".to_vec(),
        false => ok(""),
    })
    .await;
    let port = free_port();
    let collector = Collector::start(port).await;
    let mut balancer = balancer("spans", &backend, port, ", service_name: edge").await;
    until_it_sends(&balancer, &collector).await;
    let head = format!("traceparent: 00-{TRACE}-{PARENT}-00\r\nUser-Agent: u\r\n");
    assert_eq!(get(&balancer, "/good?secret=1", &head).await, "200");
    let span = collector.until_it_has("/good").await;
    assert_eq!(span.name, "GET");
    assert_eq!(span.kind, 2, "a server's");
    assert_eq!(hex(&span.trace_id), TRACE);
    assert_eq!(hex(&span.parent_span_id), PARENT);
    assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
    for (name, expected) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "200"),
        ("url.scheme", "http"),
        ("network.protocol.version", "1.1"),
        ("server.address", "a.test"),
        ("user_agent.original", "u"),
        ("pingora_etcd.group", "default"),
        ("pingora_etcd.node", "n0"),
        ("pingora_etcd.upstream", &backend.address.to_string()),
        ("pingora_etcd.tries", "1"),
        ("pingora_etcd.outcome", "succeeded"),
    ] {
        assert_eq!(text(&span.attributes, name), expected, "{name}");
    }
    assert_eq!(
        text(&collector.resources.lock().unwrap(), "service.name"),
        "edge"
    );
    assert!(
        collector
            .keys
            .lock()
            .unwrap()
            .iter()
            .all(|key| key == "secret")
    );
    assert!(!collector.keys.lock().unwrap().is_empty());
    // The backend's parent is the span of the balancer.
    let expected = format!("traceparent: 00-{TRACE}-{}-01\r\n", hex(&span.span_id));
    let requests = backend.requests();
    let sent = requests.iter().find(|request| request.contains("/good"));
    assert!(sent.unwrap().contains(&expected), "{sent:?} {expected}");

    assert_eq!(get(&balancer, "/bad", "").await, "500");
    let span = collector.until_it_has("/bad").await;
    assert_eq!(span.status.unwrap().code, 2, "an error");
    assert_eq!(text(&span.attributes, "pingora_etcd.outcome"), "failed");

    // What has been served at the end is sent before the process ends.
    assert_eq!(get(&balancer, "/last", "").await, "200");
    balancer.program.signal("TERM");
    balancer.program.ended().await;
    let last = |span: &Span| text(&span.attributes, "url.path") == "/last";
    assert!(collector.spans().iter().any(last));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_proxy_says_which_requests_have_a_span_and_chance_does_otherwise() {
    let backend = RawBackend::start(|_| ok("")).await;
    let port = free_port();
    let collector = Collector::start(port).await;
    let balancer = balancer("sampled", &backend, port, ", sample: 0").await;
    let sampled = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n");
    let trusted = "127.77.0.3".parse().unwrap();
    // No chance: only what the trusted proxy wants is recorded.
    until("the trusted proxy's is recorded", async || {
        let mut client = Raw::at(trusted, &balancer).await;
        client.get(&sampled).await;
        !collector.spans().is_empty()
    })
    .await;
    let before = backend.requests().len();
    for _ in 0..20 {
        let mut client = Raw::to(&balancer).await;
        client.get(&sampled).await;
    }
    // What is not recorded is passed on as it is.
    let requests = backend.requests();
    let untouched = |request: &&String| request.contains(&sampled);
    assert_eq!(requests[before..].iter().filter(untouched).count(), 20);
    let recorded = |span: &Span| text(&span.attributes, "client.address") == "127.77.0.3";
    let mut client = Raw::at(trusted, &balancer).await;
    let known = collector.spans().len();
    client.get(&sampled).await;
    until("one more is recorded", async || {
        collector.spans().len() > known
    })
    .await;
    assert!(collector.spans().iter().all(recorded));
}

/// What has been served is sent, however fast the process ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_spans_are_sent_over_tls_before_the_process_ends() {
    let backend = RawBackend::start_slow(Duration::from_millis(700)).await;
    let port = free_port();
    let (files, authority) = (Directory::new(), Authority::new("collectors"));
    let pair = authority.server(&["localhost"]);
    let identity = Identity::from_pem(pair.cert, pair.key);
    let tls = Server::builder().tls_config(ServerTlsConfig::new().identity(identity));
    let collector = Collector::start_with(port, tls.unwrap()).await;
    let (etcd, group) = (Etcd::shared(), group("last-spans"));
    register(&etcd, &group, &[&backend]).await;
    let fields =
        format!("drain_delay_ms: 0\nopentelemetry: {{ endpoint: 'https://localhost:{port}' }}");
    let ca = files.write("ca.pem", authority.pem());
    let setup = Setup::shared(&group)
        .with(&fields)
        .server("grace_period_seconds: 10\n");
    let setup = setup.variable("SSL_CERT_FILE", ca.to_str().unwrap());
    let mut balancer = setup.listening().await;
    until("spans are sent", async || {
        get(&balancer, "/first", "").await;
        !collector.spans().is_empty()
    })
    .await;
    // In flight when the process is asked to end, and served all the same.
    let known = backend.requests().len();
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"GET http://a.test/last?secret=1 HTTP/1.1\r\nHost: a.test\r\n\r\n")
        .await;
    until("it is on its way", async || {
        backend.requests().len() > known
    })
    .await;
    balancer.program.signal("TERM");
    assert_eq!(status(&client.response().await), "200");
    drop(client);
    assert!(balancer.program.ended().await.0.success());
    let last = |span: &Span| text(&span.attributes, "url.path") == "/last";
    assert!(collector.spans().iter().any(last));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_costs_one_line_and_no_request() {
    let backend = RawBackend::start(|_| ok("")).await;
    let port = free_port();
    let mut balancer = balancer("uncollected", &backend, port, "").await;
    let says = |balancer: &Balancer| {
        let log = balancer.log_text();
        log.matches("spans cannot be sent to the collector").count()
    };
    until("it says so", async || {
        assert_eq!(get(&balancer, "/", "").await, "200");
        says(&balancer) > 0
    })
    .await;
    let collector = Collector::start(port).await;
    until("they are sent again", async || {
        assert_eq!(get(&balancer, "/", "").await, "200");
        balancer
            .log_text()
            .contains("spans are sent to the collector again")
    })
    .await;
    assert!(!collector.spans().is_empty());
    assert_eq!(says(&balancer), 1);
    drop(collector);
    balancer.program.signal("INT");
    let (status, took) = balancer.program.ended().await;
    assert!(status.success());
    assert!(took < Duration::from_secs(10), "{took:?}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
