//! Starts programs and backends, and writes and reads keys, for the tests of this crate.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use etcd_client::{Client, PutOptions};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::common::etcd::Etcd;
use super::common::load::{client, until_it_answers};
use super::common::programs::{COMMAND, Program, optimised};
use super::common::{DEADLINE, free_port, local};

/// A file that belongs to this test run.
pub fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Where a program's log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    File,
    /// A device without free space.
    Full,
    /// A pipe whose reader has ended.
    Closed,
    /// A pipe that nobody reads.
    Stuck,
}

/// What a program has logged so far.
fn read_log(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let has_colours = text.contains('\u{1b}') && !std::thread::panicking();
    assert!(!has_colours, "colour codes in a file: {text}");
    text
}

fn start(mut command: Command, log: Log, file: &Path) -> Program {
    let everything = "trace";
    match log {
        Log::File => {
            let file = File::options().create(true).append(true).open(file);
            command.stdout(Stdio::null()).stderr(file.unwrap())
        }
        Log::Full => {
            let full = || File::options().write(true).open("/dev/full").unwrap();
            let command = command.env("RUST_LOG", everything);
            command.stdout(full()).stderr(full())
        }
        Log::Closed | Log::Stuck => {
            let command = command.env("RUST_LOG", everything);
            command.stdout(Stdio::piped()).stderr(Stdio::piped())
        }
    };
    let mut program = Program::spawn(&mut command);
    if log == Log::Closed {
        drop((program.child.stdout.take(), program.child.stderr.take()));
    }
    program
}

/// A running `load_balancer` or `leader_routing`.
pub struct Balancer {
    pub program: Program,
    pub url: String,
    pub listen: String,
    pub group: String,
    log: PathBuf,
    pub conf: PathBuf,
    _shared: Option<Arc<Etcd>>,
}

/// Whether this machine allows replacing `/etc/hosts` for a single program, which needs root.
pub fn may_replace_hosts() -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "mount", "--bind", "/etc/hosts", "/etc/hosts"])
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

/// How a balancer is started.
#[derive(Clone)]
pub struct Setup {
    pub program: &'static str,
    /// Keeps the shared etcd running as long as this, or anything started from it, exists.
    shared: Option<Arc<Etcd>>,
    pub endpoints: Vec<String>,
    pub group: String,
    /// Further fields of `cluster.etcd`, on one line.
    pub fields_of_etcd: String,
    /// Further lines of `cluster`.
    pub more: String,
    pub log: Log,
    pub listen: Option<String>,
    pub argument: Option<&'static str>,
    /// Further lines of Pingora's part.
    pub server: String,
    /// Variables of the program's environment.
    pub variables: Vec<(&'static str, String)>,
    /// What starts the program, as `unshare` does.
    pub starter: Vec<&'static str>,
    /// The file that replaces `/etc/hosts` for the program.
    pub hosts: Option<PathBuf>,
}

impl Setup {
    pub fn new(endpoints: Vec<String>, group: &str) -> Self {
        Self {
            program: "load_balancer",
            shared: None,
            endpoints,
            group: group.to_owned(),
            fields_of_etcd: String::new(),
            more: String::new(),
            log: Log::File,
            listen: None,
            argument: None,
            server: "grace_period_seconds: 0".to_owned(),
            variables: Vec::new(),
            starter: Vec::new(),
            hosts: None,
        }
    }

    /// A setup with the etcd that the tests share.
    pub fn shared(group: &str) -> Self {
        let etcd = Etcd::shared();
        Self {
            shared: Some(etcd.clone()),
            ..Self::new(etcd.endpoints(), group)
        }
    }

    pub fn program(mut self, program: &'static str) -> Self {
        self.program = program;
        self
    }

    pub fn etcd(mut self, fields: &str) -> Self {
        self.fields_of_etcd = format!(", {fields}");
        self
    }

    /// Adds lines with fields of `cluster`.
    pub fn with(mut self, lines: &str) -> Self {
        for line in lines.lines() {
            self.more.push_str(&format!("  {line}\n"));
        }
        self
    }

    pub fn log(mut self, log: Log) -> Self {
        self.log = log;
        self
    }

    pub fn listen(mut self, address: &str) -> Self {
        self.listen = Some(address.to_owned());
        self
    }

    /// Lines of Pingora's part instead of a grace period of 0.
    pub fn server(mut self, lines: &str) -> Self {
        lines.clone_into(&mut self.server);
        self
    }

    pub fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Starts the program by another one.
    pub fn starter(mut self, words: &[&'static str]) -> Self {
        words.clone_into(&mut self.starter);
        self
    }

    pub fn argument(mut self, argument: &'static str) -> Self {
        self.argument = Some(argument);
        self
    }

    /// Replaces `/etc/hosts` by these lines. Only where [`may_replace_hosts`].
    pub fn hosts(mut self, lines: &str) -> Self {
        let file = scratch(&format!("{}-{}.hosts", self.group, fastrand::u64(..)));
        std::fs::write(&file, lines).unwrap();
        self.hosts = Some(file);
        self
    }

    /// Starts the balancer without waiting until it serves.
    pub fn start(&self) -> Balancer {
        let listen = self.listen.clone();
        let listen = listen.unwrap_or_else(|| format!("{}:{}", local(), free_port()));
        // A successor has the address of its predecessor, and its upgrade socket.
        let socket = scratch(&format!("{}.sock", listen.replace(':', "-")));
        let name = format!("{}-{}", self.group, fastrand::u32(..));
        let (conf, log) = (
            scratch(&format!("{name}.yaml")),
            scratch(&format!("{name}.log")),
        );
        let text = format!(
            "version: 1\nthreads: 1\nupgrade_sock: {socket}\n\
             {server}\n\
             cluster:\n  etcd: {{ endpoints: {endpoints:?}{etcd} }}\n  group: {group}\n  listen: '{listen}'\n{more}",
            socket = socket.display(),
            server = self.server,
            endpoints = self.endpoints,
            etcd = self.fields_of_etcd,
            group = self.group,
            more = self.more,
        );
        std::fs::write(&conf, text).unwrap();
        let mut command = match &self.hosts {
            None => match self.starter.split_first() {
                None => Command::new(optimised(self.program)),
                Some((starter, words)) => {
                    let mut command = Command::new(starter);
                    command.args(words).arg(optimised(self.program));
                    command
                }
            },
            Some(hosts) => {
                let mut command = Command::new("unshare");
                let script = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
                command.args(["--mount", "sh", "-c", script]).arg(hosts);
                command.arg(optimised(self.program));
                command
            }
        };
        if self.program == COMMAND {
            command.arg("serve");
        }
        command.arg("--conf").arg(&conf).args(self.argument);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        Balancer {
            program: start(command, self.log, &log),
            url: format!("http://{listen}"),
            listen,
            group: self.group.clone(),
            log,
            conf,
            _shared: self.shared.clone(),
        }
    }

    /// Starts the balancer and waits until it listens, which it does as soon as it has a view.
    pub async fn listening(&self) -> Balancer {
        let balancer = self.start();
        until("it listens", async || {
            tokio::net::TcpStream::connect(&balancer.listen)
                .await
                .is_ok()
        })
        .await;
        balancer
    }

    /// Starts the balancer and waits until it responds.
    pub async fn serving(&self) -> Balancer {
        let balancer = self.start();
        until_it_answers(&balancer.url).await;
        balancer
    }
}

impl Balancer {
    pub fn log_text(&self) -> String {
        read_log(&self.log)
    }

    /// The node that served a GET request, or the status if none did.
    pub async fn get(&self) -> String {
        served_by(client().get(&self.url)).await
    }

    pub async fn post(&self) -> String {
        served_by(client().post(&self.url)).await
    }

    /// Sends `count` GET requests and counts them by node.
    pub async fn gets(&self, count: usize) -> BTreeMap<String, usize> {
        self.gets_with(count, |_, request| request).await
    }

    /// The same, with each request changed by `prepare`.
    pub async fn gets_with(
        &self,
        count: usize,
        prepare: impl Fn(usize, reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> BTreeMap<String, usize> {
        let (client, mut counted) = (client(), BTreeMap::new());
        for index in 0..count {
            let request = prepare(index, client.get(&self.url));
            *counted.entry(served_by(request).await).or_default() += 1;
        }
        counted
    }

    /// Waits until GET requests are served by exactly these nodes.
    pub async fn until_served_by(&self, nodes: &[&str]) -> Duration {
        let start = Instant::now();
        loop {
            let counted = self.gets(8 * nodes.len()).await;
            if counted.keys().eq(nodes) {
                return start.elapsed();
            }
            assert!(
                start.elapsed() < DEADLINE,
                "{counted:?} instead of {nodes:?}:\n{}",
                self.log_text()
            );
        }
    }

    /// Whether the program still has a connection from this address.
    pub fn has_connection_from(&self, client: std::net::SocketAddr) -> bool {
        let port = format!("{:04X}", client.port());
        let own: u16 = self.listen.rsplit_once(':').unwrap().1.parse().unwrap();
        let own = format!("{own:04X}");
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        table.lines().skip(1).any(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            // 01 is an established connection; one that was closed with unsent data is none.
            let is_ours = fields[1].ends_with(&own) && fields[2].ends_with(&port);
            is_ours && fields[3] == "01"
        })
    }

    /// How many clients are connected.
    pub fn open_connections(&self) -> usize {
        let own: u16 = self.listen.rsplit_once(':').unwrap().1.parse().unwrap();
        let own = format!(":{own:04X}");
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let of_listener = table.lines().skip(1).filter(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields[1].ends_with(&own) && ["01", "08"].contains(&fields[3])
        });
        of_listener.count()
    }

    /// The memory that the process has now, in KiB.
    pub fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.program.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.unwrap().trim().trim_end_matches(" kB");
        number.parse().unwrap()
    }

    /// The CPU time that all threads of the process have used.
    pub fn cpu(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.program.child.id()));
        let used = threads.unwrap().flatten().filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(used.sum())
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.url, self.log_text());
        }
        let _ = std::fs::remove_file(&self.log);
        let _ = std::fs::remove_file(&self.conf);
    }
}

async fn served_by(request: reqwest::RequestBuilder) -> String {
    match request.send().await {
        Err(error) => format!("{error:?}"),
        Ok(response) => match response.headers().get("x-upstream-node") {
            Some(node) if response.status().is_success() => node.to_str().unwrap().to_owned(),
            _ => response.status().as_u16().to_string(),
        },
    }
}

/// A running example `worker`.
pub struct Worker {
    pub program: Program,
    pub url: String,
    pub port: u16,
    log: PathBuf,
}

impl Worker {
    /// With a TTL that a busy machine does not exceed.
    pub fn start(endpoint: &str, group: &str, id: &str, more: &[&str], log: Log) -> Self {
        Self::with_ttl(endpoint, group, id, "10", more, log)
    }

    pub fn with_ttl(
        endpoint: &str,
        group: &str,
        id: &str,
        ttl: &str,
        more: &[&str],
        log: Log,
    ) -> Self {
        let port = free_port();
        let listen = format!("{}:{port}", local());
        let file = scratch(&format!("{group}-{id}-{port}.log"));
        let mut command = Command::new(optimised("worker"));
        command
            .args(["--etcd", endpoint, "--group", group, "--id", id])
            .args(["--listen", &listen, "--ttl", ttl])
            .args(more);
        Self {
            program: start(command, log, &file),
            url: format!("http://{listen}"),
            port,
            log: file,
        }
    }

    pub fn log_text(&self) -> String {
        read_log(&self.log)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.url, self.log_text());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// An HTTP server in this process.
pub struct Backend {
    pub id: String,
    pub port: u16,
    shared: Arc<Shared>,
    _serving: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    requests: AtomicU64,
    /// How long a response takes, in milliseconds.
    delay: AtomicU64,
    status: AtomicU64,
}

impl Backend {
    pub async fn start(id: &str) -> Self {
        let shared = Arc::new(Shared::default());
        shared.status.store(200, Ordering::Relaxed);
        let own = shared.clone();
        let serve = async move || {
            own.requests.fetch_add(1, Ordering::Relaxed);
            let delay = own.delay.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(delay)).await;
            let status = u16::try_from(own.status.load(Ordering::Relaxed)).unwrap();
            StatusCode::from_u16(status).unwrap()
        };
        let listener = tokio::net::TcpListener::bind((local(), 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut serving = JoinSet::new();
        let app = axum::Router::new().fallback(serve);
        serving.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            id: id.to_owned(),
            port,
            shared,
            _serving: serving,
        }
    }

    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    pub fn set_delay(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).unwrap();
        self.shared.delay.store(delay, Ordering::Relaxed);
    }

    pub fn set_status(&self, status: u64) {
        self.shared.status.store(status, Ordering::Relaxed);
    }

    /// The registry entry of this backend, with further fields.
    pub fn entry(&self, more: Value) -> Value {
        entry(&self.id, Some(self.port), more)
    }
}

/// A registry entry with the current time.
pub fn entry(id: &str, port: Option<u16>, more: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now = u64::try_from(now.as_millis()).unwrap();
    let mut entry = json!({ "id": id, "ip": "127.0.0.1", "last_seen": now });
    let fields = entry.as_object_mut().unwrap();
    if let Some(port) = port {
        fields.insert("port".to_owned(), json!(port));
    }
    if let Value::Object(more) = more {
        fields.extend(more);
    }
    entry
}

/// Puts an entry like a worker would, with or without a lease.
pub async fn put(etcd: &mut Client, group: &str, entry: &Value, lease: Option<i64>) {
    let id = entry["id"].as_str().unwrap();
    let options = lease.map(|lease| PutOptions::new().with_lease(lease));
    let key = format!("registry/{group}/{id}");
    etcd.put(key, entry.to_string(), options).await.unwrap();
}

pub async fn delete(etcd: &mut Client, group: &str, id: &str) {
    let key = format!("registry/{group}/{id}");
    etcd.delete(key, None).await.unwrap();
}

/// The entry of a node and its lease, as stored in etcd now.
pub async fn registered(etcd: &mut Client, group: &str, id: &str) -> Option<(Value, i64)> {
    let response = etcd
        .get(format!("registry/{group}/{id}"), None)
        .await
        .ok()?;
    let entry = response.kvs().first()?;
    Some((serde_json::from_slice(entry.value()).ok()?, entry.lease()))
}

/// Waits for a registration for which `holds` returns true.
pub async fn until_registered(
    etcd: &mut Client,
    group: &str,
    id: &str,
    holds: impl Fn(&Value, i64) -> bool,
) -> (Value, i64) {
    let start = Instant::now();
    loop {
        let found = registered(etcd, group, id).await;
        if let Some((entry, lease)) = &found
            && holds(entry, *lease)
        {
            return (entry.clone(), *lease);
        }
        assert!(
            start.elapsed() < DEADLINE,
            "{id} is not registered as expected: {found:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until an asynchronous condition holds.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds().await {
        assert!(
            start.elapsed() < DEADLINE,
            "not within {DEADLINE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}
