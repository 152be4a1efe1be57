//! Pingora's part of the file, and the file as a whole.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use pingora::server::configuration::ServerConf;
use serde::de::IgnoredAny;
use serde_saphyr::Spanned;

use super::cluster::ClusterConfig;
use super::file::parse;
use super::unreadable::{in_file, unreadable};
use crate::error::ClusterError;

/// Fields of Pingora 0.9 that change nothing here, and what does instead.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    (
        "graceful_shutdown_timeout_seconds",
        "set grace_period_seconds: requests in flight have all of that time",
    ),
    (
        "upgrade_sock_connect_accept_max_retries",
        "a successor is waited for, and waits, as long as it takes",
    ),
    (
        "daemon_wait_for_ready",
        "let a service manager start the process and wait for sd_notify",
    ),
    ("daemon_ready_timeout_seconds", "see daemon_wait_for_ready"),
    ("daemon_notify_timeout_seconds", "see daemon_wait_for_ready"),
    ("ca_file", "it is for TLS to backends in Pingora's own way"),
    (
        "downstream_tls_offload_threadpools",
        "it is for TLS to clients in Pingora's own way",
    ),
    (
        "downstream_tls_offload_thread_per_pool",
        "it is for TLS to clients in Pingora's own way",
    ),
    (
        "runtime_enable_alt_timer",
        "it is for a build with tokio_unstable",
    ),
    (
        "runtime_metrics_poll_time_histogram",
        "it is for a build with tokio_unstable",
    ),
    (
        "runtime_metrics_poll_time_histogram_scale",
        "it is for a build with tokio_unstable",
    ),
    (
        "runtime_metrics_poll_time_histogram_resolution_micros",
        "it is for a build with tokio_unstable",
    ),
    (
        "runtime_metrics_poll_time_histogram_buckets",
        "it is for a build with tokio_unstable",
    ),
    (
        "upstream_debug_ssl_keylog",
        "it is for TLS to backends in Pingora's own way",
    ),
];

/// How many idle connections to backends a thread keeps, and the field that says it. Pingora keeps 128: with some hundred
/// backends most requests would make a connection.
const POOL: &str = "upstream_keepalive_pool_size";
const POOL_SIZE: usize = 4_096;

/// The most threads, tasks and tries.
const MOST: usize = 1_024;
/// Pingora's bound of tries is over those of this crate, which has bounds of its own: retries, connections that turn out to be
/// closed, and looks at who leads.
const LEAST_TRIES: usize = 16;
const POOLS: &str = "upstream_connect_offload_threadpools";
const POOL_THREADS: &str = "upstream_connect_offload_thread_per_pool";

/// Whether the threads of a service share their work. One thread has nobody to share with, and each task has its cost.
const STEALING: &str = "work_stealing";

/// Reads Pingora's part of the text of a file, and checks it for fields that do not exist; `name` is
/// used in errors.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile), naming the field and its line.
pub fn server_conf(text: &str, name: &str) -> Result<ServerConf, ClusterError> {
    type Fields<Key> = HashMap<Key, IgnoredAny>;
    let given: Fields<Spanned<String>> =
        serde_saphyr::from_str(text).map_err(|error| unreadable(name, text, None, &error))?;
    let known: Fields<String> = serde_saphyr::from_str(&ServerConf::default().to_yaml())
        .map_err(|error| in_file("Pingora's defaults", error))?;
    for (field, instead) in WITHOUT_EFFECT {
        if let Some(given) = given.keys().find(|given| given.value == *field) {
            let line = given.referenced.line();
            return Err(in_file(
                name,
                format!("line {line}: the field {field} has no effect ({instead})"),
            ));
        }
    }
    let mut unknown: Vec<_> = given
        .keys()
        .filter(|field| field.value != "cluster" && !known.contains_key(&field.value))
        .collect();
    unknown.sort_by_key(|field| field.referenced.line());
    if let Some(field) = unknown.first() {
        let (line, field) = (field.referenced.line(), &field.value);
        return Err(in_file(
            name,
            format!("line {line}: Pingora's server section has no field {field:?}"),
        ));
    }
    // Not by Pingora's own parser, whose errors repeat the whole file.
    let mut conf: ServerConf = parse(text, name)?;
    let says = |name| given.keys().any(|field| field.value == name);
    if !says(POOL) {
        conf.upstream_keepalive_pool_size = POOL_SIZE;
    }
    if !says(STEALING) && conf.threads == 1 {
        conf.work_stealing = false;
    }
    // The reasons begin with the field.
    let at_line = |reason: String| {
        let field = reason.split(':').next().unwrap_or_default();
        match given.keys().find(|given| given.value == field) {
            Some(given) => format!("line {}: {reason}", given.referenced.line()),
            None => reason,
        }
    };
    for (field, value, least) in [
        ("threads", conf.threads, 1),
        ("listener_tasks_per_fd", conf.listener_tasks_per_fd, 1),
        ("max_retries", conf.max_retries, LEAST_TRIES),
    ] {
        // No machine has use for more.
        if !(least..=MOST).contains(&value) {
            let reason = format!("{field}: {value} is out of range, {least} to {MOST}");
            return Err(in_file(name, at_line(reason)));
        }
    }
    check(&conf).map_err(|reason| in_file(name, at_line(reason)))?;
    if conf.daemon && conf.working_directory.is_none() {
        // Pingora would move to the root, where relative paths name other files than at the start.
        conf.working_directory = std::env::current_dir().ok();
    }
    conf.validate().map_err(|error| in_file(name, error))
}

/// Checks what Pingora takes silently, or panics at.
fn check(conf: &ServerConf) -> Result<(), String> {
    let pools = conf.upstream_connect_offload_threadpools;
    let threads = conf.upstream_connect_offload_thread_per_pool;
    for (field, value, needs, other) in [
        (POOLS, pools, POOL_THREADS, threads),
        (POOL_THREADS, threads, POOLS, pools),
    ] {
        match value {
            Some(value) if !(1..=MOST).contains(&value) => {
                let range = format!("1 to {MOST}, or null");
                return Err(format!("{field}: {value} is out of range, {range}"));
            }
            Some(_) if other.is_none() => {
                return Err(format!("{field}: has no effect without {needs}"));
            }
            _ => {}
        }
    }
    // 0 if the field is missing.
    if conf.version > 1 {
        return Err(format!("version: {} is unknown, only 1 is", conf.version));
    }
    for address in &conf.client_bind_to_ipv4 {
        let parsed = address.parse::<Ipv4Addr>();
        parsed.map_err(|_| format!("client_bind_to_ipv4: {address:?} is no IPv4 address"))?;
    }
    for address in &conf.client_bind_to_ipv6 {
        let parsed = address.parse::<Ipv6Addr>();
        parsed.map_err(|_| format!("client_bind_to_ipv6: {address:?} is no IPv6 address"))?;
    }
    // One byte of the system's address is its end.
    if conf.upgrade_sock.len() > 107 {
        let length = conf.upgrade_sock.len();
        return Err(format!(
            "upgrade_sock: {length} bytes are too long, at most 107"
        ));
    }
    if !conf.daemon {
        for (field, is_given) in [
            ("user", conf.user.is_some()),
            ("group", conf.group.is_some()),
            ("error_log", conf.error_log.is_some()),
            ("working_directory", conf.working_directory.is_some()),
        ] {
            if is_given {
                return Err(format!("{field}: has an effect only with daemon: true"));
            }
        }
        return Ok(());
    }
    if conf.user.is_some() && conf.group.is_none() {
        return Err("group: is needed with user, or the process keeps its group".to_owned());
    }
    match &conf.error_log {
        Some(file) => {
            check_log(Path::new(file)).map_err(|error| format!("error_log: {file}: {error}"))
        }
        None => Ok(()),
    }
}

/// Checks that a file can be written to, without making it.
fn check_log(file: &Path) -> Result<(), String> {
    match std::fs::metadata(file) {
        Ok(about) if about.is_dir() => Err("is a directory".to_owned()),
        // What is no file may wait for a reader.
        Ok(about) if !about.is_file() => Ok(()),
        Ok(_) => {
            let opened = File::options().append(true).open(file);
            opened.map(drop).map_err(|error| error.to_string())
        }
        Err(_) => {
            let parent = file
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            match parent.is_none_or(Path::is_dir) {
                true => Ok(()),
                false => Err("its directory does not exist".to_owned()),
            }
        }
    }
}

/// Reads both parts of a file, from which the bundled load balancer starts.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile) with file, field and, where known, line.
pub fn load(path: impl AsRef<Path>) -> Result<(ClusterConfig, ServerConf), ClusterError> {
    let name = path.as_ref().display().to_string();
    let text = read(path)?;
    let cluster = ClusterConfig::from_yaml(&text, &name)?;
    Ok((cluster, server_conf(&text, &name)?))
}

/// Reads the text of a file, which may be a pipe, once.
///
/// # Errors
///
/// [`ConfigFile`](ClusterError::ConfigFile) when it cannot be read within 5 s.
pub fn read(path: impl AsRef<Path>) -> Result<String, ClusterError> {
    let path = path.as_ref();
    read_in_time(path).map_err(|error| in_file(path.display(), error))
}

/// How long a disk, or whoever writes into a pipe, may take to give a file.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads a file in a thread of its own, because a pipe that nobody writes to blocks for any time.
fn read_in_time(path: &Path) -> io::Result<String> {
    let (read, result) = mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || read.send(std::fs::read_to_string(path)));
    result.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        let reason = "it could not be read within 5 s; if it is a pipe, nobody writes to it";
        Err(io::Error::new(io::ErrorKind::TimedOut, reason))
    })
}
