//! What the integration tests share: a real etcd, a TCP proxy that goes silent, and waiting for a
//! state with a deadline.
#![allow(dead_code)] // each test crate uses its own part

pub mod certificates;
pub mod etcd;
pub mod link;
pub mod load;
pub mod programs;
pub mod scripted;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// Longer than anything here takes on a machine that is busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Shows this crate's log lines of a failing test (`RUST_LOG` has the filter).
pub fn log() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
}

/// A group of this test's own.
pub fn group(test: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    log();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{test}-{}-{count}", std::process::id())
}

/// Waits until `state` holds, looking often; panics with `what` after the deadline.
pub async fn eventually(what: &str, mut state: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !state() {
        assert!(
            start.elapsed() < DEADLINE,
            "not within {DEADLINE:?}: {what}"
        );
        sleep(Duration::from_millis(2)).await;
    }
    start.elapsed()
}

/// Waits for a future; panics with `what` after the deadline.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {DEADLINE:?}: {what}"),
    }
}

/// Lets something that must not happen happen, if it will: watches that `state` keeps holding.
pub async fn throughout(what: &str, time: Duration, mut state: impl FnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < time {
        assert!(state(), "after {:?}: {what}", start.elapsed());
        sleep(Duration::from_millis(2)).await;
    }
}

pub fn local() -> std::net::IpAddr {
    std::net::Ipv4Addr::LOCALHOST.into()
}

/// A port nobody listens on, and nobody else in this process is given. Below those that the kernel
/// gives to whoever asks for any.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = fastrand::u16(10_000..30_000);
        let free = std::net::TcpListener::bind((local(), port)).is_ok();
        let mut given = GIVEN.lock().unwrap_or_else(|error| error.into_inner());
        if free && given.insert(port) {
            return port;
        }
    }
}
