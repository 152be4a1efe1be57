//! Tests of how long a backend, and a request in all, may take: each time by itself, whoever speaks which version of HTTP.

use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::Uri;
use axum::response::Response;
use reqwest::StatusCode;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::stalls::Stalls;
use super::common::{group, local};
use super::raw::{Raw, RawBackend, http_2, in_front_of, ok, read_head, status};
use super::tls::OverTls;
use super::world::{Balancer, Setup, entry, put, until};

const SECOND: Duration = Duration::from_secs(1);
/// Much longer than the short times of these tests.
const PAUSE: Duration = Duration::from_secs(5);

/// Sends a first part, and the second one after this time. Then it ends, or hangs.
fn in_parts(pause: Duration, ends: bool) -> Response {
    let (sender, parts) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(2);
    tokio::spawn(async move {
        let _ = sender.send(Ok("one".into())).await;
        tokio::time::sleep(pause).await;
        let _ = sender.send(Ok("two".into())).await;
        if !ends {
            std::future::pending::<()>().await;
        }
    });
    let parts = tokio_stream::wrappers::ReceiverStream::new(parts);
    Response::new(Body::from_stream(parts))
}

/// A backend that speaks HTTP/1 and HTTP/2: its response to `/soon` begins after a second, that to `/late` after [`PAUSE`];
/// that to `/parts` goes on after [`PAUSE`], and that to `/more` after 4 seconds, and has no end; that to `/head` is a head,
/// and no more; that to `/whole` comes after the whole request.
async fn backend() -> (u16, JoinSet<()>) {
    let answer = async |uri: Uri, body: Body| match uri.path() {
        "/soon" => {
            tokio::time::sleep(SECOND).await;
            Response::new(Body::from("soon"))
        }
        "/late" => {
            tokio::time::sleep(PAUSE).await;
            Response::new(Body::from("late"))
        }
        "/parts" => in_parts(PAUSE, true),
        "/whole" => {
            let read = axum::body::to_bytes(body, usize::MAX).await;
            Response::new(Body::from(format!("{} bytes", read.unwrap().len())))
        }
        "/more" => in_parts(4 * SECOND, false),
        "/head" => Response::new(Body::from_stream(tokio_stream::pending::<
            Result<Bytes, std::io::Error>,
        >())),
        _ => Response::new(Body::from("ok")),
    };
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut serving = JoinSet::new();
    let app = axum::Router::new().fallback(answer);
    serving.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (port, serving)
}

/// What the file says of backends that speak in this way, and where they are.
async fn spoken_to(protocol: &str, port: u16) -> (String, u16, Option<OverTls>) {
    match protocol {
        "https" => {
            let tls = OverTls::to(port).await;
            let fields = format!("backends: {{ protocol: https, {} }}", tls.fields);
            (fields, tls.port, Some(tls))
        }
        _ => (format!("backends: {{ protocol: {protocol} }}"), port, None),
    }
}

async fn before(port: u16, name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(port), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let balancer = Setup::shared(&group).with(fields).start();
    until("it serves", async || balancer.get().await == "a").await;
    balancer
}

/// A client of HTTP/1, and one of HTTP/2.
fn clients() -> [reqwest::Client; 2] {
    let builder = || reqwest::Client::builder().no_proxy();
    let over_2 = builder().http2_prior_knowledge();
    [builder().build().unwrap(), over_2.build().unwrap()]
}

/// The status, what comes of the body, whether all of it came, and how long that took.
async fn get(
    client: &reqwest::Client,
    balancer: &Balancer,
    path: &str,
) -> (StatusCode, String, bool, Duration) {
    let start = Instant::now();
    let request = client.get(format!("{}{path}", balancer.url)).send();
    let mut response = request.await.unwrap();
    let mut body = Vec::new();
    let is_whole = loop {
        match response.chunk().await {
            Ok(Some(part)) => body.extend_from_slice(&part),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let text = String::from_utf8(body).unwrap();
    (response.status(), text, is_whole, start.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_has_a_time_to_begin_and_another_one_to_go_on() {
    let (port, _serving) = backend().await;
    tokio::join!(
        begins_and_goes_on(port, "http1"),
        begins_and_goes_on(port, "https"),
        begins_and_goes_on(port, "h2c"),
    );
}

async fn begins_and_goes_on(port: u16, protocol: &str) {
    let (backends, port, _tls) = spoken_to(protocol, port).await;
    let before = async |name: &str, times: &str| {
        let fields = format!(
            "{backends}\nretries: 0\ntimeouts: {{ {times} }}\n\
             routes:\n- {{ path: /own, group: default, rewrite: {{ path: / }}, timeouts: {{ read_ms: 20000 }} }}"
        );
        before(port, &format!("waits-{name}-{protocol}"), &fields).await
    };
    let goes_on = before("on", "response_ms: 1500, read_ms: 20000").await;
    let begins = before("begins", "response_ms: 20000, read_ms: 1500").await;
    let both = before("both", "response_ms: 1500").await;
    for (client, version) in clients().iter().zip([1, 2]) {
        let is = format!("{protocol}, HTTP/{version}");
        // A client of HTTP/2 before a backend of HTTP/2 has the longer one.
        let is_apart = protocol != "h2c" || version == 1;
        let (status, text, is_whole, took) = get(client, &goes_on, "/late").await;
        match is_apart {
            true => assert!(
                status == 504 && took < 4 * SECOND,
                "{is}: {status} {took:?}"
            ),
            false => assert!(status == 200 && text == "late", "{is}: {status}"),
        }
        assert!(is_whole, "{is}");
        let (status, text, is_whole, _) = get(client, &goes_on, "/parts").await;
        assert_eq!(
            (status.as_u16(), &*text, is_whole),
            (200, "onetwo", true),
            "{is}"
        );
        let (status, text, _, _) = get(client, &begins, "/late").await;
        assert_eq!((status.as_u16(), &*text), (200, "late"), "{is}");
        let (status, text, is_whole, took) = get(client, &begins, "/parts").await;
        match is_apart {
            true => {
                assert_eq!(
                    (status.as_u16(), &*text, is_whole),
                    (200, "one", false),
                    "{is}"
                );
                assert!(took < 4 * SECOND, "{is}: {took:?}");
            }
            false => assert!(is_whole && text == "onetwo", "{is}: {text}"),
        }
        if is_apart {
            let (status, text, is_whole, took) = get(client, &begins, "/head").await;
            assert_eq!(
                (status.as_u16(), &*text, is_whole),
                (200, "", false),
                "{is}"
            );
            assert!(took < 10 * SECOND, "{is}: {took:?}");
        }
        // A route has its own.
        let (_, text, is_whole, _) = get(client, &begins, "/own/parts").await;
        assert!(is_whole && text == "onetwo", "{is}: {text}");
        // By default they are the same.
        let (status, ..) = get(client, &both, "/late").await;
        assert_eq!(status, 504, "{is}");
        let (_, text, is_whole, _) = get(client, &both, "/parts").await;
        assert_eq!((&*text, is_whole), ("one", false), "{is}");
    }
}

/// A part of the response just before does not give it as much time again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_time_though_its_backend_has_just_sent_something() {
    let (port, _serving) = backend().await;
    tokio::join!(
        ends_with_its_time(port, "http1"),
        ends_with_its_time(port, "https"),
        ends_with_its_time(port, "h2c"),
    );
}

async fn ends_with_its_time(port: u16, protocol: &str) {
    let (backends, port, _tls) = spoken_to(protocol, port).await;
    let fields = format!("{backends}\ntimeouts: {{ request_ms: 6000 }}");
    let balancer = before(port, &format!("waits-all-{protocol}"), &fields).await;
    for (client, version) in clients().iter().zip([1, 2]) {
        let (status, text, is_whole, took) = get(client, &balancer, "/more").await;
        assert_eq!((status.as_u16(), &*text, is_whole), (200, "onetwo", false));
        let is_exact = protocol != "h2c" || version == 1;
        // Otherwise within as much time as there was left when it began.
        let most = if is_exact { 10 * SECOND } else { 14 * SECOND };
        let is = format!("{protocol}, HTTP/{version}: {took:?}");
        assert!(took >= 6 * SECOND && took < most, "{is}");
        let (status, text, ..) = get(client, &balancer, "/soon").await;
        assert_eq!((status.as_u16(), &*text), (200, "soon"));
    }
    // The next one on a connection has its own.
    let mut client = Raw::to(&balancer).await;
    for _ in 0..2 {
        assert_eq!(super::raw::status(&client.get("").await), "200");
        tokio::time::sleep(7 * SECOND).await;
    }
}

/// A backend that takes no more of a request is not waited for longer than one that does not answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_time_though_its_backend_does_not_read_it() {
    let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            // The first request is answered, whatever it is; a later one has no reader.
            if read_head(&mut stream)
                .await
                .is_some_and(|head| head.starts_with("GET"))
            {
                stream.write_all(&ok("")).await.unwrap();
            }
            kept.push(stream);
        }
    });
    for protocol in ["http1", "https"] {
        let (backends, port, _tls) = spoken_to(protocol, port).await;
        let fields = format!("{backends}\ntimeouts: {{ request_ms: 2000 }}");
        upload_without_reader(&before(port, &format!("waits-write-{protocol}"), &fields).await)
            .await;
    }
}

async fn upload_without_reader(balancer: &Balancer) {
    let start = Instant::now();
    let mut client = Raw::to(balancer).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50000000\r\n\r\n";
    client.send(head.as_bytes()).await;
    let sending = async {
        let part = vec![b'x'; 100_000];
        // Until the proxy takes no more.
        for _ in 0..500 {
            if client.0.write_all(&part).await.is_err() {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(4 * SECOND, sending).await;
    assert_eq!(super::raw::status(&client.rest().await), "504");
    assert!(start.elapsed() < 10 * SECOND, "{:?}", start.elapsed());
}

/// Over HTTP/2 no front can keep that time, because other requests go on over the same connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stalls_over_http_2_has_the_time_of_any_other_body() {
    let backend = RawBackend::start(ok).await;
    let times = "timeouts: { client_body_ms: 1000, response_ms: 60000 }";
    let (backends, port, _tls) = spoken_to("https", backend.address.port()).await;
    let over_tls = before(port, "waits-body-tls", &format!("{backends}\n{times}")).await;
    body_stalls(&over_tls).await;
    body_stalls(&in_front_of(&backend, "waits-body", times).await).await;
    let slow = RawBackend::start_slow(2 * SECOND).await;
    let balancer = in_front_of(&slow, "waits-after-body", times).await;
    let mut sender = http_2(&balancer).await;
    let request = http::Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = sender.send_request(request, false).unwrap();
    body.send_data("all".into(), true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    let mut client = Raw::to(&balancer).await;
    assert_eq!(status(&client.get("").await), "200");
}

async fn body_stalls(balancer: &Balancer) {
    let mut sender = http_2(balancer).await;
    let start = Instant::now();
    let request = http::Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = sender.send_request(request, false).unwrap();
    // Each part has its own time.
    for _ in 0..15 {
        body.send_data("part".into(), false).unwrap();
        tokio::time::sleep(SECOND / 10).await;
    }
    let response = tokio::time::timeout(20 * SECOND, response).await;
    assert_eq!(response.unwrap().unwrap().status(), 408);
    assert!(start.elapsed() > 2 * SECOND, "{:?}", start.elapsed());
    // Others on the same connection go on, and have the time of a response once they are complete.
    let request = http::Request::get("http://a/").body(()).unwrap();
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}

/// A backend of HTTP/2 gets no trailers of a request, but its end: otherwise it would wait for more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_trailers_has_an_end() {
    let (port, _serving) = backend().await;
    for protocol in ["http1", "h2c"] {
        let (backends, port, _tls) = spoken_to(protocol, port).await;
        let fields = format!("{backends}\ntimeouts: {{ client_body_ms: 2000, tunnel_ms: 2000 }}");
        let balancer = before(port, "waits-trailers", &fields).await;
        let mut sender = http_2(&balancer).await;
        let request = http::Request::post("http://a/whole").body(()).unwrap();
        let (response, mut body) = sender.send_request(request, false).unwrap();
        body.send_data("part".into(), false).unwrap();
        let trailers = [("x-sum", "1")].map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, http::HeaderValue::from_static(value))
        });
        body.send_trailers(trailers.into_iter().collect()).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.status(), 200, "{protocol}");
        let read = response.body_mut().data().await.unwrap().unwrap();
        assert_eq!(read, "4 bytes", "{protocol}");
    }
}

/// Clients of gRPC take a status for one only in a head that ends the stream, or in trailers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_answered_here_without_a_body_is_one_frame() {
    let balancer = Setup::shared(&group("nobody")).listening().await;
    let mut sender = http_2(&balancer).await;
    let call =
        http::Request::post("http://a/echo.Echo/Say").header("content-type", "application/grpc");
    let (response, mut body) = sender.send_request(call.body(()).unwrap(), false).unwrap();
    body.send_data("\0\0\0\0\0".into(), true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "14");
    assert!(
        response.body().is_end_stream(),
        "another frame follows the status"
    );
    let mut sender = sender.ready().await.unwrap();
    let head = http::Request::head("http://a/").body(()).unwrap();
    let response = sender.send_request(head, true).unwrap().0.await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.body().is_end_stream());
}

/// CANCEL would be taken for the client's own word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_its_backend_breaks_off_ends_with_an_error_of_the_server() {
    const BROKEN: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\nno chunk\r\n";
    let backend = RawBackend::start(|_: &str| BROKEN.to_vec()).await;
    let (etcd, group) = (Etcd::shared(), group("broken-off"));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let balancer = Setup::shared(&group).listening().await;
    let mut sender = http_2(&balancer).await;
    let get = http::Request::get("http://a/").body(()).unwrap();
    let response = sender.send_request(get, true).unwrap().0.await.unwrap();
    let mut body = response.into_body();
    let error = loop {
        match body.data().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("it ends as if it was complete"),
        }
    };
    assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR), "{error}");
}

/// A request that waits for its place does not read what its client sends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_waits_holds_up_no_other_one_on_its_connection() {
    let slow = RawBackend::start_slow(2 * SECOND).await;
    let (etcd, group) = (Etcd::shared(), group("upload-waits"));
    let entry = entry("a", Some(slow.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let fields = format!(
        "overload: {{ max_in_flight: 1, queue_timeout_ms: 9000 }}\n\
         groups: {{ free: {{ group: {group}, overload: {{ max_in_flight: 0 }}, registry: {{ format: native }} }} }}\n\
         routes: [{{ path: /free, group: free }}]"
    );
    let balancer = Setup::shared(&group).with(&fields).listening().await;
    let mut sender = http_2(&balancer).await;
    let stalls = Stalls::watch();
    let start = Instant::now();
    let post = |path: &str| {
        http::Request::post(format!("http://a{path}"))
            .body(())
            .unwrap()
    };
    let (first, _) = sender
        .send_request(http::Request::get("http://a/").body(()).unwrap(), true)
        .unwrap();
    let mut sender = sender.ready().await.unwrap();
    // More than a window of the protocol's default size.
    let (waits, mut body) = sender.send_request(post("/"), false).unwrap();
    body.send_data(vec![b'x'; 100_000].into(), true).unwrap();
    let mut sender = sender.ready().await.unwrap();
    tokio::time::sleep(SECOND / 2).await;
    let (other, mut body) = sender.send_request(post("/free"), false).unwrap();
    body.send_data("short".into(), true).unwrap();
    assert_eq!(other.await.unwrap().status(), 200);
    // Otherwise it would begin when the first one is over.
    let (took, stood) = (start.elapsed(), stalls.so_far());
    assert!(took < SECOND * 7 / 2 + stood, "{took:?}, {stood:?} still");
    assert_eq!(first.await.unwrap().status(), 200);
    assert_eq!(waits.await.unwrap().status(), 200);
}
