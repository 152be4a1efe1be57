//! When the snapshot file is written, and the task that writes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::snapshot_file::SnapshotFile;
use super::snapshot_format::Origin;
use crate::error::ClusterError;
use crate::view::Nodes;

/// Writes the snapshot file when it is due: one write at a time, on a thread for blocking work.
#[derive(Debug)]
pub(super) struct Saver {
    file: SnapshotFile,
    /// Without cluster and revision, which each write sets.
    origin: Origin,
    job: Option<JoinHandle<Result<(), ClusterError>>>,
    /// When the first write is due. Fixed, because a deadline that is taken from the clock at each
    /// look would never be in the past.
    created: Instant,
    last_start: Option<Instant>,
    /// There are changes that are not in the file, or the last write has failed.
    is_dirty: bool,
    /// Whether the last write has failed, for readers.
    has_failed: Arc<AtomicBool>,
}

impl Saver {
    /// Writes what belongs to this origin, and says in `has_failed` whether the last write has failed.
    pub(super) fn new(file: SnapshotFile, origin: Origin, has_failed: Arc<AtomicBool>) -> Self {
        has_failed.store(false, Ordering::Relaxed);
        Self {
            file,
            origin,
            job: None,
            created: Instant::now(),
            last_start: None,
            is_dirty: false,
            has_failed,
        }
    }

    /// The view has changed.
    pub(super) fn changed(&mut self) {
        self.is_dirty = true;
    }

    /// When to start the next write, while contact with the store lasts. `None` during a write.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.job.is_some() {
            return None;
        }
        let interval = Duration::from_millis(self.file.interval_ms);
        Some(match self.last_start {
            None => self.created,
            Some(last) if self.is_dirty => last + interval,
            // The unchanged view is current, but the file is taken to be as old as its last write.
            Some(last) => last + interval.max(Duration::from_millis(self.file.max_age_ms / 4)),
        })
    }

    /// Starts a write of a view that was current at `as_of`.
    pub(super) fn start(&mut self, nodes: &Nodes, cluster_id: u64, as_of: SystemTime) {
        self.last_start = Some(Instant::now());
        self.is_dirty = false;
        let (file, nodes) = (self.file.clone(), nodes.clone());
        let origin = Origin {
            cluster_id,
            revision: nodes.revision(),
            ..self.origin.clone()
        };
        let write = move || {
            file.remove_abandoned();
            file.write(&origin, &nodes, as_of)
        };
        self.job = Some(tokio::task::spawn_blocking(write));
    }

    /// Waits for the write in progress; without one it never returns. Dropping the future loses
    /// nothing.
    pub(super) async fn done(&mut self) {
        let Some(job) = &mut self.job else {
            return std::future::pending().await;
        };
        let result = job.await;
        self.job = None;
        let path = self.file.path.display();
        match result {
            Ok(Ok(())) if self.has_failed.swap(false, Ordering::Relaxed) => {
                info!(%path, "the snapshot file can be written again");
            }
            Ok(Ok(())) => debug!(%path, "snapshot file written"),
            Ok(Err(error)) => self.failed(&error),
            Err(error) if error.is_panic() => {
                self.failed(&self.file.error("the task that writes it panicked"));
            }
            // The runtime is shutting down.
            Err(_) => {}
        }
    }

    fn failed(&mut self, error: &ClusterError) {
        self.is_dirty = true;
        if self.has_failed.swap(true, Ordering::Relaxed) {
            debug!(%error, "the snapshot file still cannot be written");
        } else {
            warn!(%error, "the snapshot file cannot be written; the write will be repeated");
        }
    }

    /// Writes what is not in the file yet, and waits until it is written.
    pub(super) async fn finish(&mut self, nodes: &Nodes, cluster_id: u64, as_of: SystemTime) {
        if self.job.is_some() {
            self.done().await;
        }
        if self.is_dirty {
            self.start(nodes, cluster_id, as_of);
            self.done().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn saver(path: &Path) -> Saver {
        Saver::new(SnapshotFile::new(path), Origin::default(), Arc::default())
    }

    /// With the real clock, whose readings always differ.
    #[tokio::test]
    async fn the_first_write_is_due_at_once_and_the_next_one_after_the_interval() {
        let directory = tempfile::tempdir().unwrap();
        let mut saver = saver(&directory.path().join("nodes"));
        let now = Instant::now();
        assert!(saver.due().unwrap() <= now);
        assert_eq!(saver.due(), saver.due(), "it does not move");
        saver.start(&Nodes::default(), 1, SystemTime::now());
        assert_eq!(saver.due(), None, "one at a time");
        saver.done().await;
        saver.changed();
        assert!(saver.due().unwrap() >= now + Duration::from_secs(10));
        assert!(saver.due().unwrap() <= Instant::now() + Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_write_that_fails_or_panics_is_repeated_after_the_interval() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gone").join("nodes");
        let mut saver = saver(&path);
        let soon = || Instant::now() + Duration::from_secs(11);
        saver.start(&Nodes::default(), 1, SystemTime::now());
        saver.done().await;
        assert!(saver.has_failed.swap(false, Ordering::Relaxed) && saver.due().unwrap() < soon());
        saver.is_dirty = false;
        saver.job = Some(tokio::task::spawn_blocking(|| panic!("on purpose")));
        saver.done().await;
        assert!(saver.has_failed.load(Ordering::Relaxed) && saver.due().unwrap() < soon());
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        saver.start(&Nodes::default(), 1, SystemTime::now());
        saver.done().await;
        assert!(!saver.has_failed.load(Ordering::Relaxed) && path.exists());
    }
}
