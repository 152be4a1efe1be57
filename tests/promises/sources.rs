//! Tests of balancers whose nodes come from elsewhere than etcd.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use super::common::programs::{Program, optimised};
use super::common::{free_port, local};
use super::raw::{Raw, RawBackend, ok, status};
use super::world::{entry, scratch, until};

/// A proxy of the examples.
struct Proxy {
    program: Program,
    listen: String,
    log: std::path::PathBuf,
}

impl Proxy {
    fn start(example: &str, argument: &str, source: &str) -> Self {
        let listen = format!("{}:{}", local(), free_port());
        let log = scratch(&format!("{example}-{}.log", fastrand::u32(..)));
        let mut command = Command::new(optimised(example));
        command
            .args([argument, source, "--listen", &listen])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap());
        Self {
            log,
            program: Program::spawn(&mut command),
            listen,
        }
    }

    async fn answer(&self) -> String {
        let Ok(stream) = TcpStream::connect(&self.listen).await else {
            return "none".to_owned();
        };
        status(&Raw(stream).get("").await).to_owned()
    }

    /// Waits until it has said for this number of times that it has no list, and is still serving then.
    async fn until_without_list(&self, says: &str, times: usize) {
        until(&format!("{says:?} is in the log"), async || {
            let log = std::fs::read_to_string(&self.log).unwrap();
            log.matches(says).count() == times
        })
        .await;
        for _ in 0..20 {
            assert_eq!(self.answer().await, "200", "the last list stays");
        }
    }

    /// Waits until requests are answered by these of the backends, and by no others.
    async fn until_served_by(&self, what: &str, backends: &[RawBackend], expected: &[bool]) {
        until(what, async || {
            let before: Vec<_> = backends.iter().map(|it| it.requests().len()).collect();
            for _ in 0..20 {
                if self.answer().await != "200" {
                    return false;
                }
            }
            let used = backends.iter().zip(before);
            let used = used.map(|(it, before)| it.requests().len() > before);
            used.collect::<Vec<_>>() == expected
        })
        .await;
    }
}

fn list(backends: &[&RawBackend]) -> Value {
    let nodes = backends.iter().map(|backend| {
        let port = backend.address.port();
        entry(&port.to_string(), Some(port), json!({}))
    });
    nodes.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_in_a_file_is_followed() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let [one, two] = &backends;
    let file = scratch("nodes-from-file.json");
    std::fs::write(&file, list(&[one]).to_string()).unwrap();
    let proxy = Proxy::start("nodes_from_file", "--file", file.to_str().unwrap());
    let served_by = async |what: &str, expected: [bool; 2]| {
        proxy.until_served_by(what, &backends, &expected).await;
    };
    served_by("the first list", [true, false]).await;
    std::fs::write(&file, list(&[one, two]).to_string()).unwrap();
    served_by("a longer list", [true, true]).await;
    // What cannot be read changes nothing.
    std::fs::write(&file, "[{").unwrap();
    proxy.until_without_list("cannot be used", 1).await;
    std::fs::write(&file, list(&[two]).to_string()).unwrap();
    served_by("another list", [false, true]).await;
    std::fs::remove_file(&file).unwrap();
    proxy.until_without_list("cannot be used", 2).await;
    std::fs::write(&file, "[]").unwrap();
    until("nobody is left", async || proxy.answer().await == "503").await;
}

/// A list behind HTTP; `None` for a server that fails.
type Served = Arc<Mutex<(u32, Option<Value>)>>;

async fn served(State(served): State<Served>, headers: HeaderMap) -> Response {
    let (version, list) = served.lock().unwrap().clone();
    let tag = format!("\"{version}\"");
    match list {
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Some(_)
            if headers
                .get(header::IF_NONE_MATCH)
                .is_some_and(|known| *known == tag) =>
        {
            StatusCode::NOT_MODIFIED.into_response()
        }
        Some(list) => ([(header::ETAG, tag)], list.to_string()).into_response(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_behind_http_is_followed() {
    let backends = [RawBackend::start(ok).await, RawBackend::start(ok).await];
    let [one, two] = &backends;
    let state: Served = Arc::new(Mutex::new((1, Some(list(&[one])))));
    let app = axum::Router::new()
        .fallback(served)
        .with_state(state.clone());
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let url = format!("http://{}/nodes.json", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let proxy = Proxy::start("nodes_from_http", "--url", &url);
    let served_by = async |what: &str, expected: [bool; 2]| {
        proxy.until_served_by(what, &backends, &expected).await;
    };
    served_by("the first list", [true, false]).await;
    *state.lock().unwrap() = (2, None);
    proxy.until_without_list("there is no list", 1).await;
    *state.lock().unwrap() = (3, Some(list(&[two])));
    served_by("another list", [false, true]).await;
}

/// Ends the connection of each request to `/broken`.
fn breaking(request: &str) -> Vec<u8> {
    match request.contains("/broken") {
        true => Vec::new(),
        false => ok(request),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_ones_own_is_made_of_the_parts_of_the_bundled_one() {
    let (good, broken) = (
        RawBackend::start(ok).await,
        RawBackend::start(breaking).await,
    );
    let file = scratch("own-proxy.json");
    let write = |list: Value| std::fs::write(&file, list.to_string()).unwrap();
    write(list(&[&good]));
    let proxy = Proxy::start("nodes_from_file", "--file", file.to_str().unwrap());
    let send = async |method: &str, path: &str, more: &str| {
        let stream = TcpStream::connect(&proxy.listen).await.unwrap();
        let mut client = Raw(stream);
        let request = format!("{method} {path} HTTP/1.1\r\nHost: a\r\n{more}\r\n");
        client.send(request.as_bytes()).await;
        client.response().await
    };
    until("it serves", async || proxy.answer().await == "200").await;
    // Who the client is, whatever it says.
    let says = "X-Forwarded-For: 6.6.6.6\r\nx_leader_epoch: 9\r\nX-Leader-Epoch: 9\r\n";
    assert_eq!(status(&send("GET", "/", says).await), "200");
    let last = good.last();
    assert!(
        last.contains(&format!("x-forwarded-for: {}\r\n", local())),
        "{last}"
    );
    for theirs in ["6.6.6.6", "x_leader_epoch", "x-leader-epoch"] {
        assert!(!last.contains(theirs), "{last}");
    }
    // What comes back to it is refused.
    let via = last.lines().find_map(|line| line.strip_prefix("via: "));
    let via = format!("Via: {}\r\n", via.expect("a field Via"));
    assert_eq!(status(&send("GET", "/", &via).await), "508");
    // A dead backend costs no request, whatever its method; one that breaks off only those that have effects.
    let dead = entry("dead", Some(free_port()), json!({}));
    let mut all = list(&[&good, &broken]);
    all.as_array_mut().unwrap().push(dead);
    write(all);
    until("both serve", async || {
        let before = broken.requests().len();
        assert_eq!(proxy.answer().await, "200");
        broken.requests().len() > before
    })
    .await;
    for _ in 0..50 {
        assert_eq!(status(&send("GET", "/", "").await), "200");
        let post = send("POST", "/", "Content-Length: 0\r\n").await;
        assert_eq!(status(&post), "200");
    }
    let before = broken.requests().len();
    for _ in 0..20 {
        assert_eq!(status(&send("GET", "/broken", "").await), "200");
    }
    assert!(broken.requests().len() > before, "it was tried");
}

/// What holds for the bundled proxy: a taken port is an error at the start, SIGHUP ends nothing, and SIGTERM waits for what is
/// in flight, and for nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_ones_own_listens_and_ends_as_the_bundled_one_does() {
    let slow = RawBackend::start_slow(Duration::from_secs(3)).await;
    let file = scratch("nodes-of-own-proxy.json");
    std::fs::write(&file, list(&[&slow]).to_string()).unwrap();
    let mut proxy = Proxy::start("nodes_from_file", "--file", file.to_str().unwrap());
    until("it serves", async || proxy.answer().await == "200").await;
    let second = Command::new(optimised("nodes_from_file"))
        .args(["--file", file.to_str().unwrap(), "--listen", &proxy.listen])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success(), "{said}");
    assert!(
        said.contains(&format!("cannot listen on {}", proxy.listen)),
        "{said}"
    );
    proxy.program.signal("HUP");
    // The limits of the front hold, over HTTP/2 too.
    let mut large = Raw(TcpStream::connect(&proxy.listen).await.unwrap());
    let field = format!("x-large: {}\r\n", "x".repeat(200_000));
    assert_eq!(status(&large.get(&field).await), "431");
    let over_2 = TcpStream::connect(&proxy.listen).await.unwrap();
    let (sender, driving) = h2::client::handshake(over_2).await.unwrap();
    let driving = tokio::spawn(driving);
    let request = |size: usize| {
        let request = http::Request::get("http://a/").header("x-large", "x".repeat(size));
        request.body(()).unwrap()
    };
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(request(80_000), true).unwrap();
    assert_eq!(response.await.unwrap().status(), 431);
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(request(30_000), true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    let requests = slow.requests().len();
    let stream = TcpStream::connect(&proxy.listen).await.unwrap();
    let mut idle = Raw(TcpStream::connect(&proxy.listen).await.unwrap());
    assert_eq!(status(&idle.get("").await), "200");
    let in_flight = tokio::spawn(async move { Raw(stream).get("").await });
    until("the request is there", async || {
        slow.requests().len() >= requests + 2
    })
    .await;
    let start = Instant::now();
    proxy.program.signal("TERM");
    until("HTTP/2 is told", async || {
        sender.clone().ready().await.is_err()
    })
    .await;
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "before the end of the delay"
    );
    assert!(driving.await.is_ok());
    let response = in_flight.await.unwrap();
    assert_eq!(status(&response), "200", "{response}");
    assert!(
        response.to_lowercase().contains("connection: close"),
        "{response}"
    );
    assert_eq!(idle.rest().await, "");
    let (ended, _) = proxy.program.ended().await;
    assert!(ended.success(), "{ended}");
    assert!(
        start.elapsed() < Duration::from_secs(12),
        "{:?}",
        start.elapsed()
    );
}
