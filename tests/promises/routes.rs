//! Tests of several groups and of the routes to them.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::common::etcd::Etcd;
use super::common::group;
use super::common::programs::{COMMAND, optimised};
use super::echo::EchoServer;
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{Balancer, Setup, entry, put, scratch, until};

const SECOND: Duration = Duration::from_secs(1);

/// Backends in groups of their own, which are named like them with the test's group before; `default` is in
/// the group of the file itself.
struct Groups {
    etcd: std::sync::Arc<Etcd>,
    group: String,
}

impl Groups {
    fn new(name: &str) -> Self {
        Self {
            etcd: Etcd::shared(),
            group: group(name),
        }
    }

    fn in_etcd(&self, name: &str) -> String {
        match name {
            "default" => self.group.clone(),
            name => format!("{}-{name}", self.group),
        }
    }

    async fn add(&self, name: &str, backend: &RawBackend) {
        let mut keys = self.etcd.raw_client().await;
        let entry = entry(name, Some(backend.address.port()), json!({}));
        put(&mut keys, &self.in_etcd(name), &entry, None).await;
    }

    /// The line of a group in a file.
    fn line(&self, name: &str, more: &str) -> String {
        format!("  {name}: {{ group: {}{more} }}\n", self.in_etcd(name))
    }

    fn setup(&self) -> Setup {
        Setup::shared(&self.group)
    }
}

fn answer(status: &str, fields: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} X\r\nContent-Length: 3\r\n{fields}\r\nok\n").into_bytes()
}

/// Sends a request: the response in lower case.
async fn send(balancer: &Balancer, head: &str) -> String {
    let mut client = Raw::to(balancer).await;
    client.send(format!("{head}\r\n\r\n").as_bytes()).await;
    client.response().await.to_ascii_lowercase()
}

fn node(response: &str) -> Option<&str> {
    let mut lines = response.lines();
    lines.find_map(|line| line.strip_prefix("x-upstream-node: "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_goes_where_the_first_route_for_it_says() {
    let groups = Groups::new("routes");
    let mut backends = BTreeMap::new();
    for name in ["default", "api", "orders"] {
        let backend = RawBackend::start(|_| answer("200", "Server: Hidden\r\nX-Kept: 1\r\n")).await;
        groups.add(name, &backend).await;
        backends.insert(name, backend);
    }
    let fields = format!(
        "groups:\n{}{}routes:\n\
         - {{ path: /healthz, answer: {{ status: 203, body: fine }}, response_headers: {{ set: {{ x-by: route }} }} }}\n\
         - {{ path: /gone, answer: {{ status: 204 }} }}\n\
         - {{ hosts: [old.example, '*.old.example'], redirect: {{ to: 'https://new.example{{path}}{{query}}', status: 301 }} }}\n\
         - {{ path_regex: '^/v[0-9]+/(.*)$', methods: [GET, POST], group: orders, rewrite: {{ path: '/$1', host: inner.example }} }}\n\
         - name: api\n  path: /api\n  headers: {{ x-tenant: '*' }}\n  group: api\n  rewrite: {{ path: / }}\n  \
         request_headers: {{ set: {{ x-service: api }}, remove: [x-debug] }}\n  response_headers: {{ remove: [server] }}\n",
        groups.line("api", ""),
        groups.line("orders", ""),
    );
    let balancer = groups.setup().with(&fields).listening().await;
    for (request, served, backend_sees) in [
        (
            "GET /a HTTP/1.1\r\nHost: a",
            "default",
            "get /a http/1.1\r\nhost: a\r\n",
        ),
        (
            "GET /api/x HTTP/1.1\r\nHost: a",
            "default",
            "get /api/x http/1.1\r\n",
        ),
        (
            "GET /api/x?q=1 HTTP/1.1\r\nHost: a\r\nX-Tenant: 7\r\nX-Debug: 1",
            "api",
            "get /x?q=1 http/1.1\r\n",
        ),
        (
            "GET /api HTTP/1.1\r\nHost: a\r\nX-Tenant: 7",
            "api",
            "get / http/1.1\r\n",
        ),
        (
            "GET /apis HTTP/1.1\r\nHost: a\r\nX-Tenant: 7",
            "default",
            "get /apis http/1.1\r\n",
        ),
        (
            "GET /v2/users/7?x HTTP/1.1\r\nHost: a",
            "orders",
            "get /users/7?x http/1.1\r\nhost: inner.example\r\n",
        ),
        (
            "DELETE /v2/users HTTP/1.1\r\nHost: a",
            "default",
            "delete /v2/users http/1.1\r\n",
        ),
        (
            "GET /healthzz HTTP/1.1\r\nHost: a",
            "default",
            "get /healthzz",
        ),
    ] {
        let before = backends[served].requests().len();
        let response = send(&balancer, request).await;
        assert_eq!(
            (status(&response), node(&response)),
            ("200", Some(served)),
            "{request}: {response}"
        );
        let seen = backends[served].requests();
        assert_eq!(seen.len(), before + 1, "{request}");
        let seen = seen.last().unwrap().to_ascii_lowercase();
        assert!(seen.starts_with(backend_sees), "{request}: {seen}");
        let is_api = served == "api";
        assert_eq!(seen.contains("x-service: api"), is_api, "{seen}");
        assert!(!is_api || !seen.contains("x-debug"), "{seen}");
        assert_eq!(response.contains("server: hidden"), !is_api, "{response}");
        assert!(response.contains("x-kept: 1"), "{response}");
    }
    // The client's connection stays after a response without a backend.
    let mut client = Raw::to(&balancer).await;
    for (request, code, expected) in [
        ("GET /healthz HTTP/1.1\r\nHost: a", "203", "x-by: route\r\n"),
        (
            "HEAD /healthz HTTP/1.1\r\nHost: a",
            "203",
            "content-length: 4\r\n",
        ),
        ("GET /gone HTTP/1.1\r\nHost: a", "204", "keep-alive"),
        (
            "GET /x?y=1 HTTP/1.1\r\nHost: Old.Example:80",
            "301",
            "location: https://new.example/x?y=1\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nHost: www.old.example",
            "301",
            "location: https://new.example/\r\n",
        ),
    ] {
        client.send(format!("{request}\r\n\r\n").as_bytes()).await;
        let response = match request.starts_with("HEAD") {
            true => super::raw::read_head(&mut client.0).await.unwrap(),
            false => client.response().await,
        };
        let response = response.to_ascii_lowercase();
        assert_eq!(status(&response), code, "{request}: {response}");
        assert!(response.contains(expected), "{request}: {response}");
        assert_eq!(node(&response), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_is_by_weight_and_a_mirror_gets_copies_that_nobody_waits_for() {
    let groups = Groups::new("split");
    let main = RawBackend::start(ok).await;
    let canary = RawBackend::start(ok).await;
    // It never answers in time.
    let mirror = RawBackend::start_slow(30 * SECOND).await;
    for (name, backend) in [
        ("main", &main),
        ("canary", &canary),
        ("mirror", &mirror),
        ("default", &main),
    ] {
        groups.add(name, backend).await;
    }
    let fields = format!(
        "groups:\n{}{}{}{}routes:\n\
         - {{ path: /copied, group: main, mirror: {{ group: mirror, body_bytes: 1000 }} }}\n\
         - {{ path: /split, split: {{ main: 80, canary: 20 }} }}\n\
         - {{ path: /nobody, split: {{ main: 1, nobody: 99 }} }}\n\
         - {{ path: /alike, group: main, request_headers: {{ set: {{ x-tenant: own }}, remove: [x-admin] }} }}\n",
        groups.line("main", ""),
        groups.line("canary", ""),
        groups.line("nobody", ""),
        groups.line("mirror", ""),
    );
    let balancer = groups.setup().with(&fields).listening().await;
    let mut client = Raw::to(&balancer).await;
    for _ in 0..1_000 {
        client.send(b"GET /split HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(status(&client.response().await), "200");
    }
    let to_canary = canary.requests().len();
    // 200 with a standard deviation of 13: six of them.
    assert!((120..280).contains(&to_canary), "{to_canary} of 1,000");
    // A group that has no nodes gets no part.
    for _ in 0..20 {
        client
            .send(b"GET /nobody HTTP/1.1\r\nHost: a\r\n\r\n")
            .await;
        assert_eq!(status(&client.response().await), "200");
    }
    // What CGI takes for a field that the route sets or removes does not get there.
    client
        .send(b"GET /alike HTTP/1.1\r\nHost: a\r\nX_Tenant: evil\r\nX-Admin: 1\r\nX_Admin: 1\r\nX_Own: 1\r\n\r\n")
        .await;
    assert_eq!(status(&client.response().await), "200");
    let seen = main.last();
    for (field, is_there) in [
        ("x-tenant: own", true),
        ("x_own: 1", true),
        ("evil", false),
        ("admin", false),
    ] {
        assert_eq!(seen.contains(field), is_there, "{seen}");
    }

    let start = Instant::now();
    for body in [&*"x".repeat(2_000), "", "12345"] {
        let length = body.len();
        let request =
            format!("POST /copied HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}");
        client.send(request.as_bytes()).await;
        assert_eq!(status(&client.response().await), "200");
    }
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    until("the copies arrive", async || mirror.requests().len() == 2).await;
    let copies = mirror.requests();
    assert!(
        copies
            .iter()
            .all(|copy| copy.starts_with("POST /copied HTTP/1.1")),
        "{copies:?}"
    );
    assert!(
        copies.iter().any(|copy| copy.ends_with("\r\n\r\n12345")),
        "{copies:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_is_rewritten_over_http_2_at_both_ends() {
    let server = EchoServer::start("s").await;
    let groups = Groups::new("rewrite-h2");
    let mut keys = groups.etcd.raw_client().await;
    let entry = entry("n0", Some(server.address.port()), json!({}));
    put(&mut keys, &groups.group, &entry, None).await;
    let fields = "backends: { protocol: h2c }\nroutes:\n- { path: /p, group: default, rewrite: { path: / } }";
    let balancer = groups.setup().with(fields).listening().await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let response = client
        .get(format!("{}/p/nothing", balancer.url))
        .send()
        .await
        .unwrap();
    // The server has it: it knows no such call.
    let status = response
        .headers()
        .get("grpc-status")
        .map(|status| status.to_str().unwrap().to_owned());
    assert_eq!(
        (response.status().as_u16(), status.as_deref()),
        (200, Some("12")),
        "{response:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_and_a_route_have_their_own_times_retries_and_limits() {
    let groups = Groups::new("own-limits");
    let slow = RawBackend::start_slow(SECOND).await;
    let failing = RawBackend::start(|_| answer("503", "")).await;
    let well = RawBackend::start(ok).await;
    for (name, backend) in [("default", &well), ("slow", &slow), ("mixed", &failing)] {
        groups.add(name, backend).await;
    }
    let mut keys = groups.etcd.raw_client().await;
    let other = entry("other", Some(well.address.port()), json!({}));
    put(&mut keys, &groups.in_etcd("mixed"), &other, None).await;
    let fields = format!(
        "timeouts: {{ response_ms: 20000 }}\ngroups:\n{}{}routes:\n\
         - {{ path: /slow/long, group: slow, timeouts: {{ response_ms: 10000 }} }}\n\
         - {{ path: /slow/whole, group: slow, timeouts: {{ request_ms: 150, response_ms: 10000 }} }}\n\
         - {{ path: /slow, group: slow }}\n\
         - {{ path: /mixed/once, group: mixed, retries: 0 }}\n\
         - {{ path: /mixed, group: mixed }}\n",
        groups.line("slow", ", timeouts: { response_ms: 200 }"),
        groups.line(
            "mixed",
            ", policy: round_robin, retry: { on_status: [503], least_per_second: 1000 }"
        ),
    );
    let balancer = groups.setup().with(&fields).listening().await;
    let get = async |path: &str| {
        let response = send(&balancer, &format!("GET {path} HTTP/1.1\r\nHost: a")).await;
        status(&response).to_owned()
    };
    assert_eq!(get("/slow").await, "504");
    assert_eq!(get("/slow/long").await, "200");
    assert_eq!(get("/slow/whole").await, "504");
    let mut once = Vec::new();
    for _ in 0..10 {
        assert_eq!(get("/mixed").await, "200");
        once.push(get("/mixed/once").await);
    }
    assert!(once.iter().any(|code| code == "503"), "{once:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_and_a_route_send_requests_to_the_leader() {
    let groups = Groups::new("to-leader");
    let (leader, other) = (RawBackend::start(ok).await, RawBackend::start(ok).await);
    groups.add("default", &other).await;
    let mut keys = groups.etcd.raw_client().await;
    let of_orders = groups.in_etcd("orders");
    let lease = keys.lease_grant(600, None).await.unwrap().id();
    for (id, backend, lease) in [("leads", &leader, Some(lease)), ("follows", &other, None)] {
        let entry = entry(id, Some(backend.address.port()), json!({}));
        put(&mut keys, &of_orders, &entry, lease).await;
    }
    let key = format!("election/{of_orders}/{lease:x}");
    let options = etcd_client::PutOptions::new().with_lease(lease);
    keys.put(key, "leads", Some(options)).await.unwrap();
    let fields = format!(
        "groups:\n  writes: {{ group: {of_orders}, policy: round_robin, leader: {{ writes: true }} }}\n  \
         plain: {{ group: {of_orders}, policy: round_robin }}\nroutes:\n\
         - {{ path: /w, group: writes }}\n- {{ path: /all, group: plain, leader: true }}\n\
         - {{ path: /plain, group: plain }}\n"
    );
    let balancer = groups.setup().with(&fields).listening().await;
    for (request, expected) in [
        ("POST /w HTTP/1.1\r\nContent-Length: 0", "leads"),
        ("GET /w HTTP/1.1", "leads follows"),
        ("GET /all HTTP/1.1", "leads"),
        ("POST /plain HTTP/1.1\r\nContent-Length: 0", "leads follows"),
        ("POST / HTTP/1.1\r\nContent-Length: 0", "default"),
    ] {
        let mut served = Vec::new();
        for _ in 0..6 {
            let response = send(&balancer, &format!("{request}\r\nHost: a")).await;
            served.push(node(&response).unwrap_or("none").to_owned());
        }
        assert!(
            expected
                .split(' ')
                .all(|id| served.iter().any(|served| served == id)),
            "{request}: {served:?}"
        );
        assert!(
            served.iter().all(|id| expected.contains(id)),
            "{request}: {served:?}"
        );
    }
    let seen = leader.requests();
    assert!(
        seen.iter()
            .any(|request| request.starts_with("GET /all") && request.contains("x-leader-epoch")),
        "{seen:?}"
    );
}

#[test]
fn a_file_that_cannot_be_meant_is_refused_with_its_line() {
    let file = scratch(&format!("{}.yaml", group("refused")));
    for (routes, expected) in [
        (
            "- { path: /x, group: nowhere }",
            "line 8: invalid cluster.routes[0].group",
        ),
        (
            "- { group: default }\n  - { path: /x, answer: {} }",
            "line 9: invalid cluster.routes[1]",
        ),
        ("- { path: /x, pat: y, group: default }", "line 8"),
        // One without a name is called by its number.
        (
            "- { path: /x, group: api, name: route-2 }\n  - { path: /y, group: api }",
            "line 9: invalid cluster.routes[1].name",
        ),
    ] {
        let text = format!(
            "version: 1\ncluster:\n  etcd: {{ endpoints: ['http://127.0.0.1:1'] }}\n  group: web\n  \
             groups:\n    api: {{ policy: random }}\n  routes:\n  {routes}\n"
        );
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(optimised(COMMAND));
        let output = command
            .args(["serve", "--check", "--conf"])
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(expected),
            "{expected}: {said}"
        );
    }
    std::fs::remove_file(file).unwrap();
}

/// Without them the page of another origin could not read why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_route_adds_to_responses_is_on_those_of_the_proxy_too() {
    let groups = Groups::new("errors");
    let backend = RawBackend::start(ok).await;
    groups.add("default", &backend).await;
    // What is said of the content of answers is not said of errors.
    let allow = "response_headers: { set: { access-control-allow-origin: '*', cache-control: 'max-age=9', \
                 content-encoding: gzip, content-type: application/json } }";
    let fields = format!(
        "clients: {{ body_bytes: 10 }}\ngroups:\n{}routes:\n- {{ path: /nobody, group: nobody, {allow} }}",
        groups.line("nobody", "")
    );
    let balancer = groups.setup().with(&fields).serving().await;
    for (head, expected) in [
        ("GET /nobody HTTP/1.1\r\nHost: a", "503"),
        (
            "POST /nobody HTTP/1.1\r\nHost: a\r\nContent-Length: 11",
            "413",
        ),
        (
            "GET /nobody HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x",
            "501",
        ),
    ] {
        let response = send(&balancer, head).await;
        assert_eq!(status(&response), expected, "{response}");
        for (field, is_there) in [
            ("access-control-allow-origin: *", true),
            ("content-type: text/plain; charset=utf-8", true),
            ("cache-control", false),
            ("content-encoding", false),
        ] {
            let is_found = response.contains(&format!("\r\n{field}"));
            assert_eq!(is_found, is_there, "{field}: {response}");
        }
    }
}
