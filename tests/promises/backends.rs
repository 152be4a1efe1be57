//! What backends that answer wrongly do to clients, to others, and to the log.

use std::time::{Duration, Instant};

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::{group, local};
use super::raw::{
    Raw, RawBackend, http_2_backend, in_front_of, in_front_of_http_2, ok, register, status,
};
use super::world::{Balancer, Setup, entry, put, scratch, until};

const SECOND: Duration = Duration::from_secs(1);

async fn get(balancer: &Balancer, path: &str) -> String {
    let mut client = Raw::to(balancer).await;
    client
        .send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
        .await;
    client.response().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_of_responses_are_made_good() {
    let backend = RawBackend::start(|request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        match path {
            "/204" => &b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"[..],
            "/204-length" => b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
            "/1.0" => b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
            "/twice" => b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nok\n",
            "/fields" => b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nok\n",
            "/103" => {
                b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nKeep-Alive: timeout=9\r\n\
                  Connection: x-mine, keep-alive\r\nX-Mine: 1\r\n\r\n\
                  HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
            }
            _ => b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n",
        }
        .to_vec()
    })
    .await;
    let balancer = in_front_of(&backend, "good-heads", "").await;
    for path in ["/204", "/204-length"] {
        let mut client = Raw::to(&balancer).await;
        client
            .send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await;
        let start = Instant::now();
        let response = client.response().await.to_ascii_lowercase();
        assert_eq!(status(&response), "204", "{response}");
        for field in ["transfer-encoding", "content-length"] {
            assert!(!response.contains(field), "{response}");
        }
        // The connection goes on.
        assert_eq!(status(&client.get("").await), "200");
        assert!(start.elapsed() < 3 * SECOND, "{:?}", start.elapsed());
    }
    let old = get(&balancer, "/1.0").await;
    assert!(old.starts_with("HTTP/1.1 200 "), "{old}");
    for path in ["/twice", "/fields"] {
        let response = get(&balancer, path).await.to_ascii_lowercase();
        assert_eq!(
            response.matches("content-length: 3\r\n").count(),
            1,
            "{response}"
        );
        assert_eq!(response.matches("content-length").count(), 1, "{response}");
    }
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"GET /103 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    let all = client.rest().await.to_ascii_lowercase();
    let (interim, response) = all.split_once("\r\n\r\n").unwrap();
    assert_eq!(status(interim), "103", "{all}");
    assert!(interim.contains("link: </a>"), "{all}");
    for field in ["keep-alive", "x-mine"] {
        assert!(!interim.contains(field), "{all}");
    }
    assert_eq!(status(response), "200", "{all}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_switches_the_protocol_unasked_or_has_a_status_of_its_own_has_failed() {
    for (name, answer) in [
        (
            "unasked",
            &b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nbytes"
                [..],
        ),
        (
            "status-777",
            b"HTTP/1.1 777 Odd\r\nContent-Length: 0\r\n\r\n",
        ),
    ] {
        let bad = RawBackend::start(move |_| answer.to_vec()).await;
        let good = RawBackend::start(ok).await;
        let (etcd, group) = (Etcd::shared(), group(name));
        register(&etcd, &group, &[&bad, &good]).await;
        let fields = "policy: adaptive\nretries: 1\nretry: { least_per_second: 1000 }";
        let balancer = Setup::shared(&group).with(fields).listening().await;
        until("it serves", async || balancer.get().await == "n1").await;
        let before = bad.requests().len();
        let mut answers = Vec::new();
        for _ in 0..200 {
            answers.push(status(&get(&balancer, "/").await).to_owned());
        }
        // Only the status goes to clients, and never the other protocol.
        let odd = answers.iter().filter(|it| *it != "200").count();
        assert!(odd <= 40 && (name != "unasked" || odd == 0), "{answers:?}");
        let tried = bad.requests().len() - before;
        assert!(tried <= 40, "{tried} of 200 requests went to it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_backend_sends_is_not_in_the_log() {
    // A control byte in a field, and much before it.
    let answer = |_: &str| {
        let mut bytes = b"HTTP/1.1 200 OK\r\n".to_vec();
        for _ in 0..40 {
            bytes.extend_from_slice(b"Set-Cookie: ");
            bytes.extend_from_slice(&[0xe4; 1_000]);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"X: a\x01b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        bytes
    };
    let backend = RawBackend::start(answer).await;
    let file = scratch(&format!("{}.access", group("long-error")));
    let fields = format!("access_log: {{ file: {} }}\nretries: 0", file.display());
    let balancer = in_front_of(&backend, "long-error", &fields).await;
    for _ in 0..5 {
        assert_eq!(status(&get(&balancer, "/").await), "502");
    }
    until("the lines are there", async || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.lines().count() >= 5
    })
    .await;
    let text = std::fs::read_to_string(&file).unwrap();
    for line in text.lines().chain(balancer.log_text().lines()) {
        assert!(line.len() < 2_000, "{} bytes: {}", line.len(), &line[..500]);
    }
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(
        last["error"]
            .as_str()
            .unwrap()
            .contains("InvalidHTTPHeader"),
        "{last}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_up_nobody_on_its_backends_connection() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let balancer =
        in_front_of_http_2(port, "h2-slow-reader", "timeouts: { response_ms: 10000 }").await;
    // Each would fill the window of a whole connection.
    let mut slow = Vec::new();
    for _ in 0..3 {
        let mut client = Raw::to(&balancer).await;
        client.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
        slow.push(client);
    }
    let start = Instant::now();
    while start.elapsed() < 4 * SECOND {
        let asked = Instant::now();
        assert_eq!(status(&get(&balancer, "/").await), "200");
        let took = asked.elapsed();
        assert!(took < 3 * SECOND, "{took:?}");
    }
    // Who reads gets all.
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    let all = client.rest().await;
    assert!(all.len() > 20_000_000, "{}", all.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_of_http_2_with_too_many_fields_is_its_backends_failure() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let balancer = in_front_of_http_2(port, "h2-fields", "retries: 0").await;
    for _ in 0..3 {
        assert_eq!(status(&get(&balancer, "/fields").await), "502");
        assert_eq!(status(&get(&balancer, "/").await), "200");
    }
    let log = balancer.log_text();
    assert!(log.contains("too many fields"), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// During an outage each request would cost a connection, and a TLS handshake, of each client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_keeps_its_connection_while_the_backend_fails() {
    let backend = RawBackend::start(|request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        match path {
            "/ends" => Vec::new(),
            // The rest never comes.
            "/late" => b"HTTP/1.1 200 OK\r\n".to_vec(),
            "/cut" => {
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nok\n".to_vec()
            }
            _ => ok(request),
        }
    })
    .await;
    let fields = "timeouts: { response_ms: 2000 }\nclients: { requests_per_connection: 12 }";
    let balancer = in_front_of(&backend, "kept-clients", fields).await;
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let post = "POST /ends HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody";
    let mut client = Raw::to(&balancer).await;
    for (bytes, expected) in [
        (request("/ends"), "502"),
        (request("/ends"), "502"),
        (post.to_owned(), "502"),
        (request("/"), "200"),
        (request("/late"), "504"),
        (request("/ends"), "502"),
        (request("/"), "200"),
        (request("/ends"), "502"),
    ] {
        client.send(bytes.as_bytes()).await;
        let response = client.response().await;
        assert_eq!(status(&response), expected, "{response}");
        let head = response.to_ascii_lowercase();
        assert!(!head.contains("connection: close"), "{response}");
    }
    // What has been sent behind such a request is next, and as many requests are served as with other responses.
    let behind = [request("/ends"), request("/"), request("/ends")].concat();
    client.send(behind.as_bytes()).await;
    client.send(request("/ends").repeat(3).as_bytes()).await;
    let rest = client.rest().await;
    let statuses = rest
        .lines()
        .filter_map(|line| line.strip_prefix("HTTP/1.1 "));
    let statuses: Vec<_> = statuses.map(|rest| &rest[..3]).collect();
    assert_eq!(statuses, ["502", "200", "502", "502"], "{rest}");
    assert_eq!(
        rest.to_ascii_lowercase()
            .matches("connection: close")
            .count(),
        1
    );

    // Who asks for the end gets it, and so does who could not tell where a response ends.
    for (head, expected) in [
        (
            "GET /ends HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            "502",
        ),
        ("GET /ends HTTP/1.0\r\n\r\n", "502"),
        ("GET /cut HTTP/1.1\r\nHost: a\r\n\r\n", "200"),
        (
            "POST /ends HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nbody",
            "408",
        ),
    ] {
        let mut client = Raw::to(&balancer).await;
        client.send(head.as_bytes()).await;
        let rest = client.rest().await;
        assert_eq!(status(&rest), expected, "{rest}");
    }
    // Nothing is left of connections that have gone on so.
    let pid = balancer.program.child.id();
    let open = || {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    let before = open();
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut client = Raw::to(&balancer).await;
        client.send(request("/ends").as_bytes()).await;
        assert_eq!(status(&client.response().await), "502");
        clients.push(client);
    }
    assert!(open() >= before + 40);
    drop(clients);
    until("they have ended", async || open() < before + 10).await;
}

/// A frame of HTTP/2 with its head.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()];
    [&head.concat(), payload].concat()
}

/// One connection of such a backend, until it ends.
async fn process_nothing(
    mut stream: TcpStream,
    is_going: bool,
    counter: Arc<AtomicUsize>,
) -> std::io::Result<()> {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await?;
    stream.write_all(&frame(4, 0, 0, &[])).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await?;
        match (head[3], head[4]) {
            (1, _) if is_going => {
                counter.fetch_add(1, Ordering::Relaxed);
                stream.write_all(&frame(7, 0, 0, &[0; 8])).await?;
            }
            (1, _) => {
                counter.fetch_add(1, Ordering::Relaxed);
                stream.write_all(&frame(3, 0, id, &[0, 0, 0, 7])).await?;
            }
            // The settings of the other side.
            (4, 0) => stream.write_all(&frame(4, 1, 0, &[])).await?,
            (6, 0) => stream.write_all(&frame(6, 1, 0, &payload)).await?,
            _ => {}
        }
    }
}

/// A backend of HTTP/2 that has processed nothing of what it is asked for, and says so: by RST_STREAM with REFUSED_STREAM, or
/// by GOAWAY without an error. And its port.
async fn that_processes_nothing(is_going: bool) -> (u16, Arc<AtomicUsize>, JoinSet<()>) {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let requests = Arc::new(AtomicUsize::new(0));
    let (counter, mut serving) = (requests.clone(), JoinSet::new());
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(process_nothing(stream, is_going, counter.clone()));
        }
    });
    (port, requests, serving)
}

/// Whatever the method, because nothing was done; as in each rolling restart of servers of gRPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_backend_of_http_2_has_not_processed_goes_to_another_one() {
    for (name, is_going) in [("h2-refuses", false), ("h2-goes", true)] {
        let (port, requests, _serving) = that_processes_nothing(is_going).await;
        let (works, _works) = http_2_backend(Duration::ZERO).await;
        let (etcd, group) = (Etcd::shared(), group(name));
        let mut keys = etcd.raw_client().await;
        put(
            &mut keys,
            &group,
            &entry("works", Some(works), json!({})),
            None,
        )
        .await;
        let fields = "backends: { protocol: h2c }\npolicy: round_robin";
        let balancer = Setup::shared(&group).with(fields).serving().await;
        put(&mut keys, &group, &entry("a", Some(port), json!({})), None).await;
        let mut client = Raw::to(&balancer).await;
        let request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody";
        until("both are known", async || {
            client.send(request).await;
            let response = client.response().await;
            assert_eq!(status(&response), "200", "{name}: {response}");
            requests.load(Ordering::Relaxed) > 3
        })
        .await;
        for _ in 0..20 {
            client.send(request).await;
            let response = client.response().await;
            assert_eq!(status(&response), "200", "{name}: {response}");
        }
    }
}
