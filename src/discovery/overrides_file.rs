//! What operators say of nodes, in a file beside the snapshot of the nodes: a node that was drained stays so in a process
//! that starts while the store is away.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::settings::Settings;
use crate::private_file;
use crate::supervise::say;
use crate::view::NodeOverride;

/// The maximum length of a file.
const MAX_LENGTH: u64 = 64 << 20;
/// Added to the name of the snapshot file.
const SUFFIX: &str = ".overrides";
/// How long the file may take to be read.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// A file that could not be written is written again after this time.
const WRITE_AGAIN: Duration = Duration::from_secs(10);

#[derive(Serialize, Deserialize)]
struct Contents {
    group: String,
    key_prefix: String,
    overrides: HashMap<String, NodeOverride>,
}

/// The file; nothing without a snapshot file.
pub(super) struct OverridesFile {
    path: Option<PathBuf>,
    group: String,
    key_prefix: String,
    /// One write at a time.
    busy: Arc<Semaphore>,
    /// The last state, until it is written.
    writing: Option<AbortOnDrop>,
}

impl OverridesFile {
    pub(super) fn new(settings: &Settings, group: &str) -> Self {
        let path = settings.snapshot.as_ref().map(|file| {
            let mut path = file.path.clone().into_os_string();
            path.push(SUFFIX);
            PathBuf::from(path)
        });
        Self {
            path,
            group: group.to_owned(),
            key_prefix: settings.key_prefix.clone(),
            busy: Arc::new(Semaphore::new(1)),
            writing: None,
        }
    }

    /// What the file says; `None` if there is none that can be used.
    pub(super) async fn read(&self) -> Option<HashMap<String, NodeOverride>> {
        let path = self.path.clone()?;
        let read = move || -> Result<Option<Contents>, String> {
            if let Ok(false) = path.try_exists() {
                return Ok(None);
            }
            let bytes = private_file::read(&path, MAX_LENGTH)?;
            let contents = serde_json::from_slice(&bytes);
            contents.map_err(|error| format!("it cannot be parsed: {error}"))
        };
        // An error of the task says that it panicked, or that the runtime ends.
        let contents = match timeout(READ_WITHIN, spawn_blocking(read)).await {
            Ok(read) => read.unwrap_or_else(|error| Err(error.to_string())),
            // As on a network file system that hangs. What etcd says is not to wait for that.
            Err(_) => Err("it could not be read in time".to_owned()),
        };
        match contents {
            Ok(contents) => {
                let contents = contents?;
                let is_ours =
                    contents.group == self.group && contents.key_prefix == self.key_prefix;
                if is_ours && !contents.overrides.is_empty() {
                    let nodes = contents.overrides.len();
                    say(|| info!(nodes, "begins with what operators have said of nodes"));
                }
                is_ours.then_some(contents.overrides)
            }
            Err(error) => {
                say(|| {
                    warn!(
                        error,
                        "what operators have said of nodes cannot be read from its file"
                    );
                });
                None
            }
        }
    }

    /// Replaces the file in the background, with one thread at a time, and again until it is written. Of two states the
    /// later one stays.
    pub(super) fn keep(&mut self, overrides: &HashMap<String, NodeOverride>) {
        let Some(path) = self.path.clone() else {
            return;
        };
        let contents = Arc::new(Contents {
            group: self.group.clone(),
            key_prefix: self.key_prefix.clone(),
            overrides: overrides.clone(),
        });
        let busy = self.busy.clone();
        let writing = tokio::spawn(async move {
            let mut is_told = false;
            // It is never closed.
            while let Ok(place) = busy.clone().acquire_owned().await {
                let (path, contents) = (path.clone(), contents.clone());
                let write = spawn_blocking(move || {
                    // Kept to the end, also if nobody waits for that any more.
                    let _place = place;
                    write(&path, &contents).map_err(|error| (error, path))
                });
                let Ok(Err((error, path))) = write.await else {
                    return;
                };
                if !std::mem::replace(&mut is_told, true) {
                    let path = path.display();
                    say(
                        || warn!(%error, %path, "what operators say of nodes cannot be written; it is lost if this process ends before it can"),
                    );
                }
                sleep(WRITE_AGAIN).await;
            }
        });
        self.writing = Some(AbortOnDrop(writing.abort_handle()));
    }
}

fn write(path: &Path, contents: &Contents) -> std::io::Result<()> {
    private_file::replace(path, |file| {
        let mut file = std::io::BufWriter::new(file);
        serde_json::to_writer(&mut file, contents)?;
        file.flush()
    })
}

/// Ends a task that waits when a later state is to be written, or nobody keeps the file any more.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
