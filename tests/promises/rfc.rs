//! A table of raw requests against the running program: what the RFCs ask for, and what HAProxy, nginx
//! and Envoy do with the same bytes.

use std::time::Duration;

use super::raw::{Raw, RawBackend, in_front_of, ok, status};
use super::world::Balancer;

/// One request, byte by byte.
struct Case {
    name: &'static str,
    /// What the RFCs say, and what others do.
    why: &'static str,
    bytes: &'static [u8],
    /// The statuses of all responses on the connection, in order.
    statuses: &'static [&'static str],
    /// How many requests reach the backend.
    forwarded: usize,
}

const CASES: &[Case] = &[
    Case {
        name: "length twice, equal",
        why: "RFC 9112 6.3: may be folded. HAProxy folds, nginx and Envoy refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "length twice, unequal",
        why: "RFC 9112 6.3: an error. All refuse with 400",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a length that is no number",
        why: "RFC 9112 6.3: an error. All refuse with 400",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\nab",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "length and chunks",
        why: "RFC 9112 6.1: chunks win and the connection ends, or 400. HAProxy and nginx do the first, Envoy refuses",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "chunked is not last",
        why: "RFC 9112 6.1: 400. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "an unknown coding",
        why: "RFC 9112 6.1: 501 or 400. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "chunks in HTTP/1.0",
        why: "RFC 9112 6.1: faulty framing. HAProxy and Envoy refuse",
        bytes: b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a space before the colon",
        why: "RFC 9112 5.1: 400. All refuse",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a field over two lines",
        why: "RFC 9112 5.2: 400, or spaces instead. HAProxy does the second, nginx and Envoy refuse",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nX-Folded: one\r\n two\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "no host",
        why: "RFC 9112 3.2: 400. HAProxy forwards, nginx and Envoy refuse",
        bytes: b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "host twice",
        why: "RFC 9112 3.2: 400. All refuse",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "absolute form",
        why: "RFC 9112 3.2.2: must be accepted. All accept",
        bytes: b"GET http://a/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a zero in a field",
        why: "RFC 9110 5.5: 400, or a space. All refuse",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "CONNECT",
        why: "RFC 9110 9.3.6: only for proxies that offer it. nginx gives 405",
        bytes: b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        statuses: &["405"],
        forwarded: 0,
    },
    Case {
        name: "garbage",
        why: "RFC 9112 3: 400. All refuse",
        bytes: b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "an empty line first",
        why: "RFC 9112 2.2: should be ignored. All ignore it",
        bytes: b"\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "two at once",
        why: "RFC 9112 9.3.2: answered in order. All do",
        bytes: b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200", "200"],
        forwarded: 2,
    },
    Case {
        name: "HEAD",
        why: "RFC 9110 9.3.2: a length and no body. All do",
        bytes: b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "204",
        why: "RFC 9112 6.3: ends with its head, so that the next response follows. All do",
        bytes: b"GET /204 HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["204", "200"],
        forwarded: 2,
    },
    Case {
        name: "304",
        why: "RFC 9112 6.3: ends with its head, whatever length it tells of the resource. All do",
        bytes: b"GET /304 HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["304", "200"],
        forwarded: 2,
    },
    Case {
        name: "a request in HTTP/1.0",
        why: "RFC 9112 9.3: the connection ends after the response. All do",
        bytes: b"GET / HTTP/1.0\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "chunks with extensions and trailers",
        why: "RFC 9112 7.1: extensions may be ignored, trailers dropped. All do",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2;x=y\r\nab\r\n0\r\nX-Trailer: 1\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a chunk whose length is no number",
        why: "RFC 9112 7.1: an error, and the connection ends. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a loop",
        why: "RFC 9110 7.6.3: Via shows it; 508 of RFC 5842. Others loop",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nVia: 1.1 other\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "lines that end with LF",
        why: "RFC 9112 2.2: may be accepted. All accept",
        bytes: b"GET / HTTP/1.1\nHost: a\nConnection: close\n\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a CR alone in a field",
        why: "RFC 9112 2.2: invalid, or a space. HAProxy and nginx refuse, Envoy makes a space of it",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a list of equal lengths",
        why: "RFC 9112 6.3: may be folded. HAProxy folds, nginx and Envoy refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2, 2\r\n\r\nab",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a length beyond 64 bits",
        why: "RFC 9112 6.3: an error. All refuse with 400",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\nab",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "chunked twice",
        why: "RFC 9112 6.1: not allowed. HAProxy and nginx refuse with 400, Envoy with 501",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a chunk beyond 64 bits",
        why: "RFC 9112 7.1: an overflow must not go unnoticed. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000002\r\nab\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a chunk of less than nothing",
        why: "RFC 9112 7.1: an error. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a space before the length of a chunk",
        why: "RFC 9112 7.1: an error. All refuse",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n 2\r\nab\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a chunk that is longer than it says",
        why: "RFC 9112 7.1: an error. HAProxy and nginx refuse, Envoy takes it",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabX\r\n0\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "chunks whose lines end with LF",
        why: "RFC 9112 7.1: an error. HAProxy and nginx take them, Envoy refuses",
        bytes: b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\nab\n0\n\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "another expectation",
        why: "RFC 9110 10.1.1: 417, or ignored. All ignore it",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x-other\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "HEAD whose response has chunks",
        why: "RFC 9112 6.3: ends with its head. All do",
        bytes: b"HEAD /chunked HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200", "200"],
        forwarded: 2,
    },
    Case {
        name: "a body of GET",
        why: "RFC 9110 9.3.1: no meaning, and part of the message all the same. All pass it on",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "absolute form for another host",
        why: "RFC 9112 3.2.2: the host of the target counts. nginx and Envoy do that, HAProxy refuses",
        bytes: b"GET http://b/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "OPTIONS for the server",
        why: "RFC 9112 3.2.4: for a proxy's origin. HAProxy passes it on, nginx gives 400, Envoy 404",
        bytes: b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "trailers of a response",
        why: "RFC 9110 6.5.1: may be dropped. HAProxy passes them on, nginx and Envoy drop them",
        bytes: b"GET /trailers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a method that is no token",
        why: "RFC 9110 9.1: an error. All refuse",
        bytes: b"GE(T / HTTP/1.1\r\nHost: a\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a space in the host",
        why: "RFC 9112 3.2: 400. nginx and Envoy refuse, HAProxy passes it on",
        bytes: b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a target without a slash",
        why: "RFC 9112 3.2: 400. nginx and Envoy refuse, HAProxy passes it on",
        bytes: b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "a space in the target",
        why: "RFC 9112 3.2: 400. All refuse; Pingora makes %20 of it, so that no backend sees it",
        bytes: b"GET /a b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a fragment",
        why: "RFC 9112 3.2: no part of a target. HAProxy and Envoy refuse, nginx drops it, as Pingora does",
        bytes: b"GET /a#b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "a field without a name",
        why: "RFC 9110 5.1: an error. All refuse",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "bytes above 127 in a field",
        why: "RFC 9110 5.5: opaque. All pass them on",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nX: \xe4\xff\r\nConnection: close\r\n\r\n",
        statuses: &["200"],
        forwarded: 1,
    },
    Case {
        name: "HTTP/1.2",
        why: "RFC 9110 2.5: as the highest minor version that is known. HAProxy and nginx do that, Envoy gives 426",
        bytes: b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "HTTP/2.0 in the form of HTTP/1",
        why: "RFC 9110 15.6.6: 505. nginx gives 505, Envoy 426, HAProxy passes it on",
        bytes: b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "HTTP/0.9",
        why: "RFC 9112 has none of it. HAProxy refuses, Envoy gives 426, nginx passes it on",
        bytes: b"GET /\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
    Case {
        name: "Connection names the host",
        why: "RFC 9110 7.6.1: not a field of one hop. HAProxy and nginx ignore that, Envoy refuses",
        bytes: b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, host\r\n\r\n",
        statuses: &["400"],
        forwarded: 0,
    },
];

fn statuses(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| line.starts_with("HTTP/1."));
    lines.map(|line| status(line).to_owned()).collect()
}

/// What comes back until the connection ends, or until nothing comes any more.
async fn sent(balancer: &Balancer, bytes: &[u8]) -> String {
    let mut client = Raw::to(balancer).await;
    client.send(bytes).await;
    client.rest().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_requests_are_answered_as_the_rfcs_ask() {
    let without_body = |request: &str| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        match path {
            "/204" => b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(),
            "/304" => {
                b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\n".to_vec()
            }
            "/chunked" => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec(),
            "/trailers" => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                             2\r\nok\r\n0\r\nX-Trailer: 1\r\n\r\n"
                .to_vec(),
            _ => ok(request),
        }
    };
    let backend = RawBackend::start(without_body).await;
    let fields = "timeouts: { client_header_ms: 2000, client_idle_ms: 500, client_body_ms: 2000 }";
    let balancer = in_front_of(&backend, "rfc", fields).await;
    let mut wrong = Vec::new();
    for case in CASES {
        let before = backend.requests().len();
        let text = sent(&balancer, case.bytes).await;
        let forwarded = backend.requests().len() - before;
        if statuses(&text) != case.statuses || forwarded != case.forwarded {
            wrong.push(format!(
                "{} ({}): {forwarded} forwarded, {text:?}",
                case.name, case.why
            ));
        }
        let head = text
            .split("\r\n\r\n")
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        if case.name == "204" && (head.contains("content-length") || head.contains("chunked")) {
            wrong.push(format!("a length for 204: {text:?}"));
        }
        let target = backend.last().lines().next().unwrap_or_default().to_owned();
        for (name, expected) in [
            ("a space in the target", "get /a%20b http/1.1"),
            ("a fragment", "get /a http/1.1"),
        ] {
            if case.name == name && target != expected {
                wrong.push(format!("{name}: {target}"));
            }
        }
        if case.name == "HEAD" && !text.ends_with("\r\n\r\n") {
            wrong.push(format!("a body for HEAD: {text:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let smuggled = backend
        .requests()
        .iter()
        .any(|request| request.contains("/smuggled"));
    assert!(!smuggled, "a second request in the body of the first one");
    // Bad requests of clients are no errors of the program.
    assert_eq!(
        balancer.log_text().matches("ERROR").count(),
        0,
        "{}",
        balancer.log_text()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expectation_is_passed_on_and_an_early_answer_ends_an_upload() {
    // Only the head is waited for.
    let backend = RawBackend::start_early(|request| match request.contains("/early") {
        true => {
            b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
        }
        false => b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
            .to_vec(),
    })
    .await;
    let balancer = in_front_of(&backend, "expect", "timeouts: { client_drain_ms: 1000 }").await;
    let mut client = Raw::to(&balancer).await;
    client
        .send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        .await;
    let mut text = super::raw::read_head(&mut client.0).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 100 Continue"), "{text}");
    client.send(b"body").await;
    // Perhaps it has come with the interim one.
    while !text.ends_with("ok\n") {
        let mut part = [0; 1_024];
        let count = tokio::io::AsyncReadExt::read(&mut client.0, &mut part).await;
        let count = count.unwrap();
        assert!(count > 0, "{text}");
        text += &String::from_utf8_lossy(&part[..count]);
    }
    let (_, last) = text.split_once("\r\n\r\n").unwrap();
    assert_eq!(status(last), "200", "{text}");
    // 20 MB of which nobody wants anything: the answer comes at once, and the rest is not waited for.
    let mut client = Raw::to(&balancer).await;
    let start = std::time::Instant::now();
    client
        .send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n")
        .await;
    let (read, write) = client.0.into_split();
    let uploading = tokio::spawn(async move {
        let mut write = write;
        let part = vec![b'x'; 65_536];
        for _ in 0..306 {
            if tokio::io::AsyncWriteExt::write_all(&mut write, &part)
                .await
                .is_err()
            {
                return;
            }
        }
    });
    let mut read = read;
    let mut text = vec![0; 1_024];
    let answer = tokio::io::AsyncReadExt::read(&mut read, &mut text);
    let count = tokio::time::timeout(Duration::from_secs(5), answer)
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8_lossy(&text[..count]).into_owned();
    assert_eq!(status(&answer), "413", "{answer}");
    assert!(start.elapsed() < Duration::from_secs(3));
    uploading.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_ends_its_side_is_served_if_that_is_set() {
    let backend = RawBackend::start_slow(Duration::from_secs(2)).await;
    for (fields, expected) in [("", "none"), ("clients: { half_closed: true }", "200")] {
        let balancer = in_front_of(&backend, "half-closed", fields).await;
        let mut client = Raw::to(&balancer).await;
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        tokio::io::AsyncWriteExt::shutdown(&mut client.0)
            .await
            .unwrap();
        assert_eq!(status(&client.rest().await), expected, "{fields}");
    }
}
