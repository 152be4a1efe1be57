//! Reloads certificate files that change while a connection is open.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::connector::{Connector, NewConnection};
use super::link::Fingerprint;
use super::round_trips::LONGEST;
use super::tls::TlsOptions;
use super::tls_files;
use crate::error::ClusterError;
use crate::supervise::{caught, say};

/// How often the files are checked.
const INTERVAL: Duration = Duration::from_secs(3);
/// New files that did not work are tried again after this many checks.
const RETRY_AFTER: u32 = 10;

/// Watches the files of one connection.
struct CertReload {
    /// Weak, so that the task does not keep the store alive.
    connector: Weak<Connector>,
    tls: TlsOptions,
    generation: u64,
    endpoint: Arc<str>,
    /// The files that the connection was made with.
    used: u128,
    /// The new files that could not be used yet, and the number of checks since.
    unused: Option<(Fingerprint, u32)>,
}

/// Starts a task that checks the files until the connection is given up.
pub(super) fn follow(connector: &Arc<Connector>, new: &NewConnection) {
    let (Some(tls), Some(used)) = (connector.options.tls.clone(), new.files) else {
        return;
    };
    if !tls_files::has_files(&tls) {
        return;
    }
    let mut reload = CertReload {
        connector: Arc::downgrade(connector),
        tls,
        generation: new.connection.generation,
        endpoint: new.connection.endpoint.clone(),
        used,
        unused: None,
    };
    let mut open = new.open.clone();
    tokio::spawn(async move {
        // Nothing is ever sent: the channel closes with the connection.
        while timeout(INTERVAL, open.changed()).await.is_err() {
            match caught(reload.check()).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(panic) => {
                    reload.unused = None;
                    say(|| {
                        error!(
                            panic,
                            "checking for new certificate files failed, will retry"
                        );
                    });
                }
            }
        }
    });
}

impl CertReload {
    /// Checks the files once, and replaces the connection if they are new and valid. Returns whether
    /// to continue.
    async fn check(&mut self) -> bool {
        let tls = self.tls.clone();
        let read = tokio::task::spawn_blocking(move || {
            let files = tls_files::read(&tls);
            let fingerprint = files
                .as_ref()
                .ok()
                .map(super::tls_files::TlsFiles::fingerprint);
            let checked = files.and_then(|files| tls_files::check(&tls, &files).map(drop));
            (fingerprint, checked)
        });
        let Ok((found, checked)) = read.await else {
            return true;
        };
        if found == Some(self.used) {
            self.unused = None;
            return true;
        }
        let checks = match self.unused {
            Some((unused, checks)) if unused == found => checks + 1,
            _ => 0,
        };
        self.unused = Some((found, checks));
        let endpoint = &*self.endpoint;
        if let Err(error) = checked {
            match checks {
                // Perhaps they are being written just now.
                0 => debug!(endpoint, %error, "certificate files have changed"),
                1 => {
                    warn!(endpoint, %error, "certificate files have changed and cannot be used, the connection with the old ones stays");
                }
                _ => {}
            }
            return true;
        }
        if checks % RETRY_AFTER != 0 {
            return true;
        }
        let Some(connector) = self.connector.upgrade() else {
            return false;
        };
        match connector.replace(self.generation, endpoint).await {
            Ok(()) => {
                info!(
                    endpoint,
                    "certificate files have changed, the connection was replaced"
                );
                false
            }
            Err(error) => {
                if checks == 0 {
                    warn!(endpoint, %error, "certificate files have changed and etcd cannot be reached with them, the connection with the old ones stays");
                }
                true
            }
        }
    }
}

impl Connector {
    /// Replaces this connection by a new one to the same endpoint. The new one is made first, so that
    /// nothing is lost if that fails.
    async fn replace(
        self: &Arc<Self>,
        generation: u64,
        endpoint: &str,
    ) -> Result<(), ClusterError> {
        let within = LONGEST.max(self.options.connect_timeout);
        self.paced().await;
        let dialed = self.dial(endpoint, true, within).await?;
        if self.link().is_current(generation) {
            self.install(dialed, endpoint);
        }
        Ok(())
    }
}
