//! Tests of what backends and clients are told in headers.

use std::time::{Duration, Instant};

use serde_json::json;

use super::common::etcd::Etcd;
use super::common::group;
use super::raw::{
    Raw, RawBackend, header, http_2_backend, in_front_of, in_front_of_after, ok, status,
};
use super::world::{Setup, entry, put};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_learn_who_the_client_is_from_trusted_proxies_only() {
    let backend = RawBackend::start(ok).await;
    let claims = "X-Forwarded-For: 6.6.6.6, 192.0.2.7\r\nX-Forwarded-Proto: https\r\n\
                  X-Forwarded-Host: b\r\nX-Forwarded-Port: 443\r\nForwarded: for=6.6.6.6\r\n";
    let believing = "clients: { trusted_proxies: ['127.0.0.0/8'] }";
    for (name, fields, claimed) in [("strangers", "", false), ("trusted", believing, true)] {
        let balancer = in_front_of(&backend, name, fields).await;
        let mut client = Raw::to(&balancer).await;
        assert_eq!(status(&client.get(claims).await), "200");
        let seen = backend.last();
        let port = balancer.listen.rsplit_once(':').unwrap().1;
        let expected = match claimed {
            true => ["6.6.6.6, 192.0.2.7, 127.0.0.1", "https", "b", "443"],
            false => ["127.0.0.1", "http", "a", port],
        };
        let names = ["for", "proto", "host", "port"];
        for (name, expected) in names.iter().zip(expected) {
            let value = header(&seen, &format!("x-forwarded-{name}"));
            assert_eq!(value, Some(expected), "{seen}");
        }
        assert_eq!(header(&seen, "forwarded").is_some(), claimed, "{seen}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_header_names_the_client_if_it_comes_from_whom_it_is_expected() {
    let backend = RawBackend::start(ok).await;
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let v1 = b"PROXY TCP4 192.0.2.7 192.0.2.8 5000 8443\r\n".to_vec();
    let v2 = [
        &b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"[..],
        &[192, 0, 2, 7, 192, 0, 2, 8, 0x13, 0x88, 0x20, 0xfb],
    ]
    .concat();
    let from = "clients: { proxy_protocol: ['127.0.0.1'], proxy_protocol_timeout_ms: 4000 }";
    let balancer = in_front_of_after(&backend, "proxied", from, &v1).await;
    for header_bytes in [&v1, &v2] {
        // In one part, and byte by byte.
        for parts in [1, header_bytes.len()] {
            let mut client = Raw::to(&balancer).await;
            for part in header_bytes.chunks(header_bytes.len() / parts) {
                client.send(part).await;
                tokio::task::yield_now().await;
            }
            client.send(request.as_bytes()).await;
            assert_eq!(status(&client.response().await), "200");
            let seen = backend.last();
            assert_eq!(header(&seen, "x-forwarded-for"), Some("192.0.2.7"));
            assert_eq!(header(&seen, "x-forwarded-port"), Some("8443"));
            // The next request on the connection has none.
            assert_eq!(status(&client.get("").await), "200");
            assert_eq!(
                header(&backend.last(), "x-forwarded-for"),
                Some("192.0.2.7")
            );
        }
    }
    // Without one, with half of one, and with one from somebody else.
    for (bytes, is_begun) in [(request.as_bytes(), false), (&v1[..20], true)] {
        let start = Instant::now();
        let mut client = Raw::to(&balancer).await;
        client.send(bytes).await;
        assert_eq!(client.rest().await, "");
        // By default it would be three seconds.
        let took = start.elapsed();
        assert!(!is_begun || took > Duration::from_millis(3_500), "{took:?}");
    }
    let from = "clients: { proxy_protocol: ['192.0.2.1'] }";
    let balancer = in_front_of(&backend, "unproxied", from).await;
    for bytes in [&v1, &v2] {
        let mut client = Raw::to(&balancer).await;
        client.send(&[bytes, request.as_bytes()].concat()).await;
        assert_eq!(status(&client.rest().await), "400");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_can_send_the_leaders_token_by_another_spelling() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "spelling", "").await;
    let mut client = Raw::to(&balancer).await;
    let head = "x_leader_epoch: 999999\r\nX-Leader_Epoch: 1\r\nx-leader-epoch: 2\r\nx_other: 3\r\n";
    assert_eq!(status(&client.get(head).await), "200");
    let seen = backend.last();
    assert!(!seen.contains("epoch"), "{seen}");
    assert!(seen.contains("x_other: 3"), "{seen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_at_the_balancers_own_address_gets_508_at_once() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "loops", "retries: 0").await;
    let port: u16 = balancer.listen.rsplit_once(':').unwrap().1.parse().unwrap();
    let group = &balancer.group;
    let own = entry("a", Some(port), json!({}));
    put(&mut Etcd::shared().raw_client().await, group, &own, None).await;
    super::world::until("the request comes back", async || {
        balancer.get().await == "508"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_of_the_connection_to_the_backend_do_not_reach_the_client() {
    let answer = |_: &str| {
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Secret\r\nX-Secret: 1\r\n\
          Keep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\nProxy-Support: a\r\n\
          Proxy-Status: b\r\nTrailer: x\r\nUpgrade: h2c\r\n\
          X-Kept: 1\r\n\r\n"
            .to_vec()
    };
    let backend = RawBackend::start(answer).await;
    let balancer = in_front_of(&backend, "hops", "").await;
    let mut client = Raw::to(&balancer).await;
    let response = client.get("").await.to_ascii_lowercase();
    for name in [
        "x-secret",
        "keep-alive",
        "proxy-authenticate",
        "proxy-support",
        "trailer",
        "upgrade",
    ] {
        assert_eq!(header(&response, name), None, "{response}");
    }
    assert_eq!(header(&response, "x-kept"), Some("1"));
    assert_eq!(header(&response, "proxy-status"), Some("b"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_http_1_0_gets_no_chunks() {
    let answer = |_: &str| {
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nok\n\r\n0\r\n\r\n".to_vec()
    };
    let backend = RawBackend::start(answer).await;
    let balancer = in_front_of(&backend, "old", "").await;
    for head in ["", "Connection: keep-alive\r\n"] {
        let mut client = Raw::to(&balancer).await;
        client
            .send(format!("GET / HTTP/1.0\r\n{head}\r\n").as_bytes())
            .await;
        let response = client.rest().await;
        assert!(response.ends_with("\r\n\r\nok\n"), "{response:?}");
        assert!(!response.to_ascii_lowercase().contains("chunked"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cookies_that_come_in_several_fields_of_http_2_are_one_for_backends() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "cookies", "").await;
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let client = client.build().unwrap();
    let request = client.get(&balancer.url).header("cookie", "a=1");
    let request = request.header("cookie", "session=x");
    assert_eq!(request.send().await.unwrap().status(), 200);
    let seen = backend.last();
    assert_eq!(seen.matches("cookie: ").count(), 1, "{seen}");
    assert!(seen.contains("\r\ncookie: a=1; session=x\r\n"), "{seen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_http_1_0_gets_no_chunks_of_http_2_and_no_interim_responses() {
    let (port, _serving) = http_2_backend(Duration::ZERO).await;
    let hints = |_: &str| {
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n".to_vec()
    };
    let backend = RawBackend::start(hints).await;
    for (name, port, fields) in [
        ("old-h2", port, "backends: { protocol: h2c }"),
        ("old-hints", backend.address.port(), ""),
    ] {
        let (etcd, group) = (Etcd::shared(), group(name));
        let entry = entry("a", Some(port), json!({}));
        put(&mut etcd.raw_client().await, &group, &entry, None).await;
        let balancer = Setup::shared(&group).with(fields).serving().await;
        let mut client = Raw::to(&balancer).await;
        client.send(b"GET / HTTP/1.0\r\n\r\n").await;
        let response = client.rest().await;
        assert_eq!(status(&response), "200", "{name}: {response}");
        assert!(response.ends_with("\r\n\r\nok\n"), "{name}: {response}");
        assert!(
            !response.to_ascii_lowercase().contains("chunked"),
            "{response}"
        );
    }
}
