//! Tests of the client's stream over a pipe, under a paused clock.

use std::time::Duration;

use ::pingora::protocols::Peek;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::*;
use crate::proxy::front::limits::ClientTimeouts;

const SECOND: Duration = Duration::from_secs(1);

/// A client, and the stream of its connection.
fn pair() -> (DuplexStream, ClientStream) {
    pair_with(64)
}

fn pair_with(pipe: usize) -> (DuplexStream, ClientStream) {
    let (client, server) = duplex(pipe);
    let limits = FrontLimits {
        timeouts: ClientTimeouts {
            client_header: 10 * SECOND,
            client_body: 20 * SECOND,
            client_idle: 30 * SECOND,
            client_write: 40 * SECOND,
            client_drain: 5 * SECOND,
            tunnel: 3_600 * SECOND,
        },
        head_bytes: 100,
        least_rate: 0,
    };
    let refusals = Refusals {
        statistics: Arc::default(),
        tell: None,
    };
    let (limits, ahead) = (Arc::new(limits), BytesMut::new());
    let stream = ClientStream::new(Box::new(server), ahead, None, None, limits, refusals);
    (client, stream)
}

/// Reads once: what was read, and after how long.
async fn read(stream: &mut ClientStream) -> (io::Result<Vec<u8>>, Duration) {
    let start = Instant::now();
    let mut buffer = vec![0; 1_000];
    let result = stream.read(&mut buffer).await.map(|count| {
        buffer.truncate(count);
        buffer
    });
    (result, start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn each_phase_has_its_time() {
    for (phase, time, is_error) in [
        (Phase::Accepted, 10, false),
        (Phase::Idle, 30, false),
        (Phase::Body, 20, true),
        (Phase::Drain, 5, true),
        (Phase::Tunnel, 3_600, true),
    ] {
        let (_client, mut stream) = pair();
        stream.connection.enter(phase);
        let (result, took) = read(&mut stream).await;
        assert_eq!(took, time * SECOND, "{phase:?}");
        assert_eq!(result.is_err(), is_error, "{phase:?}");
        assert_eq!(stream.connection.ended(), Some(Ended::ReadTimeout));
    }
    for phase in [Phase::Expect, Phase::Answer] {
        let (_client, mut stream) = pair();
        stream.connection.enter(phase);
        let reading = tokio::time::timeout(100_000 * SECOND, read(&mut stream));
        assert!(reading.await.is_err(), "{phase:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_has_one_time_for_all_of_its_parts_and_is_answered() {
    let (mut client, mut stream) = pair();
    let start = Instant::now();
    for _ in 0..3 {
        client.write_all(b"x").await.unwrap();
        assert_eq!(read(&mut stream).await.0.unwrap(), b"x");
        tokio::time::advance(3 * SECOND).await;
    }
    let (refused, _) = read(&mut stream).await;
    assert_eq!(start.elapsed(), 10 * SECOND);
    assert!(refused.unwrap().contains(&0));
    // Whatever is written now is not for the client.
    stream
        .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .await
        .unwrap();
    drop(stream);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(!answer.contains("400"), "{answer}");
}

/// A line for each scanner would fill the log: Pingora's parser refuses what it gets, and nothing is answered.
#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_in_the_middle_of_a_head_is_no_error() {
    let (mut client, mut stream) = pair();
    client.write_all(b"GET / HT").await.unwrap();
    assert_eq!(read(&mut stream).await.0.unwrap(), b"GET / HT");
    AsyncWriteExt::shutdown(&mut client).await.unwrap();
    assert!(read(&mut stream).await.0.unwrap().contains(&0));
    stream
        .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(read(&mut stream).await.0.unwrap(), b"");
    drop(stream);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.is_empty(), "{answer:?}");
    // Before a head, it is the end of the connection as always.
    let (client, mut stream) = pair();
    drop(client);
    assert_eq!(read(&mut stream).await.0.unwrap(), b"");
}

/// The client sees the end of the response before it has sent the rest of its request.
#[tokio::test(start_paused = true)]
async fn the_end_of_a_response_is_seen_while_the_rest_of_the_request_is_read() {
    let (client, mut stream) = pair();
    stream.connection.enter(Phase::Drain);
    stream
        .write_all(b"HTTP/1.1 413 Too Large\r\n\r\n")
        .await
        .unwrap();
    stream.connection.end_writing();
    let (mut reading, mut writing) = tokio::io::split(client);
    let seen = async {
        let mut answer = String::new();
        reading.read_to_string(&mut answer).await.unwrap();
        writing.write_all(b"the rest").await.unwrap();
        answer
    };
    let (answer, (rest, _)) = tokio::join!(seen, read(&mut stream));
    assert_eq!(answer, "HTTP/1.1 413 Too Large\r\n\r\n");
    assert_eq!(rest.unwrap(), b"the rest");
    AsyncWriteExt::shutdown(&mut stream).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_body_and_a_tunnel_live_as_long_as_something_moves() {
    for phase in [Phase::Body, Phase::Tunnel] {
        let (mut client, mut stream) = pair();
        stream.connection.enter(phase);
        for _ in 0..10 {
            tokio::time::advance(15 * SECOND).await;
            client.write_all(b"x").await.unwrap();
            assert_eq!(read(&mut stream).await.0.unwrap(), b"x");
        }
    }
    // In a tunnel, in the other direction as well.
    let (_client, mut stream) = pair();
    stream.connection.enter(Phase::Tunnel);
    stream.phase();
    tokio::time::advance(3_000 * SECOND).await;
    stream.write_all(b"x").await.unwrap();
    stream.flush().await.unwrap();
    assert_eq!(read(&mut stream).await.1, 3_600 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_given_up() {
    let (_client, mut stream) = pair();
    let start = Instant::now();
    // More than the pipe and the stream hold.
    let written = stream.write_all(&[0; HELD + 100]).await;
    assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(start.elapsed(), 40 * SECOND);
    assert_eq!(stream.connection.ended(), Some(Ended::WriteTimeout));
}

#[tokio::test(start_paused = true)]
async fn http_2_is_recognised_without_waiting_for_more_than_is_sent() {
    for (start, is_http2) in [
        (&PREFACE[..], true),
        (b"GET / HTTP/1.0\r\n\r\n", false),
        (b"PRI / HTTP/1.0\r\n\r\n", false),
    ] {
        let (mut client, mut stream) = pair();
        client.write_all(start).await.unwrap();
        let mut buffer = [0; 24];
        let peeking = tokio::time::timeout(SECOND, stream.try_peek(&mut buffer));
        assert!(peeking.await.unwrap().unwrap());
        assert_eq!(&buffer == PREFACE, is_http2);
        assert_eq!(read(&mut stream).await.0.unwrap(), start);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What a client sends is what is read, however it is cut, whether it looks like HTTP/2 or not.
    #[test]
    fn bytes_pass_unchanged(
        preface in 0..=PREFACE.len(),
        rest in prop::collection::vec(any::<u8>(), 0..300),
        parts in prop::collection::vec(1..40_usize, 1..20),
    ) {
        let sent = [&PREFACE[..preface], &rest].concat();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let read = runtime.block_on(async {
            let (mut client, mut stream) = pair();
            let mut cut = parts.clone().into_iter().cycle();
            let bytes = sent.clone();
            let writing = tokio::spawn(async move {
                let mut left = &bytes[..];
                while !left.is_empty() {
                    let (part, more) = left.split_at(cut.next().unwrap().min(left.len()));
                    client.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                    left = more;
                }
            });
            stream.try_peek(&mut [0; 24]).await.unwrap();
            // Without the limit of a head.
            stream.connection.enter(Phase::Answer);
            let mut read = Vec::new();
            stream.read_to_end(&mut read).await.unwrap();
            writing.await.unwrap();
            read
        });
        prop_assert_eq!(read, sent);
    }
}

/// Whatever is written, in whatever parts, arrives as it is; and what is short leaves with what follows.
#[tokio::test(start_paused = true)]
async fn short_writes_leave_with_what_follows_them() {
    for (lengths, pipe) in [
        (&[10, 20, 30][..], 64),
        (&[10, HELD * 3], 64),
        (&[10, HELD * 3], 1 << 20),
        (&[HELD, 1, HELD + 1, 5], 7),
        (&[HELD * 2, 0, HELD * 2], 1 << 20),
    ] {
        let (mut client, mut stream) = pair_with(pipe);
        let sum = lengths.iter().sum();
        let expected: Vec<u8> = (0..sum).map(|at| (at % 251) as u8).collect();
        let mut rest = &expected[..];
        let writing = async {
            for length in lengths {
                let (part, behind) = rest.split_at(*length);
                stream.write_all(part).await.unwrap();
                rest = behind;
            }
            stream.flush().await.unwrap();
            assert!(stream.held.is_empty());
        };
        let mut received = vec![0; sum];
        let (_, read) = tokio::join!(writing, client.read_exact(&mut received));
        assert_eq!(read.unwrap(), sum, "{lengths:?} {pipe}");
        assert_eq!(received, expected, "{lengths:?} {pipe}");
    }
}

#[tokio::test(start_paused = true)]
async fn several_slices_and_what_is_held_arrive_in_their_order() {
    let (mut client, mut stream) = pair_with(1 << 20);
    stream.write_all(b"head").await.unwrap();
    let long = vec![b'x'; HELD];
    let slices = [&b"5a0"[..], &long, b"end"].map(io::IoSlice::new);
    let written = stream.write_vectored(&slices).await.unwrap();
    assert_eq!(written, HELD + 6);
    stream.flush().await.unwrap();
    let mut received = vec![0; 4 + HELD + 6];
    client.read_exact(&mut received).await.unwrap();
    assert!(received.starts_with(b"head5a0xx") && received.ends_with(b"xxend"));
}

#[tokio::test(start_paused = true)]
async fn what_there_is_of_a_response_that_breaks_off_reaches_the_client() {
    let (mut client, mut stream) = pair_with(1 << 20);
    stream.write_all(b"HTTP/1.1 200 OK").await.unwrap();
    drop(stream);
    let mut received = String::new();
    client.read_to_string(&mut received).await.unwrap();
    assert_eq!(received, "HTTP/1.1 200 OK");
}
