//! Whether a handle's `run` is in progress, so that a wait ends when nothing can fulfil it any more.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::error::ClusterError;

/// How long a wait that begins without a run waits for one to begin: a task that was just spawned for
/// it may not have been polled yet.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(5);

/// Whether a run of a handle is in progress. Allows one at a time.
#[derive(Debug)]
pub(crate) struct Lifecycle(watch::Sender<bool>);

impl Default for Lifecycle {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Lifecycle {
    /// Begins a run. Returns `false` if one is in progress already.
    pub(crate) fn begin(&self) -> bool {
        self.0
            .send_if_modified(|runs| !std::mem::replace(runs, true))
    }

    /// Ends the run.
    pub(crate) fn end(&self) {
        self.0.send_replace(false);
    }

    pub(crate) fn is_running(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for `wanted`, for as long as there is a run that may fulfil it.
    ///
    /// # Errors
    ///
    /// [`NotRunning`](ClusterError::NotRunning) as soon as the run ends, or after five seconds if none
    /// begins.
    pub(crate) async fn wait<T>(
        &self,
        wanted: impl Future<Output = T>,
        what: impl FnOnce() -> String,
    ) -> Result<T, ClusterError> {
        let over = async {
            let mut runs = self.0.subscribe();
            // The sender lives in `self`, so neither can fail.
            let began = runs.wait_for(|runs| *runs);
            if timeout(START_PATIENCE, began).await.is_ok() {
                let _ = runs.wait_for(|runs| !*runs).await;
            }
        };
        tokio::select! {
            biased;
            wanted = wanted => Ok(wanted),
            () = over => Err(ClusterError::NotRunning { what: what() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_the_run_or_without_one() {
        let life = Lifecycle::default();
        let what = || "it".to_owned();
        let start = Instant::now();
        let error = life.wait(pending::<()>(), what).await.unwrap_err();
        assert!(error.to_string().contains("it is not running"), "{error}");
        assert_eq!(start.elapsed(), START_PATIENCE);

        assert!(life.begin() && !life.begin() && life.is_running());
        let start = Instant::now();
        let (waited, ()) = tokio::join!(life.wait(pending::<()>(), what), async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            life.end();
        });
        assert!(waited.is_err());
        assert_eq!(start.elapsed(), Duration::from_secs(60));

        // A run that begins late, and a wait that is fulfilled without a run.
        let (waited, ()) = tokio::join!(
            life.wait(
                async {
                    tokio::time::sleep(Duration::from_secs(9)).await;
                    7
                },
                what
            ),
            async {
                tokio::time::sleep(Duration::from_secs(4)).await;
                life.begin();
            }
        );
        assert_eq!(waited, Ok(7));
        life.end();
        assert_eq!(life.wait(async { 1 }, what).await, Ok(1));
    }
}
