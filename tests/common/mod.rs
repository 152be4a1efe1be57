//! What the integration tests share: a real etcd, a scripted one, a TCP proxy that can go silent,
//! the example programs, waiting for a state with a deadline, and for how long the machine stood still.
#![allow(dead_code)] // each test crate uses only a part of it

pub mod certificates;
pub mod etcd;
pub mod link;
pub mod load;
pub mod namespace;
pub mod programs;
pub mod scripted;
pub mod stalls;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// Longer than any step of a test takes on a machine that is busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Shows the log lines of this crate when a test fails; `RUST_LOG` sets the filter.
pub fn log() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
}

/// Gives the log lines of the current thread to `subscriber`, until the guard is dropped.
///
/// The subscriber of [`log`] has to be there before: as long as `tracing` knows one subscriber only,
/// it asks the thread that reaches a log line first, and if that thread has none, the line is off for
/// all threads.
pub fn subscribe(subscriber: impl Into<tracing::Dispatch>) -> tracing::subscriber::DefaultGuard {
    log();
    tracing::dispatcher::set_default(&subscriber.into())
}

/// Says that the test is skipped: on standard error directly, because the test harness hides what passing tests print.
pub fn skipped(why: impl std::fmt::Display) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = std::io::Write::write_fmt(
        &mut std::io::stderr(),
        format_args!("skipped: {test}: {why}\n"),
    );
}

/// A group name that no other test uses.
pub fn group(test: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    log();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{test}-{}-{count}", std::process::id())
}

/// Waits until `state` holds and returns how long that took; panics with `what` after the deadline.
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

/// Checks during `time` that `state` keeps holding, so that a violation has time to occur.
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

/// A port that nobody listens on and that no other caller in this process gets. It is below the
/// range from which the kernel assigns ephemeral ports.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = fastrand::u16(10_000..30_000);
        let free = std::net::TcpListener::bind((local(), port)).is_ok();
        let mut given = GIVEN
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if free && given.insert(port) {
            return port;
        }
    }
}
