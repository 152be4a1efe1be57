//! What clients send, to the front and Pingora's proxy behind it.

use std::sync::LazyLock;
use std::time::Duration;

use fastrand::Rng;
use pingora_etcd::config::ClusterConfig;
use pingora_etcd::proxy::PipedProxy;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use crate::Trace;
use crate::corpora;
use crate::mutate::Corpus;

static CONNECTIONS: LazyLock<Corpus> = LazyLock::new(corpora::connections);

/// What the proxy may answer without a backend.
const STATUSES: [u16; 10] = [100, 400, 405, 408, 411, 413, 431, 501, 503, 508];
/// No client holds a connection for longer than its times allow, however it goes on: a head, a body, its
/// rest, and the time between requests for each of a few requests.
const LONGEST: Duration = Duration::from_secs(600);

thread_local! {
    static PROXY: (Runtime, PipedProxy) = {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let text = "cluster: { group: g, listen: '127.0.0.1:1', etcd: { endpoints: ['memory://fuzz'] } }";
        let runtime = runtime.unwrap();
        let config = ClusterConfig::from_yaml(text, "fuzz.yaml").unwrap();
        let proxy = {
            let _entered = runtime.enter();
            PipedProxy::new(&config).unwrap()
        };
        (runtime, proxy)
    };
}

/// One connection, whose bytes arrive in parts.
pub(crate) fn connection(rng: &mut Rng, trace: &mut Trace) {
    let mut bytes = Vec::new();
    for _ in 0..rng.usize(1..4) {
        bytes.extend(CONNECTIONS.next(rng).1);
    }
    trace.input(&bytes);
    let mut parts = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let length = match rng.u8(..4) {
            0 => 1,
            1 => rng.usize(1..=rest.len().min(32)),
            _ => rest.len(),
        };
        let (part, behind) = rest.split_at(length);
        parts.push(part);
        rest = behind;
    }
    let ends = rng.bool();
    let (answer, took) = PROXY.with(|(runtime, proxy)| {
        runtime.block_on(async {
            let start = Instant::now();
            (proxy.exchange(&parts, ends).await, start.elapsed())
        })
    });
    assert!(took <= LONGEST, "the connection lasted {took:?}");
    let is_http2 = bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    let served = match is_http2 {
        true => frames(&answer),
        false => responses(&answer),
    };
    trace.done(served);
}

/// Checks that these are complete responses of HTTP/1, and returns whether one is the proxy's.
fn responses(mut bytes: &[u8]) -> bool {
    let mut served = false;
    while !bytes.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(bytes);
        let Ok(httparse::Status::Complete(length)) = parsed else {
            panic!(
                "no response: {parsed:?} {:?}",
                bytes.escape_ascii().to_string()
            );
        };
        let code = response.code.unwrap();
        assert!(STATUSES.contains(&code), "the status {code}");
        served |= code == 503;
        let find = |name: &str| {
            let header = response
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case(name));
            header.map(|header| std::str::from_utf8(header.value).unwrap())
        };
        assert_eq!(find("transfer-encoding"), None, "{code}");
        let body = find("content-length").map_or(0, |length| length.parse().unwrap());
        bytes = &bytes[length..];
        // The response to HEAD has no body; a response or the end follows.
        let has_body = bytes.len() >= body && !bytes.starts_with(b"HTTP/1.");
        bytes = if has_body { &bytes[body..] } else { bytes };
    }
    served
}

/// Checks that these are complete frames of HTTP/2, and returns whether one has the head of a response.
fn frames(mut bytes: &[u8]) -> bool {
    let mut served = false;
    while !bytes.is_empty() {
        assert!(bytes.len() >= 9, "a part of a frame");
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]);
        let (kind, length) = (bytes[3], usize::try_from(length).unwrap());
        assert!(kind <= 9, "a frame of the kind {kind}");
        assert!(bytes.len() >= 9 + length, "a part of a frame");
        served |= kind == 1;
        bytes = &bytes[9 + length..];
    }
    served
}
