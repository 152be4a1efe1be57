//! Raw bytes: clients that send what no HTTP library would, and backends that record and answer bytes.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::{DEADLINE, group, local};
use super::world::{Balancer, Setup, entry, put, until};

/// A client connection.
pub struct Raw(pub TcpStream);

impl Raw {
    pub async fn to(balancer: &Balancer) -> Self {
        Self(TcpStream::connect(&balancer.listen).await.unwrap())
    }

    /// A client at this address.
    pub async fn at(address: IpAddr, balancer: &Balancer) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address, 0).into()).unwrap();
        let connecting = socket.connect(balancer.listen.parse().unwrap());
        Self(connecting.await.unwrap())
    }

    /// Sends bytes; to a balancer that has closed the connection, in vain.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes).await;
    }

    /// Sends these bytes again and again until something arrives: its beginning.
    pub async fn drip(&mut self, bytes: &[u8], every: Duration) -> String {
        let dripping = async {
            loop {
                self.send(bytes).await;
                tokio::time::sleep(every).await;
                let mut answer = [0; 64];
                if let Ok(count) = self.0.try_read(&mut answer) {
                    break String::from_utf8_lossy(&answer[..count]).into_owned();
                }
            }
        };
        let answer = tokio::time::timeout(DEADLINE, dripping).await;
        answer.expect("a response")
    }

    /// What arrives until the connection ends.
    pub async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        // A reset ends it as well.
        let reading = self.0.read_to_end(&mut bytes);
        let _ = tokio::time::timeout(DEADLINE, reading)
            .await
            .expect("the connection ends");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// One response with a length.
    pub async fn response(&mut self) -> String {
        tokio::time::timeout(DEADLINE, read_message(&mut self.0))
            .await
            .expect("a response")
            .unwrap_or_default()
    }

    /// Sends a request and returns the whole of its response.
    pub async fn get(&mut self, head: &str) -> String {
        self.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{head}\r\n").as_bytes())
            .await;
        self.response().await
    }
}

/// Reads a head, and a body as long as its `Content-Length` says, or up to its last chunk. `None` at
/// the end of the connection.
pub async fn read_message(stream: &mut TcpStream) -> Option<String> {
    read_until(stream, |head, body| {
        let head = head.to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"));
        match length {
            Some(length) => body.len() >= length.trim().parse().unwrap(),
            None if head.contains("transfer-encoding: chunked") => body.ends_with("0\r\n\r\n"),
            None => true,
        }
    })
    .await
}

/// Reads a head, and what comes with it of a body.
pub async fn read_head(stream: &mut TcpStream) -> Option<String> {
    read_until(stream, |_, _| true).await
}

/// Reads a message until it is whole, by its head and what there is of its body.
async fn read_until(
    stream: &mut TcpStream,
    is_whole: impl Fn(&str, &str) -> bool,
) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && is_whole(head, body)
        {
            return Some(text.into_owned());
        }
        let mut part = [0; 4096];
        match stream.read(&mut part).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&part[..count]),
        }
    }
}

/// The status of a response.
pub fn status(response: &str) -> &str {
    response.split(' ').nth(1).unwrap_or("none")
}

type Answer = Arc<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// A backend that records each request and answers with bytes.
pub struct RawBackend {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
    at_once: Arc<AtOnce>,
    _serving: JoinSet<()>,
}

/// Requests that have arrived and are not answered.
#[derive(Default)]
struct AtOnce {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl AtOnce {
    fn begins(&self) {
        let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(now, Ordering::Relaxed);
    }

    fn ends(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl RawBackend {
    /// A connection ends after an empty answer, and after one that says so.
    pub async fn start(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::started(Arc::new(answer), false, Duration::ZERO).await
    }

    /// One at this address, which nobody else uses.
    pub async fn start_at(
        address: SocketAddr,
        answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        Self::serving(listener, Arc::new(answer), false, Duration::ZERO)
    }

    /// One that does not wait for the body of a request.
    pub async fn start_early(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::started(Arc::new(answer), true, Duration::ZERO).await
    }

    /// One that answers with [`ok`] after this time.
    pub async fn start_slow(after: Duration) -> Self {
        Self::started(Arc::new(ok), false, after).await
    }

    /// One that accepts what waits at this listener.
    pub fn start_on(
        listener: std::net::TcpListener,
        answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::from_std(listener).unwrap();
        Self::serving(listener, Arc::new(answer), false, Duration::ZERO)
    }

    async fn started(answer: Answer, is_early: bool, after: Duration) -> Self {
        let listener = TcpListener::bind((local(), 0)).await.unwrap();
        Self::serving(listener, answer, is_early, after)
    }

    fn serving(listener: TcpListener, answer: Answer, is_early: bool, after: Duration) -> Self {
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let recorded = requests.clone();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let at_once = Arc::<AtOnce>::default();
        let counted = at_once.clone();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                let (answer, recorded) = (answer.clone(), recorded.clone());
                let counted = counted.clone();
                connections.spawn(async move {
                    loop {
                        let request = match is_early {
                            true => read_until(&mut stream, |_, _| true).await,
                            false => read_message(&mut stream).await,
                        };
                        let Some(request) = request else {
                            return;
                        };
                        recorded.lock().unwrap().push(request.clone());
                        counted.begins();
                        tokio::time::sleep(after).await;
                        let bytes = answer(&request);
                        // Who gets the answer may send the next request at once.
                        counted.ends();
                        let _ = stream.write_all(&bytes).await;
                        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
                        if bytes.is_empty() || text.contains("connection: close") {
                            return;
                        }
                    }
                });
            }
        });
        Self {
            address,
            requests,
            connections,
            at_once,
            _serving: serving,
        }
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// The greatest number of requests that it had at one time.
    pub fn most_at_once(&self) -> usize {
        self.at_once.most.load(Ordering::Relaxed)
    }

    /// The last request, in lower case.
    pub fn last(&self) -> String {
        let requests = self.requests();
        requests.last().expect("a request").to_ascii_lowercase()
    }
}

/// A backend of HTTP/2 without TLS that answers with `ok`, and no length, once it has the whole request, and at once with
/// a head and nothing else if that is for `/early`; with 20 MB for `/large`, with a head of 24,575 fields for `/fields`,
/// and never for `/hangs`. And its port.
pub async fn http_2_backend(after: Duration) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else {
                    return;
                };
                let mut streams = JoinSet::new();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    streams.spawn(async move {
                        let path = request.uri().path().to_owned();
                        let is_early = path == "/early";
                        let mut body = request.into_body();
                        if is_early {
                            let response = http::Response::builder().status(401).body(());
                            let _ = respond.send_response(response.unwrap(), true);
                            // If it were dropped, the stream would be reset.
                            return std::future::pending().await;
                        }
                        while let Some(Ok(data)) = body.data().await {
                            let _ = body.flow_control().release_capacity(data.len());
                        }
                        if path == "/hangs" {
                            return std::future::pending().await;
                        }
                        tokio::time::sleep(after).await;
                        let mut response = http::Response::new(());
                        if path == "/fields" {
                            for number in 0..24_575 {
                                let name = format!("x{number}").parse::<http::HeaderName>();
                                let value = http::HeaderValue::from_static("1");
                                response.headers_mut().insert(name.unwrap(), value);
                            }
                        }
                        let Ok(mut body) = respond.send_response(response, false) else {
                            return;
                        };
                        // As much of it as the other side has room for.
                        let _ = match path.as_str() {
                            "/large" => body.send_data(vec![b'x'; 20_000_000].into(), true),
                            _ => body.send_data("ok\n".into(), true),
                        };
                    });
                }
            });
        }
    });
    (port, serving)
}

/// A connection of HTTP/2 to the balancer.
pub async fn http_2(balancer: &Balancer) -> h2::client::SendRequest<bytes::Bytes> {
    let stream = TcpStream::connect(&balancer.listen).await;
    let (sender, connection) = h2::client::handshake(stream.unwrap()).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

/// A field of a message whose names are in lower case.
pub fn header<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = message.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

pub fn ok(_: &str) -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n".to_vec()
}

/// Registers backends, as `n0` and so on.
pub async fn register(etcd: &Etcd, group: &str, backends: &[&RawBackend]) {
    let mut keys = etcd.raw_client().await;
    for (index, backend) in backends.iter().enumerate() {
        let port = Some(backend.address.port());
        let entry = entry(&format!("n{index}"), port, json!({}));
        put(&mut keys, group, &entry, None).await;
    }
}

/// A balancer with these fields in front of one backend.
pub async fn in_front_of(backend: &RawBackend, name: &str, fields: &str) -> Balancer {
    in_front_of_after(backend, name, fields, b"").await
}

/// The same, where connections have to begin with these bytes.
pub async fn in_front_of_after(
    backend: &RawBackend,
    name: &str,
    fields: &str,
    start: &[u8],
) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(backend.address.port()), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let balancer = Setup::shared(&group).with(fields).start();
    until("it serves", async || {
        let Ok(stream) = TcpStream::connect(&balancer.listen).await else {
            return false;
        };
        let mut client = Raw(stream);
        client.send(start).await;
        client.send(b"GET / HTTP/1.0\r\n\r\n").await;
        !["503", "none"].contains(&status(&client.rest().await))
    })
    .await;
    backend.requests.lock().unwrap().clear();
    balancer
}

/// A balancer with these fields in front of a backend of HTTP/2 at this port.
pub async fn in_front_of_http_2(port: u16, name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(port), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    let fields = format!("backends: {{ protocol: h2c }}\n{fields}");
    let balancer = Setup::shared(&group).with(&fields).start();
    until("it serves", async || balancer.get().await == "a").await;
    balancer
}

/// Whether the other side closes the connection within this time.
pub async fn is_closed_within(stream: &mut TcpStream, time: Duration) -> bool {
    let mut byte = [0];
    matches!(
        tokio::time::timeout(time, stream.read(&mut byte)).await,
        Ok(Ok(0) | Err(_))
    )
}
