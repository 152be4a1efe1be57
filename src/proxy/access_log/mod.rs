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
use crate::proxy::shutdown::Shutdown;
use crate::supervise::say;
use crate::sync::lock;

pub(super) use entry::Entry;
pub use statistics::AccessLogStatistics;
use writer::{Line, Writer, check, open};

/// Where lines go.
#[derive(Debug)]
pub(super) struct AccessLog {
    config: config::AccessLog,
    /// Opened before a daemon changes to a user who may not open it.
    opened: Mutex<Option<File>>,
    /// The thread is started by the first line: before, the process may still become another one.
    lines: OnceLock<Option<SyncSender<Line>>>,
    dropped: Arc<AtomicU64>,
    statistics: AccessLogStatistics,
}

impl AccessLog {
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

    pub(super) fn statistics(&self) -> &AccessLogStatistics {
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

    /// Gives a line to the thread that writes. Never waits: a line for which there is no room is
    /// counted.
    pub(super) fn write(&self, entry: Entry) {
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
