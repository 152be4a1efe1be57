//! Tests of what is tried again, and of whom is blamed.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::common::etcd::{Etcd, Process};
use super::common::namespace::Namespace;
use super::common::programs::optimised;
use super::common::{group, skipped};
use super::raw::{Raw, RawBackend, in_front_of, ok, register, status};
use super::world::{Balancer, Setup, entry, put, scratch, until};

/// A balancer in front of these backends, which takes turns.
async fn before(backends: &[&RawBackend], name: &str, fields: &str) -> Balancer {
    let balancer = started(backends, name, fields).await;
    until("it serves", async || {
        !["503", "error"].contains(&&*served(&balancer).await)
    })
    .await;
    balancer
}

async fn started(backends: &[&RawBackend], name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    register(&etcd, &group, backends).await;
    let policy = match fields.starts_with("adaptive") {
        true => "adaptive",
        false => "round_robin",
    };
    let fields = format!("policy: {policy}\n{fields}");
    Setup::shared(&group).with(&fields).start()
}

async fn served(balancer: &Balancer) -> String {
    let served = balancer.get().await;
    if served.contains("Error") {
        "error".to_owned()
    } else {
        served
    }
}

fn unavailable(_: &str) -> Vec<u8> {
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy".to_vec()
}

fn count(backend: &RawBackend, method: &str) -> usize {
    let requests = backend.requests();
    requests
        .iter()
        .filter(|request| request.starts_with(method))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_that_is_listed_is_tried_elsewhere() {
    let (busy, good) = (
        RawBackend::start(unavailable).await,
        RawBackend::start(ok).await,
    );
    let listed = before(
        &[&busy, &good],
        "listed",
        "retry: { on_status: [503], budget: 1 }",
    )
    .await;
    let answers = listed.gets(20).await;
    assert_eq!(answers.get("n1"), Some(&20), "{answers:?}");
    assert!(count(&busy, "GET") >= 5);
    // Not one that may have side effects, and not unless it is listed.
    let tried = count(&good, "POST");
    let mut posts = Vec::new();
    for _ in 0..8 {
        posts.push(listed.post().await);
    }
    assert!(posts.iter().any(|answer| answer == "503"), "{posts:?}");
    assert_eq!(
        count(&good, "POST") - tried,
        posts.iter().filter(|answer| *answer == "n1").count()
    );
    let unlisted = before(&[&busy, &good], "unlisted", "").await;
    let answers = unlisted.gets(20).await;
    assert!(answers.contains_key("503"), "{answers:?}");
    // Where it is not tried again, the client gets the backend's own response.
    let once = started(&[&busy], "once", "retries: 0\nretry: { on_status: [503] }").await;
    until("the backend's response arrives", async || {
        let Ok(stream) = tokio::net::TcpStream::connect(&once.listen).await else {
            return false;
        };
        Raw(stream).get("").await.ends_with("busy")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_slow_request_is_one_request() {
    let slow = Duration::from_millis(600);
    let backends = [
        RawBackend::start_slow(slow).await,
        RawBackend::start_slow(slow).await,
    ];
    let [a, b] = &backends;
    for (name, on_timeout, expected) in [("once", false, 1), ("twice", true, 2)] {
        let fields = format!(
            "retries: 1\ntimeouts: {{ response_ms: 200 }}\nretry: {{ on_timeout: {on_timeout} }}"
        );
        let balancer = before(&[a, b], name, &fields).await;
        // Those by which the balancer showed that it serves may arrive later.
        let own = format!("GET /{name} ");
        let requests = || count(a, &own) + count(b, &own);
        let mut client = Raw::to(&balancer).await;
        client
            .send(format!("{own}HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await;
        assert_eq!(status(&client.response().await), "504");
        until("the requests have arrived", async || requests() >= expected).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(requests(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_are_limited_to_a_part_of_all_requests() {
    let (busy, good) = (
        RawBackend::start(unavailable).await,
        RawBackend::start(ok).await,
    );
    let fields = "retry: { on_status: [503], budget: 0.1, least_per_second: 2 }";
    let balancer = before(&[&busy, &good], "budget", fields).await;
    let sent = || count(&busy, "GET") + count(&good, "GET");
    let (start, earlier) = (Instant::now(), sent());
    let answers = balancer.gets(200).await;
    let (served, refused) = (answers["n1"], answers["503"]);
    assert_eq!(served + refused, 200, "{answers:?}");
    // Half of the requests need a retry. A tenth of all get one, and two a second.
    let allowed = 20 + 2 * (start.elapsed().as_secs() as usize + 2);
    assert!(served >= 100 && served <= 105 + allowed, "{answers:?}");
    let retries = sent() - earlier - 200;
    assert!(
        retries >= 10 && retries <= allowed + 5,
        "{retries} of {allowed}"
    );
    // Where requests earn none, nothing is left but the number a second: none at all, or more than there are requests.
    for (least, is_retried) in [(0, false), (1_000, true)] {
        let fields = format!("retry: {{ on_status: [503], budget: 0, least_per_second: {least} }}");
        let balancer = before(&[&busy, &good], "least", &fields).await;
        let (refused, all) = (count(&busy, "GET"), sent());
        let answers = balancer.gets(200).await;
        let (refused, retries) = (count(&busy, "GET") - refused, sent() - all - 200);
        // The default would allow for some in the first case, and for much fewer in the second one.
        assert!(refused >= 50, "{refused} of 200");
        let expected = if is_retried { refused } else { 0 };
        assert_eq!(retries, expected, "{least}: {answers:?}");
        let served = answers.get("n1").copied();
        assert_eq!(served, Some(200 - refused + retries), "{answers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_here_is_no_backends_fault() {
    // No connection stays in the pool.
    let backend = RawBackend::start(|_| {
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
    })
    .await;
    let balancer = in_front_of(&backend, "descriptors", "policy: adaptive").await;
    let limit = |descriptors: u32| {
        let pid = balancer.program.child.id().to_string();
        let limit = format!("--nofile={descriptors}:4096");
        let set = Command::new("prlimit")
            .args(["--pid", &pid, &limit])
            .status();
        assert!(set.unwrap().success());
    };
    let mut clients = Vec::new();
    for _ in 0..30 {
        let mut client = Raw::to(&balancer).await;
        assert_eq!(status(&client.get("").await), "200");
        clients.push(client);
    }
    limit(3);
    for client in &mut clients {
        let response = client.get("").await;
        assert_eq!(status(&response), "503", "{response}");
        assert!(response.contains("cannot make a connection"), "{response}");
    }
    limit(1_024);
    until("it serves again", async || balancer.get().await == "a").await;
    let log = balancer.log_text();
    assert!(!log.contains("a backend fails"), "{log}");
    // A line for each would be thirty.
    assert!(
        log.matches("cannot make a connection").count() < 10,
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_backend_a_client_keeps_its_connection_and_no_error_is_logged() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "nobody", "").await;
    let mut client = Raw::to(&balancer).await;
    assert_eq!(status(&client.get("").await), "200");
    let mut keys = Etcd::shared().raw_client().await;
    super::world::delete(&mut keys, &balancer.group, "a").await;
    until("nobody is left", async || {
        status(&client.get("").await) == "503"
    })
    .await;
    for _ in 0..20 {
        let response = client.get("").await;
        assert_eq!(status(&response), "503", "{response}");
        assert!(response.to_ascii_lowercase().contains("retry-after: 1"));
    }
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut keys, &balancer.group, &entry, None).await;
    until("it serves again", async || {
        status(&client.get("").await) == "200"
    })
    .await;
    assert_eq!(balancer.log_text().matches("ERROR").count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_refuses_at_once_does_not_attract_requests() {
    for (status, most) in [("429 Too Many Requests", 150), ("404 Not Found", 700)] {
        let good = RawBackend::start_slow(Duration::from_millis(3)).await;
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        let bad = RawBackend::start(move |_| head.clone().into_bytes()).await;
        let balancer = started(&[&bad, &good], "refusing", "adaptive: { slow_start_ms: 0 }").await;
        until("both are there", async || {
            let before = (bad.requests().len(), good.requests().len());
            balancer.gets(10).await;
            bad.requests().len() > before.0 && good.requests().len() > before.1
        })
        .await;
        // Long enough for latencies to count.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(3) {
            balancer.gets(20).await;
        }
        let before = bad.requests().len();
        balancer.gets(1_000).await;
        let refused = bad.requests().len() - before;
        assert!(refused <= most, "{status}: {refused} of 1000");
    }
}

/// Each request fails, and a line for each would fill the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_all_backends_are_away_the_log_has_a_line_a_second() {
    let mut backends = Vec::new();
    for _ in 0..4 {
        backends.push(RawBackend::start(ok).await);
    }
    // More backends than tries, so that it is not this process that refuses.
    let fields = "adaptive: { slow_start_ms: 0 }\nretries: 1";
    let balancer = before(&backends.iter().collect::<Vec<_>>(), "all-away", fields).await;
    drop(backends);
    until("they are away", async || balancer.get().await == "502").await;
    let start = Instant::now();
    let answers = balancer.gets(2_000).await;
    assert_eq!(answers.get("502"), Some(&2_000), "{answers:?}");
    let log = balancer.log_text();
    let lines = log.matches("a request was not served").count() as u64;
    assert!(lines >= 1, "{log}");
    let most = start.elapsed().as_secs() + 5;
    assert!(lines <= most, "{lines} lines, {log}");
    // What came after the last line is not told yet.
    let left_out = log.split("left_out=").skip(1).map(|rest| {
        let number = rest.split(|it: char| !it.is_ascii_digit()).next();
        number.unwrap().parse::<u64>().unwrap()
    });
    let told = left_out.sum::<u64>() + lines;
    assert!(lines == 1 || told > 100, "{told} told, {log}");
    let all = log.lines().count() as u64;
    assert!(all < 40 + 3 * most, "{all} lines: {log}");
}

/// It never has anything in flight, so that it would be the least busy of all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_refuses_at_once_does_not_attract_the_requests_of_many_clients() {
    let usual = Duration::from_millis(20);
    let good = [
        RawBackend::start_slow(usual).await,
        RawBackend::start_slow(usual).await,
    ];
    let refusal = |_: &str| b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n".to_vec();
    let bad = RawBackend::start(refusal).await;
    let fields = "adaptive: { slow_start_ms: 0 }";
    let balancer = started(&[&bad, &good[0], &good[1]], "attracting", fields).await;
    until("all are there", async || {
        balancer.gets(30).await;
        let all = [&bad, &good[0], &good[1]];
        all.iter().all(|it| !it.requests().is_empty())
    })
    .await;
    let seconds = Duration::from_secs;
    let (start, from) = (Instant::now(), seconds(3));
    let mut clients = JoinSet::new();
    for _ in 0..12 {
        let mut client = Raw::to(&balancer).await;
        clients.spawn(async move {
            let (mut refused, mut all) = (0, 0);
            while start.elapsed() < seconds(8) {
                let response = client.get("").await;
                if start.elapsed() > from {
                    all += 1;
                    refused += u32::from(status(&response) == "401");
                }
            }
            (refused, all)
        });
    }
    let counts = clients.join_all().await;
    let refused: u32 = counts.iter().map(|(refused, _)| refused).sum();
    let all: u32 = counts.iter().map(|(_, all)| all).sum();
    let part = f64::from(refused) / f64::from(all);
    assert!((0.2..0.45).contains(&part), "{refused} of {all}");
}

/// The kernel sends the first packet of a connection again after a second. It drops those of connections that
/// too many others wait before, which is how one is lost here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_made_though_its_first_packet_is_lost() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap().into_std().unwrap();
    let (address, listener_again) = (listener.local_addr().unwrap(), listener.try_clone());
    let closing =
        |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
    let backend = RawBackend::start_on(listener, closing);
    let balancer = in_front_of(&backend, "lost", "retries: 0").await;
    drop(backend);
    let waiting = until_no_more_can_wait(address).await;
    assert!(waiting.len() >= 2);
    let start = Instant::now();
    let request = async {
        let response = Raw::to(&balancer).await.get("").await;
        (status(&response).to_owned(), start.elapsed())
    };
    let accept = async {
        until("the packet is sent", async || is_connecting(address)).await;
        drop(waiting);
        RawBackend::start_on(listener_again.unwrap(), ok)
    };
    let ((status, took), _backend) = tokio::join!(request, accept);
    assert_eq!(status, "200");
    assert!(
        took > Duration::from_millis(900),
        "{took:?}: it was not lost"
    );
}

/// Whether somebody here waits for a connection to this address.
fn is_connecting(address: std::net::SocketAddr) -> bool {
    let port = format!(":{:04X}", address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // 02 is a connection whose first packet was sent.
        fields[2].ends_with(&port) && fields[3] == "02"
    })
}

/// As a firewall does that has forgotten a connection, or a machine that has lost its network.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_drops_packets_in_silence_costs_seconds() {
    let namespace = match Namespace::create() {
        Ok(namespace) => namespace,
        Err(reason) => {
            skipped(format_args!("this machine cannot drop packets: {reason}"));
            return;
        }
    };
    let listen = format!("{}:8080", namespace.inner_ip);
    let mut command = namespace.command(optimised("worker"));
    command.args(["--etcd", "memory://far", "--id", "far", "--listen", &listen]);
    let _far = Process::spawn(&command, &scratch(&format!("{}-far", namespace.name)));
    until("the far backend listens", async || {
        TcpStream::connect(&listen).await.is_ok()
    })
    .await;
    let (etcd, group) = (Etcd::shared(), group("silent-network"));
    let mut keys = etcd.raw_client().await;
    let near = RawBackend::start(ok).await;
    for (id, ip, port) in [
        ("far", namespace.inner_ip.to_string(), 8080),
        ("near", near.address.ip().to_string(), near.address.port()),
    ] {
        let entry = entry(id, Some(port), json!({ "ip": ip }));
        put(&mut keys, &group, &entry, None).await;
    }
    let fields =
        "policy: round_robin\ntimeouts: { tcp_user_timeout_ms: 3000, pool_idle_ms: 60000 }";
    let balancer = Setup::shared(&group).with(fields).serving().await;
    balancer.until_served_by(&["far", "near"]).await;
    // The same without anybody else, and with a connection that has been used.
    let alone = group.clone() + "-alone";
    let entry = entry(
        "far",
        Some(8080),
        json!({ "ip": namespace.inner_ip.to_string() }),
    );
    put(&mut keys, &alone, &entry, None).await;
    let without_others = Setup::shared(&alone).with(fields).serving().await;
    without_others.until_served_by(&["far"]).await;
    namespace.cut().unwrap();
    let start = Instant::now();
    // On the connection that the pool has, and on a new one, which has 1.5 s to connect.
    let (served, status) = tokio::join!(balancer.gets(4), without_others.get());
    assert_eq!(served.keys().collect::<Vec<_>>(), ["near"], "{served:?}");
    let took = start.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(10)).contains(&took),
        "{took:?}"
    );
    // Not 503, which says that there was nobody to ask.
    assert!(["502", "504"].contains(&&*status), "{status}");
}

/// Sends this many requests one after the other, for paths that differ; every fourth one is for the broken page.
async fn pages(client: &mut Raw, count: usize) {
    for page in 0..count {
        let path = match page % 4 {
            0 => "broken".to_owned(),
            _ => format!("page{}", fastrand::u32(..)),
        };
        let head = format!("GET /{path} HTTP/1.1\r\nHost: a\r\n\r\n");
        client.send(head.as_bytes()).await;
        client.response().await;
    }
}

/// Its owner is left out, and not all who own it after that one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_always_fails_takes_out_one_backend_at_a_time() {
    let answer = |request: &str| match request.starts_with("GET /broken") {
        true => b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n".to_vec(),
        false => ok(request),
    };
    let mut backends = Vec::new();
    let (etcd, group) = (Etcd::shared(), group("broken-page"));
    let mut keys = etcd.raw_client().await;
    // Always the same addresses, by which the pages are shared out: with others, one backend may have few of them by chance.
    for last in 1..=6 {
        let address = std::net::SocketAddr::from(([127, 0, 77, last], 18_077));
        backends.push(RawBackend::start_at(address, answer).await);
        let ip = json!({ "ip": address.ip().to_string() });
        let entry = entry(&format!("n{last}"), Some(address.port()), ip);
        put(&mut keys, &group, &entry, None).await;
    }
    let fields = "policy: consistent\nhash_on: uri";
    let balancer = Setup::shared(&group).with(fields).serving().await;
    let mut client = Raw::to(&balancer).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        pages(&mut client, 100).await;
    }
    let before: Vec<_> = backends.iter().map(|it| it.requests().len()).collect();
    pages(&mut client, 600).await;
    let after = backends.iter().zip(before);
    let served: Vec<_> = after
        .map(|(backend, before)| backend.requests().len() - before)
        .collect();
    println!("{served:?}");
    let serving = served.iter().filter(|count| **count > 30).count();
    assert!(serving >= 5, "{served:?}\n{}", balancer.log_text());
}

/// Whoever sets a time for whole requests sets it shorter than that of a backend.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_hangs_is_left_out_though_the_time_of_requests_ends_first() {
    let (hangs, works) = (
        RawBackend::start_slow(Duration::from_secs(60)).await,
        RawBackend::start(ok).await,
    );
    let fields = "adaptive: { slow_start_ms: 0 }\ntimeouts: { request_ms: 400, response_ms: 5000 }";
    let balancer = started(&[&hangs, &works], "hangs", fields).await;
    until("it is left out", async || {
        balancer.gets(2).await;
        balancer.log_text().contains("a backend fails")
    })
    .await;
    assert!(balancer.log_text().contains("node=\"n0\""));
}

/// Opens connections that nobody accepts, until the kernel drops what comes.
async fn until_no_more_can_wait(address: SocketAddr) -> Vec<std::io::Result<TcpStream>> {
    let mut waiting = Vec::new();
    let connect = || tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address));
    until("no more can wait", async || {
        let connection = connect().await;
        let is_full = connection.is_err();
        waiting.extend(connection);
        is_full
    })
    .await;
    waiting
}

/// A machine that has lost its power does not even refuse connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_swallows_packets_is_left_out_though_the_time_of_requests_ends_first() {
    let works = RawBackend::start(ok).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = socket.listen(1).unwrap();
    let address = silent.local_addr().unwrap();
    let _waiting = until_no_more_can_wait(address).await;
    let (etcd, group) = (Etcd::shared(), group("swallows"));
    let mut keys = etcd.raw_client().await;
    for (id, port) in [("silent", address.port()), ("works", works.address.port())] {
        put(&mut keys, &group, &entry(id, Some(port), json!({})), None).await;
    }
    let fields = "adaptive: { slow_start_ms: 0 }\ntimeouts: { request_ms: 400, connect_ms: 5000 }";
    let balancer = Setup::shared(&group).with(fields).start();
    until("it is left out", async || {
        balancer.gets(2).await;
        balancer.log_text().contains("a backend fails")
    })
    .await;
    let log = balancer.log_text();
    assert!(
        log.contains("node=\"silent\"") && !log.contains("node=\"works\""),
        "{log}"
    );
}

/// Responses that go on until the time of the request is over, as events that come now and then, are no failures.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_begun_to_answer_is_not_blamed_for_the_end_of_the_time() {
    let events = |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nevent".to_vec();
    let (streams, works) = (RawBackend::start(events).await, RawBackend::start(ok).await);
    let fields = "adaptive: { slow_start_ms: 0 }\ntimeouts: { request_ms: 300, response_ms: 5000 }";
    let balancer = started(&[&streams, &works], "events", fields).await;
    until("many have ended", async || {
        balancer.gets(4).await;
        count(&streams, "GET") >= 12
    })
    .await;
    let log = balancer.log_text();
    assert!(!log.contains("a backend fails"), "{log}");
}

/// As one that makes the program crash that has to answer it: each try may cost another backend.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_ends_connections_ends_few_of_them() {
    let answer = |request: &str| {
        if request.starts_with("GET /late") {
            std::thread::sleep(Duration::from_millis(1_300));
        }
        match request.starts_with("GET / ") {
            true => ok(request),
            false => Vec::new(),
        }
    };
    let mut backends = Vec::new();
    for _ in 0..10 {
        backends.push(RawBackend::start(answer).await);
    }
    let all: Vec<_> = backends.iter().collect();
    for (path, most) in [("/at-once", 5), ("/late", 3)] {
        // The first try, two on connections that may have been closed before, if it is that soon, and two retries.
        let balancer = before(&all, "deadly", "retries: 2").await;
        balancer.gets(40).await;
        let tries = || -> usize {
            let requests = backends.iter().flat_map(RawBackend::requests);
            requests
                .filter(|it| it.starts_with(&format!("GET {path}")))
                .count()
        };
        let mut client = Raw::to(&balancer).await;
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
        client.send(request.as_bytes()).await;
        let response = client.response().await;
        assert_eq!(status(&response), "502", "{response}");
        assert!((1..=most).contains(&tries()), "{path}: {}", tries());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_nobody_else_to_try_the_client_learns_what_has_failed() {
    let backend = RawBackend::start_slow(Duration::from_secs(5)).await;
    let fields = "timeouts: { response_ms: 400 }\nretry: { on_timeout: true }\nretries: 2";
    let balancer = in_front_of(&RawBackend::start(ok).await, "last", fields).await;
    let mut keys = Etcd::shared().raw_client().await;
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut keys, &balancer.group, &entry, None).await;
    until("the slow one is asked", async || {
        let response = Raw::to(&balancer).await.get("").await;
        status(&response) == "504"
    })
    .await;
}

/// As where this machine has no IPv6, or may not connect to one network. Without another address it would be the fault
/// of this process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_be_connected_to_from_here_is_left_out() {
    let Some(address) = Prohibited::some() else {
        skipped("this machine cannot prohibit an address");
        return;
    };
    let closing =
        |_: &str| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
    let near = RawBackend::start(closing).await;
    let (etcd, group) = (Etcd::shared(), group("prohibited"));
    let mut keys = etcd.raw_client().await;
    let far = entry("far", Some(80), json!({ "ip": address.0 }));
    put(&mut keys, &group, &far, None).await;
    put(
        &mut keys,
        &group,
        &entry("near", Some(near.address.port()), json!({})),
        None,
    )
    .await;
    let balancer = Setup::shared(&group).with("adaptive: { slow_start_ms: 0 }");
    let balancer = balancer.listening().await;
    let served = balancer.gets(100).await;
    let log = balancer.log_text();
    assert_eq!(
        served.keys().collect::<Vec<_>>(),
        ["near"],
        "{served:?}\n{log}"
    );
    assert!(
        log.contains("a backend fails") && log.contains("node=\"far\""),
        "{log}"
    );
    // Each that came there would be a line.
    assert!(
        log.matches("this process cannot make a connection").count() < 10,
        "{log}"
    );
}

/// An address that this machine may not connect to, until this is dropped.
struct Prohibited(String);

impl Prohibited {
    fn some() -> Option<Self> {
        // Of a range for documentation.
        let address = format!("198.51.100.{}", fastrand::u8(1..255));
        Self::route("add", &address).then_some(Self(address))
    }

    fn route(what: &str, address: &str) -> bool {
        let mut ip = Command::new("ip");
        ip.args(["route", what, "prohibit", address]);
        ip.output().is_ok_and(|output| output.status.success())
    }
}

impl Drop for Prohibited {
    fn drop(&mut self) {
        Self::route("del", &self.0);
    }
}
