//! Starts the example programs as processes, and waits for what they do.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use super::etcd::send_signal;
use super::load::client;
use super::{DEADLINE, free_port, local};

/// A process that is killed when this is dropped.
pub struct Program {
    pub child: Child,
    has_children: bool,
}

impl Program {
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, &[])
    }

    pub fn start_with(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary(name));
        command
            .args(arguments)
            .envs(variables.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self::spawn(&mut command)
    }

    pub fn spawn(command: &mut Command) -> Self {
        let name = command.get_program().to_owned();
        let child = command.spawn();
        let child = child.unwrap_or_else(|error| {
            panic!("{}: {error}; build the examples first", name.display())
        });
        Self {
            child,
            has_children: false,
        }
    }

    /// It has processes of its own, which end only if it is asked to end.
    pub fn with_children(mut self) -> Self {
        self.has_children = true;
        self
    }

    /// Whether the process is still running.
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Whether the pipe behind standard error is full because nobody reads it.
    pub fn log_is_full(&self) -> bool {
        let Some(log) = &self.child.stderr else {
            return false;
        };
        let unread = rustix::io::ioctl_fionread(log).unwrap();
        let size = rustix::pipe::fcntl_getpipe_size(log).unwrap();
        // The kernel counts partly filled pages as full, so half of the size is the limit.
        unread as usize * 2 > size
    }

    pub fn signal(&self, signal: &str) {
        send_signal(self.child.id(), signal);
    }

    /// Waits until the process ends; returns its status and how long the wait took.
    pub async fn ended(&mut self) -> (ExitStatus, Duration) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, start.elapsed());
            }
            assert!(start.elapsed() < DEADLINE, "the program did not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.has_children {
            self.signal("TERM");
            let start = Instant::now();
            while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < DEADLINE {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a program of others is installed; if not, a line says that the test is skipped.
pub fn is_installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        super::skipped(format_args!("{program} is not installed"));
    }
    found
}

/// The command of this crate.
pub const COMMAND: &str = "pingora-etcd";

/// Where a program is below `target/*`: the command itself, or an example.
fn place(profile: &Path, name: &str) -> PathBuf {
    match name {
        COMMAND => profile.join(name),
        example => profile.join("examples").join(example),
    }
}

/// The program that was built as the test binary was.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    place(profile, name)
}

/// The optimised program, as users run it: built by `cargo build --profile bench --all-features
/// --examples --bins`. If it is missing or older than the sources, a line on standard error reports that,
/// and the program beside the test binary is used.
pub fn optimised(name: &str) -> PathBuf {
    static SAID: std::sync::Once = std::sync::Once::new();
    let debug = binary(name);
    let test = std::env::current_exe().unwrap();
    let target = test.ancestors().nth(3).unwrap_or(Path::new(""));
    let optimised = place(&target.join("release"), name);
    let built = |file: &Path| std::fs::metadata(file).and_then(|about| about.modified());
    match built(&optimised) {
        Ok(built) if built >= newest_source() => optimised,
        other => {
            SAID.call_once(|| {
                let why = if other.is_ok() {
                    "is out of date"
                } else {
                    "does not exist"
                };
                let _ = std::io::Write::write_fmt(
                    &mut std::io::stderr(),
                    format_args!(
                        "{} {why}: using the unoptimised programs instead\n",
                        optimised.display()
                    ),
                );
            });
            debug
        }
    }
}

/// When the sources of the programs were last changed.
fn newest_source() -> SystemTime {
    fn newest(path: &Path) -> SystemTime {
        let of_file = std::fs::metadata(path).and_then(|about| about.modified());
        let files = std::fs::read_dir(path).into_iter().flatten().flatten();
        // The guide is in no program.
        let is_guide = path.extension().is_some_and(|it| it == "md");
        let of_file = of_file.ok().filter(|_| !path.is_dir() && !is_guide);
        files
            .map(|entry| newest(&entry.path()))
            .chain(of_file)
            .max()
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    newest(&root.join("src")).max(newest(&root.join("examples")))
}

pub fn config_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("config")
        .join(name)
}

/// Copies a shipped configuration file with other endpoints, group and port. Returns the copy and
/// the URL of the proxy.
pub fn adapted(name: &str, etcd: &str, group: &str) -> (PathBuf, String) {
    let text = std::fs::read_to_string(config_file(name)).unwrap();
    let listen = format!("{}:{}", local(), free_port());
    let mut adapted = String::new();
    for line in text.lines() {
        let value = match line.split_once(':') {
            Some(("      - http" | "      - memory", _)) => format!("      - {etcd}"),
            Some(("  group", _)) => format!("  group: {group}"),
            Some(("  listen", _)) => format!("  listen: \"{listen}\""),
            Some(("  admin", value)) if value.contains("listen") => {
                format!("  admin: {{ listen: \"{}:{}\" }}", local(), free_port())
            }
            _ => line.to_owned(),
        };
        adapted.push_str(&value);
        adapted.push('\n');
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{group}-{name}"));
    std::fs::write(&file, adapted).unwrap();
    (file, format!("http://{listen}"))
}

pub struct Worker {
    pub program: Program,
    pub url: String,
}

pub fn worker(etcd: &str, group: &str, id: &str) -> Worker {
    let listen = format!("{}:{}", local(), free_port());
    let arguments = [
        "--etcd", etcd, "--group", group, "--id", id, "--listen", &listen,
    ];
    Worker {
        program: Program::start(
            "worker",
            &[&arguments[..], &["--ttl", "10", "--zone", "z"]].concat(),
        ),
        url: format!("http://{listen}"),
    }
}

/// Waits until this many nodes have responded through the proxy.
pub async fn until_nodes_answer(url: &str, count: usize) {
    let client = client();
    let mut nodes = std::collections::HashSet::new();
    let start = Instant::now();
    while nodes.len() < count {
        assert!(
            start.elapsed() < DEADLINE,
            "only these nodes responded: {nodes:?}"
        );
        if let Ok(response) = client.get(url).send().await
            && let Some(node) = response.headers().get("x-upstream-node")
        {
            nodes.insert(node.clone());
        }
    }
}
