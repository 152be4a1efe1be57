//! A TCP proxy in front of etcd that counts connections, can be slow, and can go silent: it then
//! passes nothing and closes nothing, as a network does that drops packets.

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
    /// Each open connection holds one more.
    open: Arc<()>,
    silent: watch::Sender<bool>,
    delay: watch::Sender<Duration>,
    cut: Arc<tokio::sync::Notify>,
    _accepting: JoinSet<()>,
}

impl Link {
    /// In front of `target` (`host:port`).
    pub async fn to(target: String) -> Link {
        Self::at(super::local(), target).await
    }

    /// In front of `target`, and reached at `ip`.
    pub async fn at(ip: IpAddr, target: String) -> Link {
        Self::bound(&format!("{ip}:0"), target).await
    }

    /// In front of `target`, and reached at `address`.
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
            let mut passing = JoinSet::new();
            loop {
                let near = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = to_cut.notified() => {
                        passing.shutdown().await;
                        continue;
                    }
                };
                let Ok((near, _)) = near else { continue };
                counter.fetch_add(1, Ordering::Relaxed);
                let held = to_hold.clone();
                let passed = pass(
                    near,
                    target.clone(),
                    state.clone(),
                    delayed.clone(),
                    to_pings.clone(),
                );
                passing.spawn(async move {
                    passed.await;
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

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// HTTP/2 pings that the client has sent, its answers to the server's not among them.
    pub fn pings(&self) -> usize {
        self.pings.load(Ordering::Relaxed)
    }

    /// Connections that neither side has closed.
    pub fn open(&self) -> usize {
        // Without this one, and the one that accepts.
        Arc::strong_count(&self.open) - 2
    }

    /// Closes every connection there is.
    pub fn cut(&self) {
        self.cut.notify_one();
    }

    /// Holds everything back for so long from now on, in each direction, and does not limit how much
    /// is on its way. A connection is made as if its handshake took as long, too.
    pub fn set_delay(&self, each_way: Duration) {
        self.delay.send_replace(each_way);
    }

    /// Passes nothing from now on, or passes again what has been held back.
    pub fn set_silent(&self, silent: bool) {
        self.silent.send_replace(silent);
    }
}

async fn pass(
    near: TcpStream,
    target: String,
    mut silent: watch::Receiver<bool>,
    delay: watch::Receiver<Duration>,
    pings: Arc<AtomicUsize>,
) {
    // A connection made during silence is accepted by the kernel and then hears nothing.
    if silent.wait_for(|silent| !silent).await.is_err() {
        return;
    }
    let handshake = *delay.borrow() * 2;
    sleep(handshake).await;
    let Ok(far) = TcpStream::connect(target).await else {
        return;
    };
    // A proxy that waits for more to send would add 40 ms to each answer.
    if near.set_nodelay(true).is_err() || far.set_nodelay(true).is_err() {
        return;
    }
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    tokio::join!(
        pump(
            near_in,
            far_out,
            silent.clone(),
            delay.clone(),
            Some(Frames::new(pings))
        ),
        pump(far_in, near_out, silent, delay, None)
    );
}

/// Reads the HTTP/2 frames of a client.
struct Frames {
    /// Of the preface, or of a frame's content, still to come.
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

async fn pump(
    from: impl AsyncReadExt + Unpin,
    to: impl AsyncWriteExt + Unpin,
    silent: watch::Receiver<bool>,
    delay: watch::Receiver<Duration>,
    frames: Option<Frames>,
) {
    // Bounded only so that a test cannot fill the memory.
    let (queue, due) = mpsc::channel(64 * 1024);
    tokio::join!(take(from, queue, delay, frames), deliver(due, to, silent));
}

async fn take(
    mut from: impl AsyncReadExt + Unpin,
    queue: mpsc::Sender<(Instant, Vec<u8>)>,
    delay: watch::Receiver<Duration>,
    mut frames: Option<Frames>,
) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            // The other side is gone.
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
