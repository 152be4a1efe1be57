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

    async fn connect(&self, times: Times, has_body: bool) -> (Stream, Arc<Exchange>) {
        let exchange = Exchange::new(self.pool.clone(), 7, times, has_body);
        let addr = self.listener.local_addr().unwrap().into();
        (exchange.connect(&addr).await.unwrap(), exchange)
    }

    /// A request without a body on a connection, which is then dropped.
    async fn exchange(&self, end: End) -> Arc<Exchange> {
        let (mut stream, exchange) = self.connect(times(), false).await;
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
        TcpStream::connect(self.target().addr).await.unwrap().into()
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

fn times() -> Times {
    Times {
        connect: Some(Duration::from_secs(5)),
        silence: Some(Duration::from_secs(5)),
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
        // Until it has arrived. Nobody but the task that looks after the pool takes it out.
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

/// Tokio learns of an end when it looks for events: here it has no time for that.
#[tokio::test]
async fn a_request_that_cannot_be_repeated_does_not_meet_an_end_that_the_system_knows() {
    let world = World::new(10).await;
    for looks_closely in [false, true] {
        let connection = world.new_connection().await;
        let addr = connection.socket.local_addr().unwrap();
        drop(world.accept().await);
        // Until the system has passed it on.
        std::thread::sleep(Duration::from_millis(50));
        world
            .pool
            .put(world.target(), connection, Duration::from_secs(60));
        let taken = world.pool.take(world.target(), looks_closely);
        let taken = taken.map(|it| it.socket.local_addr().unwrap());
        assert_eq!(taken, (!looks_closely).then_some(addr));
    }
}

#[tokio::test]
async fn a_connection_is_kept_for_its_time() {
    let world = World::new(10).await;
    let target = world.target();
    for (milliseconds, kept) in [(0, 0), (20, 1), (60_000, 2)] {
        let connection = world.new_connection().await;
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
async fn the_one_that_was_used_last_comes_first_and_the_oldest_makes_room() {
    let minute = Duration::from_secs(60);
    let world = World::new(3).await;
    let target = world.target();
    let mut ports = Vec::new();
    for number in 0..5 {
        let connection = world.new_connection().await;
        ports.push(connection.socket.local_addr().unwrap());
        world.pool.put(target, connection, minute);
        assert_eq!(world.pool.count(), (number + 1).min(3));
    }
    let taken = std::iter::from_fn(|| world.pool.take(target, false));
    let taken: Vec<_> = taken.map(|it| it.socket.local_addr().unwrap()).collect();
    assert_eq!(taken, [ports[4], ports[3], ports[2]]);
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
    let (mut stream, exchange) = world.connect(times(), true).await;
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
        let (mut stream, exchange) = world.connect(times(), true).await;
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

/// What Pingora writes in parts, as a chunk, is gathered until it flushes or waits.
#[tokio::test]
async fn parts_of_a_body_leave_together() {
    let world = World::new(10).await;
    let large = vec![b'x'; 40_000];
    for (data, reads) in [(&b"data"[..], 1), (&large, 2)] {
        let (mut stream, _) = world.connect(times(), true).await;
        let mut backend = world.accept().await;
        let mut whole = Vec::new();
        for part in [HEAD, b"9C40\r\n", data, b"\r\n"] {
            stream.write_all(part).await.unwrap();
            whole.extend_from_slice(part);
            if part == HEAD {
                stream.flush().await.unwrap();
            }
        }
        stream.flush().await.unwrap();
        let (mut read, mut count) = (vec![0; 100_000], 0);
        for _ in 0..reads {
            // The rest is there, but the buffer of the system may give it in two parts.
            count += backend.read(&mut read[count..]).await.unwrap();
        }
        assert_eq!(read[..count], whole[..count]);
        assert!(count == whole.len() || data.len() > 20_000, "{count}");
        // A part that is not the last one is not flushed: it leaves when the response is waited for.
        stream.write_all(BODY).await.unwrap();
        let mut answer = [0; 2];
        let (answered, heard) = tokio::join!(stream.read_exact(&mut answer), async {
            let mut rest = vec![0; whole.len() - count + BODY.len()];
            backend.read_exact(&mut rest).await.unwrap();
            assert!(rest.ends_with(BODY));
            backend.write_all(b"ok").await
        });
        assert!(answered.is_ok() && heard.is_ok());
    }
}

#[tokio::test]
async fn a_silence_ends_after_its_time_and_each_byte_begins_it_anew() {
    let world = World::new(10).await;
    let within = |silence| Times {
        silence: Some(Duration::from_millis(silence)),
        ..times()
    };
    let (mut stream, exchange) = world.connect(within(200), false).await;
    let mut backend = world.accept().await;
    for _ in 0..5 {
        let (read, ()) = tokio::join!(stream.read_u8(), async {
            tokio::time::sleep(Duration::from_millis(80)).await;
            backend.write_u8(7).await.unwrap();
        });
        assert_eq!(read.unwrap(), 7);
    }
    // So does what is written.
    for _ in 0..5 {
        let read = tokio::time::timeout(Duration::from_millis(80), stream.read_u8());
        assert!(read.await.is_err());
        stream.write_all(b"a part").await.unwrap();
    }
    let start = std::time::Instant::now();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(exchange.is_unanswered() && start.elapsed() >= Duration::from_millis(190));
}

#[tokio::test]
async fn a_connection_that_cannot_be_made_is_an_error_of_pingora() {
    let world = World::new(10).await;
    let addr = world.listener.local_addr().unwrap();
    drop(world.listener);
    let exchange = Exchange::new(world.pool, 7, times(), false);
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
    let mut plain = peer(false);
    assert!(connections.carry(&mut plain, false).is_some());
    assert!(plain.options.custom_l4.is_some() && plain.options.read_timeout.is_none());
    let (mut tls, mut h2) = (peer(true), peer(false));
    h2.options.set_http_version(2, 2);
    for peer in [&mut tls, &mut h2] {
        assert!(connections.carry(peer, false).is_none());
        assert!(peer.options.custom_l4.is_none() && peer.options.read_timeout.is_some());
    }
}
