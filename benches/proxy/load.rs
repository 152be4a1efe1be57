//! Requests, the backends that answer them, and what a proxy needs for them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;

use super::others::Running;

const CONNECTIONS: usize = 64;
const WARM_UP: Duration = Duration::from_millis(300);

/// What is requested again and again.
#[derive(Clone, Copy)]
pub enum Load {
    /// A response of 100 bytes.
    Small,
    /// One of 16 KiB.
    Large,
    /// A request with 1 KiB.
    Post,
}

/// What a proxy needed.
pub struct Measured {
    requests: u64,
    cpu: Duration,
    time: Duration,
}

impl Measured {
    /// CPU time per request, in microseconds.
    pub fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests as f64
    }

    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.time.as_secs_f64()
    }
}

impl Load {
    pub const ALL: [Self; 3] = [Self::Small, Self::Large, Self::Post];

    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "GET, 100 bytes",
            Self::Large => "GET, 16 KiB",
            Self::Post => "POST, 1 KiB",
        }
    }

    fn request(self) -> Vec<u8> {
        let (method, path, length) = match self {
            Self::Small => ("GET", "/small", 0),
            Self::Large => ("GET", "/large", 0),
            Self::Post => ("POST", "/small", 1_024),
        };
        let fields = "Host: bench.test\r\nUser-Agent: bench\r\nAccept: */*\r\n";
        let framing = match length {
            0 => String::new(),
            length => format!("Content-Length: {length}\r\n"),
        };
        let head = format!("{method} {path} HTTP/1.1\r\n{fields}{framing}\r\n");
        [head.as_bytes(), &vec![b'x'; length]].concat()
    }

    /// Sends requests for this time, and measures how much CPU time the proxy needs.
    pub fn measure(self, proxy: &Running, time: Duration) -> Measured {
        let requests = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let (counter, over, address) = (requests.clone(), is_over.clone(), proxy.address);
        let sending = std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let clients: Vec<_> = (0..CONNECTIONS)
                    .map(|_| {
                        tokio::spawn(client(
                            address,
                            self.request(),
                            counter.clone(),
                            over.clone(),
                        ))
                    })
                    .collect();
                for client in clients {
                    client.await.unwrap();
                }
            });
        });
        std::thread::sleep(WARM_UP);
        let (start, cpu, count) = (
            Instant::now(),
            proxy.cpu(),
            requests.load(Ordering::Relaxed),
        );
        std::thread::sleep(time);
        let measured = Measured {
            requests: requests.load(Ordering::Relaxed) - count,
            cpu: proxy.cpu() - cpu,
            time: start.elapsed(),
        };
        is_over.store(true, Ordering::Relaxed);
        sending.join().unwrap();
        assert!(measured.requests > 0, "{} does not answer", proxy.name);
        measured
    }
}

async fn client(
    address: SocketAddr,
    request: Vec<u8>,
    count: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut buffer = vec![0; 65_536];
    while !over.load(Ordering::Relaxed) {
        stream.write_all(&request).await.unwrap();
        let (status, _) = read_message(&mut stream, &mut buffer)
            .await
            .expect("a response");
        assert!(status.contains(" 200 "), "{status}");
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads a message with a length: its first line and its path.
async fn read_message(stream: &mut TcpStream, buffer: &mut [u8]) -> Option<(String, bool)> {
    let mut filled = 0;
    let (head, length) = loop {
        match stream.read(&mut buffer[filled..]).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => filled += count,
        }
        let end = buffer[..filled]
            .windows(4)
            .position(|bytes| bytes == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let lower = head.to_ascii_lowercase();
            let length = lower
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            break (
                head,
                end + 4 + length.map_or(0, |text| text.trim().parse::<usize>().unwrap()),
            );
        }
    };
    while filled < length {
        match stream.read(&mut buffer[filled..]).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => filled += count,
        }
    }
    let first = head.lines().next().unwrap_or_default().to_owned();
    let is_large = first.contains("/large");
    Some((first, is_large))
}

/// Two servers that answer at once, in a thread of their own.
pub fn backends() -> Vec<SocketAddr> {
    let listeners: Vec<_> = (0..2)
        .map(|_| {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        })
        .collect();
    let addresses = listeners
        .iter()
        .map(|listener| listener.local_addr().unwrap())
        .collect();
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let serving: Vec<_> = listeners
                .into_iter()
                .map(|listener| tokio::spawn(serve(TcpListener::from_std(listener).unwrap())))
                .collect();
            for task in serving {
                task.await.unwrap();
            }
        });
    });
    addresses
}

async fn serve(listener: TcpListener) {
    let answer = |length: usize| {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
        );
        Arc::new([head.as_bytes(), &vec![b'x'; length]].concat())
    };
    let (small, large) = (answer(100), answer(16_384));
    while let Ok((mut stream, _)) = listener.accept().await {
        stream.set_nodelay(true).unwrap();
        let (small, large) = (small.clone(), large.clone());
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while let Some((_, is_large)) = read_message(&mut stream, &mut buffer).await {
                let answer = if is_large { &large } else { &small };
                if stream.write_all(answer).await.is_err() {
                    return;
                }
            }
        });
    }
}
