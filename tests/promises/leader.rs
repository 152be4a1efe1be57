//! Tests of what goes to the leader, and of when it is sent once more.

use std::time::Duration;

use etcd_client::{Client, PutOptions};
use serde_json::json;

use super::common::etcd::Etcd;
use super::common::group;
use super::raw::{Raw, RawBackend, read_head, status};
use super::world::{Balancer, Setup, entry, put, until};

/// A response that names who gave it.
fn named(name: &'static str) -> impl Fn(&str) -> Vec<u8> + Send + Sync {
    move |_| {
        let length = name.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{name}").into_bytes()
    }
}

/// Registers a node under a lease of its own, and makes it a candidate.
async fn candidate(keys: &mut Client, group: &str, id: &str, backend: &RawBackend) -> String {
    let lease = keys.lease_grant(600, None).await.unwrap().id();
    let address = json!({ "ip": backend.address.ip() });
    let entry = entry(id, Some(backend.address.port()), address);
    put(keys, group, &entry, Some(lease)).await;
    let key = format!("election/{group}/{lease:x}");
    let options = PutOptions::new().with_lease(lease);
    keys.put(key.clone(), id, Some(options)).await.unwrap();
    key
}

/// Two nodes, the first of which leads, and a `leader_routing` in front of them; and the key by which
/// the first one leads.
async fn before(
    name: &str,
    backends: [&RawBackend; 2],
    fields: &str,
) -> (Balancer, Client, String) {
    let (etcd, group) = (Etcd::shared(), group(name));
    let mut keys = etcd.raw_client().await;
    let first = candidate(&mut keys, &group, "leader", backends[0]).await;
    candidate(&mut keys, &group, "other", backends[1]).await;
    let setup = Setup::shared(&group).program("leader_routing");
    let fields = format!("policy: round_robin\n{fields}");
    let balancer = setup.with(&fields).serving().await;
    balancer.until_served_by(&["leader", "other"]).await;
    (balancer, keys, first)
}

/// Who answers requests with this head, in turns that would reach everybody.
async fn served_by(balancer: &Balancer, head: &str) -> Vec<String> {
    let mut nodes = Vec::new();
    for _ in 0..6 {
        let mut client = Raw::to(balancer).await;
        client.send(format!("{head}\r\n\r\n").as_bytes()).await;
        let response = read_head(&mut client.0).await.unwrap_or_default();
        let node = response
            .lines()
            .find_map(|line| line.strip_prefix("x-upstream-node: "));
        nodes.push(node.unwrap_or(status(&response)).to_owned());
    }
    nodes.sort();
    nodes.dedup();
    nodes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_but_safe_methods_goes_to_the_leader_and_so_do_paths_and_tunnels() {
    let (leader, other) = (
        RawBackend::start(named("l")).await,
        RawBackend::start(named("o")).await,
    );
    let fields = "leader: { paths: [/admin] }";
    let (balancer, _, _) = before("leads", [&leader, &other], fields).await;
    let both = ["leader", "other"];
    for method in ["GET", "HEAD", "OPTIONS", "TRACE"] {
        let nodes = served_by(&balancer, &format!("{method} / HTTP/1.1\r\nHost: a")).await;
        assert_eq!(nodes, both, "{method}");
    }
    for method in [
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "PROPPATCH",
        "MKCOL",
        "MOVE",
        "COPY",
        "LOCK",
        "UNLOCK",
        "PURGE",
        "ACL",
        "post",
        "Delete",
        "UNKNOWN",
    ] {
        let head = format!("{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0");
        assert_eq!(served_by(&balancer, &head).await, ["leader"], "{method}");
    }
    for (path, expected) in [
        ("/admin", &both[..1]),
        ("/admin/x?y", &both[..1]),
        ("/administrator", &both),
        // As most servers read them.
        ("//admin", &both[..1]),
        ("/%61dmin", &both[..1]),
        ("/x/../admin/y", &both[..1]),
    ] {
        let nodes = served_by(&balancer, &format!("GET {path} HTTP/1.1\r\nHost: a")).await;
        assert_eq!(nodes, expected, "{path}");
    }
    let websocket = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13";
    assert_eq!(served_by(&balancer, websocket).await, ["leader"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_lead_any_more_has_the_request_sent_once_more() {
    for refusal in [
        "HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\n\r\n",
        // A token that is newer than any.
        "HTTP/1.1 409 Conflict\r\nx-leader-epoch: 9000000000000000000\r\nContent-Length: 0\r\n\r\n",
    ] {
        let refuses = move |request: &str| match request.starts_with("POST") {
            true => refusal.as_bytes().to_vec(),
            false => named("l")(request),
        };
        let (leader, other) = (
            RawBackend::start(refuses).await,
            RawBackend::start(named("o")).await,
        );
        let (balancer, mut keys, key) =
            before("resigns", [&leader, &other], "leader_wait_ms: 20000").await;
        let mut client = Raw::to(&balancer).await;
        let request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody";
        client.send(request.as_bytes()).await;
        until("the former leader has refused", async || {
            leader
                .requests()
                .iter()
                .any(|request| request.starts_with("POST"))
        })
        .await;
        keys.delete(key, None).await.unwrap();
        let response = client.response().await;
        assert_eq!(status(&response), "200", "{response}");
        assert!(response.contains("x-upstream-node: other"), "{response}");
        assert!(other.last().ends_with("\r\n\r\nbody"), "{}", other.last());
    }
    // If there is no other, the client gets what the node says, after one more try.
    let always =
        |_: &str| b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\n\r\n".to_vec();
    let (leader, other) = (
        RawBackend::start(always).await,
        RawBackend::start(named("o")).await,
    );
    let (etcd, group) = (Etcd::shared(), group("stays"));
    let mut keys = etcd.raw_client().await;
    candidate(&mut keys, &group, "leader", &leader).await;
    let entry = entry("other", Some(other.address.port()), json!({}));
    put(&mut keys, &group, &entry, None).await;
    let setup = Setup::shared(&group)
        .program("leader_routing")
        .with("leader_wait_ms: 500");
    let balancer = setup.serving().await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        .await;
    assert_eq!(status(&client.response().await), "421");
    let posts = leader
        .requests()
        .iter()
        .filter(|request| request.starts_with("POST"))
        .count();
    assert_eq!(posts, 2);
}

/// A read may go to any node, which may know that only the leader can answer it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_a_node_cannot_answer_goes_to_the_leader() {
    let refuses = |request: &str| match request.starts_with("GET /fresh") {
        true => b"HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
        false => named("o")(request),
    };
    let (leader, other) = (
        RawBackend::start(named("l")).await,
        RawBackend::start(refuses).await,
    );
    let (balancer, _, _) = before("reads", [&leader, &other], "").await;
    let served = served_by(&balancer, "GET /fresh HTTP/1.1\r\nHost: a").await;
    assert_eq!(served, ["leader"]);
    let asked = other.requests();
    assert!(asked.iter().any(|it| it.starts_with("GET /fresh")));
    // Nothing is held against the other one.
    let served = served_by(&balancer, "GET / HTTP/1.1\r\nHost: a").await;
    assert_eq!(served, ["leader", "other"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_reads_its_own_writes_for_as_long_as_is_set() {
    let (leader, other) = (
        RawBackend::start(named("l")).await,
        RawBackend::start(named("o")).await,
    );
    let fields = "leader: { read_your_writes_ms: 5000 }";
    let (balancer, _, _) = before("own-writes", [&leader, &other], fields).await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        .await;
    let response = client.response().await;
    let field = "x-leader-reads-until: ";
    let until_then = response.lines().find_map(|line| line.strip_prefix(field));
    let until_then = until_then.unwrap_or_else(|| panic!("{response}"));
    let head = format!("GET / HTTP/1.1\r\nHost: a\r\n{field}{until_then}");
    assert_eq!(served_by(&balancer, &head).await, ["leader"]);
    // Another balancer has said it, whose clock is ahead.
    let ahead = until_then.parse::<u64>().unwrap() + 2_000;
    let ahead = format!("GET / HTTP/1.1\r\nHost: a\r\n{field}{ahead}");
    assert_eq!(served_by(&balancer, &ahead).await, ["leader"]);
    tokio::time::sleep(Duration::from_millis(5_100)).await;
    assert_eq!(served_by(&balancer, &head).await, ["leader", "other"]);
    // Nobody gets more than twice that by a time of his own.
    let far: u64 = until_then.parse::<u64>().unwrap() + 1_000_000;
    for value in [far.to_string(), "x".to_owned(), "0".to_owned()] {
        let head = format!("GET / HTTP/1.1\r\nHost: a\r\n{field}{value}");
        assert_eq!(
            served_by(&balancer, &head).await,
            ["leader", "other"],
            "{value}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_count_as_in_flight_at_the_leader() {
    let leader = RawBackend::start_slow(Duration::from_secs(6)).await;
    let other = RawBackend::start(named("o")).await;
    let (etcd, group) = (Etcd::shared(), group("in-flight"));
    let mut keys = etcd.raw_client().await;
    candidate(&mut keys, &group, "leader", &leader).await;
    candidate(&mut keys, &group, "other", &other).await;
    let setup = Setup::shared(&group).program("leader_routing");
    let fields = "policy: round_robin\noverload: { max_in_flight_per_node: 1 }";
    let balancer = setup.with(fields).serving().await;
    let mut writer = Raw::to(&balancer).await;
    writer
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        .await;
    until("the leader has the write", async || {
        leader
            .requests()
            .iter()
            .any(|request| request.starts_with("POST"))
    })
    .await;
    for _ in 0..10 {
        assert_eq!(balancer.get().await, "other");
    }
    assert_eq!(status(&writer.response().await), "200");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_gets_no_more_requests_at_a_time_than_a_node_may() {
    let leader = RawBackend::start_slow(Duration::from_secs(3)).await;
    let other = RawBackend::start(named("o")).await;
    let (etcd, group) = (Etcd::shared(), group("leader-limit"));
    let mut keys = etcd.raw_client().await;
    candidate(&mut keys, &group, "leader", &leader).await;
    candidate(&mut keys, &group, "other", &other).await;
    let setup = Setup::shared(&group).program("leader_routing");
    let fields = "policy: round_robin\n\
                  overload: { max_in_flight_per_node: 2, queue: 1, queue_timeout_ms: 15000 }";
    let balancer = setup.with(fields).serving().await;
    let mut writes = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut client = Raw::to(&balancer).await;
        writes.spawn(async move {
            let post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
            client.send(post).await;
            status(&client.response().await).to_owned()
        });
    }
    let mut got = writes.join_all().await;
    got.sort();
    assert_eq!(got, ["200", "200", "200", "503"]);
}

/// As after a crash whose lease is still there: Pingora by itself gives up after 16 tries.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_refuses_connections_is_waited_for_as_long_as_is_set() {
    // Nobody else takes the port meanwhile.
    let address = format!("127.88.{}.{}:80", fastrand::u8(..), fastrand::u8(1..));
    let (leader, other) = (
        RawBackend::start_at(address.parse().unwrap(), named("l")).await,
        RawBackend::start(named("o")).await,
    );
    let fields = "leader_wait_ms: 20000";
    let (balancer, _, _) = before("refusing-leader", [&leader, &other], fields).await;
    let address = leader.address;
    drop(leader);
    // A write on a connection that was just closed may have been read, and is not sent again.
    let std::net::IpAddr::V4(ip) = address.ip() else {
        panic!("{address}");
    };
    let remote = format!(
        "{:08X}:{:04X}",
        u32::from_le_bytes(ip.octets()),
        address.port()
    );
    until("its connections are gone", async || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let is_open = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields[2] == remote && ["01", "08"].contains(&fields[3])
        };
        !table.lines().any(is_open)
    })
    .await;
    let mut client = Raw::to(&balancer).await;
    let start = std::time::Instant::now();
    let post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    client.send(post).await;
    let returns = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        RawBackend::start_at(address, named("l")).await
    };
    let (response, _returned) = tokio::join!(client.response(), returns);
    assert_eq!(
        status(&response),
        "200",
        "{response} after {:?}",
        start.elapsed()
    );
}

/// It may hang, and be replaced because of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_room_at_the_leader_goes_to_the_next_one() {
    let hangs = RawBackend::start_slow(Duration::from_secs(60)).await;
    let other = RawBackend::start(named("o")).await;
    let (etcd, group) = (Etcd::shared(), group("hangs"));
    let mut keys = etcd.raw_client().await;
    let leads = candidate(&mut keys, &group, "leader", &hangs).await;
    candidate(&mut keys, &group, "other", &other).await;
    let setup = Setup::shared(&group).program("leader_routing");
    let fields = "overload: { max_in_flight_per_node: 1, queue_timeout_ms: 30000 }";
    let balancer = setup.with(fields).listening().await;
    let post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    let (mut first, mut second) = (Raw::to(&balancer).await, Raw::to(&balancer).await);
    first.send(post).await;
    until("the leader has the first one", async || {
        !hangs.requests().is_empty()
    })
    .await;
    second.send(post).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let start = std::time::Instant::now();
    keys.delete(leads, None).await.unwrap();
    let response = second.response().await;
    assert!(response.ends_with("\r\n\r\no"), "{response}");
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(hangs.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_leader_for_a_client_that_has_left() {
    let backend = RawBackend::start(named("one")).await;
    let (etcd, group) = (Etcd::shared(), group("left"));
    // Registered, and no candidate.
    let node = entry("one", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &node, None).await;
    let setup = Setup::shared(&group)
        .program("leader_routing")
        .with("leader_wait_ms: 60000\ntimeouts: { client_idle_ms: 60000 }")
        .server("grace_period_seconds: 50");
    let mut balancer = setup.listening().await;
    let mut whole = Raw::to(&balancer).await;
    whole
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        .await;
    let stream = tokio::net::TcpStream::connect(&balancer.listen)
        .await
        .unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let driving = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let request = http::Request::post("http://a/").body(()).unwrap();
    let (_, mut body) = sender.send_request(request, false).unwrap();
    body.send_data("a part".into(), false).unwrap();
    // Behind it on the same connection, so that it has arrived.
    let mut sender = sender.ready().await.unwrap();
    let read = http::Request::get("http://a/").body(()).unwrap();
    let (response, _) = sender.send_request(read, true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    body.send_reset(h2::Reason::CANCEL);
    drop(whole);
    // The process ends when nothing is in flight.
    balancer.program.signal("INT");
    let (status, took) = balancer.program.ended().await;
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(status.success(), "{status}");
    drop((sender, driving));
}
