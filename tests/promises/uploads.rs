//! How long requests take that are long, at backends of HTTP/2 and of HTTP/1.

use std::time::{Duration, Instant};

use super::common::etcd::Etcd;
use super::common::load::client;
use super::common::{free_port, group};
use super::echo::{EchoClient, EchoServer};
use super::raw::{
    Raw, RawBackend, http_2, http_2_backend, in_front_of, in_front_of_http_2, ok, read_head, status,
};
use super::world::{Balancer, Setup, entry, put, scratch, until};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);
const PART: Duration = Duration::from_millis(100);

/// Sends a body of so many parts, one after the other, in a request of HTTP/1: its response, and how long it took after
/// the last part.
async fn uploads(balancer: &Balancer, path: &str, parts: usize) -> (String, Duration) {
    let mut client = Raw::to(balancer).await;
    let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {parts}\r\n\r\n");
    client.send(head.as_bytes()).await;
    for _ in 0..parts {
        tokio::time::sleep(PART).await;
        client.send(b"x").await;
    }
    let sent = Instant::now();
    (status(&client.response().await).to_owned(), sent.elapsed())
}

/// The same over HTTP/2.
async fn uploads_over_2(balancer: &Balancer, path: &str, parts: usize) -> (u16, Duration) {
    let mut sender = http_2(balancer).await;
    let request = http::Request::post(format!("http://a{path}")).body(());
    let (response, mut body) = sender.send_request(request.unwrap(), false).unwrap();
    for part in 1..=parts {
        tokio::time::sleep(PART).await;
        body.send_data("x".into(), part == parts).unwrap();
    }
    let sent = Instant::now();
    (response.await.unwrap().status().as_u16(), sent.elapsed())
}

/// In one thread, so that a head and the body that follows it leave together: 5 ms later it would be a stream.
#[tokio::test]
async fn an_upload_to_a_backend_of_http_2_may_take_longer_than_a_response() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let fields = "timeouts: { response_ms: 1000 }\nretries: 0";
    let balancer = in_front_of_http_2(port, "h2-uploads", fields).await;
    // Both for three times as long.
    let (over_1, over_2) = tokio::join!(
        uploads(&balancer, "/", 30),
        uploads_over_2(&balancer, "/", 30)
    );
    assert_eq!((&*over_1.0, over_2.0), ("200", 200));
    // A backend that hangs then has its time, and no more.
    let (code, took) = uploads(&balancer, "/hangs", 15).await;
    assert_eq!(code, "504");
    assert!(took > SECOND / 2 && took < 4 * SECOND, "{took:?}");
    // So has one that hangs with what is complete at once, as most calls are.
    let mut sender = http_2(&balancer).await;
    for has_body in [false, true] {
        sender = sender.ready().await.unwrap();
        let start = Instant::now();
        let request = http::Request::post("http://a/hangs").body(()).unwrap();
        let (response, mut body) = sender.send_request(request, !has_body).unwrap();
        if has_body {
            body.send_data("all".into(), true).unwrap();
        }
        let response = tokio::time::timeout(20 * SECOND, response).await;
        assert_eq!(response.unwrap().unwrap().status(), 504);
        let took = start.elapsed();
        assert!(took < 4 * SECOND, "{took:?}");
    }
    let text = "x".repeat(40_000);
    let mut client = Raw::to(&balancer).await;
    let head = format!(
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
        text.len()
    );
    client.send((head + &text).as_bytes()).await;
    assert_eq!(status(&client.response().await), "200");
}

/// What is read of a request to find out whether it is complete has to arrive, once and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_arrive_whole_at_backends_of_http_2() {
    let server = EchoServer::start("s").await;
    let balancer = in_front_of_http_2(server.address.port(), "h2-bodies", "").await;
    let mut echo = EchoClient::to(&balancer.url).await;
    for length in [
        0, 1, 1_000, 16_000, 16_384, 40_000, 49_152, 65_536, 70_000, 1_000_000,
    ] {
        let text: String = (0..length)
            .map(|at| char::from(b'a' + (at % 23) as u8))
            .collect();
        let answer = echo.call(&text).await.unwrap();
        assert!(answer == format!("s: {text}"), "{length}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_grpc_may_be_silent_for_longer_than_a_response() {
    let server = EchoServer::start("s").await;
    let fields = "timeouts: { response_ms: 500 }";
    let balancer = in_front_of_http_2(server.address.port(), "h2-streams", fields).await;
    let mut echo = EchoClient::to(&balancer.url).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let opening = echo.stream(messages);
    // Before the first message, and between two.
    let opened = async {
        tokio::time::sleep(2 * SECOND).await;
        sender.send("one".to_owned()).await.unwrap();
    };
    let (answers, ()) = tokio::join!(opening, opened);
    let mut answers = answers.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap(), "s: one");
    tokio::time::sleep(2 * SECOND).await;
    sender.send("two".to_owned()).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap(), "s: two");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expectation_for_a_backend_of_http_2_is_answered_here() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let balancer = in_front_of_http_2(port, "h2-expect", "timeouts: { response_ms: 2000 }").await;
    let mut client = Raw::to(&balancer).await;
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    // The connection goes on.
    for _ in 0..2 {
        client.send(head).await;
        let interim = read_head(&mut client.0).await.unwrap();
        assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
        client.send(b"body").await;
        let response = client.response().await;
        assert_eq!(status(&response), "200", "{response}");
    }
}

/// Pingora would end it with the interim response.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_keeps_its_connection_after_an_interim_response() {
    let backend = RawBackend::start_early(|request| match request.contains("\r\n\r\n") {
        true if request.starts_with("POST") => b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(),
        // The body, which ends as a head does.
        _ => ok(request),
    })
    .await;
    let balancer = in_front_of(&backend, "interim", "").await;
    let mut client = Raw::to(&balancer).await;
    for _ in 0..3 {
        let head =
            "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n";
        client.send(head.as_bytes()).await;
        let interim = read_head(&mut client.0).await.unwrap();
        assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
        client.send(b"body\r\n\r\n").await;
        let response = client.response().await;
        assert_eq!(status(&response), "200", "{response}");
        assert!(
            !response.to_ascii_lowercase().contains("connection: close"),
            "{response}"
        );
    }
}

/// With each of them Pingora would give up the connection that all calls share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_wait_for_milliseconds_cost_nobody_the_connection() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let admin = format!("127.0.0.1:{}", free_port());
    let fields = format!("admin: {{ listen: '{admin}' }}\nretries: 0");
    let balancer = in_front_of_http_2(port, "h2-impatient", &fields).await;
    let connected = async || {
        let text = client().get(format!("http://{admin}/metrics")).send().await;
        let text = text.unwrap().text().await.unwrap();
        let name = format!(
            "pingora_etcd_backend_connections_total{{group=\"{}\"}} ",
            balancer.group
        );
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.unwrap().parse::<f64>().unwrap()
    };
    let first = connected().await;
    let mut sender = http_2(&balancer).await;
    for _ in 0..20 {
        sender = sender.ready().await.unwrap();
        let request = http::Request::post("http://a/hangs")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", "30m");
        let sent = sender.send_request(request.body(()).unwrap(), false);
        let (response, mut body) = sent.unwrap();
        body.send_data("call".into(), true).unwrap();
        let late = tokio::time::timeout(Duration::from_millis(30), response).await;
        assert!(late.is_err(), "{late:?}");
        body.send_reset(h2::Reason::CANCEL);
        assert_eq!(balancer.get().await, "a");
    }
    let more = connected().await - first;
    assert!(more < 2.0, "{more} more connections");

    // A client that does not end its call itself: its time is kept here.
    for (said, least, most) in [("100m", 0.4, 3.0), ("1500m", 1.4, 4.0)] {
        let mut sender = http_2(&balancer).await;
        let request = http::Request::post("http://a/hangs")
            .header("content-type", "application/grpc")
            .header("grpc-timeout", said);
        let start = Instant::now();
        let (response, mut body) = sender
            .send_request(request.body(()).unwrap(), false)
            .unwrap();
        body.send_data("call".into(), true).unwrap();
        let response = response.await.unwrap();
        let took = start.elapsed().as_secs_f64();
        assert_eq!(response.headers()["grpc-status"], "4", "{response:?}");
        assert!(took > least && took < most, "{said}: {took}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_latency_of_a_backend_begins_with_the_last_byte_and_an_early_answer_counts() {
    let (etcd, group) = (Etcd::shared(), group("last-byte"));
    let late = RawBackend::start_early(|request| match request.contains("/early") {
        true => b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n".to_vec(),
        false => ok(request),
    })
    .await;
    let slow = RawBackend::start(ok).await;
    let mut keys = etcd.raw_client().await;
    put(
        &mut keys,
        &group,
        &entry("slow", Some(slow.address.port()), json!({})),
        None,
    )
    .await;
    let file = scratch(&format!("{group}.access"));
    let fields = format!("access_log: {{ file: {} }}\nretries: 0", file.display());
    let setup = Setup::shared(&group).with(&fields);
    let balancer = setup.server("grace_period_seconds: 20").listening().await;
    let line = async |count: usize| -> Value {
        let lines = || std::fs::read_to_string(&file).unwrap_or_default();
        until("the line is there", async || {
            lines().lines().count() >= count
        })
        .await;
        serde_json::from_str(lines().lines().nth(count - 1).unwrap()).unwrap()
    };
    let (code, _) = uploads(&balancer, "/", 12).await;
    assert_eq!(code, "200");
    let written = line(1).await;
    let (duration, upstream) = (&written["duration_ms"], &written["upstream_ms"]);
    assert!(duration.as_f64().unwrap() > 1_150.0, "{written}");
    assert!(upstream.as_f64().unwrap() < 1_000.0, "{written}");

    // Who leaves with its answer has not made it another one.
    put(
        &mut keys,
        &group,
        &entry("slow", Some(late.address.port()), json!({})),
        None,
    )
    .await;
    until("the other one is there", async || {
        balancer.get().await == "503" || !late.requests().is_empty()
    })
    .await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nsome")
        .await;
    assert_eq!(status(&client.response().await), "503");
    drop(client);
    let early = || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let mut lines = text.lines().map(str::to_owned);
        lines.find(|line| line.contains("/early"))
    };
    until("the line is there", async || early().is_some()).await;
    let written: Value = serde_json::from_str(&early().unwrap()).unwrap();
    assert_eq!(written["outcome"], "failed", "{written}");
    let _ = std::fs::remove_file(&file);
}

/// Pingora connects to a backend before it refuses them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_connection_may_not_name_costs_no_connection_to_a_backend() {
    let closing =
        |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
    let backend = RawBackend::start(closing).await;
    let balancer = in_front_of(&backend, "nominations", "").await;
    let before = backend.connections();
    let many = (0..12)
        .map(|at| format!("x-{at}"))
        .collect::<Vec<_>>()
        .join(",");
    for (value, expected) in [
        ("host", "400"),
        ("close, X-Forwarded-For", "400"),
        ("b@d", "400"),
        (&many, "400"),
        ("keep-alive, x-mine", "200"),
        ("close", "200"),
    ] {
        let mut client = Raw::to(&balancer).await;
        let response = client.get(&format!("Connection: {value}\r\n")).await;
        assert_eq!(status(&response), expected, "{value}");
    }
    assert_eq!(backend.connections() - before, 2);
    // Pingora would take the chunks off, and the name of the coding within with them.
    let mut client = Raw::to(&balancer).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    client.send(head.as_bytes()).await;
    assert_eq!(status(&client.rest().await), "501");
}
