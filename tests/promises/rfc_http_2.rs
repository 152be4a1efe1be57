//! A table of raw frames of HTTP/2 against the running program: what RFC 9113 and RFC 7541 ask for.
//!
//! The library below (h2) ends a connection with `PROTOCOL_ERROR` in several cases for which the RFCs name another
//! error. That is what the table says of them, with the error that it should be.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::common::DEADLINE;
use super::raw::{RawBackend, in_front_of, ok};
use super::world::Balancer;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// As long as something may still come.
const QUIET: Duration = Duration::from_millis(2_500);

// Types of frames.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH: u8 = 5;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW: u8 = 8;
const CONTINUATION: u8 = 9;

// Flags.
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const ALL: u8 = END_STREAM | END_HEADERS;

// Errors.
const PROTOCOL: u32 = 1;
const FLOW_CONTROL: u32 = 3;
const FRAME_SIZE: u32 = 6;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head, payload].concat()
}

/// Fields as literals that are not indexed.
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let literals = fields
        .iter()
        .map(|(name, value)| [vec![0], text(name), text(value)].concat());
    literals.collect::<Vec<_>>().concat()
}

const METHOD: (&str, &str) = (":method", "GET");
const SCHEME: (&str, &str) = (":scheme", "http");
const PATH: (&str, &str) = (":path", "/");
const AUTHORITY: (&str, &str) = (":authority", "a");
const POST: (&str, &str) = (":method", "POST");

fn get(more: &[(&str, &str)]) -> Vec<u8> {
    fields(&[&[METHOD, SCHEME, PATH, AUTHORITY], more].concat())
}

fn post(more: &[(&str, &str)]) -> Vec<u8> {
    fields(&[&[POST, SCHEME, PATH, AUTHORITY], more].concat())
}

/// A whole request on a stream.
fn request(stream: u32) -> Vec<u8> {
    frame(HEADERS, ALL, stream, &get(&[]))
}

/// A request on the first stream with these fields alone.
fn only(given: &[(&str, &str)]) -> Vec<Vec<u8>> {
    vec![frame(HEADERS, ALL, 1, &fields(given))]
}

/// A request on the first stream with these fields, too.
fn with(more: &[(&str, &str)]) -> Vec<Vec<u8>> {
    vec![frame(HEADERS, ALL, 1, &get(more))]
}

/// What becomes of the frames.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// A response with this status on this stream.
    Response(u32, u16),
    /// The stream is reset with this error.
    Stream(u32, u32),
    /// The connection ends with this error.
    Connection(u32),
    /// The connection ends without a word.
    Closed,
    /// A ping is answered with these bytes.
    Pong(Vec<u8>),
}

use Outcome::{Closed, Connection, Pong, Response, Stream};

struct Case {
    name: &'static str,
    /// What the RFC says.
    why: &'static str,
    frames: Vec<Vec<u8>>,
    outcomes: Vec<Outcome>,
    /// How many requests reach the backend; `None` if that is for chance to say.
    forwarded: Option<usize>,
}

/// One that gets its response, and reaches the backend.
fn served(name: &'static str, why: &'static str, frames: Vec<Vec<u8>>) -> Case {
    Case {
        name,
        why,
        frames,
        outcomes: vec![Response(1, 200)],
        forwarded: Some(1),
    }
}

/// One that ends so, and does not reach the backend.
fn refused(name: &'static str, why: &'static str, frames: Vec<Vec<u8>>, outcome: Outcome) -> Case {
    Case {
        name,
        why,
        frames,
        outcomes: vec![outcome],
        forwarded: Some(0),
    }
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// Frames that concern the connection.
fn of_connections() -> Vec<Case> {
    let settings = |payload: &[u8]| vec![frame(SETTINGS, 0, 0, payload), request(1)];
    let window = |stream, size: u32| frame(WINDOW, 0, stream, &size.to_be_bytes());
    vec![
        served("a request", "8.1", vec![request(1)]),
        refused(
            "settings of seven bytes",
            "6.5: an error of the frame's size",
            settings(&[0; 7]),
            Connection(PROTOCOL),
        ),
        refused(
            "settings of a stream",
            "6.5: an error of the protocol",
            vec![frame(SETTINGS, 0, 1, &[]), request(1)],
            Connection(PROTOCOL),
        ),
        refused(
            "settings acknowledged with a payload",
            "6.5: an error of the frame's size",
            vec![frame(SETTINGS, ACK, 0, &setting(3, 1)), request(1)],
            Connection(PROTOCOL),
        ),
        refused(
            "a window of 2^31",
            "6.5.2: an error of the flow control",
            settings(&setting(4, 1 << 31)),
            Connection(PROTOCOL),
        ),
        refused(
            "frames of at most 16,383 bytes",
            "6.5.2: an error of the protocol",
            settings(&setting(5, 16_383)),
            Connection(PROTOCOL),
        ),
        refused(
            "push that is neither on nor off",
            "6.5.2: an error of the protocol",
            settings(&setting(2, 2)),
            Connection(PROTOCOL),
        ),
        served(
            "an unknown setting",
            "6.5.2: is ignored",
            settings(&setting(0xf0f0, 7)),
        ),
        served(
            "an unknown frame",
            "4.1: is ignored",
            vec![frame(0xb0, 0xff, 0, b"abc"), request(1)],
        ),
        Case {
            name: "a ping",
            why: "6.7: is answered with its own bytes",
            frames: vec![frame(PING, 0, 0, b"12345678")],
            outcomes: vec![Pong(b"12345678".to_vec())],
            forwarded: Some(0),
        },
        refused(
            "a ping of six bytes",
            "6.7: an error of the frame's size",
            vec![frame(PING, 0, 0, b"123456")],
            Connection(PROTOCOL),
        ),
        refused(
            "a ping of a stream",
            "6.7: an error of the protocol",
            vec![frame(PING, 0, 1, b"12345678")],
            Connection(PROTOCOL),
        ),
        refused(
            "a window for the connection that grows by 0",
            "6.9: an error of the protocol",
            vec![window(0, 0)],
            Connection(PROTOCOL),
        ),
        refused(
            "a window for the connection above 2^31 - 1",
            "6.9.1: an error of the flow control",
            vec![window(0, 0x7fff_ffff)],
            Connection(FLOW_CONTROL),
        ),
        refused(
            "a frame of 16,385 bytes",
            "4.2: an error of the frame's size",
            vec![frame(PING, 0, 0, &[0; 16_385])],
            Connection(FRAME_SIZE),
        ),
        refused(
            "a push from a client",
            "8.4: an error of the protocol",
            vec![frame(
                PUSH,
                END_HEADERS,
                1,
                &[&[0, 0, 0, 2], &get(&[])[..]].concat(),
            )],
            Connection(PROTOCOL),
        ),
    ]
}

/// Frames that concern a stream.
fn of_streams() -> Vec<Case> {
    let open = |more: &[(&str, &str)]| frame(HEADERS, END_HEADERS, 1, &post(more));
    let window = |stream, size: u32| frame(WINDOW, 0, stream, &size.to_be_bytes());
    let block = get(&[("x", "y")]);
    let (first, second) = block.split_at(9);
    vec![
        refused(
            "data of stream 0",
            "6.1: an error of the protocol",
            vec![frame(DATA, END_STREAM, 0, b"x")],
            Connection(PROTOCOL),
        ),
        refused(
            "data of a stream that is idle",
            "5.1: an error of the protocol",
            vec![frame(DATA, END_STREAM, 1, b"x")],
            Connection(PROTOCOL),
        ),
        refused(
            "fields of stream 0",
            "6.2: an error of the protocol",
            vec![request(0)],
            Connection(PROTOCOL),
        ),
        refused(
            "a stream with an even number",
            "5.1.1: an error of the protocol",
            vec![request(2)],
            Connection(PROTOCOL),
        ),
        refused(
            "a reset of a stream that is idle",
            "6.4: an error of the protocol",
            vec![frame(RESET, 0, 1, &8_u32.to_be_bytes())],
            Connection(PROTOCOL),
        ),
        refused(
            "a reset of three bytes",
            "6.4: an error of the frame's size",
            vec![open(&[]), frame(RESET, 0, 1, &[0; 3])],
            Connection(PROTOCOL),
        ),
        Case {
            name: "data after the end of a stream",
            why: "5.1: an error, that the stream is closed; may end the connection",
            frames: vec![
                frame(HEADERS, END_HEADERS, 1, &post(&[("content-length", "1")])),
                frame(DATA, END_STREAM, 1, b"x"),
                frame(DATA, END_STREAM, 1, b"y"),
            ],
            outcomes: vec![Connection(PROTOCOL)],
            // It was complete before.
            forwarded: None,
        },
        refused(
            "a window of a stream that is idle",
            "5.1: an error of the protocol",
            vec![window(1, 1)],
            Connection(PROTOCOL),
        ),
        refused(
            "a window for a stream that grows by 0",
            "6.9: an error of the protocol; of the stream, which may end the connection",
            vec![open(&[]), window(1, 0)],
            Connection(PROTOCOL),
        ),
        refused(
            "a window for a stream above 2^31 - 1",
            "6.9.1: an error of the flow control",
            vec![open(&[]), window(1, 0x7fff_ffff)],
            Stream(1, FLOW_CONTROL),
        ),
        served(
            "a priority",
            "5.3.2: is ignored",
            vec![frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 7]), request(1)],
        ),
        refused(
            "fields that go on without a beginning",
            "6.10: an error of the protocol",
            vec![frame(CONTINUATION, END_HEADERS, 1, &block)],
            Connection(PROTOCOL),
        ),
        refused(
            "something else between fields",
            "6.2: an error of the protocol",
            vec![
                frame(HEADERS, END_STREAM, 1, first),
                frame(PING, 0, 0, b"12345678"),
                frame(CONTINUATION, END_HEADERS, 1, second),
            ],
            Connection(PROTOCOL),
        ),
        served(
            "fields in two frames",
            "6.10: are one block",
            vec![
                frame(HEADERS, END_STREAM, 1, first),
                frame(CONTINUATION, END_HEADERS, 1, second),
            ],
        ),
        refused(
            "more padding than there is",
            "6.1: an error of the protocol",
            vec![open(&[]), frame(DATA, END_STREAM | PADDED, 1, &[9, b'x'])],
            Connection(PROTOCOL),
        ),
        served(
            "padding",
            "6.1: is no content",
            vec![
                open(&[("content-length", "1")]),
                frame(DATA, END_STREAM | PADDED, 1, &[2, b'x', 0, 0]),
            ],
        ),
        refused(
            "field 0",
            "RFC 7541 6.1: an error of the compression",
            vec![frame(HEADERS, ALL, 1, &[0x80])],
            Connection(PROTOCOL),
        ),
        refused(
            "a field that the table has not",
            "RFC 7541 2.3.3: an error of the compression",
            vec![frame(HEADERS, ALL, 1, &[0xff, 0x7f])],
            Connection(PROTOCOL),
        ),
        refused(
            "a field that is cut off",
            "RFC 9113 4.3: an error of the compression",
            vec![frame(HEADERS, ALL, 1, &[0, 9, b'x'])],
            Connection(PROTOCOL),
        ),
        refused(
            "a table that is larger than allowed",
            "RFC 7541 6.3: an error of the compression",
            vec![frame(HEADERS, ALL, 1, &[0x3f, 0xff, 0xff, 0x7f])],
            Connection(PROTOCOL),
        ),
    ]
}

/// Requests that are malformed, and some that are not.
fn of_requests() -> Vec<Case> {
    let open = |more: &[(&str, &str)]| frame(HEADERS, END_HEADERS, 1, &post(more));
    let malformed = |name, why, frames| refused(name, why, frames, Stream(1, PROTOCOL));
    // 5.4.1 allows that, too.
    let fatal = |name, why, frames| refused(name, why, frames, Connection(PROTOCOL));
    vec![
        fatal(
            "an upper case letter",
            "8.2.1: malformed",
            with(&[("X", "y")]),
        ),
        fatal(
            "a space in a name",
            "8.2.1: malformed",
            with(&[("x y", "z")]),
        ),
        fatal(
            "a line end in a value",
            "8.2.1: malformed",
            with(&[("x", "a\r\nb: c")]),
        ),
        fatal(
            "a zero in a value",
            "8.2.1: malformed",
            with(&[("x", "a\0b")]),
        ),
        malformed(
            "a pseudo field after others",
            "8.3: malformed",
            only(&[METHOD, SCHEME, AUTHORITY, ("x", "y"), PATH]),
        ),
        fatal("an unknown pseudo field", "8.3: malformed", {
            only(&[METHOD, SCHEME, PATH, AUTHORITY, (":x", "y")])
        }),
        malformed("a status in a request", "8.3: malformed", {
            only(&[METHOD, SCHEME, PATH, AUTHORITY, (":status", "200")])
        }),
        malformed(
            "no method",
            "8.3.1: malformed",
            only(&[SCHEME, PATH, AUTHORITY]),
        ),
        malformed(
            "no scheme",
            "8.3.1: malformed",
            only(&[METHOD, PATH, AUTHORITY]),
        ),
        malformed(
            "no path",
            "8.3.1: malformed",
            only(&[METHOD, SCHEME, AUTHORITY]),
        ),
        malformed("an empty path", "8.3.1: malformed", {
            only(&[METHOD, SCHEME, (":path", ""), AUTHORITY])
        }),
        malformed("the path twice", "8.3.1: malformed", {
            only(&[METHOD, SCHEME, PATH, PATH, AUTHORITY])
        }),
        malformed("a field of the connection", "8.2.2: malformed", {
            with(&[("connection", "keep-alive")])
        }),
        malformed(
            "a coding",
            "8.2.2: malformed",
            with(&[("transfer-encoding", "chunked")]),
        ),
        malformed(
            "TE with a coding",
            "8.2.2: malformed",
            with(&[("te", "gzip")]),
        ),
        served(
            "TE with trailers",
            "8.2.2: is allowed",
            with(&[("te", "trailers")]),
        ),
        malformed(
            "less than its length",
            "8.1.1: malformed",
            vec![
                open(&[("content-length", "2")]),
                frame(DATA, END_STREAM, 1, b"x"),
            ],
        ),
        malformed(
            "more than its length",
            "8.1.1: malformed",
            vec![
                open(&[("content-length", "1")]),
                frame(DATA, END_STREAM, 1, b"xy"),
            ],
        ),
        malformed(
            "a length and no content",
            "8.1.1: malformed",
            vec![frame(HEADERS, ALL, 1, &post(&[("content-length", "2")]))],
        ),
        served(
            "a pseudo field in trailers",
            "8.1: malformed. The library drops it, so that it reaches nobody",
            vec![
                open(&[]),
                frame(DATA, 0, 1, b"x"),
                frame(HEADERS, ALL, 1, &fields(&[(":path", "/x")])),
            ],
        ),
        malformed(
            "trailers that do not end the stream",
            "8.1: malformed",
            vec![
                open(&[]),
                frame(DATA, 0, 1, b"x"),
                frame(HEADERS, END_HEADERS, 1, &fields(&[("x", "y")])),
            ],
        ),
        served(
            "trailers",
            "8.1: end a request",
            vec![
                open(&[]),
                frame(DATA, 0, 1, b"x"),
                frame(HEADERS, ALL, 1, &fields(&[("x", "y")])),
            ],
        ),
        served(
            "a host and no authority",
            "8.3.1: is allowed",
            only(&[METHOD, SCHEME, PATH, ("host", "a")]),
        ),
        refused(
            "neither",
            "8.3.1 and RFC 9110 7.2: 400",
            only(&[METHOD, SCHEME, PATH]),
            Response(1, 400),
        ),
        refused(
            "a host that differs from the authority",
            "8.3.1: should be malformed",
            with(&[("host", "b")]),
            Response(1, 400),
        ),
        refused(
            "an authority with a user",
            "8.3.1: must not be",
            only(&[METHOD, SCHEME, PATH, (":authority", "u@a")]),
            Response(1, 400),
        ),
        refused(
            "CONNECT",
            "RFC 9110 9.3.6: only for proxies that offer it",
            only(&[(":method", "CONNECT"), (":authority", "a:443")]),
            Response(1, 405),
        ),
    ]
}

/// What a server has sent, frame by frame.
async fn outcomes(balancer: &Balancer, case: &Case) -> Vec<Outcome> {
    let mut stream = TcpStream::connect(&balancer.listen).await.unwrap();
    let start = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    stream.write_all(&start).await.unwrap();
    for frame in &case.frames {
        // A server that ends the connection at once is one that has been heard.
        if stream.write_all(frame).await.is_err() {
            break;
        }
    }
    let mut found = Vec::new();
    while found.len() < case.outcomes.len() {
        match tokio::time::timeout(QUIET, read_frame(&mut stream)).await {
            Ok(Some(read)) => found.extend(outcome(&read)),
            Ok(None) => {
                found.push(Closed);
                break;
            }
            Err(_) => break,
        }
    }
    found.sort();
    found
}

struct Read {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

async fn read_frame(stream: &mut TcpStream) -> Option<Read> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [a, b, c, kind, flags, rest @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some(Read {
        kind,
        flags,
        stream: u32::from_be_bytes(rest) & 0x7fff_ffff,
        payload,
    })
}

fn outcome(read: &Read) -> Option<Outcome> {
    let number = |at: usize| {
        let bytes = read.payload.get(at..at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    match read.kind {
        HEADERS => Some(Response(read.stream, status_in(&read.payload))),
        RESET => Some(Stream(read.stream, number(0)?)),
        GO_AWAY => Some(Connection(number(4)?)),
        PING if read.flags & ACK != 0 => Some(Pong(read.payload.clone())),
        _ => None,
    }
}

/// The status that a block of fields begins with; 0 if it is none of these.
fn status_in(block: &[u8]) -> u16 {
    match block {
        // RFC 7541, appendix A.
        [first @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(first - 0x88)],
        // The name is that of field 8, and the value follows, with a code for three digits of five or six bits each.
        [0x48, 0x03, digits @ ..] => {
            let digits = std::str::from_utf8(&digits[..3]);
            digits.ok().and_then(|it| it.parse().ok()).unwrap_or(0)
        }
        [0x48, 0x82 | 0x83, bits @ ..] => digits_in(bits),
        _ => 0,
    }
}

/// Three digits in the code of RFC 7541, appendix B: 0, 1 and 2 have five bits, and the others six.
fn digits_in(bytes: &[u8]) -> u16 {
    let mut bits = bytes
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1));
    let mut number = 0;
    for _ in 0..3 {
        let five = (0..5).fold(0, |sum, _| sum << 1 | u16::from(bits.next().unwrap_or(0)));
        let digit = match five {
            0..=2 => five,
            // From 0x19 in six bits on it is the digit 3.
            _ => (five << 1 | u16::from(bits.next().unwrap_or(0))).wrapping_sub(0x19 - 3),
        };
        number = number * 10 + digit;
    }
    number
}

/// A connection, with the settings of both ends said.
async fn connected(balancer: &Balancer) -> TcpStream {
    let mut stream = TcpStream::connect(&balancer.listen).await.unwrap();
    let start = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    stream.write_all(&start).await.unwrap();
    stream
}

/// The next frame that is none of settings and windows; `None` at the end of the connection.
async fn next_frame(stream: &mut TcpStream) -> Option<Read> {
    loop {
        let read = tokio::time::timeout(DEADLINE, read_frame(stream));
        let read = read.await.expect("a frame, or the end")?;
        if ![SETTINGS, WINDOW].contains(&read.kind) {
            return Some(read);
        }
    }
}

/// Reads the word that no more requests are taken. Those that were on their way are: a PING follows, whose answer says
/// that there are none.
async fn is_told(stream: &mut TcpStream) -> Read {
    let told = next_frame(stream).await.unwrap();
    assert_eq!(told.kind, GO_AWAY);
    assert_eq!(told.payload, [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let ping = next_frame(stream).await.unwrap();
    assert_eq!((ping.kind, ping.flags & ACK), (PING, 0));
    ping
}

/// A client has to know which of its requests were not taken: it may send those anywhere, whatever they do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_requests_is_told_before_the_connection_ends() {
    let backend = RawBackend::start(ok).await;
    let fields = "timeouts: { client_idle_ms: 4000 }";
    let balancer = in_front_of(&backend, "idle-http-2", fields).await;
    let connections = async |answers: bool| {
        let mut stream = connected(&balancer).await;
        let mut start = Instant::now();
        for number in [1, 3, 5] {
            // Less than the time without a request, and more in all.
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            start = Instant::now();
            stream.write_all(&request(number)).await.unwrap();
            let answer = next_frame(&mut stream).await.unwrap();
            assert_eq!((answer.kind, answer.stream), (HEADERS, number));
            let body = next_frame(&mut stream).await.unwrap();
            assert_eq!((body.kind, body.flags & END_STREAM), (DATA, END_STREAM));
        }
        let ping = is_told(&mut stream).await;
        let told = start.elapsed();
        assert!(told >= Duration::from_secs(4), "{told:?}");
        assert!(told < Duration::from_secs(8), "{told:?}");
        let start = Instant::now();
        if answers {
            // One was on its way.
            stream.write_all(&request(7)).await.unwrap();
            stream
                .write_all(&frame(PING, ACK, 0, &ping.payload))
                .await
                .unwrap();
            let mut kinds = Vec::new();
            while let Some(read) = next_frame(&mut stream).await {
                if read.kind == GO_AWAY {
                    assert_eq!(read.payload, [0, 0, 0, 7, 0, 0, 0, 0]);
                }
                kinds.push(read.kind);
            }
            kinds.sort_unstable();
            assert_eq!(kinds, [DATA, HEADERS, GO_AWAY]);
            assert!(start.elapsed() < Duration::from_millis(1_800));
        } else {
            // Who says nothing is not waited for.
            assert!(next_frame(&mut stream).await.is_none());
            assert!(start.elapsed() < Duration::from_secs(5));
        }
    };
    tokio::join!(connections(true), connections(false));
    assert_eq!(backend.requests().len(), 7);
}

#[test]
fn digits_are_read() {
    // 302, as in RFC 7541, C.6.1.
    assert_eq!(status_in(&[0x48, 0x82, 0x64, 0x02]), 302);
    assert_eq!(status_in(&[0x88]), 200);
    assert_eq!(status_in(b"\x48\x03405"), 405);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_frames_are_answered_as_the_rfc_asks() {
    let backend = RawBackend::start(ok).await;
    let balancer = in_front_of(&backend, "rfc-http-2", "timeouts: { response_ms: 5000 }").await;
    let mut wrong = Vec::new();
    let cases = [of_connections(), of_streams(), of_requests()];
    for case in cases.into_iter().flatten() {
        let before = backend.requests().len();
        let found = outcomes(&balancer, &case).await;
        let forwarded = backend.requests().len() - before;
        if found != case.outcomes || case.forwarded.is_some_and(|it| it != forwarded) {
            let (name, why, expected) = (case.name, case.why, &case.outcomes);
            wrong.push(format!(
                "{name} ({why}): {found:?} instead of {expected:?}, {forwarded} forwarded"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Bad requests of clients are no errors of the program.
    let log = balancer.log_text();
    assert_eq!(log.matches("ERROR").count(), 0, "{log}");
}
