//! Tests of limits, the queue, pauses that backends ask for, and of keys and cookies.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::stalls::Stalls;
use super::common::{free_port, group};
use super::raw::{Raw, RawBackend, http_2_backend, ok, read_message, register, status};
use super::world::{Balancer, Setup, entry, put, until};

const SECOND: Duration = Duration::from_secs(1);
/// How long a request takes where several are sent at once: all of them are there before the first one is served.
const SLOW: Duration = Duration::from_secs(3);

/// A balancer in front of these backends, `n0` and so on.
async fn before(backends: &[&RawBackend], name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    register(&etcd, &group, backends).await;
    Setup::shared(&group).with(fields).listening().await
}

/// Sends this number of requests at once: the responses, and how long each took.
async fn at_once(balancer: &Balancer, count: usize) -> Vec<(String, Duration)> {
    let mut requests = JoinSet::new();
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Raw::to(balancer).await);
    }
    let start = Instant::now();
    for mut client in clients {
        requests.spawn(async move { (client.get("").await, start.elapsed()) });
    }
    requests.join_all().await
}

fn count(responses: &[(String, Duration)], code: &str) -> usize {
    let matching = responses
        .iter()
        .filter(|(response, _)| status(response) == code);
    matching.count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_beyond_the_limit_wait_and_then_get_503() {
    let backend = RawBackend::start_slow(SLOW).await;
    let fields = "overload: { max_in_flight: 2, queue: 2, queue_timeout_ms: 30000 }";
    let balancer = before(&[&backend], "limit", fields).await;
    let stalls = Stalls::watch();
    let responses = at_once(&balancer, 6).await;
    let stood = stalls.so_far();
    assert_eq!(
        (count(&responses, "200"), count(&responses, "503")),
        (4, 2),
        "{responses:?}"
    );
    for (response, took) in &responses {
        if status(response) == "503" {
            assert!(*took < SECOND / 2 + stood, "{took:?}");
            assert!(
                response.to_ascii_lowercase().contains("retry-after: 1"),
                "{response}"
            );
            // The client keeps its connection.
            assert!(response.contains("Connection: keep-alive"), "{response}");
        }
    }
    let waited = responses.iter().filter(|(_, took)| *took >= 2 * SLOW);
    assert_eq!(waited.count(), 2);
    assert_eq!(backend.most_at_once(), 2);
    // Whoever waits too long gets 503, too.
    let fields = "overload: { max_in_flight: 1, queue: 9, queue_timeout_ms: 100 }";
    let balancer = before(&[&backend], "patience", fields).await;
    let responses = at_once(&balancer, 3).await;
    assert_eq!(
        (count(&responses, "200"), count(&responses, "503")),
        (1, 2),
        "{responses:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_gets_no_more_requests_at_a_time_than_it_may() {
    tokio::join!(
        gets_no_more_than_it_may("adaptive"),
        gets_no_more_than_it_may("headroom"),
        gets_no_more_than_it_may("round_robin"),
        gets_no_more_than_it_may("random"),
        gets_no_more_than_it_may("consistent"),
    );
}

async fn gets_no_more_than_it_may(policy: &str) {
    let backends = [
        RawBackend::start_slow(SLOW).await,
        RawBackend::start_slow(SLOW).await,
    ];
    let [one, two] = &backends;
    let fields = format!(
        "policy: {policy}\noverload: {{ max_in_flight_per_node: 2, queue: 1, queue_timeout_ms: 30000 }}"
    );
    let balancer = before(&[one, two], "per-node", &fields).await;
    // Four at once, one waits, and one too many.
    let responses = at_once(&balancer, 6).await;
    let got = (count(&responses, "200"), count(&responses, "503"));
    assert_eq!(got, (5, 1), "{policy}: {responses:?}");
    let mut times: Vec<_> = responses.iter().map(|(_, took)| *took).collect();
    times.sort_unstable();
    assert!(
        times[4] < SLOW * 9 / 5 && times[5] >= 2 * SLOW,
        "{policy}: {times:?}"
    );
    for backend in &backends {
        assert_eq!(backend.most_at_once(), 2, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_asks_for_a_pause_gets_one_within_bounds() {
    for code in ["503 Busy", "429 Too Many"] {
        let busy = RawBackend::start(move |_| {
            format!("HTTP/1.1 {code}\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n")
                .into_bytes()
        })
        .await;
        let fine = RawBackend::start(ok).await;
        let fields = "policy: round_robin\noverload: { retry_after_most_ms: 4000 }";
        let balancer = before(&[&busy, &fine], "pause", fields).await;
        let (stalls, start) = (Stalls::watch(), Instant::now());
        let counted = balancer.gets(40).await;
        assert_eq!(counted.get("n1"), Some(&39), "{counted:?}");
        assert_eq!(busy.requests().len(), 1);
        until("it is tried again", async || {
            balancer.get().await;
            busy.requests().len() > 1
        })
        .await;
        // Without the field it would be after ten seconds.
        let (took, stood) = (start.elapsed(), stalls.so_far());
        assert!(
            took >= 3 * SECOND && took < 8 * SECOND + stood,
            "{code}: {took:?}, of which the machine stood still for {stood:?}"
        );
        // Alone, it gets everything.
        let balancer = before(&[&busy], "alone", fields).await;
        let requests = busy.requests().len();
        balancer.gets(5).await;
        assert_eq!(busy.requests().len(), requests + 5);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_a_cookie_a_parameter_or_the_first_value_of_a_header() {
    let backends = [
        RawBackend::start(ok).await,
        RawBackend::start(ok).await,
        RawBackend::start(ok).await,
    ];
    let all: Vec<_> = backends.iter().collect();
    for (hash_on, request) in [
        (
            "cookie:user",
            "GET / HTTP/1.1\r\nHost: a\r\nCookie: a=1; user=KEY; b=2",
        ),
        ("query:user", "GET /?a=1&user=KEY&b=2 HTTP/1.1\r\nHost: a"),
        (
            "header:x-user",
            "GET / HTTP/1.1\r\nHost: a\r\nX-User: KEY, other",
        ),
    ] {
        let fields = format!("policy: consistent\nhash_on: '{hash_on}'");
        let balancer = before(&all, "keys", &fields).await;
        let mut nodes = BTreeSet::new();
        for key in 0..30 {
            let mut of_key = BTreeSet::new();
            for noise in 0..3 {
                let head = request
                    .replace("KEY", &format!("k{key}"))
                    .replace("a=1", &format!("a={noise}"));
                let head = head.replace("other", &format!("other{noise}"));
                let mut client = Raw::to(&balancer).await;
                client.send(format!("{head}\r\n\r\n").as_bytes()).await;
                of_key.insert(node(&client.response().await));
            }
            assert_eq!(of_key.len(), 1, "{hash_on} {key}: {of_key:?}");
            nodes.extend(of_key);
        }
        assert_eq!(nodes.len(), 3, "{hash_on}");
    }
}

fn node(response: &str) -> String {
    let node = response
        .lines()
        .find_map(|line| line.strip_prefix("x-upstream-node: "));
    node.unwrap_or_else(|| panic!("{response}")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sticky_cookie_names_the_node_and_holds_while_it_serves() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let all: Vec<_> = backends.iter().collect();
    let fields = "policy: round_robin\nsticky_cookie: node";
    let balancer = before(&all, "sticky", fields).await;
    let mut client = Raw::to(&balancer).await;
    let response = client.get("").await;
    let first = node(&response);
    let cookie = response
        .lines()
        .find_map(|line| line.strip_prefix("Set-Cookie: "));
    let cookie = cookie.or(response
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: ")));
    let cookie = cookie.unwrap_or_else(|| panic!("{response}"));
    assert!(
        cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax"),
        "{cookie}"
    );
    let cookie = cookie.split(';').next().unwrap();
    let head = format!("Cookie: other=1; {cookie}\r\n");
    for _ in 0..10 {
        let response = client.get(&head).await;
        assert_eq!(node(&response), first);
        assert!(
            !response.to_ascii_lowercase().contains("set-cookie"),
            "{response}"
        );
    }
    // The node drains: another one, and a cookie that names it.
    let at: usize = first[1..].parse().unwrap();
    let entry = entry(
        &first,
        Some(backends[at].address.port()),
        json!({ "state": "draining" }),
    );
    let mut keys = Etcd::shared().raw_client().await;
    put(&mut keys, &balancer.group, &entry, None).await;
    until("another node serves", async || {
        let response = client.get(&head).await;
        node(&response) != first && response.to_ascii_lowercase().contains("set-cookie")
    })
    .await;
    // What names nobody is ignored.
    for value in ["zz", "", "6e39", "ff"] {
        let response = client.get(&format!("Cookie: node={value}\r\n")).await;
        assert_eq!(status(&response), "200", "{value}");
    }
}

/// A session is where its node is. One request goes elsewhere, the session does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sticky_cookie_stays_while_its_node_is_full() {
    let backends = [
        RawBackend::start_slow(SECOND).await,
        RawBackend::start_slow(SECOND).await,
    ];
    let all: Vec<_> = backends.iter().collect();
    let fields = "policy: round_robin\nsticky_cookie: node\noverload: { max_in_flight_per_node: 1 }\n\
                  clients: { trusted_proxies: [127.0.0.0/8] }";
    let balancer = before(&all, "sticky-full", fields).await;
    let mut client = Raw::to(&balancer).await;
    let response = client.get("X-Forwarded-Proto: https\r\n").await;
    let first = node(&response);
    let cookie = response.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("set-cookie: ")
            .map(str::to_owned)
    });
    let cookie = cookie.unwrap_or_else(|| panic!("{response}"));
    // It came over TLS to who is trusted.
    assert!(cookie.ends_with("; secure"), "{cookie}");
    let head = format!("Cookie: {}\r\n", cookie.split(';').next().unwrap());
    let mut busy = Raw::to(&balancer).await;
    let owner = &backends[first[1..].parse::<usize>().unwrap()];
    let before = owner.requests().len();
    let (held, meanwhile) = tokio::join!(busy.get(&head), async {
        until("the first one is there", async || {
            owner.requests().len() > before
        })
        .await;
        client.get(&head).await
    });
    assert_eq!(node(&held), first);
    assert_ne!(node(&meanwhile), first);
    let meanwhile = meanwhile.to_ascii_lowercase();
    assert!(!meanwhile.contains("set-cookie"), "{meanwhile}");
}

/// HTTP/2 has no upgrades, and without them a request for a WebSocket would be another request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_websocket_goes_to_a_backend_of_http_2() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let one = RawBackend::start(|_| {
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            .to_vec()
    })
    .await;
    let websocket = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                      Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    for (has_one, expected) in [(false, "501"), (true, "101")] {
        let (etcd, group) = (Etcd::shared(), group("h2-upgrades"));
        let mut keys = etcd.raw_client().await;
        let speaks_2 = json!({ "metadata": { "protocol": "h2c" } });
        put(&mut keys, &group, &entry("two", Some(port), speaks_2), None).await;
        if has_one {
            let port = Some(one.address.port());
            put(&mut keys, &group, &entry("one", port, json!({})), None).await;
        }
        let fields = "backends: { protocol_of_node: true }\npolicy: round_robin";
        let balancer = Setup::shared(&group).with(fields).serving().await;
        for _ in 0..6 {
            let mut client = Raw::to(&balancer).await;
            client.send(websocket).await;
            let response = read_message(&mut client.0).await.unwrap_or_default();
            assert_eq!(status(&response), expected, "{has_one} {response}");
        }
        assert!(!balancer.log_text().contains("a backend fails"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocols_are_passed_on_as_is_set_and_others_are_refused() {
    // Answers with another protocol if it is asked for one, and then with what it reads.
    let backend = RawBackend::start(|request| {
        let asked = request.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("upgrade").then_some(value)
        });
        match asked {
            Some(protocol) => format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
            )
            .into_bytes(),
            None => ok(""),
        }
    })
    .await;
    let websocket = "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                     Sec-WebSocket-Version: 13\r\n";
    for (fields, [of_websocket, of_tcp]) in [
        ("", ["101", "501"]),
        ("clients: { upgrade: any }", ["101", "101"]),
        ("clients: { upgrade: none }", ["501", "501"]),
    ] {
        let balancer = before(&[&backend], "upgrades", fields).await;
        for (more, expected) in [
            (format!("Connection: Upgrade\r\n{websocket}"), of_websocket),
            ("Connection: upgrade\r\nUpgrade: tcp\r\n".to_owned(), of_tcp),
            // Of the connection to the proxy only: everybody may ignore it.
            ("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n".to_owned(), "200"),
            // Nothing asks for it.
            (format!("Connection: keep-alive\r\n{websocket}"), "200"),
            // Beside another one, which stays.
            (format!("Connection: Upgrade\r\nUpgrade: h2c\r\n{websocket}"), of_websocket),
        ] {
            let mut client = Raw::to(&balancer).await;
            client
                .send(format!("GET / HTTP/1.1\r\nHost: a\r\n{more}\r\n").as_bytes())
                .await;
            let response = read_message(&mut client.0).await.unwrap_or_default();
            assert_eq!(status(&response), expected, "{fields} {more}: {response}");
        }
    }
}

/// From the first one to the last one, however many come while they wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_is_served_in_the_order_of_coming() {
    let backend = RawBackend::start(|request| match request.starts_with("GET /held ") {
        // The rest never comes.
        true => b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart".to_vec(),
        false => ok(request),
    })
    .await;
    let admin = format!("127.0.0.1:{}", free_port());
    let fields = format!(
        "admin: {{ listen: '{admin}' }}\n\
         overload: {{ max_in_flight_per_node: 1, queue: 100, queue_timeout_ms: 60000 }}"
    );
    let balancer = before(&[&backend], "order", &fields).await;
    let in_flight = async || {
        let answer = reqwest::get(format!("http://{admin}/metrics")).await;
        let text = answer.ok()?.text().await.ok()?;
        let name = format!(
            "pingora_etcd_requests_in_flight{{group=\"{}\"}} ",
            balancer.group
        );
        let value = text.lines().find_map(|line| line.strip_prefix(&name))?;
        value.parse::<f64>().ok()
    };
    // The first one has the only place, until its client leaves.
    let mut clients = Vec::new();
    for number in 0..=12_u32 {
        let path = match number {
            0 => "held".to_owned(),
            _ => number.to_string(),
        };
        let mut client = Raw::to(&balancer).await;
        client
            .send(format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await;
        let expected = Some(f64::from(number + 1));
        until("the request is there", async || {
            in_flight().await == expected
        })
        .await;
        clients.push(client);
    }
    until("the backend has the first one", async || {
        backend.requests().len() == 1
    })
    .await;
    drop(clients.remove(0));
    for client in &mut clients {
        assert_eq!(status(&client.response().await), "200");
    }
    let served = backend.requests().split_off(1);
    assert_eq!(served.len(), 12, "{served:?}");
    for (number, request) in (1..).zip(&served) {
        assert!(
            request.starts_with(&format!("GET /{number} ")),
            "{served:?}"
        );
    }
}

/// Whoever gives up often asks again: otherwise backends would work for nobody when they have most to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_has_given_up_while_it_waited_is_not_sent() {
    let backend = RawBackend::start_slow(2 * SECOND).await;
    for limit in ["max_in_flight: 1", "max_in_flight_per_node: 1"] {
        let fields = format!("overload: {{ {limit}, queue: 9, queue_timeout_ms: 15000 }}");
        let balancer = before(&[&backend], "given-up", &fields).await;
        let before = backend.requests().len();
        let mut first = Raw::to(&balancer).await;
        let request = b"POST /first HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
        first.send(request).await;
        until("the first one is there", async || {
            backend.requests().len() > before
        })
        .await;
        let (mut leaves, mut stays) = (Raw::to(&balancer).await, Raw::to(&balancer).await);
        for (client, path) in [(&mut leaves, "leaves"), (&mut stays, "stays")] {
            let request = format!("POST /{path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
            client.send(request.as_bytes()).await;
            tokio::time::sleep(SECOND / 10).await;
        }
        drop(leaves);
        assert_eq!(status(&first.response().await), "200");
        assert_eq!(status(&stays.response().await), "200");
        let got = backend.requests().split_off(before);
        assert!(
            got.iter().all(|it| !it.contains("/leaves")),
            "{limit}: {got:?}"
        );
        assert_eq!(got.len(), 2, "{limit}: {got:?}");
    }
}

/// A client that asks for too much is refused by each backend, and nobody else is to notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_that_is_refused_does_not_keep_backends_from_the_others() {
    let limits = |request: &str| {
        let status = match request {
            _ if request.starts_with("GET /limited") => "429 No",
            _ if request.starts_with("GET /closed") => "503 No",
            _ => return ok(request),
        };
        let answer = format!("HTTP/1.1 {status}\r\nRetry-After: 10\r\nContent-Length: 0\r\n\r\n");
        answer.into_bytes()
    };
    let mut backends = Vec::new();
    for _ in 0..4 {
        backends.push(RawBackend::start(limits).await);
    }
    let all: Vec<_> = backends.iter().collect();
    let balancer = before(&all, "one-client", "policy: round_robin").await;
    until("it serves", async || balancer.get().await.starts_with('n')).await;
    let from = |last: u8| Raw::at([127, 0, 0, last].into(), &balancer);
    let mut limited = from(9).await;
    let mut others = Vec::new();
    for last in 2..8 {
        others.push(from(last).await);
    }
    let counts = || backends.iter().map(|it| it.requests().len());
    for _ in 0..20 {
        let before: Vec<_> = counts().collect();
        for client in &mut others {
            assert_eq!(status(&client.get("").await), "200");
        }
        assert!(counts().zip(before).all(|(now, before)| now > before));
        for _ in 0..4 {
            for (path, code) in [("limited", "429"), ("closed", "503")] {
                let request = format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n");
                limited.send(request.as_bytes()).await;
                assert_eq!(status(&limited.response().await), code);
            }
        }
    }
}
