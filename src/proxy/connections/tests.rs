use std::net::Ipv4Addr;
use std::time::Duration;

use ::pingora::connectors::L4Connect;
use ::pingora::protocols::l4::stream::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::pool::Target;
use super::*;

const HEAD: &[u8] = b"POST / HTTP/1.1\r\n\r\n";
const BODY: &[u8] = b"body";

/// A backend, and what a proxy has to connect to it.
struct World {
    listener: TcpListener,
    pool: Arc<Pool>,
}

impl World {
    async fn new(most: usize) -> Self {
        Self {
            listener: TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
            pool: Arc::new(Pool::new(most, true)),
        }
    }

    async fn connect(&self, times: Times, body: Body) -> (Stream, Arc<Exchange>) {
        let exchange = Exchange::new(self.pool.clone(), plain(), times, sent(body));
        let addr = self.listener.local_addr().unwrap().into();
        (exchange.connect(&addr).await.unwrap(), exchange)
    }

    /// A request without a body on a connection, which is then dropped.
    async fn exchange(&self, end: End) -> Arc<Exchange> {
        let (mut stream, exchange) = self.connect(times(), Body::None).await;
        stream.write_all(HEAD).await.unwrap();
        if end != End::BeforeResponse {
            exchange.completes();
        }
        match end {
            End::Shutdown => stream.shutdown().await.unwrap(),
            End::Untouched => {}
            // As Pingora looks whether it is quiet, and whether it is over.
            End::BeforeResponse | End::Complete => {
                let mut byte = [0];
                let read = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut byte));
                assert_eq!(read.await.is_ok(), end == End::Complete);
            }
        }
        exchange
    }

    fn target(&self) -> Target {
        Target {
            addr: self.listener.local_addr().unwrap(),
            group_key: 7,
        }
    }

    /// A connection, to be kept.
    async fn new_connection(&self) -> pool::Connection {
        pool::Connection::new(TcpStream::connect(self.target().addr).await.unwrap())
    }

    async fn accept(&self) -> TcpStream {
        self.listener.accept().await.unwrap().0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    BeforeResponse,
    Complete,
    Untouched,
    Shutdown,
}

fn sent(body: Body) -> Sent {
    Sent {
        body,
        is_idempotent: true,
    }
}

fn plain() -> Spoken {
    Spoken {
        group_key: 7,
        secure: None,
    }
}

fn times() -> Times {
    Times {
        connect: Some(Duration::from_secs(5)),
        open: None,
        silence: Silence::of(Duration::from_secs(5)),
        waits: Waits::default(),
        idle: Duration::from_secs(60),
    }
}

#[tokio::test]
async fn only_a_connection_that_pingora_would_use_again_is_kept() {
    for (end, kept) in [
        (End::BeforeResponse, 0),
        (End::Untouched, 0),
        (End::Shutdown, 0),
        (End::Complete, 1),
    ] {
        let world = World::new(10).await;
        let exchange = world.exchange(end).await;
        assert!(!exchange.is_reused() && !exchange.is_unsent());
        assert_eq!(world.pool.count(), kept, "{end:?}");
        let exchange = world.exchange(End::Untouched).await;
        assert_eq!(exchange.is_reused(), kept > 0, "{end:?}");
    }
}

#[tokio::test]
async fn what_the_backend_has_closed_or_written_to_is_not_used() {
    for says in [None, Some(b"HTTP/1.1 408 Request Timeout\r\n\r\n")] {
        let world = World::new(10).await;
        world.exchange(End::Complete).await;
        let mut backend = world.accept().await;
        match says {
            Some(says) => backend.write_all(says).await.unwrap(),
            None => drop(backend),
        }
        // Until it has arrived: the task that looks after the pool takes it out.
        tokio::time::timeout(Duration::from_secs(5), async {
            while world.pool.count() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        assert!(!world.exchange(End::Untouched).await.is_reused());
    }
}

/// Also before the task has looked.
#[tokio::test]
async fn what_is_over_is_not_taken() {
    let world = World::new(10).await;
    let minute = Duration::from_secs(60);
    let connection = world.new_connection().await;
    drop(world.accept().await);
    connection.socket.tcp().readable().await.unwrap();
    world.pool.put(world.target(), connection, minute);
    assert!(world.pool.take(world.target(), false).is_none());
    let connection = world.new_connection().await;
    let moment = Duration::from_nanos(1);
    world.pool.put(world.target(), connection, moment);
    assert!(world.pool.take(world.target(), false).is_none());
    assert_eq!(world.pool.count(), 0);
}

/// Tokio learns of an end when it looks for events: here it has no time for that.
#[tokio::test]
async fn a_request_that_cannot_be_repeated_does_not_meet_an_end_that_the_system_knows() {
    let world = World::new(10).await;
    for looks_closely in [false, true] {
        let connection = world.new_connection().await;
        let addr = connection.socket.tcp().local_addr().unwrap();
        drop(world.accept().await);
        // Until the system has passed it on.
        std::thread::sleep(Duration::from_millis(50));
        world
            .pool
            .put(world.target(), connection, Duration::from_secs(60));
        let taken = world.pool.take(world.target(), looks_closely);
        let taken = taken.map(|it| it.socket.tcp().local_addr().unwrap());
        assert_eq!(taken, (!looks_closely).then_some(addr));
    }
}

#[tokio::test]
async fn a_connection_is_kept_for_its_time() {
    let world = World::new(10).await;
    let target = world.target();
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(world.new_connection().await);
    }
    // Nobody looks in between.
    let times = [(0, 0), (20, 1), (60_000, 2)];
    for (connection, (milliseconds, kept)) in connections.into_iter().zip(times) {
        let idle = Duration::from_millis(milliseconds);
        world.pool.put(target, connection, idle);
        assert_eq!(world.pool.count(), kept);
    }
    tokio::time::timeout(Duration::from_secs(5), async {
        while world.pool.count() > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap();
    assert!(world.pool.take(target, false).is_some() && world.pool.take(target, false).is_none());
    assert_eq!(world.pool.count(), 0);
}

#[tokio::test]
async fn the_one_that_was_used_last_comes_first_and_the_one_that_ends_first_makes_room() {
    let minute = Duration::from_secs(60);
    let world = World::new(3).await;
    let target = world.target();
    let mut ports = Vec::new();
    for number in 0..5 {
        let connection = world.new_connection().await;
        ports.push(connection.socket.tcp().local_addr().unwrap());
        world.pool.put(target, connection, minute);
        assert_eq!(world.pool.count(), (number + 1).min(3));
    }
    let taken = std::iter::from_fn(|| world.pool.take(target, false));
    let taken: Vec<_> = taken
        .map(|it| it.socket.tcp().local_addr().unwrap())
        .collect();
    assert_eq!(taken, [ports[4], ports[3], ports[2]]);
    // Whatever backend it is of.
    let other = World::new(3).await;
    for _ in 0..5 {
        let connection = other.new_connection().await;
        world.pool.put(other.target(), connection, minute);
    }
    assert_eq!(world.pool.count(), 3);
    let none = World::new(0).await;
    let connection = none.new_connection().await;
    none.pool.put(target, connection, minute);
    assert_eq!(none.pool.count(), 0);
}

/// Another process may have taken over the address.
#[tokio::test]
async fn a_connection_to_a_former_process_is_not_used() {
    let world = World::new(10).await;
    let target = world.target();
    let connection = world.new_connection().await;
    world.pool.put(target, connection, Duration::from_secs(60));
    let of_another = Target {
        group_key: 8,
        ..target
    };
    assert!(world.pool.take(of_another, false).is_none());
    assert!(world.pool.take(target, false).is_some());
}

/// A head and the body that is at hand are one packet.
#[tokio::test]
async fn a_head_leaves_with_its_body() {
    let world = World::new(10).await;
    let (mut stream, exchange) = world.connect(times(), Body::Sized).await;
    let mut backend = world.accept().await;
    stream.write_all(HEAD).await.unwrap();
    stream.flush().await.unwrap();
    assert!(exchange.is_unsent());
    stream.write_all(BODY).await.unwrap();
    stream.flush().await.unwrap();
    let mut read = [0; 100];
    let count = backend.read(&mut read).await.unwrap();
    assert_eq!(&read[..count], [HEAD, BODY].concat());
    assert!(!exchange.is_unsent());
}

/// Without a body, or with a long head, nothing waits.
#[tokio::test]
async fn a_head_without_a_body_at_hand_leaves_alone() {
    let world = World::new(10).await;
    let long = vec![b'x'; 20_000];
    for head in [HEAD, &long] {
        let (mut stream, exchange) = world.connect(times(), Body::Sized).await;
        let mut backend = world.accept().await;
        stream.write_all(head).await.unwrap();
        stream.flush().await.unwrap();
        let (mut read, mut answer) = (vec![0; head.len()], [0; 2]);
        // The response is waited for.
        let (answered, heard) = tokio::join!(stream.read_exact(&mut answer), async {
            backend.read_exact(&mut read).await.unwrap();
            backend.write_all(b"ok").await
        });
        assert!(answered.is_ok() && heard.is_ok());
        assert_eq!((&answer, read.as_slice()), (b"ok", head));
        assert!(!exchange.is_unanswered());
    }
}

/// What Pingora writes in three parts is one write, up to a size.
#[tokio::test]
async fn the_parts_of_a_chunk_leave_together() {
    let world = World::new(10).await;
    let large = vec![b'x'; 40_000];
    for data in [&b"data"[..], &large] {
        let (mut stream, _) = world.connect(times(), Body::Chunked).await;
        let mut backend = world.accept().await;
        let (mut read, mut whole) = (vec![0; 100_000], Vec::new());
        // The first chunk leaves with the head.
        stream.write_all(HEAD).await.unwrap();
        stream.flush().await.unwrap();
        whole.extend_from_slice(HEAD);
        for _ in 0..2 {
            for part in [b"9C40\r\n", data, b"\r\n"] {
                stream.write_all(part).await.unwrap();
                whole.extend_from_slice(part);
            }
            stream.flush().await.unwrap();
            let (mut count, mut reads) = (0, 0);
            while count < whole.len() {
                let more = backend.read(&mut read[count..]);
                let more = tokio::time::timeout(Duration::from_secs(5), more).await;
                count += more.unwrap().unwrap();
                reads += 1;
            }
            assert_eq!(read[..count], whole);
            assert!(reads == 1 || data.len() > 20_000, "{reads}");
            whole.clear();
        }
    }
}

/// What is shorter than a body that has a length is written at once, so that a backend sees an upload as it comes.
#[tokio::test]
async fn parts_of_a_body_with_a_length_do_not_wait() {
    let world = World::new(10).await;
    let (mut stream, _) = world.connect(times(), Body::Sized).await;
    let mut backend = world.accept().await;
    let mut read = [0; 100];
    for part in [HEAD, BODY, b"more"] {
        stream.write_all(part).await.unwrap();
        if part == HEAD {
            stream.flush().await.unwrap();
            continue;
        }
        let count = tokio::time::timeout(Duration::from_secs(5), backend.read(&mut read));
        let count = count.await.unwrap().unwrap();
        assert!(read[..count].ends_with(part));
    }
}

/// A backend may answer instead of reading all: that is not lost while a write waits in vain.
#[tokio::test]
async fn a_response_is_read_while_the_request_cannot_be_written() {
    let world = World::new(10).await;
    let (mut stream, exchange) = world.connect(times(), Body::Chunked).await;
    let mut backend = world.accept().await;
    stream.write_all(HEAD).await.unwrap();
    stream.flush().await.unwrap();
    let large = vec![b'x'; 20_000_000];
    let written = tokio::time::timeout(Duration::from_millis(200), stream.write_all(&large));
    assert!(written.await.is_err(), "nobody reads");
    // What is short waits until the response is asked for.
    stream.write_all(BODY).await.unwrap();
    backend.write_all(b"ok").await.unwrap();
    let mut answer = [0; 2];
    let read = tokio::time::timeout(Duration::from_secs(3), stream.read_exact(&mut answer));
    assert_eq!(read.await.unwrap().unwrap(), 2);
    assert!(!exchange.is_unsent() && !exchange.is_unanswered());
}

#[tokio::test]
async fn a_silence_ends_after_its_time_and_what_is_read_or_written_begins_it_anew() {
    let world = World::new(10).await;
    let silence = Duration::from_secs(1);
    let times = Times {
        silence: Silence::of(silence),
        ..times()
    };
    let (mut stream, exchange) = world.connect(times, Body::None).await;
    let mut backend = world.accept().await;
    let start = std::time::Instant::now();
    while start.elapsed() < 2 * silence {
        let (read, ()) = tokio::join!(stream.read_u8(), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            backend.write_u8(7).await.unwrap();
        });
        assert_eq!(read.unwrap(), 7);
    }
    while start.elapsed() < 4 * silence {
        let read = tokio::time::timeout(Duration::from_millis(50), stream.read_u8());
        assert!(read.await.is_err());
        stream.write_all(b"a part").await.unwrap();
    }
    let start = std::time::Instant::now();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(exchange.is_unanswered() && start.elapsed() >= silence);
}

#[tokio::test]
async fn a_connection_that_cannot_be_made_is_an_error_of_pingora() {
    let world = World::new(10).await;
    let addr = world.listener.local_addr().unwrap();
    drop(world.listener);
    let exchange = Exchange::new(world.pool, plain(), times(), sent(Body::None));
    let error = exchange.connect(&addr.into()).await.unwrap_err();
    assert_eq!(error.etype(), &::pingora::ErrorType::ConnectRefused);
}

#[test]
fn pingora_makes_connections_where_the_file_says_how() {
    let default = ServerConf::default;
    assert!(Connections::new(&default()).is_some());
    for server in [
        ServerConf {
            client_bind_to_ipv4: vec!["127.0.0.2".to_owned()],
            ..default()
        },
        ServerConf {
            client_bind_to_ipv6: vec!["::1".to_owned()],
            ..default()
        },
        ServerConf {
            upstream_connect_offload_threadpools: Some(1),
            upstream_connect_offload_thread_per_pool: Some(1),
            ..default()
        },
    ] {
        assert!(Connections::new(&server).is_none());
    }
}

/// TLS and HTTP/2 have state of their own, which only Pingora keeps.
#[test]
fn only_plain_http_1_is_carried() {
    let connections = Connections::new(&ServerConf::default()).unwrap();
    let peer = |has_tls| {
        let mut peer = HttpPeer::new((Ipv4Addr::LOCALHOST, 80), has_tls, "a.test".to_owned());
        peer.options.idle_timeout = Some(Duration::from_secs(1));
        peer.options.read_timeout = Some(Duration::from_secs(1));
        peer
    };
    let post = RequestHeader::build("POST", b"/", None).unwrap();
    let mut sized = RequestHeader::build("PUT", b"/", None).unwrap();
    sized.insert_header(CONTENT_LENGTH, "4").unwrap();
    let mut plain = peer(false);
    for (request, has_body, body, is_idempotent) in [
        (&post, false, Body::None, false),
        (&post, true, Body::Chunked, false),
        (&sized, true, Body::Sized, true),
    ] {
        plain = peer(false);
        let sent = connections
            .carry(&mut plain, (has_body, request), Waits::default(), None)
            .unwrap()
            .sent();
        assert_eq!((sent.body, sent.is_idempotent), (body, is_idempotent));
    }
    assert!(plain.options.custom_l4.is_some() && plain.options.read_timeout.is_none());
    let (mut tls, mut h2) = (peer(true), peer(false));
    h2.options.set_http_version(2, 2);
    for peer in [&mut tls, &mut h2] {
        assert!(
            connections
                .carry(peer, (false, &post), Waits::default(), None)
                .is_none()
        );
        assert!(peer.options.custom_l4.is_none() && peer.options.read_timeout.is_some());
    }
}

#[test]
fn each_wait_has_its_time() {
    let pool = || Arc::new(Pool::new(10, true));
    let start = tokio::time::Instant::now();
    let seconds = |seconds| Duration::from_secs(seconds);
    let waits = Waits {
        client_body: Some(seconds(10)),
        end_by: Some(start + seconds(100)),
        ..Waits::default()
    };
    let times = || Times {
        silence: Silence {
            response: seconds(20),
            read: seconds(40),
        },
        waits,
        ..times()
    };
    let exchange = Exchange::new(pool(), plain(), times(), sent(Body::Chunked));
    let until = || exchange.wait_until(start) - start;
    assert_eq!(until(), seconds(10));
    exchange.request_completes();
    assert_eq!(until(), seconds(20));
    exchange.answer_begins();
    assert_eq!(until(), seconds(40));
    // None of them is longer than the request.
    let later = start + seconds(90);
    assert_eq!(exchange.wait_until(later) - start, seconds(100));
}
