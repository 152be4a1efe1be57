//! Attacks, with numbers: what a client costs that sends slowly, does not read, does nothing, or resets.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::common::etcd::Etcd;
use super::common::{free_port, group, local};
use super::raw::{Raw, RawBackend, http_2_backend, in_front_of, ok, read_head, status};
use super::world::{Balancer, Setup, entry, put, until};

const SECOND: Duration = Duration::from_secs(1);

/// Resident memory, in KiB.
fn memory(balancer: &Balancer) -> u64 {
    let file = format!("/proc/{}/status", balancer.program.child.id());
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

/// How long a request of somebody else takes meanwhile.
async fn others(balancer: &Balancer) -> Duration {
    let start = Instant::now();
    let mut client = Raw::to(balancer).await;
    assert_eq!(status(&client.get("").await), "200");
    start.elapsed()
}

async fn connections(balancer: &Balancer, count: usize) -> Vec<Raw> {
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        clients.push(Raw::to(balancer).await);
    }
    clients
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_slow_heads_cost_nobody_else_and_are_cut() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(
        &backend,
        "slow-heads",
        "timeouts: { client_header_ms: 15000 }",
    )
    .await;
    let before = memory(&balancer);
    let start = Instant::now();
    let mut clients = connections(&balancer, 2_000).await;
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nX: ";
    for byte in 0..6 {
        for client in &mut clients {
            client.send(&request[byte..=byte]).await;
        }
        let took = others(&balancer).await;
        assert!(took < 3 * SECOND, "{took:?}");
    }
    println!(
        "2,000 slow heads: {} KiB more",
        memory(&balancer).saturating_sub(before)
    );
    for client in clients {
        let mut client = client;
        assert_eq!(status(&client.rest().await), "408");
    }
    let took = start.elapsed();
    assert!(took < 45 * SECOND, "{took:?}");
    assert_eq!(
        backend
            .requests()
            .iter()
            .filter(|request| request.contains("X:"))
            .count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_that_never_read_are_given_up_with_their_backends() {
    // A large response in parts, so that this test needs no memory for it.
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let open = Arc::new(AtomicUsize::new(0));
    let counter = open.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counter = counter.clone();
            counter.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                serve_large(stream).await;
                counter.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    let (etcd, group) = (Etcd::shared(), group("never-read"));
    let entry = entry("a", Some(port), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let setup =
        Setup::shared(&group).with("timeouts: { client_write_ms: 2000, pool_idle_ms: 1000, client_idle_ms: 2000, connect_ms: 30000 }");
    let balancer = setup.serving().await;
    let mut clients = connections(&balancer, 500).await;
    for client in &mut clients {
        client.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
    }
    let took = others(&balancer).await;
    assert!(took < 20 * SECOND, "{took:?}");
    println!("500 that do not read: {} KiB", memory(&balancer));
    until("their backends are free", async || {
        open.load(Ordering::Relaxed) == 0
    })
    .await;
    for client in &mut clients {
        assert!(ends(client).await);
    }
}

/// Answers with ten megabytes, or less if nobody reads it.
async fn serve_large(mut stream: TcpStream) {
    while let Some(request) = read_head(&mut stream).await {
        if !request.contains("/large") {
            let _ = stream.write_all(&ok("")).await;
            continue;
        }
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 10240000\r\n\r\n";
        let _ = stream.write_all(head).await;
        let part = vec![b'x'; 64_000];
        for _ in 0..160 {
            if stream.write_all(&part).await.is_err() {
                return;
            }
        }
    }
}

/// Whether a connection ends, behind what is in its buffers.
async fn ends(client: &mut Raw) -> bool {
    let mut buffer = vec![0; 65_536];
    let reading = async { while matches!(client.0.read(&mut buffer).await, Ok(1..)) {} };
    tokio::time::timeout(25 * SECOND, reading).await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_cost_memory_that_is_known_and_end() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_idle_ms: 20000, client_header_ms: 60000 }";
    let balancer = in_front_of(&backend, "idle-many", fields).await;
    let before = memory(&balancer);
    // As many as the descriptors of this process allow, up to 10,000. Half of them are for tests beside this one.
    let count = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let count = usize::try_from(count.unwrap_or(21_000)).unwrap();
    let count = count.min(21_000) / 2 - 500;
    let mut clients = connections(&balancer, count).await;
    // A hundred at a time: the backend's ends of thousands more would take what is left of the descriptors, and tests that
    // run beside this one could not connect.
    for portion in clients.chunks_mut(100) {
        for client in &mut *portion {
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        }
        for client in portion {
            assert_eq!(status(&client.response().await), "200");
        }
    }
    let each = memory(&balancer).saturating_sub(before) * 1_024 / clients.len() as u64;
    println!("{} idle connections: {each} bytes each", clients.len());
    // Pingora's buffer for reading is 64 KiB, of which only touched pages count.
    assert!(each < 100_000, "{each}");
    for client in &mut clients {
        assert_eq!(client.rest().await, "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_resets_over_http_2_ends_its_connection_only() {
    let backend = RawBackend::start_slow(SECOND).await;
    let balancer = in_front_of(&backend, "resets", "").await;
    let stream = tokio::net::TcpStream::connect(&balancer.listen)
        .await
        .unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driving =
        tokio::spawn(async move { connection.await.err().map(|error| error.to_string()) });
    let start = Instant::now();
    let mut sent = 0;
    let mut sender = sender;
    while start.elapsed() < 10 * SECOND && !driving.is_finished() {
        let Ok(mut ready) = sender.clone().ready().await else {
            break;
        };
        let request = http::Request::get("http://a/").body(()).unwrap();
        let Ok((response, mut body)) = ready.send_request(request, true) else {
            break;
        };
        body.send_reset(h2::Reason::CANCEL);
        drop(response);
        sent += 1;
        if sent % 50 == 0 {
            tokio::task::yield_now().await;
        }
        sender = ready;
    }
    println!(
        "{sent} resets in {:?}: {:?}",
        start.elapsed(),
        driving.is_finished()
    );
    let took = others(&balancer).await;
    assert!(took < 3 * SECOND, "{took:?}");
    // Most of them have never reached the backend.
    let reached = backend.requests().len();
    assert!(reached < 1_000 + sent / 10, "{reached} of {sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_bodies_over_http_2_that_do_not_go_on_end() {
    let backend = RawBackend::start(ok).await;
    let times = "timeouts: { response_ms: 1000, client_idle_ms: 1000, client_header_ms: 1000 }";
    let balancer = in_front_of(&backend, "h2-stalls", times).await;
    let connect = || tokio::net::TcpStream::connect(&balancer.listen);
    let (sender, connection) = h2::client::handshake(connect().await.unwrap())
        .await
        .unwrap();
    let driving = tokio::spawn(connection);
    let mut ready = sender.ready().await.unwrap();
    let request = http::Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = ready.send_request(request, false).unwrap();
    body.send_data("a part".into(), false).unwrap();
    let start = Instant::now();
    let response = response.await.unwrap();
    // The client's fault: its backend had to wait.
    assert_eq!(response.status(), 408);
    assert!(start.elapsed() < 5 * SECOND, "{:?}", start.elapsed());
    let log = balancer.log_text();
    assert!(!log.contains("ERROR"), "{log}");
    // Without requests the connection ends, although the client keeps it.
    drop((body, response));
    assert!(tokio::time::timeout(5 * SECOND, driving).await.is_ok());
    drop(ready);
    // SETTINGS, and the first part of a head that CONTINUATION would have to complete.
    let mut client = connect().await.unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    client.write_all(preface).await.unwrap();
    let head = b"\0\0\x03\x01\0\0\0\0\x01\x82\x86\x84";
    client.write_all(head).await.unwrap();
    // Whatever the proxy sends before.
    let mut received = Vec::new();
    let reading = client.read_to_end(&mut received);
    assert!(tokio::time::timeout(5 * SECOND, reading).await.is_ok());
}

/// Frames are written, and then wait for the client, without anything that the connection below would notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_http_2_whose_client_gives_no_room_are_given_up() {
    let large = |_: &str| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n";
        [&head[..], &vec![b'x'; 1_000_000]].concat()
    };
    let backend = RawBackend::start(large).await;
    let fields = "timeouts: { client_write_ms: 1000, client_idle_ms: 60000 }";
    let balancer = in_front_of(&backend, "no-room", fields).await;
    let stream = tokio::net::TcpStream::connect(&balancer.listen).await;
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(0)
        .max_concurrent_reset_streams(0);
    let (mut sender, connection) = builder
        .handshake::<_, bytes::Bytes>(stream.unwrap())
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..50 {
        sender = sender.ready().await.unwrap();
        let request = http::Request::get("http://a/").body(()).unwrap();
        let (response, _) = sender.send_request(request, true).unwrap();
        streams.spawn(async move {
            let mut body = response.await.unwrap().into_body();
            let start = Instant::now();
            // A part that came before the window was known does not matter.
            while let Some(Ok(_)) = body.data().await {}
            (start.elapsed(), body.is_end_stream())
        });
    }
    let ends = tokio::time::timeout(20 * SECOND, streams.join_all()).await;
    for (took, is_whole) in ends.expect("all streams end") {
        assert!(took < 10 * SECOND && !is_whole, "{took:?}");
    }
    let took = others(&balancer).await;
    assert!(took < 3 * SECOND, "{took:?}");
}

/// Each would be a wake-up in vain, again and again: a program without a free descriptor cannot accept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_descriptors_are_no_busy_loop_and_it_recovers() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "few-descriptors", "").await;
    let pid = balancer.program.child.id().to_string();
    let set = std::process::Command::new("prlimit")
        .args(["--pid", &pid, "--nofile=256:4096"])
        .status();
    assert!(set.unwrap().success());
    let clients = connections(&balancer, 300).await;
    until("no descriptor is left", async || {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        open.count() >= 256
    })
    .await;
    let before = balancer.cpu();
    tokio::time::sleep(3 * SECOND).await;
    let used = balancer.cpu() - before;
    assert!(used < SECOND / 2, "{used:?} in 3 s");
    let lines = balancer.log_text().lines().count();
    assert!(lines < 200, "{lines} lines in the log");
    drop(clients);
    until("it serves again", async || balancer.get().await == "a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_front_answers_by_itself_is_counted() {
    let backend = RawBackend::start(ok).await;
    let admin = format!("{}:{}", local(), free_port());
    let fields = format!(
        "admin: {{ listen: '{admin}' }}\ntimeouts: {{ client_header_ms: 700 }}\n\
         clients: {{ head_bytes: 4096, headers: 20 }}"
    );
    let balancer = in_front_of(&backend, "counted", &fields).await;
    until("the metrics are there", async || {
        let answer = reqwest::get(format!("http://{admin}/metrics")).await;
        answer.is_ok()
    })
    .await;
    let counted = async |event: &str| {
        let text = reqwest::get(format!("http://{admin}/metrics"))
            .await
            .unwrap();
        let text = text.text().await.unwrap();
        let labels = format!("group=\"{}\",event=\"{event}\"", balancer.group);
        let name = format!("pingora_etcd_client_connections_total{{{labels}}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name));
        value
            .unwrap_or_else(|| panic!("{event}: {text}"))
            .parse::<f64>()
            .unwrap()
    };
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX-Long: {}\r\n\r\n",
        "x".repeat(6_000)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
        "X-Many: 1\r\n".repeat(30)
    );
    for (event, status, bytes) in [
        ("bad_request", "400", "GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
        (
            "bad_request",
            "405",
            "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        ),
        ("request_timeout", "408", "GET / HTTP/1.1\r\nHost"),
        ("head_too_large", "431", &long),
        ("head_too_large", "431", &many),
    ] {
        let before = counted(event).await;
        let mut client = Raw::to(&balancer).await;
        client.send(bytes.as_bytes()).await;
        let response = client.rest().await;
        assert_eq!(super::raw::status(&response), status, "{response:?}");
        until(event, async || counted(event).await == before + 1.0).await;
    }
}

/// One that is answered early, and of which nothing more comes, would keep its backend as long as the client likes; one
/// that goes on ends by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_request_of_http_2_after_its_response_has_a_time() {
    let early = |_: &str| b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n".to_vec();
    let backend = RawBackend::start_early(early).await;
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    for (name, port, protocol) in [
        ("h2-early", backend.address.port(), "http1"),
        // Its response is complete with its head, as an error of gRPC.
        ("h2-early-h2", port, "h2c"),
    ] {
        let (etcd, group) = (Etcd::shared(), group(name));
        let entry = entry("a", Some(port), json!({}));
        put(&mut etcd.raw_client().await, &group, &entry, None).await;
        let fields = format!(
            "timeouts: {{ client_drain_ms: 3000 }}\nbackends: {{ protocol: {protocol} }}\n\
             overload: {{ max_in_flight: 1, queue_timeout_ms: 100 }}"
        );
        let balancer = Setup::shared(&group).with(&fields).start();
        until("it serves", async || {
            ["a", "401"].contains(&&*balancer.get().await)
        })
        .await;
        what_is_left_has_a_time(&balancer).await;
    }
}

async fn what_is_left_has_a_time(balancer: &Balancer) {
    let connect = || tokio::net::TcpStream::connect(&balancer.listen);
    let is_free = async || {
        let response = Raw::to(balancer).await.get("").await;
        status(&response) != "503"
    };
    for goes_on in [true, false] {
        let (sender, connection) = h2::client::handshake(connect().await.unwrap())
            .await
            .unwrap();
        let driving = tokio::spawn(connection);
        let mut sender = sender.ready().await.unwrap();
        let request = http::Request::post("http://a/early").body(()).unwrap();
        let (response, mut body) = sender.send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), 401);
        let start = Instant::now();
        if goes_on {
            // The stream ends, and the connection does not.
            until("the stream is reset", async || {
                let sent = body.send_data("more".into(), false);
                tokio::time::sleep(Duration::from_millis(20)).await;
                sent.is_err()
            })
            .await;
            let mut sender = sender.ready().await.unwrap();
            let request = http::Request::get("http://a/").body(()).unwrap();
            let (response, _) = sender.send_request(request, true).unwrap();
            assert_ne!(response.await.unwrap().status(), 503);
            driving.abort();
        } else {
            assert!(!is_free().await, "the place is taken");
            let ended = tokio::time::timeout(9 * SECOND, driving).await;
            assert!(ended.is_ok(), "{:?}", start.elapsed());
        }
        until("the place is free again", is_free).await;
    }
    let log = balancer.log_text();
    assert!(!log.contains("ERROR"), "{log}");
}
