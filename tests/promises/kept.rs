//! Connections to backends, as the backends see them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::{DEADLINE, group, local};
use super::raw::{Raw, RawBackend, in_front_of, is_closed_within, ok, read_message, status};
use super::tls::OverTls;
use super::world::{Balancer, Setup, entry, put, until};

/// A balancer with these fields in front of a backend at this port.
async fn in_front_of_port(port: u16, name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(port), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let balancer = Setup::shared(&group).with(fields).start();
    until("it serves", async || balancer.get().await == "a").await;
    balancer
}

/// After each response the next request either comes on the same connection, or on another one, whatever the response is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_used_again_exactly_if_both_messages_are_complete_and_nobody_ends_it() {
    let backend = RawBackend::start(|request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (name, _) = path.trim_start_matches('/').split_once('?').unwrap_or((path, ""));
        let response = match name {
            "length" => "200 OK\r\nContent-Length: 3\r\n\r\nok\n",
            "empty" => "200 OK\r\nContent-Length: 0\r\n\r\n",
            "chunked" => "200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok\n\r\n0\r\n\r\n",
            "trailers" => {
                "200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok\n\r\n0\r\nx-a: 1\r\n\r\n"
            }
            "204" => "204 No Content\r\n\r\n",
            "304" => "304 Not Modified\r\nContent-Length: 10\r\n\r\n",
            "head" => "200 OK\r\nContent-Length: 10\r\n\r\n",
            "error" => "500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno",
            "interim" => {
                "103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
            }
            "close" => "200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
            "more" => "200 OK\r\nContent-Length: 2\r\n\r\nok and more",
            "two" => {
                "200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
            }
            _ => return ok(request),
        };
        format!("HTTP/1.1 {response}").into_bytes()
    })
    .await;
    let balancer = in_front_of(&backend, "kept", "").await;
    let post = "Content-Length: 4\r\n\r\nbody";
    for (method, path, is_kept) in [
        ("GET", "length", true),
        ("GET", "empty", true),
        ("GET", "chunked", true),
        ("GET", "trailers", true),
        ("GET", "204", true),
        ("GET", "304", true),
        ("HEAD", "head", true),
        ("GET", "error", true),
        ("GET", "interim", true),
        ("POST", "length", true),
        ("POST", "chunked", true),
        ("GET", "close", false),
        ("POST", "close", false),
        ("GET", "more", false),
        ("GET", "two", false),
        ("HEAD", "more", false),
    ] {
        // The one that it begins with may be new.
        let fresh = |number: usize| {
            let rest = match method {
                "POST" => post,
                _ => "\r\n",
            };
            let end = "Host: a\r\nConnection: close\r\n";
            format!("{method} /{path}?{number} HTTP/1.1\r\n{end}{rest}")
        };
        let mut before = backend.connections();
        for number in 0..4 {
            let mut client = Raw::to(&balancer).await;
            client.send(fresh(number).as_bytes()).await;
            let response = client.rest().await;
            let expected = ["200", "204", "304", "500", "103"];
            assert!(expected.contains(&status(&response)), "{path}: {response}");
            assert!(
                !response.contains("evil") && !response.contains("more"),
                "{response}"
            );
            let now = backend.connections();
            if number > 0 {
                assert_eq!(
                    now - before == 0,
                    is_kept,
                    "{method} {path}, request {number}"
                );
            }
            before = now;
        }
    }
}

/// Answers requests, whose bodies have four bytes, one by one, and notes how much of each body its first read brings.
async fn answer(mut stream: TcpStream, firsts: &Mutex<Vec<usize>>) -> std::io::Result<()> {
    let mut read = vec![0; 65_536];
    loop {
        let first = stream.read(&mut read).await?;
        if first == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&read[..first]).into_owned();
        if text.starts_with("POST") {
            let head = text.find("\r\n\r\n").map_or(first, |end| end + 4);
            firsts.lock().unwrap().push(first - head);
            if head == first {
                stream.read_exact(&mut read[..4]).await?;
            }
        }
        stream.write_all(&ok(&text)).await?;
    }
}

/// A body that is there with its head goes on with it: one packet, one system call. Where it comes later, nothing waits for
/// it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_and_the_body_that_came_with_it_reach_the_backend_together() {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let firsts = Arc::new(Mutex::new(Vec::new()));
    let noted = firsts.clone();
    let _serving = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let noted = noted.clone();
            connections.spawn(async move { answer(stream, &noted).await });
        }
    });
    let balancer = in_front_of_port(port, "together", "").await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n";
    let mut client = Raw::to(&balancer).await;
    for _ in 0..20 {
        client.send(format!("{head}body").as_bytes()).await;
        assert_eq!(status(&client.response().await), "200");
    }
    assert_eq!(*firsts.lock().unwrap(), [4; 20]);
    // The head is there before its body.
    client.send(head.as_bytes()).await;
    until("the head arrives", async || {
        firsts.lock().unwrap().len() == 21
    })
    .await;
    client.send(b"body").await;
    assert_eq!(status(&client.response().await), "200");
    assert_eq!(firsts.lock().unwrap()[20], 0);
}

/// Nobody uses an idle connection that its backend has closed, so that the proxy's side is closed soon, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_that_the_backend_has_closed_are_not_left_half_open() {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let fields = "timeouts: { pool_idle_ms: 60000 }";
    let (last, mut of_last) = tokio::sync::mpsc::channel(1);
    let _serving = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let last = last.clone();
            connections.spawn(async move {
                let mut read = [0; 4_096];
                while let Ok(count @ 1..) = stream.read(&mut read).await {
                    let text = String::from_utf8_lossy(&read[..count]).into_owned();
                    stream.write_all(&ok(&text)).await.unwrap();
                    if text.contains("/last") {
                        last.send(stream).await.unwrap();
                        return;
                    }
                }
            });
        }
    });
    let balancer = in_front_of_port(port, "half-open", fields).await;
    let mut client = Raw::to(&balancer).await;
    client.send(b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(status(&client.response().await), "200");
    let mut backend = of_last.recv().await.unwrap();
    backend.shutdown().await.unwrap();
    assert!(is_closed_within(&mut backend, Duration::from_secs(5)).await);
}

/// The time of a silent backend begins with the last part of a request that it has got.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_may_take_longer_than_a_backend_may_be_silent() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { response_ms: 2000, client_body_ms: 5000 }";
    let balancer = in_front_of(&backend, "slow-upload", fields).await;
    for framing in ["Content-Length: 20", "Transfer-Encoding: chunked"] {
        let is_chunked = framing.contains("chunked");
        let mut client = Raw::to(&balancer).await;
        let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
        client.send(head.as_bytes()).await;
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            client
                .send(if is_chunked { b"1\r\nx\r\n" } else { b"x" })
                .await;
        }
        if is_chunked {
            client.send(b"0\r\n\r\n").await;
        }
        assert_eq!(status(&client.response().await), "200", "{framing}");
    }
}

/// A tunnel ends after a time without a byte in either direction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_lives_while_one_side_writes() {
    let backend = RawBackend::start(|request| match request.contains("upgrade: websocket") {
        true => {
            let fields = "Connection: Upgrade\r\nUpgrade: websocket";
            format!("HTTP/1.1 101 Switching Protocols\r\n{fields}\r\n\r\n").into_bytes()
        }
        false => ok(request),
    })
    .await;
    let balancer = in_front_of(&backend, "one-way", "timeouts: { tunnel_ms: 2000 }").await;
    let mut client = Raw::to(&balancer).await;
    let fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                  Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    assert_eq!(status(&client.get(fields).await), "101");
    for _ in 0..20 {
        client.send(b"a frame").await;
        assert!(!is_closed_within(&mut client.0, Duration::from_millis(250)).await);
    }
    assert!(is_closed_within(&mut client.0, DEADLINE).await);
}

/// A backend that says nothing of it, and ends a connection shortly after its response.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_does_not_go_over_a_connection_that_its_backend_has_ended() {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (posts, open) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(AtomicUsize::new(0)),
    );
    let (recorded, counter) = (posts.clone(), open.clone());
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let (recorded, counter) = (recorded.clone(), counter.clone());
            counter.fetch_add(1, Ordering::Relaxed);
            connections.spawn(async move {
                let pause = Duration::from_millis(5);
                let mut is_first = true;
                // The first one may be long in coming.
                while let Some(request) = match is_first {
                    true => read_message(&mut stream).await,
                    false => tokio::time::timeout(pause, read_message(&mut stream))
                        .await
                        .unwrap_or_default(),
                } {
                    is_first = false;
                    if request.starts_with("P") {
                        recorded.lock().unwrap().push(request);
                    }
                    if stream.write_all(&ok("")).await.is_err() {
                        break;
                    }
                }
                drop(stream);
                counter.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    let tls = OverTls::to(port).await;
    let over_tls = format!(
        "retries: 0\nbackends: {{ protocol: https, {} }}",
        tls.fields
    );
    for (name, port, fields) in [
        ("ended", port, "retries: 0"),
        ("ended-tls", tls.port, &over_tls),
    ] {
        let balancer = in_front_of_port(port, name, fields).await;
        let has_ended = || open.load(Ordering::Relaxed) == 0 && !is_connected_to(port);
        post_after_end(&balancer, has_ended, &posts).await;
    }
}

/// Whether somebody has a connection to this port whose end has not arrived.
fn is_connected_to(port: u16) -> bool {
    let port = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // 01 is an established connection.
        fields[2].ends_with(&port) && fields[3] == "01"
    })
}

async fn post_after_end(
    balancer: &Balancer,
    has_ended: impl Fn() -> bool,
    posts: &Mutex<Vec<String>>,
) {
    let mut client = Raw::to(balancer).await;
    for (number, method) in ["POST", "PUT", "PATCH"].repeat(5).iter().enumerate() {
        until("the end has arrived", async || has_ended()).await;
        let head =
            format!("{method} /{number} HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody");
        client.send(head.as_bytes()).await;
        let response = client.response().await;
        assert_eq!(status(&response), "200", "{number}: {response}");
    }
    let posts = std::mem::take(&mut *posts.lock().unwrap());
    assert_eq!(posts.len(), 15, "each of them once: {posts:?}");
    let log = balancer.log_text();
    assert!(!log.contains("a backend fails"), "{log}");
}

/// A process that takes over an address of another one has its own connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_run_of_a_node_gets_no_connections_of_the_former_one() {
    let backend = RawBackend::start(ok).await;
    let (etcd, group) = (Etcd::shared(), group("runs"));
    let mut keys = etcd.raw_client().await;
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut keys, &group, &entry, None).await;
    let balancer = Setup::shared(&group)
        .with("timeouts: { pool_idle_ms: 60000 }")
        .start();
    until("it serves", async || balancer.get().await == "a").await;
    assert_eq!(balancer.get().await, "a");
    let before = backend.connections();
    assert_eq!(balancer.get().await, "a");
    assert_eq!(backend.connections(), before, "it is used again");
    super::world::delete(&mut keys, &group, "a").await;
    until("nobody is left", async || balancer.get().await == "503").await;
    put(&mut keys, &group, &entry, None).await;
    until("it serves again", async || balancer.get().await == "a").await;
    assert_eq!(backend.connections(), before + 1);
}
