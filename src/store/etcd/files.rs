//! Reading certificates and passwords from files, which may be on a disk that does not answer.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::error::ClusterError;

/// Reads a file that the setting `field` names. Blocks.
pub(super) fn read_file(field: &str, path: &Path) -> Result<Vec<u8>, ClusterError> {
    std::fs::read(path)
        .map_err(|error| ClusterError::config(field, format!("{}: {error}", path.display())))
}

/// Reads files one after another, so that a disk that hangs blocks one thread only.
#[derive(Debug, Default)]
pub(super) struct FileReader(Arc<Mutex<()>>);

impl FileReader {
    /// Runs a function that reads files, for a connection to this endpoint.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        endpoint: &str,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ClusterError> {
        let turn = self.0.clone().lock_owned().await;
        blocking(endpoint, move || {
            let _turn = turn;
            read()
        })
        .await
    }
}

/// Runs a function that blocks on a thread for such functions.
pub(super) async fn blocking<T: Send + 'static>(
    endpoint: &str,
    function: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ClusterError> {
    let done = tokio::task::spawn_blocking(function).await;
    done.map_err(|error| ClusterError::Unavailable {
        endpoint: endpoint.to_owned(),
        operation: "connect",
        reason: error.to_string(),
    })
}

/// Bounds the reading of files in time.
pub(super) async fn in_time<T>(
    operation: &'static str,
    endpoint: &str,
    after: Duration,
    reading: impl Future<Output = Result<T, ClusterError>>,
) -> Result<T, ClusterError> {
    let late = |_| ClusterError::Timeout {
        endpoint: endpoint.to_owned(),
        operation,
        after,
    };
    tokio::time::timeout(after, reading).await.map_err(late)?
}
