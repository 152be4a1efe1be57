//! What has become of reloads.

use std::time::SystemTime;

/// What a reload has done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Reloaded {
    /// Whether anything has changed.
    pub is_changed: bool,
    /// Fields that have another value than before, which takes effect only when the process is started
    /// again.
    pub needs_restart: Vec<String>,
}

/// What has become of reloads since the start.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReloadStatus {
    /// When the configuration that is in use was taken over.
    pub since: SystemTime,
    /// How often another one was taken over.
    pub taken_over: u64,
    /// How often one was refused.
    pub refused: u64,
    /// Why the last one was refused; `None` if it was not.
    pub error: Option<String>,
    /// See [`Reloaded::needs_restart`], of the last one that was not refused.
    pub needs_restart: Vec<String>,
}

impl ReloadStatus {
    pub(super) fn new() -> Self {
        Self {
            since: SystemTime::now(),
            taken_over: 0,
            refused: 0,
            error: None,
            needs_restart: Vec::new(),
        }
    }

    /// Takes notice of a reload.
    pub(super) fn add(&mut self, result: Result<&Reloaded, String>) {
        match result {
            Ok(reloaded) => {
                self.error = None;
                self.needs_restart.clone_from(&reloaded.needs_restart);
                if reloaded.is_changed {
                    self.taken_over += 1;
                    self.since = SystemTime::now();
                }
            }
            Err(error) => {
                self.refused += 1;
                self.error = Some(error);
            }
        }
    }
}
