//! The balancers that are compared: this crate's with each policy, and others where they are installed.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::programs::{Program, binary};
use crate::common::{free_port, local};

/// How requests are balanced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// This crate, with this policy.
    Ours(&'static str),
    Nginx,
    Haproxy,
    EnvoyLeastRequest,
    EnvoyWeighted,
}

pub const POLICIES: [Kind; 5] = [
    Kind::Ours("round_robin"),
    Kind::Ours("random"),
    Kind::Ours("consistent"),
    Kind::Ours("headroom"),
    Kind::Ours("adaptive"),
];

pub const WITH_RIVALS: [Kind; 6] = [
    Kind::Ours("adaptive"),
    Kind::Ours("headroom"),
    Kind::Nginx,
    Kind::Haproxy,
    Kind::EnvoyLeastRequest,
    Kind::EnvoyWeighted,
];

/// What a balancer needs to know of its surroundings.
pub struct Surroundings<'a> {
    pub etcd: &'a str,
    pub group: &'a str,
    pub workers: &'a [SocketAddr],
    /// Everything is spoken over HTTP/2 without TLS.
    pub are_streams: bool,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours(policy) => policy,
            Self::Nginx => "nginx least_conn",
            Self::Haproxy => "HAProxy leastconn",
            Self::EnvoyLeastRequest => "Envoy least request",
            Self::EnvoyWeighted => "Envoy client-side weighted",
        }
    }

    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ours(_))
    }

    /// The version of the program; `None` if it is not installed.
    pub fn version(self) -> Option<String> {
        let (program, argument) = match self {
            Self::Ours(_) => return Some(env!("CARGO_PKG_VERSION").to_owned()),
            Self::Nginx => ("nginx".to_owned(), "-v"),
            Self::Haproxy => ("haproxy".to_owned(), "-v"),
            Self::EnvoyLeastRequest | Self::EnvoyWeighted => (envoy(), "--version"),
        };
        let output = Command::new(program).arg(argument).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        let is_number =
            |part: &&str| part.contains('.') && part.contains(|c: char| c.is_ascii_digit());
        let number = text.split(|c: char| c.is_whitespace() || c == '/');
        number.into_iter().find(is_number).map(str::to_owned)
    }

    /// Starts one that listens at this address.
    pub fn start(self, listen: SocketAddr, around: &Surroundings<'_>) -> Program {
        let directory = directory(listen);
        let file = |name: &str, text: &str| {
            let file = directory.join(name);
            std::fs::write(&file, text).unwrap();
            file
        };
        let mut command = match self {
            Self::Ours(policy) => {
                let mut command = Command::new(binary("load_balancer"));
                let file = file("ours.yaml", &ours(policy, listen, around));
                command.arg("--conf").arg(file);
                command
            }
            Self::Nginx => {
                let path = directory.display().to_string();
                let file = file("nginx.conf", &nginx(listen, around, &path));
                let mut command = Command::new("nginx");
                command.arg("-c").arg(file).arg("-p").arg(&directory);
                command
            }
            Self::Haproxy => {
                let mut command = Command::new("haproxy");
                let file = file("haproxy.cfg", &haproxy(listen, around));
                command.arg("-f").arg(file);
                command
            }
            Self::EnvoyLeastRequest | Self::EnvoyWeighted => {
                let mut command = Command::new(envoy());
                let text = envoy_configuration(self, listen, around).to_string();
                command.arg("--config-path").arg(file("envoy.json", &text));
                command.args(["--concurrency", "1", "--disable-hot-restart"]);
                command
            }
        };
        command.stdin(Stdio::null());
        let program = Program::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
        match self {
            Self::Nginx => program.with_children(),
            _ => program,
        }
    }
}

/// An address of this machine that is free.
pub fn free_address() -> SocketAddr {
    format!("{}:{}", local(), free_port()).parse().unwrap()
}

fn envoy() -> String {
    std::env::var("ENVOY").unwrap_or_else(|_| "envoy".to_owned())
}

fn directory(listen: SocketAddr) -> PathBuf {
    let name = format!("real-load-{}", listen.port());
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

fn ours(policy: &str, listen: SocketAddr, around: &Surroundings<'_>) -> String {
    let Surroundings { etcd, group, .. } = around;
    let protocol = if around.are_streams { "h2c" } else { "http1" };
    let hash_on = match policy {
        "consistent" => "  hash_on: header:x-user\n",
        _ => "",
    };
    format!(
        "version: 1\nthreads: 1\ncluster:\n  etcd: {{ endpoints: ['{etcd}'] }}\n  group: {group}\n  \
         listen: '{listen}'\n  policy: {policy}\n{hash_on}  load_reports: true\n  \
         headroom: {{ queue_capacity: 20 }}\n  backends: {{ protocol: {protocol} }}\n"
    )
}

/// As its documentation recommends for upstreams: connections are kept, and a server that refuses one has the
/// request sent to the next.
fn nginx(listen: SocketAddr, around: &Surroundings<'_>, path: &str) -> String {
    let mut servers = String::new();
    for worker in around.workers {
        let _ = writeln!(servers, "server {worker};");
    }
    let server = match around.are_streams {
        true => format!("listen {listen} http2; location / {{ grpc_pass grpc://b; }}"),
        false => format!(
            "listen {listen}; location / {{ proxy_pass http://b; proxy_http_version 1.1;\n\
             proxy_set_header Connection \"\"; }}"
        ),
    };
    format!(
        "daemon off; worker_processes 1; pid {path}/pid; error_log /dev/null;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off;\n\
         client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;\n\
         uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
         upstream b {{ least_conn; {servers} keepalive 128; }}\n\
         server {{ {server} }} }}\n"
    )
}

fn haproxy(listen: SocketAddr, around: &Surroundings<'_>) -> String {
    let mut servers = String::new();
    let protocol = if around.are_streams { "proto h2" } else { "" };
    for (index, worker) in around.workers.iter().enumerate() {
        let _ = writeln!(
            servers,
            "  server s{index} {worker} check inter 1s {protocol}"
        );
    }
    format!(
        "global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  \
         timeout server 60s\n  http-reuse always\n  retries 3\n  option redispatch 1\n  \
         retry-on conn-failure\nfrontend f\n  bind {listen} {protocol}\n  default_backend b\n\
         backend b\n  balance leastconn\n{servers}"
    )
}

fn envoy_configuration(kind: Kind, listen: SocketAddr, around: &Surroundings<'_>) -> Value {
    let address = |at: &SocketAddr| json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } });
    let of = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let policy = match kind {
        Kind::EnvoyWeighted => json!({
            "@type": of("load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin"),
            "blackout_period": "1s",
            "weight_update_period": "1s",
            "weight_expiration_period": "60s",
        }),
        _ => json!({
            "@type": of("load_balancing_policies.least_request.v3.LeastRequest"),
        }),
    };
    let endpoints: Vec<_> = around
        .workers
        .iter()
        .map(|worker| json!({ "endpoint": { "address": address(worker) } }))
        .collect();
    let route = json!({
        "match": { "prefix": "/" },
        "route": {
            "cluster": "workers",
            "retry_policy": { "retry_on": "connect-failure,refused-stream", "num_retries": 2 },
        },
    });
    let protocol = match around.are_streams {
        true => json!({ "http2_protocol_options": {} }),
        false => json!({ "http_protocol_options": {} }),
    };
    let options = "upstreams.http.v3.HttpProtocolOptions";
    json!({ "static_resources": {
        "listeners": [{
            "address": address(&listen),
            "filter_chains": [{ "filters": [{
                "name": "http",
                "typed_config": {
                    "@type": of("filters.network.http_connection_manager.v3.HttpConnectionManager"),
                    "stat_prefix": "http",
                    "route_config": { "virtual_hosts": [{
                        "name": "all", "domains": ["*"], "routes": [route],
                    }] },
                    "http_filters": [{
                        "name": "router",
                        "typed_config": { "@type": of("filters.http.router.v3.Router") },
                    }],
                },
            }] }],
        }],
        "clusters": [{
            "name": "workers",
            "type": "STATIC",
            "typed_extension_protocol_options": {
                (format!("envoy.extensions.{options}")): {
                    "@type": of(options), "explicit_http_config": protocol,
                },
            },
            "load_assignment": { "cluster_name": "workers", "endpoints": [{ "lb_endpoints": endpoints }] },
            "load_balancing_policy": { "policies": [{ "typed_extension_config": {
                "name": "policy", "typed_config": policy,
            } }] },
        }],
    } })
}
