//! A TCP proxy in front of etcd that counts connections, adds delay, and can go silent: it then
//! forwards nothing and closes nothing, like a network that drops packets.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pingora_etcd::EtcdOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

pub struct Link {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    pings: Arc<AtomicUsize>,
    /// Each open connection holds a clone.
    open: Arc<()>,
    silent: watch::Sender<bool>,
    delay: watch::Sender<Duration>,
    cut: Arc<tokio::sync::Notify>,
    _accepting: JoinSet<()>,
}

impl Link {
    /// A link in front of `target` (`host:port`).
    pub async fn to(target: String) -> Link {
        Self::at(super::local(), target).await
    }

    /// A link in front of `target` that listens on `ip`.
    pub async fn at(ip: IpAddr, target: String) -> Link {
        Self::bound(&format!("{ip}:0"), target).await
    }

    /// A link in front of `target` that listens on `address`.
    pub async fn bound(address: &str, target: String) -> Link {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let pings = Arc::new(AtomicUsize::new(0));
        let to_pings = pings.clone();
        let open = Arc::new(());
        let to_hold = open.clone();
        let silent = watch::Sender::new(false);
        let delay = watch::Sender::new(Duration::ZERO);
        let (counter, state) = (connections.clone(), silent.subscribe());
        let delayed = delay.subscribe();
        let cut = Arc::new(tokio::sync::Notify::new());
        let to_cut = cut.clone();
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut forwarding = JoinSet::new();
            loop {
                let near = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = to_cut.notified() => {
                        forwarding.shutdown().await;
                        continue;
                    }
                };
                let Ok((near, _)) = near else { continue };
                counter.fetch_add(1, Ordering::Relaxed);
                let held = to_hold.clone();
                let forwarded = forward(
                    near,
                    target.clone(),
                    state.clone(),
                    delayed.clone(),
                    to_pings.clone(),
                );
                forwarding.spawn(async move {
                    forwarded.await;
                    drop(held);
                });
            }
        });
        Link {
            address,
            connections,
            pings,
            open,
            silent,
            delay,
            cut,
            _accepting: accepting,
        }
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions::new([format!("http://{}", self.address)])
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections were accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// How many HTTP/2 pings the client sent, without its acknowledgements of the server's pings.
    pub fn pings(&self) -> usize {
        self.pings.load(Ordering::Relaxed)
    }

    /// How many connections neither side has closed.
    pub fn open(&self) -> usize {
        // Two references are not connections: the one in `self` and the one in the accepting task.
        Arc::strong_count(&self.open) - 2
    }

    /// Closes every open connection.
    pub fn cut(&self) {
        self.cut.notify_one();
    }

    /// Delays everything by this much from now on, in each direction, without limiting how many
    /// bytes are in transit. The handshake of a new connection is delayed, too.
    pub fn set_delay(&self, each_way: Duration) {
        self.delay.send_replace(each_way);
    }

    /// Forwards nothing from now on, or resumes and forwards what was held back.
    pub fn set_silent(&self, silent: bool) {
        self.silent.send_replace(silent);
    }
}

async fn forward(
    near: TcpStream,
    target: String,
    mut silent: watch::Receiver<bool>,
    delay: watch::Receiver<Duration>,
    pings: Arc<AtomicUsize>,
) {
    // The kernel accepts a connection that is made during silence; nothing is sent on it until the
    // silence ends.
    if silent.wait_for(|silent| !silent).await.is_err() {
        return;
    }
    let handshake = *delay.borrow() * 2;
    sleep(handshake).await;
    let Ok(far) = TcpStream::connect(target).await else {
        return;
    };
    // Nagle's algorithm would add 40 ms to each response.
    if near.set_nodelay(true).is_err() || far.set_nodelay(true).is_err() {
        return;
    }
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    tokio::join!(
        forward_one_way(
            near_in,
            far_out,
            silent.clone(),
            delay.clone(),
            Some(Frames::new(pings))
        ),
        forward_one_way(far_in, near_out, silent, delay, None)
    );
}

/// Parses the HTTP/2 frames of a client.
struct Frames {
    /// How many bytes of the preface, or of a frame's payload, are still to be skipped.
    skip: usize,
    head: Vec<u8>,
    pings: Arc<AtomicUsize>,
}

impl Frames {
    const PREFACE: usize = 24;
    const HEAD: usize = 9;
    const PING: u8 = 6;
    const ACK: u8 = 1;

    fn new(pings: Arc<AtomicUsize>) -> Self {
        Self {
            skip: Self::PREFACE,
            head: Vec::new(),
            pings,
        }
    }

    fn read(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return;
            }
            let (head, rest) = bytes.split_at(bytes.len().min(Self::HEAD - self.head.len()));
            self.head.extend_from_slice(head);
            bytes = rest;
            if let [a, b, c, kind, flags, ..] = self.head[..]
                && self.head.len() == Self::HEAD
            {
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                self.head.clear();
                if kind == Self::PING && flags & Self::ACK == 0 {
                    self.pings.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

async fn forward_one_way(
    from: impl AsyncReadExt + Unpin,
    to: impl AsyncWriteExt + Unpin,
    silent: watch::Receiver<bool>,
    delay: watch::Receiver<Duration>,
    frames: Option<Frames>,
) {
    // The queue is bounded only so that a test cannot exhaust the memory.
    let (queue, due) = mpsc::channel(64 * 1024);
    tokio::join!(
        receive(from, queue, delay, frames),
        deliver(due, to, silent)
    );
}

async fn receive(
    mut from: impl AsyncReadExt + Unpin,
    queue: mpsc::Sender<(Instant, Vec<u8>)>,
    delay: watch::Receiver<Duration>,
    mut frames: Option<Frames>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            // The other side has closed its connection.
            () = queue.closed() => return,
        };
        let read = match read {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if let Some(frames) = &mut frames {
            frames.read(&buffer[..read]);
        }
        let due = Instant::now() + *delay.borrow();
        if queue.send((due, buffer[..read].to_vec())).await.is_err() {
            return;
        }
    }
}

async fn deliver(
    mut due: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut to: impl AsyncWriteExt + Unpin,
    mut silent: watch::Receiver<bool>,
) {
    while let Some((at, bytes)) = due.recv().await {
        sleep_until(at).await;
        if silent.wait_for(|silent| !silent).await.is_err() {
            return;
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
    if silent.wait_for(|silent| !silent).await.is_ok() {
        let _ = to.shutdown().await;
    }
}
