//! Starting a proxy as a process, and its CPU time.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::proxies::configuration;

/// A proxy that runs as a process.
pub struct Running {
    pub name: &'static str,
    pub address: SocketAddr,
    child: Child,
}

impl Running {
    /// `None` if it is not installed.
    pub fn start(name: &'static str, backends: &[SocketAddr], etcd: &str) -> Option<Self> {
        let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = port.local_addr().unwrap();
        drop(port);
        let mut command = match name {
            "nginx" => nginx(address, backends),
            "haproxy" => haproxy(address, backends),
            "envoy" => envoy(address, backends),
            "installed" => installed(address, etcd),
            _ => {
                let mut command = Command::new(std::env::current_exe().unwrap());
                let list: Vec<_> = backends.iter().map(ToString::to_string).collect();
                command.args(["--serve", name, "--listen", &address.to_string()]);
                command.args(["--backends", &list.join(","), "--etcd", etcd]);
                command
            }
        };
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let Ok(child) = command.spawn() else {
            println!("{name}: not installed");
            return None;
        };
        let running = Self {
            name,
            address,
            child,
        };
        let start = Instant::now();
        while !answers(address) {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{name} does not answer"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(running)
    }

    /// The CPU time of all threads of the process and of its children.
    pub fn cpu(&self) -> Duration {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let children = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        std::iter::once(pid).chain(children).map(cpu_of).sum()
    }
}

/// Whether it answers with what a backend answers.
fn answers(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return false;
    };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let request = b"GET /small HTTP/1.1\r\nHost: bench.test\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    let is_done = stream.write_all(request).is_ok() && stream.read_to_end(&mut answer).is_ok();
    is_done && answer.starts_with(b"HTTP/1.1 200 ")
}

fn cpu_of(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let used = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
    Duration::from_nanos(used.sum())
}

impl Drop for Running {
    fn drop(&mut self) {
        // nginx ends its worker only if it is asked to.
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(3)
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{name}"));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// The command, with the allocator that `make install` gives it, from the profile of this program.
fn installed(address: SocketAddr, etcd: &str) -> Command {
    let file = directory("installed").join("load_balancer.yaml");
    std::fs::write(&file, configuration(etcd, &address.to_string())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pingora-etcd"));
    command.args(["serve", "--conf"]).arg(file);
    command
}

fn nginx(address: SocketAddr, backends: &[SocketAddr]) -> Command {
    let directory = directory("nginx");
    let servers: String = backends
        .iter()
        .map(|backend| format!("server {backend};\n"))
        .collect();
    let text = format!(
        "daemon off; worker_processes 1; pid {path}/pid; error_log /dev/null;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log off; keepalive_requests 100000000;\n\
         client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;\n\
         uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
         upstream b {{ {servers} keepalive 128; keepalive_requests 100000000; }}\n\
         server {{ listen {address}; location / {{ proxy_pass http://b; proxy_http_version 1.1;\n\
         proxy_set_header Connection \"\"; }} }} }}\n",
        path = directory.display(),
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(file).arg("-p").arg(directory);
    command
}

fn haproxy(address: SocketAddr, backends: &[SocketAddr]) -> Command {
    let servers: String = backends
        .iter()
        .enumerate()
        .map(|(index, backend)| format!("  server s{index} {backend}\n"))
        .collect();
    let text = format!(
        "global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  \
         timeout server 60s\n  http-reuse always\nfrontend f\n  bind {address}\n  default_backend b\n\
         backend b\n  balance roundrobin\n{servers}"
    );
    let file = directory("haproxy").join("haproxy.cfg");
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-f").arg(file);
    command
}

fn envoy(address: SocketAddr, backends: &[SocketAddr]) -> Command {
    let of = |name: &str| format!("type.googleapis.com/envoy.extensions.filters.{name}");
    let at = |at: &SocketAddr| json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    let endpoints: Vec<_> = backends
        .iter()
        .map(|backend| json!({ "endpoint": { "address": at(backend) } }))
        .collect();
    let text = json!({ "static_resources": {
        "listeners": [{
            "address": at(&address),
            "filter_chains": [{ "filters": [{ "name": "http", "typed_config": {
                "@type": of("network.http_connection_manager.v3.HttpConnectionManager"),
                "stat_prefix": "http",
                "route_config": { "virtual_hosts": [{
                    "name": "all", "domains": ["*"],
                    "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "backends" } }],
                }] },
                "http_filters": [{
                    "name": "router",
                    "typed_config": { "@type": of("http.router.v3.Router") },
                }],
            } }] }],
        }],
        "clusters": [{
            "name": "backends",
            "type": "STATIC",
            "load_assignment": { "cluster_name": "backends", "endpoints": [{ "lb_endpoints": endpoints }] },
        }],
    } });
    let file = directory("envoy").join("envoy.json");
    std::fs::write(&file, text.to_string()).unwrap();
    let program = std::env::var("ENVOY").unwrap_or_else(|_| "envoy".to_owned());
    let mut command = Command::new(program);
    command.arg("--config-path").arg(file);
    command.args(["--concurrency", "1", "--disable-hot-restart"]);
    command
}
