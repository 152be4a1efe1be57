//! Idle connections.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::runtime::Handle;

use crate::proxy::deadline::Deadline;
use crate::sync::lock;

/// After which time connections that are over are looked for. Nobody gets one of them in between.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Backends share their locks with few others.
const SHARDS: usize = 16;

/// Idle connections, by the address of the backend: the one that was used last comes first, so that those of a busy
/// moment are let go of afterwards.
#[derive(Debug)]
pub(super) struct Pool {
    shards: [Mutex<Shard>; SHARDS],
    count: AtomicUsize,
    most: usize,
    /// A task looks for those that are over.
    is_looked_after: AtomicBool,
}

type Shard = HashMap<SocketAddr, Vec<Idle>>;

/// A connection, and what is used again with it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: TcpStream,
    pub(super) deadline: Deadline,
}

impl From<TcpStream> for Connection {
    /// One that is new.
    fn from(socket: TcpStream) -> Self {
        Self {
            socket,
            deadline: Deadline::default(),
        }
    }
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    until: Instant,
}

impl Idle {
    /// Whether it may be used: its backend has neither closed it nor sent anything.
    fn is_open(&self, now: Instant) -> bool {
        self.until > now && is_quiet(&self.connection.socket)
    }
}

/// Whether there is nothing to read, and no end.
fn is_quiet(socket: &TcpStream) -> bool {
    let read = socket.try_read(&mut [0]);
    matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

impl Pool {
    /// An empty pool of at most this number of connections.
    pub(super) fn new(most: usize) -> Self {
        Self {
            shards: Default::default(),
            count: AtomicUsize::new(0),
            most,
            is_looked_after: AtomicBool::new(false),
        }
    }

    fn shard(&self, addr: SocketAddr) -> &Mutex<Shard> {
        let last = match addr.ip() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        &self.shards[(usize::from(last) ^ usize::from(addr.port())) % SHARDS]
    }

    /// A connection to this address.
    pub(super) fn take(&self, addr: SocketAddr) -> Option<Connection> {
        let now = Instant::now();
        // They are closed after the lock is free.
        let mut over = Vec::new();
        let mut shard = lock(self.shard(addr));
        let kept = shard.get_mut(&addr)?;
        while let Some(last) = kept.pop() {
            self.count.fetch_sub(1, Ordering::Relaxed);
            if last.is_open(now) {
                return Some(last.connection);
            }
            over.push(last);
        }
        drop(shard);
        None
    }

    /// Keeps a connection for this time, if there is room for it.
    pub(super) fn put(self: &Arc<Self>, addr: SocketAddr, connection: Connection, idle: Duration) {
        if idle.is_zero() {
            return;
        }
        if self.count.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.count.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let until = Instant::now() + idle;
        let mut shard = lock(self.shard(addr));
        shard
            .entry(addr)
            .or_default()
            .push(Idle { connection, until });
        drop(shard);
        if !self.is_looked_after.load(Ordering::Relaxed) {
            self.look_after();
        }
    }

    /// Closes those that are over, as long as the pool is there.
    fn look_after(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        if self.is_looked_after.swap(true, Ordering::Relaxed) {
            return;
        }
        let pool = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                match pool.upgrade() {
                    Some(pool) => pool.close_those_over(Instant::now()),
                    None => return,
                }
            }
        });
    }

    fn close_those_over(&self, now: Instant) {
        for shard in &self.shards {
            let mut over = Vec::new();
            let mut shard = lock(shard);
            shard.retain(|_, kept| {
                over.extend(kept.extract_if(.., |idle| !idle.is_open(now)));
                !kept.is_empty()
            });
            drop(shard);
            self.count.fetch_sub(over.len(), Ordering::Relaxed);
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}
