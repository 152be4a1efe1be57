//! A real balancer as a process, and requests through it at a steady rate.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::common::etcd::Process;
use super::common::link::Link;
use super::common::{DEADLINE, free_port, local};

/// The number of clients, each with its own keep-alive connection.
const CLIENTS: usize = 8;
/// The time between two requests of one client: 160 requests a second in all.
const EVERY: Duration = Duration::from_millis(50);
/// The time limit of a request: longer than the balancer takes to try three silent backends.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The example `load_balancer`, with its own links to etcd.
pub struct Balancer {
    links: Vec<Link>,
    process: Option<Process>,
    url: String,
}

impl Balancer {
    pub async fn start(etcd: &[String], group: &str) -> Self {
        let mut links = Vec::new();
        for member in etcd {
            links.push(Link::to(member.clone()).await);
        }
        let endpoints: Vec<_> = links
            .iter()
            .map(|link| format!("'http://{}'", link.address()))
            .collect();
        let listen = format!("{}:{}", local(), free_port());
        // The balancer gives up on a backend that is cut off in the middle of a response after a
        // second.
        let text = format!(
            "version: 1\nthreads: 1\ncluster:\n  etcd: {{ endpoints: [{}] }}\n  group: {group}\n  \
             listen: '{listen}'\n  policy: adaptive\n  adaptive: {{ slow_start_ms: 1000 }}\n  \
             timeouts: {{ connect_ms: 500, response_ms: 1000 }}\n  retry: {{ on_timeout: true }}\n",
            endpoints.join(", ")
        );
        let files = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{group}-balancer"));
        std::fs::write(&files, text)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", files.display()));
        let mut command = Command::new(example("load_balancer"));
        command.arg("--conf").arg(&files);
        let balancer = Self {
            links,
            process: Some(Process::spawn(&command, &files)),
            url: format!("http://{listen}/"),
        };
        let client = client();
        let start = Instant::now();
        loop {
            let response = client.get(&balancer.url).send().await;
            if response
                .as_ref()
                .is_ok_and(|response| response.status().is_success())
            {
                return balancer;
            }
            let log = files.with_extension("log");
            assert!(
                start.elapsed() < DEADLINE,
                "the balancer does not serve: {response:?}; see {}",
                log.display()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn set_silent(&self, silent: bool) {
        for link in &self.links {
            link.set_silent(silent);
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(false);
        }
    }
}

#[derive(Default)]
struct Seen {
    sent: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failed: Vec<String>,
    slowest: Duration,
    /// When each node last responded.
    nodes: HashMap<String, Instant>,
}

/// Sends requests at a steady rate until it is dropped.
pub struct Traffic {
    seen: Arc<Seen>,
    _clients: JoinSet<()>,
}

/// What was counted since the last [`Traffic::take`].
#[derive(Clone, Debug, Default)]
pub struct Requests {
    pub sent: u64,
    pub failed: Vec<String>,
    pub slowest: Duration,
}

impl Traffic {
    pub fn start(url: &str) -> Self {
        let seen = Arc::new(Seen::default());
        let mut clients = JoinSet::new();
        for index in 0..CLIENTS {
            let (url, seen, client) = (url.to_owned(), seen.clone(), client());
            clients.spawn(async move {
                tokio::time::sleep(EVERY * index as u32 / CLIENTS as u32).await;
                let mut ticks = interval(EVERY);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    seen.request(&client, &url).await;
                }
            });
        }
        Self {
            seen,
            _clients: clients,
        }
    }

    pub fn take(&self) -> Requests {
        let mut state = self.seen.state();
        Requests {
            sent: self.seen.sent.swap(0, Ordering::Relaxed),
            failed: std::mem::take(&mut state.failed),
            slowest: std::mem::take(&mut state.slowest),
        }
    }

    /// The nodes that have not responded to any request sent after `since`.
    pub fn missing<'a>(
        &self,
        nodes: impl Iterator<Item = &'a String>,
        since: Instant,
    ) -> BTreeSet<&'a str> {
        let state = self.seen.state();
        let responded = |id: &String| state.nodes.get(id).is_some_and(|last| *last > since);
        nodes
            .filter(|id| !responded(id))
            .map(String::as_str)
            .collect()
    }
}

impl Seen {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, client: &reqwest::Client, url: &str) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let node = async {
            let response = client.get(url).send().await.map_err(|e| chain(&e))?;
            let (status, node) = (
                response.status(),
                response.headers().get("x-upstream-node").cloned(),
            );
            let body = response.text().await.map_err(|e| chain(&e))?;
            if !status.is_success() {
                return Err(format!("{status}: {}", body.trim()));
            }
            match node.as_ref().map(|node| node.to_str()) {
                Some(Ok(node)) => Ok(node.to_owned()),
                other => Err(format!("no x-upstream-node: {other:?}")),
            }
        };
        let node = node.await;
        let mut state = self.state();
        state.slowest = state.slowest.max(start.elapsed());
        match node {
            Ok(node) => drop(state.nodes.insert(node, start)),
            Err(reason) => state
                .failed
                .push(format!("after {:.1?}: {reason}", start.elapsed())),
        }
    }
}

fn client() -> reqwest::Client {
    let client = reqwest::Client::builder().timeout(REQUEST_LIMIT).build();
    client.unwrap_or_else(|error| panic!("an HTTP client: {error}"))
}

/// An error with the chain of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// The path of an example beside the test binary, in `target/*/examples`.
pub fn example(name: &str) -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap_or_else(|error| panic!("our own path: {error}"));
    let target = test.parent().and_then(Path::parent);
    let example = target.unwrap_or(Path::new(".")).join("examples").join(name);
    assert!(
        example.is_file(),
        "{} is missing: cargo build --all-features --examples",
        example.display()
    );
    example
}
