//! How loaded the command is: CPU and memory of its processes, and what it says itself.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use pingora_etcd::metrics::{LOAD_REPORT_HEADER, LoadReport, MetricsCollector};
use pingora_etcd::{NodeMetadata, metadata_keys};
use serde_json::{Map, Value};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::time::{sleep, timeout};
use tracing::warn;

/// How often the file or the endpoint is read.
const EVERY: Duration = Duration::from_secs(1);
/// A command that has said nothing readable for this number of times is named in the log.
const SAID_AFTER: u32 = 10;
/// A report has at most this many bytes.
const MOST: usize = 1 << 20;

#[derive(Args)]
#[group(id = "load")]
pub struct Options {
    /// A file with more metrics, which is read every second: a number is the queue depth; otherwise
    /// as --metrics-url.
    #[arg(long, value_name = "FILE", conflicts_with = "metrics_url")]
    metrics_file: Option<PathBuf>,
    /// An endpoint with more metrics, which is read every second: a JSON object, Prometheus text, or any
    /// response with the header `endpoint-load-metrics` (ORCA).
    #[arg(long, value_name = "URL", value_parser = plain_url)]
    metrics_url: Option<reqwest::Url>,
    /// Publish the metric NAME as KEY, such as `queue_depth=vllm:num_requests_waiting`; several of
    /// one name are added. NAME is that of a Prometheus metric, or a field or pointer (`/a/b`) in JSON.
    /// Without this, all fields of a JSON object are published, and nothing of a Prometheus text.
    #[arg(long = "metric", value_name = "KEY=NAME", value_parser = mapping)]
    metrics: Vec<(String, String)>,
}

fn plain_url(text: &str) -> Result<reqwest::Url, String> {
    let url: reqwest::Url = text.parse().map_err(|error| format!("{error}"))?;
    match url.scheme() {
        "http" => Ok(url),
        other => Err(format!("{other} is not spoken, only http is")),
    }
}

fn mapping(text: &str) -> Result<(String, String), String> {
    let (key, name) = text.split_once('=').ok_or("KEY=NAME is expected")?;
    Ok((key.to_owned(), name.to_owned()))
}

#[derive(Clone)]
enum Source {
    None,
    File(PathBuf),
    Url(reqwest::Client, reqwest::Url),
}

/// What the command says, and its processes.
pub struct Load {
    source: Source,
    metrics: Vec<(String, String)>,
    state: Arc<State>,
}

struct State {
    /// The process of the command.
    root: AtomicU32,
    system: Mutex<System>,
    said: Mutex<Map<String, Value>>,
    /// How often in a row it could not be read.
    failures: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    pub fn new(options: &Options) -> Result<Self, Box<dyn std::error::Error>> {
        let source = match (&options.metrics_file, &options.metrics_url) {
            (Some(file), _) => Source::File(file.clone()),
            (None, Some(url)) => {
                let client = reqwest::Client::builder()
                    .timeout(EVERY)
                    .no_proxy()
                    .build()?;
                Source::Url(client, url.clone())
            }
            (None, None) => Source::None,
        };
        let system = System::new()?;
        Ok(Self {
            source,
            metrics: options.metrics.clone(),
            state: Arc::new(State {
                root: AtomicU32::new(0),
                system: Mutex::new(system),
                said: Mutex::default(),
                failures: AtomicU32::new(0),
            }),
        })
    }

    /// What a node publishes.
    pub fn collector(&self) -> impl MetricsCollector + 'static {
        Collector(self.state.clone())
    }

    /// Reads what the command with this process says from now on, in a task of its own.
    pub fn start(&self, child: u32) {
        self.state.root.store(child, Ordering::Relaxed);
        let (source, state) = (self.source.clone(), self.state.clone());
        let metrics = self.metrics.clone();
        tokio::spawn(async move {
            loop {
                let mut reading = pin!(source.read(&metrics));
                loop {
                    let said = timeout(EVERY, &mut reading).await;
                    let is_late = said.is_err();
                    state.take(said.unwrap_or_else(|_| Err("no answer in time".to_owned())));
                    // A file that hangs keeps a thread: one, and not one more each second.
                    if !(is_late && matches!(source, Source::File(_))) {
                        break;
                    }
                }
                sleep(EVERY).await;
            }
        });
    }
}

impl State {
    fn take(&self, said: Result<Map<String, Value>, String>) {
        let mut current = lock(&self.said);
        match said {
            Ok(said) => {
                self.failures.store(0, Ordering::Relaxed);
                *current = said;
            }
            Err(reason) => {
                // Not while the command starts, and not each second.
                let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
                if !current.is_empty() || failures == SAID_AFTER {
                    warn!(reason, "the metrics of the command cannot be read");
                }
                // Old figures mislead more than none.
                current.clear();
            }
        }
    }
}

fn read(file: &Path) -> Result<String, String> {
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        let most = MOST as u64 + 1;
        File::open(file)?.take(most).read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) if text.len() > MOST => Err(format!("it has more than {MOST} bytes")),
        Ok(text) => Ok(text),
        Err(error) => Err(error.to_string()),
    }
}

impl Source {
    async fn read(&self, metrics: &[(String, String)]) -> Result<Map<String, Value>, String> {
        match self {
            Self::None => Ok(Map::new()),
            Self::File(file) => {
                let file = file.clone();
                // An error of the task says that it panicked, or that the runtime ends.
                let text = tokio::task::spawn_blocking(move || read(&file)).await;
                parse(&text.map_err(|error| error.to_string())??, metrics)
            }
            Self::Url(client, url) => {
                let response = client.get(url.clone()).send().await;
                let response = response.and_then(reqwest::Response::error_for_status);
                let mut response = response.map_err(|error| error.to_string())?;
                if let Some(report) = response.headers().get(LOAD_REPORT_HEADER) {
                    return of_report(report.as_bytes());
                }
                let mut body = Vec::new();
                while let Some(part) = response.chunk().await.map_err(|error| error.to_string())? {
                    body.extend_from_slice(&part);
                    if body.len() > MOST {
                        return Err(format!("it has more than {MOST} bytes"));
                    }
                }
                parse(&String::from_utf8_lossy(&body), metrics)
            }
        }
    }
}

fn of_report(report: &[u8]) -> Result<Map<String, Value>, String> {
    let report = LoadReport::parse(report).map_err(|error| error.to_string())?;
    let percent = |part: f64| part * 100.0;
    let said = [
        (metadata_keys::CPU_USAGE_PERCENT, report.cpu.map(percent)),
        (
            metadata_keys::MEMORY_USAGE_PERCENT,
            report.memory.map(percent),
        ),
        (metadata_keys::QUEUE_DEPTH, report.queue),
    ];
    let said = said
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?.into())));
    Ok(said.collect())
}

/// Reads a number, a JSON object or Prometheus text.
fn parse(text: &str, metrics: &[(String, String)]) -> Result<Map<String, Value>, String> {
    let text = text.trim();
    if let Ok(queue) = text.parse::<f64>() {
        let key = metadata_keys::QUEUE_DEPTH.to_owned();
        return Ok(Map::from_iter([(key, queue.into())]));
    }
    if !text.starts_with('{') {
        let found = metrics
            .iter()
            .map(|(key, name)| (key, prometheus(text, name)));
        let found = found.filter_map(|(key, value)| Some((key.clone(), value?.into())));
        return Ok(found.collect());
    }
    let object: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    if metrics.is_empty() {
        return Ok(object);
    }
    let object = Value::Object(object);
    let find = |name: &str| match name.starts_with('/') {
        true => object.pointer(name),
        false => object.get(name),
    };
    let found = metrics
        .iter()
        .filter_map(|(key, name)| Some((key.clone(), find(name)?.clone())));
    Ok(found.collect())
}

/// The sum of the samples of one name.
fn prometheus(text: &str, name: &str) -> Option<f64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.trim().strip_prefix(name)?;
        let values = match rest.strip_prefix('{') {
            Some(labels) => after_labels(labels)?,
            None if rest.starts_with([' ', '\t']) => rest,
            None => return None,
        };
        let value: f64 = values.split_whitespace().next()?.parse().ok()?;
        value.is_finite().then_some(value)
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// What follows the brace that ends the labels. One in a value is none, and after the number there may be an example with
/// labels of its own (OpenMetrics).
fn after_labels(labels: &str) -> Option<&str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let end = labels.find(|sign| {
        match sign {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            '}' => return !is_quoted,
            _ => {}
        }
        false
    })?;
    Some(&labels[end + 1..])
}

struct Collector(Arc<State>);

impl MetricsCollector for Collector {
    fn collect(&self) -> NodeMetadata {
        let mut metrics = Map::new();
        let mut system = lock(&self.0.system);
        let kinds = ProcessRefreshKind::nothing().with_cpu().with_memory();
        system.refresh_processes_specifics(ProcessesToUpdate::All, true, kinds);
        system.refresh_memory();
        let (mut cpu, mut memory) = (0.0, 0);
        let root = Pid::from_u32(self.0.root.load(Ordering::Relaxed));
        for process in tree(&system, root) {
            cpu += f64::from(process.cpu_usage());
            memory += process.memory();
        }
        let cores = cores();
        let tenth = |value: f64| (value.clamp(0.0, 100.0) * 10.0).round() / 10.0;
        metrics.insert(
            metadata_keys::CPU_USAGE_PERCENT.to_owned(),
            tenth(cpu / cores).into(),
        );
        // That of the container, if there is one.
        let limit = system.cgroup_limits().map(|limits| limits.total_memory);
        let total = limit.map_or(system.total_memory(), |limit| {
            limit.min(system.total_memory())
        });
        if total > 0 {
            let part = memory as f64 / total as f64;
            metrics.insert(
                metadata_keys::MEMORY_USAGE_PERCENT.to_owned(),
                tenth(part * 100.0).into(),
            );
        }
        metrics.extend(lock(&self.0.said).clone());
        NodeMetadata::Object(metrics)
    }
}

/// How many cores the command may use: those of the machine, or of its container, which may be a fraction.
fn cores() -> f64 {
    let known = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let read = |file: &str| std::fs::read_to_string(file).ok();
    let second = read("/sys/fs/cgroup/cpu.max");
    let first = || {
        let quota = read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")?;
        let period = read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")?;
        Some(format!("{} {}", quota.trim(), period.trim()))
    };
    let quota = second.or_else(first).and_then(|text| quota(&text));
    quota.map_or(known, |quota| usable(known, quota))
}

/// The cores of a quota, of which this many are known: these are rounded down, but not below one.
fn usable(known: f64, quota: f64) -> f64 {
    match quota.floor().max(1.0) > known {
        // Fewer than the quota, as on a small machine.
        true => known,
        false => quota,
    }
}

/// A quota and its period: `150000 100000` for one and a half cores; `max` or a negative number for any.
fn quota(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// A process, and those that it has started.
fn tree(system: &System, root: Pid) -> Vec<&sysinfo::Process> {
    let mut ids = HashSet::from([root]);
    loop {
        let before = ids.len();
        for (id, process) in system.processes() {
            if process.thread_kind().is_none()
                && process.parent().is_some_and(|parent| ids.contains(&parent))
            {
                ids.insert(*id);
            }
        }
        if ids.len() == before {
            break;
        }
    }
    let found = ids.iter().filter_map(|id| system.process(*id));
    found.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_may_have_a_part_of_a_core() {
        for (text, expected) in [
            ("50000 100000\n", Some(0.5)),
            ("150000 100000", Some(1.5)),
            ("max 100000", None),
            ("-1 100000", None),
            ("", None),
        ] {
            assert_eq!(quota(text), expected, "{text}");
        }
        for (known, quota, expected) in [
            (1.0, 0.5, 0.5),
            (1.0, 1.5, 1.5),
            (2.0, 2.5, 2.5),
            (2.0, 8.0, 2.0),
            (4.0, 1.5, 1.5),
        ] {
            assert_eq!(usable(known, quota), expected, "{known} {quota}");
        }
        assert!(cores() > 0.0);
    }

    fn parsed(text: &str, metrics: &[(&str, &str)]) -> Value {
        let metrics: Vec<_> = metrics
            .iter()
            .map(|(key, name)| ((*key).to_owned(), (*name).to_owned()))
            .collect();
        parse(text, &metrics).unwrap().into()
    }

    #[test]
    fn numbers_json_and_prometheus_text_are_read() {
        assert_eq!(parsed(" 12\n", &[]), json!({ "queue_depth": 12.0 }));
        let text = r#"{ "queue_depth": 3, "a": { "b": 4 } }"#;
        assert_eq!(
            parsed(text, &[]),
            json!({ "queue_depth": 3, "a": { "b": 4 } })
        );
        assert_eq!(
            parsed(text, &[("queue_depth", "/a/b"), ("x", "no such field")]),
            json!({ "queue_depth": 4 })
        );
        let text = "# HELP waiting requests\n# TYPE waiting gauge\nwaiting{a=\"}\",b=\"x y\"} 2\n\
                    waiting{a=\"2\"} 3 # {trace_id=\"x\"} 0.5 1700000000\nwaiting_more 7\nbad NaN\nplain 1.5e1\n";
        let metrics = [("queue_depth", "waiting"), ("b", "bad"), ("p", "plain")];
        assert_eq!(
            parsed(text, &metrics),
            json!({ "queue_depth": 5.0, "p": 15.0 })
        );
        assert!(parse("{", &[]).is_err());
        let report = of_report(b"TEXT cpu_utilization=0.5,named_metrics.queue=2").unwrap();
        assert_eq!(report["cpu_usage_percent"], 50.0);
    }
}
