//! Tests of what clients may do: times, limits, and who is believed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::common::etcd::Etcd;
use super::common::group;
use super::raw::{Raw, RawBackend, http_2, in_front_of, is_closed_within, ok, status};
use super::world::{Setup, entry, put, scratch, until};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_has_to_arrive_as_a_whole_in_its_time_for_each_request() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_header_ms: 600, client_idle_ms: 30000 }";
    let balancer = in_front_of(&backend, "heads", fields).await;
    // A byte now and then does not help. The second one is a request on a connection that has
    // served one.
    for served in [false, true] {
        let mut start = Instant::now();
        let mut client = Raw::to(&balancer).await;
        if served {
            assert_eq!(status(&client.get("").await), "200");
            // Longer than a head may take: nothing of one has been sent.
            tokio::time::sleep(SECOND).await;
            start = Instant::now();
        }
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n").await;
        let answer = client.drip(b"x: 1\r\n", SECOND / 10).await;
        assert_eq!(status(&answer), "408", "{answer:?}");
        let took = start.elapsed();
        assert!(took > SECOND / 2 && took < 5 * SECOND, "{took:?}");
    }
    // Nothing of them has been taken for a request.
    assert_eq!(backend.requests().len(), 1);
    // One that sends nothing is closed without a response.
    let mut silent = Raw::to(&balancer).await;
    assert_eq!(silent.rest().await, "");
    assert_eq!(
        balancer.log_text().matches("ERROR").count(),
        0,
        "{}",
        balancer.log_text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_without_requests_is_closed_after_its_time() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "idle", "timeouts: { client_idle_ms: 3000 }").await;
    let mut client = Raw::to(&balancer).await;
    // Longer than the time in all: each request begins it anew.
    for _ in 0..3 {
        assert_eq!(status(&client.get("").await), "200");
        assert!(!is_closed_within(&mut client.0, SECOND * 3 / 2).await);
    }
    let start = Instant::now();
    assert!(is_closed_within(&mut client.0, 15 * SECOND).await);
    assert!(start.elapsed() < 12 * SECOND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_body_is_the_clients_fault() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_body_ms: 500, response_ms: 60000 }";
    let balancer = in_front_of(&backend, "bodies", fields).await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
        .await;
    let start = Instant::now();
    let response = client.rest().await;
    assert_eq!(status(&response), "408", "{response:?}");
    assert!(start.elapsed() < 5 * SECOND);
    // The other way round: the backend's time is over first. It is blamed for none of them.
    let access_log = scratch(&group("bodies-access"));
    let fields = format!(
        "timeouts: {{ client_body_ms: 60000, response_ms: 500 }}\naccess_log: {{ file: {} }}",
        access_log.display()
    );
    let balancer = in_front_of(&backend, "bodies-2", &fields).await;
    let mut clients = Vec::new();
    for _ in 0..6 {
        let mut client = Raw::to(&balancer).await;
        client
            .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
            .await;
        clients.push(client);
    }
    for client in &mut clients {
        let response = client.rest().await;
        assert_eq!(status(&response), "408", "{response:?}");
    }
    let outcomes = || -> Vec<Value> {
        let text = std::fs::read_to_string(&access_log).unwrap_or_default();
        // The last line may not be whole yet.
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let stalled = lines.filter(|line| line["status"] == 408);
        stalled.map(|line| line["outcome"].clone()).collect()
    };
    until("each of them has a line", async || outcomes().len() >= 6).await;
    assert_eq!(outcomes(), ["unknown"; 6]);
    until("the backend still serves", async || {
        balancer.get().await == "a"
    })
    .await;
    let log = balancer.log_text();
    assert!(!log.contains("a backend fails"), "{log}");
    let _ = std::fs::remove_file(access_log);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_given_up() {
    let large = |_: &str| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n";
        [&head[..], &vec![b'x'; 50_000_000]].concat()
    };
    let backend = RawBackend::start(large).await;
    for (name, fields) in [
        ("writes", "timeouts: { client_write_ms: 500 }"),
        ("rates", "clients: { least_rate: 1000000000 }"),
    ] {
        let balancer = in_front_of(&backend, name, fields).await;
        let mut client = Raw::to(&balancer).await;
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        super::world::until("the client is given up", async || {
            // What is in the buffers is still there, then the connection ends.
            !balancer.has_connection_from(client.0.local_addr().unwrap())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_limited_in_all_and_per_client() {
    let backend = RawBackend::start(ok).await;
    for (name, fields) in [
        ("all", "clients: { connections: 3 }"),
        ("one", "clients: { connections_per_client: 3 }"),
    ] {
        let balancer = in_front_of(&backend, name, fields).await;
        let served = async |client: &mut TcpStream| {
            use tokio::io::AsyncWriteExt;
            let request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
            client.write_all(request).await.is_ok()
                && super::raw::read_message(client).await.is_some()
        };
        let mut open = Vec::new();
        super::world::until("the connections of the start are gone", async || {
            open.clear();
            for _ in 0..3 {
                let mut client = TcpStream::connect(&balancer.listen).await.unwrap();
                if served(&mut client).await {
                    open.push(client);
                }
            }
            open.len() == 3
        })
        .await;
        let mut fourth = TcpStream::connect(&balancer.listen).await.unwrap();
        assert!(!served(&mut fourth).await);
        assert!(served(&mut open[1]).await);
        // Another client has a limit of its own.
        let mut other = Raw::at("127.77.0.1".parse().unwrap(), &balancer).await;
        assert_eq!(served(&mut other.0).await, name == "one");
        if name == "one" {
            // Who has connections for many clients has as many as it likes.
            let fields = format!("{fields}\n").replace(" }", ", trusted_proxies: [127.0.0.0/8] }");
            let trusting = in_front_of(&backend, "trusted", &fields).await;
            let mut many = Vec::new();
            for _ in 0..8 {
                let mut client = TcpStream::connect(&trusting.listen).await.unwrap();
                assert!(served(&mut client).await);
                many.push(client);
            }
        }
        drop(open);
        super::world::until("there is room again", async || {
            let mut client = TcpStream::connect(&balancer.listen).await.unwrap();
            served(&mut client).await
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_bodies_are_limited() {
    let backend = RawBackend::start(ok).await;
    let fields = "clients: { head_bytes: 1024, headers: 8, body_bytes: 100 }";
    let balancer = in_front_of(&backend, "sizes", fields).await;
    let many: String = (0..9).map(|index| format!("x-{index}: 1\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(1_024));
    for head in [many, long] {
        let mut client = Raw::to(&balancer).await;
        assert_eq!(status(&client.get(&head).await), "431", "{head}");
    }
    // A head that has no end.
    let mut client = Raw::to(&balancer).await;
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n").await;
    let answer = client.drip(b"x: 01234567890123456789\r\n", SECOND / 500);
    assert_eq!(status(&answer.await), "431");
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n")
        .await;
    assert_eq!(status(&client.rest().await), "413");
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    for _ in 0..11 {
        client.send(b"a\r\n0123456789\r\n").await;
    }
    let response = client.rest().await;
    assert_eq!(status(&response), "413");
    // The reason, and nothing of the backend.
    assert!(
        response.ends_with("the body of the request is too large\n"),
        "{response}"
    );
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
        .await;
    assert_eq!(status(&client.response().await), "200");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_after_as_many_requests_as_are_set() {
    let backend = RawBackend::start(ok).await;
    let fields = "clients: { requests_per_connection: 3 }";
    let balancer = in_front_of(&backend, "requests", fields).await;
    let mut client = Raw::to(&balancer).await;
    for last in [false, false, true] {
        let response = client.get("").await;
        assert_eq!(status(&response), "200");
        let says_so = response.to_ascii_lowercase().contains("connection: close");
        assert_eq!(says_so, last, "{response}");
    }
    // Long before the time of a connection without requests is over.
    assert!(is_closed_within(&mut client.0, 10 * SECOND).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_without_tls_is_spoken_to_those_who_begin_with_it() {
    let backend = RawBackend::start(ok).await;
    for (name, fields, is_spoken) in [("h2c", "", true), ("h1", "clients: { h2c: false }", false)] {
        let balancer = in_front_of(&backend, name, fields).await;
        let client = reqwest::Client::builder().http2_prior_knowledge();
        let client = client.build().unwrap();
        for _ in 0..3 {
            let response = client.get(&balancer.url).send().await;
            let spoken = response.is_ok_and(|response| {
                response.status() == 200 && response.version() == reqwest::Version::HTTP_2
            });
            assert_eq!(spoken, is_spoken);
        }
        if is_spoken {
            // As many streams at a time as Pingora allows.
            let stream = tokio::net::TcpStream::connect(&balancer.listen).await;
            let (sender, mut connection) = h2::client::Builder::new()
                .handshake::<_, bytes::Bytes>(stream.unwrap())
                .await
                .unwrap();
            let settled = async {
                until("its settings are there", async || {
                    sender.current_max_send_streams() <= 100
                })
                .await;
                sender.current_max_send_streams()
            };
            tokio::select! {
                _ = &mut connection => panic!("the connection ends"),
                most = settled => assert_eq!(most, 100),
            }
        }
        // A request that is shorter than the preface of HTTP/2, and one that begins like it.
        for request in ["GET / HTTP/1.0\r\n\r\n", "PRI / HTTP/1.0\r\n\r\n"] {
            let mut client = Raw::to(&balancer).await;
            client.send(request.as_bytes()).await;
            assert_eq!(status(&client.rest().await), "200", "{request}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_may_be_silent_for_longer_than_a_response() {
    let upgrade = |request: &str| {
        if !request.to_ascii_lowercase().contains("upgrade: websocket") {
            return ok(request);
        }
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            .to_vec()
    };
    let backend = RawBackend::start(upgrade).await;
    let head = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let times = "client_body_ms: 1000, client_idle_ms: 1000, client_header_ms: 1000, \
                 response_ms: 1000, request_ms: 1500";
    for (tunnel, lives) in [(60_000, true), (2_000, false)] {
        let limits = "clients: { body_bytes: 10 }";
        let fields = format!("timeouts: {{ tunnel_ms: {tunnel}, {times} }}\n{limits}");
        let balancer = in_front_of(&backend, "tunnels", &fields).await;
        let mut client = Raw::to(&balancer).await;
        assert_eq!(status(&client.get(head).await), "101");
        let within = if lives { 3 * SECOND } else { 6 * SECOND };
        let is_closed = is_closed_within(&mut client.0, within).await;
        assert_eq!(is_closed, !lives);
        if lives {
            // It still carries bytes both ways: the backend answers whatever looks like a request.
            assert_eq!(status(&client.get("").await), "200");
        }
    }
}

/// The time of the tunnel, which Pingora takes for the answer as well, is an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_does_not_answer_a_websocket_has_the_time_of_any_other_answer() {
    let silent = Duration::from_secs(3_600);
    let (hangs, late) = (
        RawBackend::start_slow(silent).await,
        RawBackend::start_slow(SECOND / 3).await,
    );
    let head = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let fields = "timeouts: { response_ms: 2000 }";
    // Until it serves, a request without an upgrade is answered.
    let balancer = in_front_of(&late, "agreement", fields).await;
    let mut client = Raw::to(&balancer).await;
    assert_eq!(status(&client.get(head).await), "200");
    // The time of the upgrade is over, and the next requests have their own.
    for _ in 0..8 {
        assert_eq!(status(&client.get("").await), "200");
    }
    let mut keys = Etcd::shared().raw_client().await;
    let entry = entry("a", Some(hangs.address.port()), json!({}));
    put(&mut keys, &balancer.group, &entry, None).await;
    until("the other one is asked", async || {
        let mut client = Raw::to(&balancer).await;
        client
            .send(format!("GET / HTTP/1.1\r\nHost: a\r\n{head}\r\n").as_bytes())
            .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        !hangs.requests().is_empty()
    })
    .await;
    let post = format!("POST / HTTP/1.1\r\nHost: a\r\n{head}Content-Length: 2\r\n");
    let get = format!("GET / HTTP/1.1\r\nHost: a\r\n{head}");
    let plain = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    let plain = plain.to_owned();
    for (request, then, expected) in [
        (format!("{get}\r\n"), "", "504"),
        // It waits for the backend to say that it wants the body.
        (format!("{post}Expect: 100-continue\r\n\r\n"), "", "504"),
        (plain, "", "504"),
        // The backend's time begins with the end of the request.
        (format!("{post}\r\n"), "ab", "504"),
        // Nothing may follow before the backend has agreed, and it would hide that the client leaves.
        (format!("{get}\r\n"), "early", "400"),
    ] {
        let mut client = Raw::to(&balancer).await;
        client.send(request.as_bytes()).await;
        let mut start = Instant::now();
        if !then.is_empty() {
            let before = if expected == "400" {
                SECOND / 4
            } else {
                3 * SECOND / 2
            };
            tokio::time::sleep(before).await;
            start = Instant::now();
            client.send(then.as_bytes()).await;
        }
        let response = client.rest().await;
        let took = start.elapsed();
        assert_eq!(status(&response), expected, "{request:?}: {response:?}");
        let is_in_time = (took > SECOND || expected == "400") && took < 10 * SECOND;
        assert!(is_in_time, "{request:?}: {took:?}");
    }
}

/// Its time is not the tunnel's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_that_refuses_a_websocket_and_stops_ends() {
    let stops = |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart".to_vec();
    let backend = RawBackend::start(stops).await;
    let (etcd, group) = (Etcd::shared(), group("stops"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let fields = "timeouts: { response_ms: 1500 }";
    let balancer = Setup::shared(&group).with(fields).listening().await;
    until("the backend is asked", async || {
        let mut client = Raw::to(&balancer).await;
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        !backend.requests().is_empty()
    })
    .await;
    for head in ["", "Connection: Upgrade\r\nUpgrade: websocket\r\n"] {
        let mut client = Raw::to(&balancer).await;
        let start = Instant::now();
        let request = format!("GET / HTTP/1.1\r\nHost: a\r\n{head}\r\n");
        client.send(request.as_bytes()).await;
        let response = client.rest().await;
        assert!(response.ends_with("part"), "{head}: {response}");
        assert!(
            start.elapsed() < 10 * SECOND,
            "{head}: {:?}",
            start.elapsed()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_to_backends_end_before_the_backend_ends_them() {
    let says_so =
        |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nKeep-Alive: timeout=2\r\n\r\n".to_vec();
    for (name, fields, backend) in [
        (
            "pool",
            "timeouts: { pool_idle_ms: 1000 }",
            RawBackend::start(ok).await,
        ),
        (
            "hint",
            "timeouts: { pool_idle_ms: 60000 }",
            RawBackend::start(says_so).await,
        ),
    ] {
        let balancer = in_front_of(&backend, name, fields).await;
        // The first response says for how long the next connections are kept.
        assert_eq!(balancer.get().await, "a");
        assert_eq!(balancer.get().await, "a");
        let before = backend.connections();
        assert_eq!(balancer.get().await, "a");
        assert_eq!(backend.connections(), before, "{name}: it is used again");
        tokio::time::sleep(2 * SECOND).await;
        assert_eq!(balancer.get().await, "a");
        assert_eq!(backend.connections(), before + 1, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_has_a_time_for_all_of_it() {
    let backend = RawBackend::start_slow(SECOND).await;
    let fields = "timeouts: { request_ms: 300, response_ms: 60000 }\nretries: 2";
    let balancer = in_front_of(&backend, "whole", fields).await;
    let mut client = Raw::to(&balancer).await;
    let start = Instant::now();
    assert_eq!(status(&client.get("").await), "504");
    assert!(start.elapsed() < 2 * SECOND, "{:?}", start.elapsed());
    // Also while the client is waited for, whose parts would each have their own time.
    let fields = "timeouts: { request_ms: 2000, response_ms: 60000 }";
    let balancer = in_front_of(&backend, "whole-bodies", fields).await;
    let mut client = Raw::to(&balancer).await;
    let start = Instant::now();
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345";
    client.send(head).await;
    tokio::time::sleep(3 * SECOND / 2).await;
    client.send(b"678").await;
    assert_eq!(status(&client.rest().await), "408");
    assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_nobody_wants_is_read_for_its_time() {
    let early = RawBackend::start_early(ok).await;
    let balancer = in_front_of(&early, "drains", "timeouts: { client_drain_ms: 700 }").await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n")
        .await;
    assert_eq!(status(&client.response().await), "200");
    let start = Instant::now();
    assert!(is_closed_within(&mut client.0, 5 * SECOND).await);
    assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_100_continue_there_is_still_a_response() {
    let continues = |request: &str| {
        let head = request.to_ascii_lowercase();
        match head.contains("expect: 100-continue") && !request.ends_with("abc") {
            true => b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(),
            false => ok(request),
        }
    };
    let backend = RawBackend::start_early(continues).await;
    let fields = "clients: { body_bytes: 10 }\ntimeouts: { client_body_ms: 600 }";
    let balancer = in_front_of(&backend, "continues", fields).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    for (body, expected) in [("b\r\n01234567890\r\n", "413"), ("", "408")] {
        let mut client = Raw::to(&balancer).await;
        client.send(head.as_bytes()).await;
        assert_eq!(status(&client.response().await), "100");
        client.send(body.as_bytes()).await;
        let rest = client.rest().await;
        assert_eq!(status(&rest), expected, "{rest:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_there_is_of_a_response_that_breaks_off_reaches_the_client() {
    let part = |_: &str| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n";
        [&head[..], &[b'x'; 500]].concat()
    };
    let backend = RawBackend::start(part).await;
    let fields = "timeouts: { response_ms: 2000 }";
    let balancer = in_front_of(&backend, "breaks-off", fields).await;
    let mut client = Raw::to(&balancer).await;
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let received = client.rest().await;
    assert_eq!(status(&received), "200", "{received:?}");
    assert!(received.ends_with(&"x".repeat(500)), "{received:?}");
}

/// Its 413 comes while it sends, and it reads only afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_before_the_end_of_a_body_is_not_lost() {
    let backend = RawBackend::start(ok).await;
    let fields = "clients: { body_bytes: 1000 }\ntimeouts: { client_drain_ms: 5000 }";
    let balancer = in_front_of(&backend, "refused-body", fields).await;
    for head in [
        "Content-Length: 20000000\r\n",
        "Transfer-Encoding: chunked\r\n",
    ] {
        let mut client = Raw::to(&balancer).await;
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n");
        client.send(head.as_bytes()).await;
        let part = match head.contains("chunked") {
            true => [&b"186a0\r\n"[..], &[b'x'; 100_000], b"\r\n"].concat(),
            false => vec![b'x'; 100_000],
        };
        for _ in 0..200 {
            let sent = client.0.write_all(&part).await;
            sent.expect("the connection is not reset while the client sends");
        }
        if head.contains("chunked") {
            client.send(b"0\r\n\r\n").await;
        }
        let answer = client.rest().await;
        assert_eq!(status(&answer), "413", "{answer}");
        assert!(answer.to_ascii_lowercase().contains("connection: close"));
    }
    // Whoever waits for the end of the connection sees it at once.
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\nx")
        .await;
    let start = Instant::now();
    assert_eq!(status(&client.rest().await), "413");
    assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_in_the_middle_are_no_errors_in_the_log() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "leaving", "").await;
    for begun in ["", "G", "GET / HT", "GET / HTTP/1.1\r\nHost: a\r\nX-A: b"] {
        for is_reset in [false, true] {
            for is_first in [true, false] {
                let mut client = Raw::to(&balancer).await;
                if !is_first {
                    assert_eq!(status(&client.get("").await), "200");
                }
                client.send(begun.as_bytes()).await;
                if is_reset {
                    client.0.set_zero_linger().unwrap();
                }
                drop(client);
            }
        }
    }
    until("they are all gone", async || {
        balancer.open_connections() == 0
    })
    .await;
    let log = balancer.log_text();
    assert!(!log.contains("ERROR"), "{log}");
}

/// The backend that is started again has no tunnel, and is not the only one that gets requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_websockets_are_no_load() {
    let upgrade = |request: &str| match request.to_ascii_lowercase().contains("upgrade: websocket")
    {
        true => {
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
                .to_vec()
        }
        false => ok(request),
    };
    let first = RawBackend::start(upgrade).await;
    let balancer = in_front_of(&first, "websockets", "adaptive: { slow_start_ms: 0 }").await;
    let mut tunnels = Vec::new();
    for _ in 0..40 {
        let mut client = Raw::to(&balancer).await;
        let head = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
        assert_eq!(status(&client.get(head).await), "101");
        tunnels.push(client);
    }
    let second = RawBackend::start(upgrade).await;
    let entry = entry("b", Some(second.address.port()), json!({}));
    let mut keys = Etcd::shared().raw_client().await;
    put(&mut keys, &balancer.group, &entry, None).await;
    balancer.until_served_by(&["a", "b"]).await;
    let counts = balancer.gets(200).await;
    assert!(counts["a"] >= 60 && counts["b"] >= 60, "{counts:?}");
    // The next tunnels go to where there are fewer.
    let before = second.requests().len();
    for _ in 0..30 {
        let mut client = Raw::to(&balancer).await;
        let head = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
        assert_eq!(status(&client.get(head).await), "101");
        tunnels.push(client);
    }
    let of_second = second.requests().len() - before;
    assert!(of_second >= 25, "{of_second} of 30");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_proxy_answers_itself_keeps_the_connection_of_a_client_that_has_sent_all() {
    let balancer = Setup::shared(&group("nobody-here"));
    let balancer = balancer.with("ready_timeout_ms: 100").listening().await;
    let mut client = Raw::to(&balancer).await;
    for _ in 0..3 {
        client
            .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc")
            .await;
        let response = client.response().await;
        assert_eq!(status(&response), "503", "{response}");
        assert!(
            !response.to_ascii_lowercase().contains("connection: close"),
            "{response}"
        );
    }
    // Over HTTP/2, a body after the response to HEAD would be an error of the protocol.
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let client = client.build().unwrap();
    for _ in 0..3 {
        let response = client.head(&balancer.url).send().await.unwrap();
        assert_eq!(response.status(), 503);
        assert_eq!(response.text().await.unwrap(), "");
    }
}

/// Whoever looks for errors in the log is not to find what clients do wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_of_a_further_request_is_no_error_in_the_log() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_idle_ms: 700 }";
    let balancer = in_front_of(&backend, "further", fields).await;
    let post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc";
    let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    for more in ["\r\n", "GET /2 HT"] {
        for request in [post, get] {
            for leaves in [true, false] {
                let mut client = Raw::to(&balancer).await;
                client.send(format!("{request}{more}").as_bytes()).await;
                assert_eq!(status(&client.response().await), "200");
                match leaves {
                    true => drop(client),
                    false => assert_eq!(client.rest().await, "", "{more:?}"),
                }
            }
        }
    }
    until("they are all gone", async || {
        balancer.open_connections() == 0
    })
    .await;
    let log = balancer.log_text();
    assert!(!log.contains("ERROR"), "{log}");
}

/// A client that has vanished says nothing, for as long as a tunnel may be silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_looked_for_and_all_descriptors_are_used() {
    let (etcd, group) = (Etcd::shared(), group("alive"));
    let backend = RawBackend::start(ok).await;
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let limits = ["prlimit", "--nofile=600:5000"];
    let balancer = Setup::shared(&group).starter(&limits).listening().await;
    let mut client = Raw::to(&balancer).await;
    assert_eq!(status(&client.get("").await), "200");
    let port: u16 = balancer.listen.rsplit_once(':').unwrap().1.parse().unwrap();
    let local = format!(":{port:04X}");
    // The third field from the end of the addresses: 02 is the timer of keep-alive.
    let is_looked_for = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        table.lines().any(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields[1].ends_with(&local) && fields[3] == "01" && fields[5].starts_with("02:")
        })
    };
    until("a timer runs for it", async || is_looked_for()).await;
    let pid = balancer.program.child.id();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = files.unwrap().split_whitespace().nth(3).unwrap();
    assert_eq!(soft, "5000", "{limits}");
    assert!(!balancer.log_text().contains("few connections"));
}

/// The limits of a head are the same ones over HTTP/2, and who is beyond them is told and counted in the same way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_of_http_2_that_is_too_large_gets_431() {
    let backend = RawBackend::start(ok).await;
    for (name, fields, count, length, expected) in [
        ("h2-few", "", 100, 10, 200),
        ("h2-many", "", 200, 10, 431),
        ("h2-long", "", 100, 800, 431),
        (
            "h2-allowed",
            "clients: { head_bytes: 200000, headers: 250 }",
            240,
            500,
            200,
        ),
    ] {
        let balancer = in_front_of(&backend, name, fields).await;
        let mut request = http::Request::get("http://a/");
        for number in 0..count {
            request = request.header(format!("x-{number}"), "x".repeat(length));
        }
        let request = request.body(()).unwrap();
        let (response, _) = http_2(&balancer).await.send_request(request, true).unwrap();
        assert_eq!(response.await.unwrap().status(), expected, "{name}");
    }
}
