//! Tests of gRPC through the proxy, with tonic at both ends.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};

use super::common::etcd::Etcd;
use super::common::{free_port, group};
use super::echo::{EchoClient, EchoServer};
use super::raw::{RawBackend, ok};
use super::world::{Balancer, Setup, entry, put, scratch, until};

/// A balancer in front of servers at these ports, and a client.
async fn before(
    ports: &[u16],
    name: &str,
    metadata: Value,
    fields: &str,
) -> (Balancer, EchoClient) {
    let (etcd, group) = (Etcd::shared(), group(name));
    let mut keys = etcd.raw_client().await;
    for (index, port) in ports.iter().enumerate() {
        let more = json!({ "metadata": metadata });
        let entry = entry(&format!("n{index}"), Some(*port), more);
        put(&mut keys, &group, &entry, None).await;
    }
    let balancer = Setup::shared(&group).with(fields).serving().await;
    let client = EchoClient::to(&balancer.url).await;
    (balancer, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_streams_deadlines_and_cancellation_pass_through() {
    let server = EchoServer::start("s").await;
    let port = server.address.port();
    for (name, metadata, fields) in [
        ("grpc", Value::Null, "backends: { protocol: h2c }"),
        (
            "grpc-node",
            json!({ "protocol": "h2c" }),
            "backends: { protocol_of_node: true }",
        ),
    ] {
        let (_balancer, mut client) = before(&[port], name, metadata, fields).await;
        assert_eq!(client.call("one").await.unwrap(), "s: one");
        // Each message is answered before the next one is sent.
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let mut answers = client.stream(ReceiverStream::new(receiver)).await.unwrap();
        for index in 0..20 {
            sender.send(index.to_string()).await.unwrap();
            let answer = answers.message().await.unwrap();
            assert_eq!(answer.unwrap(), format!("s: {index}"));
        }
        // The status of a stream is in its trailers.
        sender.send("fail 9".to_owned()).await.unwrap();
        let status = answers.message().await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::FailedPrecondition, "as asked")
        );
        // That of a call that fails at once is in the head.
        let mut request = Request::new(String::new());
        request.metadata_mut().insert("fail", "5".parse().unwrap());
        assert_eq!(
            client.send(request).await.unwrap_err().code(),
            Code::NotFound
        );
        drop((sender, answers));

        // The server's own deadline, and a client that gives up: the call ends at the server.
        let start = Instant::now();
        let late = client.call_within("wait", Duration::from_millis(300)).await;
        let code = late.unwrap_err().code();
        assert!(
            [Code::DeadlineExceeded, Code::Cancelled].contains(&code),
            "{code:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        sender.send("one".to_owned()).await.unwrap();
        let mut answers = client.stream(ReceiverStream::new(receiver)).await.unwrap();
        answers.message().await.unwrap();
        assert!(server.open() >= 1);
        drop((answers, sender));
        until("the calls have ended at the server", async || {
            server.open() == 0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_share_connections_and_large_messages_pass() {
    let server = EchoServer::start("s").await;
    let fields = "backends: { protocol: h2c }";
    let port = server.address.port();
    let (_balancer, mut client) = before(&[port], "grpc-many", Value::Null, fields).await;
    let large = "x".repeat(3_000_000);
    assert_eq!(client.call(&large).await.unwrap().len(), large.len() + 3);
    let texts = tokio_stream::iter((0..500).map(|index| index.to_string()));
    let answers = client.stream(texts).await.unwrap();
    let answers: Vec<_> = answers.collect().await;
    assert_eq!(answers.len(), 500);
    assert_eq!(answers[499].as_ref().unwrap(), "s: 499");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_has_as_many_calls_at_one_time_as_is_set() {
    for (streams, connections) in [(", streams: 2", 5), ("", 1)] {
        let server = EchoServer::start("s").await;
        let fields = format!("backends: {{ protocol: h2c{streams} }}");
        let name = format!("grpc-streams-{connections}");
        let port = server.address.port();
        let (_balancer, mut client) = before(&[port], &name, Value::Null, &fields).await;
        // One after the other, because of those that begin together some may find no connection in the pool.
        let mut held = Vec::new();
        for _ in 0..10 {
            let (sender, receiver) = tokio::sync::mpsc::channel(1);
            sender.send("one".to_owned()).await.unwrap();
            let mut answers = client.stream(ReceiverStream::new(receiver)).await.unwrap();
            let answer = answers.message().await.unwrap();
            assert_eq!(answer.unwrap(), "s: one");
            held.push((sender, answers));
        }
        assert_eq!(server.open(), 10, "{fields}");
        assert_eq!(server.connections(), connections, "{fields}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_of_a_call_is_its_outcome() {
    // UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED are the backend's fault; NOT_FOUND is not.
    for (status, is_fault) in [(14, true), (8, true), (4, true), (5, false)] {
        let good = EchoServer::start("good").await;
        let bad = EchoServer::start_failing("bad", status).await;
        let ports = [good.address.port(), bad.address.port()];
        let admin = format!("127.0.0.1:{}", free_port());
        let fields = format!(
            "backends: {{ protocol: h2c }}\npolicy: adaptive\nadmin: {{ listen: '{admin}' }}"
        );
        let name = format!("grpc-status-{status}");
        let (_balancer, mut client) = before(&ports, &name, Value::Null, &fields).await;
        let mut call = async |count| {
            let start = bad.calls();
            for _ in 0..count {
                let _ = client.call("one").await;
            }
            bad.calls() - start
        };
        call(200).await;
        let of_200 = call(200).await;
        assert_eq!(of_200 < 20, is_fault, "{status}: {of_200}");
        // Over HTTP all of them have succeeded.
        let url = format!("http://{admin}/metrics");
        let text = reqwest::get(url).await.unwrap().text().await.unwrap();
        let of_status = |status: i32| {
            let label = format!("grpc_status=\"{status}\"}} ");
            let is_it = |line: &&str| {
                line.starts_with("pingora_etcd_grpc_calls_total") && line.contains(&label)
            };
            let line = text.lines().find(is_it).unwrap_or("0");
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert!(of_status(status) >= 1.0 && of_status(0) >= 100.0, "{text}");
    }
}

/// Its calls get a status of the proxy's own, and are no successes of the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_breaks_off_is_left_out() {
    let good = EchoServer::start("good").await;
    // What it says is no HTTP/2.
    let bad = RawBackend::start(ok).await;
    let ports = [good.address.port(), bad.address.port()];
    let fields = "backends: { protocol: h2c }\npolicy: adaptive\naccess_log: { file: FILE }";
    let file = scratch(&group("grpc-breaks"));
    let fields = fields.replace("FILE", file.to_str().unwrap());
    let (balancer, mut client) = before(&ports, "grpc-breaks", Value::Null, &fields).await;
    let mut call = async |count| {
        let start = bad.connections();
        for _ in 0..count {
            let _ = client.call("one").await;
        }
        bad.connections() - start
    };
    call(100).await;
    let of_200 = call(200).await;
    assert!(of_200 < 20, "{of_200}");
    assert!(balancer.log_text().contains("a backend fails"));
    let log = std::fs::read_to_string(&file).unwrap();
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let failed: Vec<_> = lines.filter(|line| line["node"] == "n1").collect();
    assert!(!failed.is_empty());
    for line in failed {
        assert!(
            line["outcome"] != "succeeded" && !line["error"].is_null(),
            "{line}"
        );
    }
    let _ = std::fs::remove_file(file);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_proxy_says_itself_is_a_status_too() {
    let nowhere = free_port();
    let fields = "backends: { protocol: h2c }";
    let (etcd, group) = (Etcd::shared(), group("grpc-none"));
    let balancer = Setup::shared(&group).with(fields).start();
    until("it answers", async || balancer.get().await == "503").await;
    let mut client = EchoClient::to(&balancer.url).await;
    let status = client.call("one").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "no backend is registered")
    );
    // Nobody listens there.
    let dead = entry("n0", Some(nowhere), json!({}));
    put(&mut etcd.raw_client().await, &group, &dead, None).await;
    until("the node is tried", async || {
        let status = client.call("one").await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        status.message() != "no backend is registered"
    })
    .await;
}
