//! What operators say of nodes, in a file beside the snapshot of the nodes: a node that was drained stays so in a process
//! that starts while the store is away.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::settings::Settings;
use crate::private_file;
use crate::supervise::say;
use crate::sync::lock;
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
    /// How many states there have been.
    states: u64,
    /// The last of them that is on the disk.
    written: Arc<Mutex<u64>>,
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
            states: 0,
            written: Arc::default(),
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

    /// Replaces the file in the background. Of two states the later one stays.
    pub(super) fn keep(&mut self, overrides: &HashMap<String, NodeOverride>) {
        let Some(path) = self.path.clone() else {
            return;
        };
        self.states += 1;
        let (state, written) = (self.states, self.written.clone());
        let contents = Contents {
            group: self.group.clone(),
            key_prefix: self.key_prefix.clone(),
            overrides: overrides.clone(),
        };
        let (contents, shown) = (Arc::new(contents), path.clone());
        let write = move || {
            let mut written = lock(&written);
            if *written > state {
                return Ok(());
            }
            let result = private_file::replace(&path, |file| {
                let mut file = std::io::BufWriter::new(file);
                serde_json::to_writer(&mut file, &*contents)?;
                file.flush()
            });
            *written = state;
            result
        };
        tokio::spawn(async move {
            let mut is_told = false;
            // Until it is written, or a later state is.
            while let Ok(Err(error)) = spawn_blocking(write.clone()).await {
                if !std::mem::replace(&mut is_told, true) {
                    let path = shown.display();
                    say(
                        || warn!(%error, %path, "what operators say of nodes cannot be written; it is lost if this process ends before it can"),
                    );
                }
                sleep(WRITE_AGAIN).await;
            }
        });
    }
}
