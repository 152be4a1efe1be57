//! Idle connections.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::net::TcpStream;
use tokio::runtime::Handle;

use super::socket::Socket;
use crate::opaque::opaque_debug;
use crate::proxy::deadline::Deadline;
use crate::sync::lock;

/// How often connections that are over are looked for. Nobody gets one of them in between.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Backends share their locks with few others.
const SHARDS: usize = 16;

/// Where a connection leads: one to a former process at the same address is not used for a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Target {
    pub(super) addr: SocketAddr,
    /// Pingora's name for what keeps connections apart.
    pub(super) group_key: u64,
}

/// Idle connections, by where they lead: the one that was used last comes first, so that those of a busy moment are let
/// go of afterwards.
pub(super) struct Pool {
    shards: [Mutex<Shard>; SHARDS],
    count: AtomicUsize,
    most: usize,
    /// All threads have one timer, so that a deadline that was made by one of them serves the others.
    keeps_deadlines: bool,
    /// A task looks for those that are over.
    is_looked_after: AtomicBool,
}

type Shard = HashMap<Target, Vec<Idle>>;

/// A connection, and what is used again with it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Socket,
    pub(super) deadline: Deadline,
}

impl Connection {
    /// One that is new.
    pub(super) fn new(socket: impl Into<Socket>) -> Self {
        Self {
            socket: socket.into(),
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
        self.until > now && is_quiet(self.connection.socket.tcp())
    }
}

/// The one that ends first.
fn take_first(shard: &mut Shard) -> Option<Idle> {
    let lists = shard.values_mut();
    let lists = lists.filter_map(|kept| Some((kept.first()?.until, kept)));
    let (_, kept) = lists.min_by_key(|(until, _)| *until)?;
    Some(kept.remove(0))
}

/// Whether there is nothing to read, and no end.
fn is_quiet(socket: &TcpStream) -> bool {
    let read = socket.try_read(&mut [0]);
    matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// The same, as the system knows it. Costs a system call.
fn is_alive(socket: &TcpStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(socket, &mut [0; 1], flags).is_err_and(|error| error == Errno::WOULDBLOCK)
}

impl Pool {
    /// An empty pool of at most this number of connections.
    pub(super) fn new(most: usize, keeps_deadlines: bool) -> Self {
        Self {
            shards: Default::default(),
            count: AtomicUsize::new(0),
            most,
            keeps_deadlines,
            is_looked_after: AtomicBool::new(false),
        }
    }

    fn shard(&self, target: Target) -> &Mutex<Shard> {
        let addr = target.addr;
        let last = match addr.ip() {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        &self.shards[(usize::from(last) ^ usize::from(addr.port())) % SHARDS]
    }

    /// A connection that leads there. Who `looks_closely` asks the system, too, which may know of an end of which this
    /// process has not been told yet.
    pub(super) fn take(&self, target: Target, looks_closely: bool) -> Option<Connection> {
        let now = Instant::now();
        loop {
            let last = lock(self.shard(target)).get_mut(&target)?.pop()?;
            self.count.fetch_sub(1, Ordering::Relaxed);
            if last.is_open(now) && (!looks_closely || is_alive(last.connection.socket.tcp())) {
                return Some(last.connection);
            }
        }
    }

    /// Makes room for one more, which counts already. `false` if there is none.
    fn make_room(&self) -> bool {
        let more = |count| (count < self.most).then_some(count + 1);
        let counted = self
            .count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        if counted.is_ok() {
            return true;
        }
        // The next one comes from another shard.
        let first = fastrand::usize(..SHARDS);
        let mut shards = self.shards.iter().cycle().skip(first).take(SHARDS);
        // It is closed after the lock is free.
        shards.any(|shard| {
            let given_up = take_first(&mut lock(shard));
            given_up.is_some()
        })
    }

    /// Keeps a connection for this time, if need be instead of another one.
    pub(super) fn put(
        self: &Arc<Self>,
        target: Target,
        mut connection: Connection,
        idle: Duration,
    ) {
        if idle.is_zero() {
            return;
        }
        if !self.keeps_deadlines {
            connection.deadline = Deadline::default();
        }
        let until = Instant::now() + idle;
        if !self.make_room() {
            return;
        }
        let mut shard = lock(self.shard(target));
        let kept = shard.entry(target).or_default();
        kept.push(Idle { connection, until });
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

opaque_debug!(Pool);
