//! The access log: a line for each request, written by a thread of its own.

mod entry;
mod statistics;
mod writer;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};

use tracing::error;

use crate::config;
use crate::error::ClusterError;
use crate::proxy::outcome::Outcome;
use crate::proxy::shutdown::Shutdown;
use crate::supervise::say;
use crate::sync::lock;

pub use entry::AccessLogEntry;
pub use statistics::AccessLogStatistics;
use writer::{Line, Writer, check, open};

/// An access log: a line for each request, in a file. Lines are written by a thread of their own, and a request never
/// waits for it. The file is opened again at SIGUSR1, if [`run`](crate::proxy::run) handles the signals.
///
/// ```
/// use std::time::Instant;
/// use pingora::{Error, prelude::Session};
/// use pingora_etcd::config;
/// use pingora_etcd::proxy::{AccessLog, AccessLogEntry};
///
/// # fn main() -> Result<(), pingora_etcd::ClusterError> {
/// # let file = std::env::temp_dir().join(format!("access-{}.log", std::process::id()));
/// let log = AccessLog::open(&config::AccessLog::new(file))?;
///
/// /// For the hook `logging`.
/// fn end(log: &AccessLog, session: &Session, started: Instant, error: Option<&Error>) {
///     log.write(AccessLogEntry::of(session, started, error));
/// }
/// # let _ = end;
/// assert_eq!(log.statistics().lost(), 0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AccessLog {
    config: config::AccessLog,
    /// Opened before a daemon changes to a user who may not open it.
    opened: Mutex<Option<File>>,
    /// The thread is started by the first line: before, the process may still become another one.
    lines: OnceLock<Option<SyncSender<Line>>>,
    dropped: Arc<AtomicU64>,
    statistics: AccessLogStatistics,
}

impl AccessLog {
    /// Opens the file, to append to it.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) when a field is out of range, or the file cannot be written to.
    pub fn open(config: &config::AccessLog) -> Result<Self, ClusterError> {
        config.validate("access_log")?;
        Self::new(config, false)
    }

    /// A log of a process that only checks its configuration (`is_test`) makes no file.
    ///
    /// # Errors
    ///
    /// When the file cannot be written to.
    pub(super) fn new(config: &config::AccessLog, is_test: bool) -> Result<Self, ClusterError> {
        let file = &config.file;
        let opened = match (file == Path::new("-"), is_test) {
            (true, _) => Ok(None),
            (false, true) => check(file).map(|()| None),
            (false, false) => open(file).map(Some),
        };
        let opened = opened.map_err(|error| {
            let reason = format!("{}: {error}", file.display());
            ClusterError::config("cluster.access_log.file", reason)
        })?;
        Ok(Self {
            config: config.clone(),
            opened: Mutex::new(opened),
            lines: OnceLock::new(),
            dropped: Arc::default(),
            statistics: AccessLogStatistics::default(),
        })
    }

    /// What has become of the lines.
    pub fn statistics(&self) -> &AccessLogStatistics {
        &self.statistics
    }

    /// Whether a request with this status has a line; `has_failed` says whether it has failed whatever the status
    /// is.
    pub(super) fn takes(&self, status: Option<u16>, has_failed: impl Fn() -> bool) -> bool {
        let sample = self.config.sample;
        sample >= 1.0
            || status.is_none_or(|status| status >= 500)
            || has_failed()
            || fastrand::f64() < sample
    }

    /// Writes a line, or not, as `sample` says: those of requests that have failed are always written. Never waits: a
    /// line for which there is no room is counted.
    pub fn write(&self, entry: AccessLogEntry) {
        if self.takes(entry.status, || entry.outcome == Outcome::Failed) {
            self.queue(entry);
        }
    }

    /// Gives a line to the thread that writes. Never waits: a line for which there is no room is
    /// counted.
    pub(super) fn queue(&self, entry: AccessLogEntry) {
        let lines = self.lines.get_or_init(|| self.start());
        let line = (entry, Shutdown::of_process().writer());
        let is_queued = lines
            .as_ref()
            .is_some_and(|lines| lines.try_send(line).is_ok());
        if !is_queued {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.statistics.add(1);
        }
    }

    fn start(&self) -> Option<SyncSender<Line>> {
        let (sender, lines) = sync_channel(self.config.queue);
        let opened = lock(&self.opened).take();
        let counts = (self.dropped.clone(), self.statistics.clone());
        let writer = Writer::new(&self.config.file, opened, self.config.format, counts);
        let thread = std::thread::Builder::new().name("access log".to_owned());
        match thread.spawn(move || writer.run(&lines)) {
            Ok(_) => Some(sender),
            Err(error) => {
                say(|| error!(%error, "there is no access log"));
                None
            }
        }
    }
}
