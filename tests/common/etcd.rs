//! A real etcd for the integration tests. It is found in this order: `ETCD_ENDPOINTS`
//! (comma-separated, already running), `ETCD_BIN` (a binary), `ETCD_IMAGE` (a container image, run
//! through testcontainers), an `etcd` on the `PATH`.

use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Once, OnceLock, Weak};
use std::time::{Duration, Instant};

use pingora_etcd::EtcdOptions;
use testcontainers::core::{IntoContainerPort, Mount, WaitFor};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt};
use tokio::runtime::Runtime;

use super::{free_port, local};

enum Source {
    Endpoints(Vec<String>),
    Binary(PathBuf),
    Image(String),
}

fn source() -> &'static Source {
    static SOURCE: OnceLock<Source> = OnceLock::new();
    SOURCE.get_or_init(|| {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let source = if let Some(endpoints) = variable("ETCD_ENDPOINTS") {
            Source::Endpoints(endpoints.split(',').map(str::to_owned).collect())
        } else {
            own_source()
        };
        announce(&source);
        source
    })
}

/// Where to get an etcd that belongs to one test, and that the test may stop.
fn own_source() -> Source {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(binary) = variable("ETCD_BIN") {
        Source::Binary(binary.into())
    } else if let Some(image) = variable("ETCD_IMAGE") {
        Source::Image(image)
    } else if let Some(binary) = on_path() {
        Source::Binary(binary)
    } else {
        panic!(
            "these tests need a real etcd: set ETCD_BIN to an etcd binary, or ETCD_IMAGE to the \
             name of a container image (with a Docker engine), or put etcd on the PATH; \
             `make test` gets one by itself"
        );
    }
}

/// An etcd binary, if one is given or found.
pub fn binary() -> Option<PathBuf> {
    let given = std::env::var_os("ETCD_BIN").filter(|value| !value.is_empty());
    given.map(PathBuf::from).or_else(on_path)
}

/// The newest etcd that there is for the tests, by the variable `ETCD_NEWEST`; `make test` gets one by itself.
pub fn newest() -> Option<PathBuf> {
    let given = std::env::var_os("ETCD_NEWEST").filter(|value| !value.is_empty());
    given.map(PathBuf::from)
}

fn on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join("etcd"))
        .find(|file| file.is_file())
}

/// Writes to standard error directly, because the test harness hides what passing tests print, and
/// a log of the tests must show which etcd they used.
fn announce(source: &Source) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let what = match source {
            Source::Endpoints(endpoints) => format!("running at {}", endpoints.join(",")),
            Source::Binary(binary) => format!("process {}", binary.display()),
            Source::Image(image) => format!("container {image} through testcontainers"),
        };
        let _ = writeln!(std::io::stderr(), "etcd under test: {what}");
    });
}

/// An etcd that is stopped when the last handle is dropped, or when this process ends.
pub struct Etcd {
    endpoints: Vec<String>,
    https: bool,
    server: Server,
}

/// How to start an etcd for one test, besides the defaults.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Whether etcd uses TLS. The arguments must then name its certificate.
    pub https: bool,
    /// Further arguments. `{files}` is replaced by the path of `files` as etcd sees it, and
    /// `{port}` by the port that etcd is reached at.
    pub arguments: Vec<String>,
    /// A directory with files that etcd needs.
    pub files: Option<PathBuf>,
    /// Another binary than that of the other tests.
    pub binary: Option<PathBuf>,
}

impl Setup {
    fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    fn arguments(&self, files: &str, port: u16) -> impl Iterator<Item = String> {
        let (arguments, port) = (self.arguments.iter(), port.to_string());
        arguments.map(move |argument| argument.replace("{files}", files).replace("{port}", &port))
    }
}

enum Server {
    External,
    Process {
        setup: Setup,
        binary: PathBuf,
        client_port: u16,
        peer_port: u16,
        data: PathBuf,
        running: Mutex<Option<Process>>,
    },
    /// `None` only while the container is being removed.
    Container(Option<Box<ContainerAsync<GenericImage>>>),
}

/// A program that ends when this process ends, for whatever reason.
pub struct Process {
    shell: Child,
    pid: u32,
}

impl Etcd {
    /// The etcd that the tests of this process share. No test may stop or compact it.
    pub fn shared() -> Arc<Etcd> {
        static SHARED: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());
        let mut shared = SHARED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(etcd) = shared.upgrade() {
            return etcd;
        }
        let etcd = Arc::new(match source() {
            Source::Endpoints(endpoints) => Etcd {
                endpoints: endpoints.clone(),
                https: false,
                server: Server::External,
            },
            other => Etcd::start_from(other, Setup::default()),
        });
        *shared = Arc::downgrade(&etcd);
        etcd
    }

    /// An etcd of the test's own, which may be stopped, paused or compacted.
    pub fn own() -> Etcd {
        Self::with(Setup::default())
    }

    /// An etcd of the test's own, started with this setup.
    pub fn with(mut setup: Setup) -> Etcd {
        if let Some(binary) = setup.binary.take() {
            return Etcd::start_from(&Source::Binary(binary), setup);
        }
        match source() {
            Source::Endpoints(_) => Etcd::start_from(&own_source(), setup),
            other => Etcd::start_from(other, setup),
        }
    }

    fn start_from(source: &Source, setup: Setup) -> Etcd {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let client_port = free_port();
        let scheme = setup.scheme();
        let https = setup.https;
        let endpoints = vec![format!("{scheme}://{}:{client_port}", local())];
        let server = match source {
            Source::Endpoints(_) => unreachable!("endpoints cannot be started"),
            Source::Binary(binary) => {
                let name = format!(
                    "etcd-{}-{}",
                    std::process::id(),
                    COUNT.fetch_add(1, Ordering::Relaxed)
                );
                Server::Process {
                    setup,
                    binary: binary.clone(),
                    client_port,
                    peer_port: free_port(),
                    data: Path::new(env!("CARGO_TARGET_TMPDIR")).join(name),
                    running: Mutex::new(None),
                }
            }
            Source::Image(image) => Self::start_container(image, &setup, client_port),
        };
        let etcd = Etcd {
            endpoints,
            https,
            server,
        };
        if matches!(etcd.server, Server::Process { .. }) {
            etcd.start();
        } else {
            etcd.wait_until_it_serves();
        }
        etcd
    }

    fn start_container(image: &str, setup: &Setup, client_port: u16) -> Server {
        let scheme = setup.scheme();
        let (name, tag) = image.rsplit_once(':').unwrap_or((image, "latest"));
        let container = GenericImage::new(name, tag)
            .with_wait_for(WaitFor::message_on_stderr("ready to serve client requests"))
            // A fixed port, so that the port stays the same after a restart.
            .with_mapped_port(client_port, 2379.tcp());
        let container = if setup.arguments.is_empty() {
            container
        } else {
            let own = [
                "--data-dir=/data".to_owned(),
                format!("--listen-client-urls={scheme}://0.0.0.0:2379"),
                format!("--advertise-client-urls={scheme}://0.0.0.0:2379"),
            ];
            container.with_cmd(
                own.into_iter()
                    .chain(setup.arguments("/files", client_port)),
            )
        };
        let container = match &setup.files {
            Some(files) => {
                container.with_mount(Mount::bind_mount(files.display().to_string(), "/files"))
            }
            None => container,
        };
        let container = block_on(container.start())
            .unwrap_or_else(|error| panic!("cannot run image {image}: {error}"));
        Server::Container(Some(Box::new(container)))
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.endpoints.clone()
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions::new(self.endpoints.clone())
    }

    /// `host:port` of the first endpoint.
    pub fn address(&self) -> String {
        let endpoint = &self.endpoints[0];
        let address = endpoint.split_once("://").map(|(_, address)| address);
        address.unwrap_or(endpoint).to_owned()
    }

    pub async fn raw_client(&self) -> etcd_client::Client {
        etcd_client::Client::connect(&self.endpoints, None)
            .await
            .unwrap()
    }

    /// The process id, if etcd is a process of this test.
    pub fn pid(&self) -> Option<u32> {
        let Server::Process { running, .. } = &self.server else {
            return None;
        };
        running.lock().unwrap().as_ref().map(|process| process.pid)
    }

    /// Pauses etcd without closing any connection: it goes silent.
    pub fn pause(&self) {
        match &self.server {
            Server::Container(Some(container)) => block_on(container.pause()).unwrap(),
            _ => self.signal("STOP"),
        }
    }

    pub fn resume(&self) {
        match &self.server {
            Server::Container(Some(container)) => block_on(container.unpause()).unwrap(),
            _ => self.signal("CONT"),
        }
    }

    /// Kills etcd; its data is kept.
    pub fn stop(&self) {
        match &self.server {
            Server::External | Server::Container(None) => unreachable!("there is no etcd to stop"),
            Server::Container(Some(container)) => {
                block_on(container.stop_with_timeout(Some(0))).unwrap();
            }
            Server::Process { running, .. } => {
                let process = running.lock().unwrap().take().expect("etcd is running");
                process.end(true);
            }
        }
    }

    /// Starts it again with its previous data.
    pub fn start(&self) {
        match &self.server {
            Server::External | Server::Container(None) => unreachable!("there is no etcd to start"),
            Server::Container(Some(container)) => block_on(container.start()).unwrap(),
            Server::Process {
                setup,
                binary,
                client_port,
                peer_port,
                data,
                running,
            } => {
                let url = |port: u16| format!("http://{}:{port}", local());
                let client_url = format!("{}://{}:{client_port}", setup.scheme(), local());
                let arguments = [
                    ["--listen-client-urls", &client_url],
                    ["--advertise-client-urls", &client_url],
                    ["--listen-peer-urls", &url(*peer_port)],
                    ["--initial-advertise-peer-urls", &url(*peer_port)],
                    ["--initial-cluster", &format!("default={}", url(*peer_port))],
                    ["--log-level", "error"],
                ];
                let mut command = Command::new(binary);
                command
                    .args(arguments.as_flattened())
                    .arg("--unsafe-no-fsync")
                    .arg("--data-dir")
                    .arg(data);
                let files = setup.files.as_deref().unwrap_or(Path::new(""));
                command.args(setup.arguments(&files.display().to_string(), *client_port));
                *running.lock().unwrap() = Some(Process::spawn(&command, data));
            }
        }
        self.wait_until_it_serves();
    }

    fn signal(&self, signal: &str) {
        let Server::Process { running, .. } = &self.server else {
            unreachable!("only an etcd process of this test can be sent a signal");
        };
        let running = running.lock().unwrap();
        running.as_ref().expect("etcd is running").signal(signal);
    }

    fn wait_until_it_serves(&self) {
        if self.https {
            // The test decides which clients may connect and with which credentials, so this only
            // waits for the port.
            let start = Instant::now();
            while std::net::TcpStream::connect(self.address()).is_err() {
                assert!(start.elapsed() < super::DEADLINE, "etcd does not listen");
                std::thread::sleep(Duration::from_millis(10));
            }
            return;
        }
        // Not through this crate's store, which limits how often it dials.
        let endpoints = self.endpoints.clone();
        block_on(async move {
            let start = Instant::now();
            loop {
                let read = async {
                    let mut client = etcd_client::Client::connect(&endpoints, None).await?;
                    client.get("any", None).await
                };
                match tokio::time::timeout(Duration::from_secs(1), read).await {
                    Ok(Ok(_)) => return,
                    answer => assert!(
                        start.elapsed() < super::DEADLINE,
                        "etcd does not serve: {answer:?}"
                    ),
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
}

/// Runs a future on a thread outside any runtime, because the caller usually is inside one. All
/// calls use the same runtime, which owns the container client's connections.
fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| RUNTIME.block_on(future));
        thread.join().expect("etcd can be controlled")
    })
}

pub fn send_signal(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), &pid.to_string()])
        .status()
        .expect("kill runs");
    assert!(status.success(), "kill -{signal} {pid}");
    if signal == "STOP" {
        until_stopped(pid);
    }
}

/// A thread that runs at that moment stops a little later, and may still answer.
fn until_stopped(pid: u32) {
    let start = Instant::now();
    let is_stopped = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        threads.into_iter().flatten().flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat"));
            let stat = stat.unwrap_or_default();
            // The state follows the name of the program, which may contain anything.
            let state = stat.rsplit(") ").next().unwrap_or_default();
            state.is_empty() || state.starts_with(['T', 't', 'X', 'Z'])
        })
    };
    while !is_stopped() {
        assert!(
            start.elapsed() < super::DEADLINE,
            "process {pid} does not stop"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Process {
    /// Starts a program. Its output goes to `{files}.log`.
    pub fn spawn(command: &Command, files: &Path) -> Process {
        // The shell outlives this process for a moment, in which it stops the program: its standard
        // input is closed when this process ends, for whatever reason. Only this process handles a
        // Ctrl-C in the terminal.
        let script = r#"
            trap : INT TERM
            files=$1; shift
            "$@" >>"$files.log" 2>&1 </dev/null &
            pid=$!
            echo $pid
            read -r last
            kill -9 $pid 2>/dev/null
            wait $pid 2>/dev/null
            [ "$last" = keep ] || rm -rf "$files" "$files.log"
        "#;
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(files)
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh starts");
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let pid = line.trim().parse().expect("the shell prints the pid");
        Process { shell, pid }
    }

    pub fn signal(&self, signal: &str) {
        send_signal(self.pid, signal);
    }

    /// Kills the program, and removes its files unless `keep_files` is set.
    pub fn end(mut self, keep_files: bool) {
        if let Some(mut input) = self.shell.stdin.take() {
            let _ = writeln!(input, "{}", if keep_files { "keep" } else { "remove" });
        }
        let _ = self.shell.wait();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        match &mut self.server {
            Server::External => {}
            Server::Container(container) => {
                if let Some(container) = container.take() {
                    let _ = block_on(container.rm());
                }
            }
            Server::Process { running, .. } => {
                if let Some(process) = running.get_mut().ok().and_then(Option::take) {
                    process.end(false);
                }
            }
        }
    }
}
