//! An etcd, members as processes, and what both crates see of a group.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longer than any step takes on a machine that is busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(40);

/// Waits until `state` holds.
pub async fn until(what: &str, mut state: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !state().await {
        assert!(
            start.elapsed() < DEADLINE,
            "not within {DEADLINE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from)
}

/// A port that nobody listens on and that no other caller in this process gets. It is below the
/// range from which the kernel assigns ephemeral ports.
fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = fastrand::u16(10_000..30_000);
        let is_free = std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        if is_free && GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// An etcd of the test's own.
pub struct Etcd {
    process: Child,
    pub endpoint: String,
    _data: tempfile::TempDir,
}

impl Etcd {
    pub async fn start() -> Self {
        let binary = variable("ETCD_BIN").expect(
            "these tests need a real etcd: set ETCD_BIN to an etcd binary, or run `make interop`",
        );
        let (client, peer) = (free_port(), free_port());
        let endpoint = format!("http://127.0.0.1:{client}");
        let peer = format!("http://127.0.0.1:{peer}");
        let data = tempfile::tempdir().unwrap();
        let process = Command::new(binary)
            .arg("--data-dir")
            .arg(data.path())
            .args(["--listen-client-urls", &endpoint])
            .args(["--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Self {
            process,
            endpoint,
            _data: data,
        };
        until("etcd serves", async || {
            let client = etcd_client::Client::connect([&etcd.endpoint], None).await;
            match client {
                Ok(mut client) => client.get("ready", None).await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
        etcd
    }

    pub async fn client(&self) -> etcd_client::Client {
        let client = etcd_client::Client::connect([&self.endpoint], None).await;
        client.unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ours,
    Theirs,
}

impl Kind {
    pub const BOTH: [Self; 2] = [Self::Ours, Self::Theirs];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Theirs => "theirs",
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Ours => Self::Theirs,
            Self::Theirs => Self::Ours,
        }
    }
}

/// A time during which a process said each time it was asked that it leads, in microseconds since
/// 1970: from after the first answer until before the last question.
#[derive(Debug, Clone, Copy)]
pub struct Led {
    pub from: u128,
    pub to: u128,
}

/// A member of a group, which is killed when this is dropped.
pub struct Member {
    process: Child,
    pub kind: Kind,
    pub id: String,
    led: Arc<Mutex<Vec<Led>>>,
}

/// Answers that are further apart than this are of two terms.
const APART_MICROS: u128 = 100_000;

impl Member {
    pub fn start(kind: Kind, etcd: &Etcd, group: &str, id: &str) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_member"))
            .args([kind.name(), &etcd.endpoint, group, id])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let led: Arc<Mutex<Vec<Led>>> = Arc::default();
        let terms = led.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let (before, after) = line.split_once(' ').unwrap();
                let (before, after) = (before.parse().unwrap(), after.parse().unwrap());
                let mut terms = terms.lock().unwrap();
                match terms.last_mut() {
                    Some(term) if before < term.to.max(term.from) + APART_MICROS => {
                        term.to = before;
                    }
                    _ => terms.push(Led {
                        from: after,
                        to: before,
                    }),
                }
            }
        });
        Self {
            process,
            kind,
            id: id.to_owned(),
            led,
        }
    }

    /// Sends a signal, by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.unwrap().success(), "kill -s {name} {pid}");
    }

    /// When it led.
    pub fn led(&self) -> Vec<Led> {
        let led = self.led.lock().unwrap();
        led.iter()
            .filter(|led| led.from < led.to)
            .copied()
            .collect()
    }

    /// Whether it has said within the last half second that it leads.
    pub fn leads(&self) -> bool {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.unwrap().as_micros();
        let led = self.led.lock().unwrap();
        led.last().is_some_and(|led| led.to + 500_000 > now)
    }

    /// Waits until the process has ended; returns when it led.
    pub fn ended(mut self) -> Vec<Led> {
        let _ = self.process.wait();
        self.led()
    }

    /// Ends it at once, as a crash does.
    pub fn crash(mut self) -> Vec<Led> {
        let _ = self.process.kill();
        self.ended()
    }

    /// Ends it as its crate ends a node.
    pub fn stop(self) -> Vec<Led> {
        self.signal("TERM");
        self.ended()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the discovery of each crate shows of a group.
pub struct Views {
    ours: pingora_etcd::ServiceDiscovery,
    theirs: photon_etcd_cluster::ServiceDiscovery,
}

/// Nodes with their metadata in the order of their ids, and the leader.
pub type View = (Vec<(String, String)>, Option<String>);

macro_rules! view {
    ($discovery:expr) => {{
        let nodes = $discovery.nodes();
        let of = nodes.iter();
        let mut nodes: Vec<_> = of
            .map(|node| (node.id.clone(), node.metadata.to_string()))
            .collect();
        nodes.sort();
        (nodes, $discovery.leader().map(|node| node.id.clone()))
    }};
}

impl Views {
    pub async fn of(etcd: &Etcd, group: &str) -> Self {
        let endpoints = || vec![etcd.endpoint.clone()];
        let views = Self {
            ours: pingora_etcd::ServiceDiscovery::new(endpoints(), group.to_owned()),
            theirs: photon_etcd_cluster::ServiceDiscovery::new(endpoints(), group.to_owned()),
        };
        let (ours, theirs) = (views.ours.clone(), views.theirs.clone());
        tokio::spawn(async move { ours.run(None).await });
        tokio::spawn(async move { theirs.run(None).await });
        views.ours.wait_ready().await;
        views.theirs.wait_ready().await;
        views
    }

    /// What ours shows, and what theirs shows.
    pub fn both(&self) -> (View, View) {
        (view!(self.ours), view!(self.theirs))
    }

    /// Waits until both show this leader.
    pub async fn until_leader(&self, id: Option<&str>) {
        until(
            &format!("both views show {id:?} as the leader"),
            async || {
                let ((_, ours), (_, theirs)) = self.both();
                ours.as_deref() == id && theirs.as_deref() == id
            },
        )
        .await;
    }

    /// Waits until both show these nodes, with the metadata that a member publishes.
    pub async fn until_nodes(&self, ids: &[&str]) {
        let mut expected: Vec<_> = ids
            .iter()
            .map(|id| {
                let metadata = serde_json::json!({ "queue_depth": id.len() });
                ((*id).to_owned(), metadata.to_string())
            })
            .collect();
        expected.sort();
        until(&format!("both views show {ids:?}"), async || {
            let ((ours, _), (theirs, _)) = self.both();
            ours == expected && theirs == expected
        })
        .await;
    }
}

/// The `etcdctl` that the environment names, or that is on the path.
pub fn etcdctl() -> Option<PathBuf> {
    let given = variable("ETCDCTL").unwrap_or_else(|| Path::new("etcdctl").to_owned());
    let found = Command::new(&given).arg("version").output().is_ok();
    if !found {
        eprintln!("skipped, because {} is not installed", given.display());
    }
    found.then_some(given)
}
