//! Certificate files that change while a connection is open.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use super::connection::Connection;
use super::round_trips::LONGEST;
use super::security::Fingerprint;
use super::{EtcdStore, Shared};
use crate::error::ClusterError;
use crate::store::TlsOptions;
use crate::supervise::{caught, say};

/// How often the files are looked at.
const EVERY: Duration = Duration::from_secs(3);
/// New files that did not work are tried again after so many looks.
const AGAIN_AFTER: u32 = 10;

/// Looks at the files until the connection is given up. A task of the connection's own.
pub(super) struct FileWatch {
    /// Not to keep the store alive.
    store: Weak<Shared>,
    tls: TlsOptions,
    connection: (u64, Arc<str>),
    /// What the connection was made with.
    used: u128,
    /// What was seen last and could not be used, for so many looks.
    bad: Option<(Fingerprint, u32)>,
}

impl FileWatch {
    pub(super) fn start(
        store: &EtcdStore,
        connection: &Connection,
        used: Fingerprint,
        mut open: watch::Receiver<()>,
    ) {
        let (Some(tls), Some(used)) = (store.shared.options.tls.clone(), used) else {
            return;
        };
        if !tls.has_files() {
            return;
        }
        let mut watch = Self {
            store: Arc::downgrade(&store.shared),
            tls,
            connection: (connection.generation, connection.endpoint.clone()),
            used,
            bad: None,
        };
        tokio::spawn(async move {
            // Nothing is ever sent: an answer is the connection's end.
            while timeout(EVERY, open.changed()).await.is_err() {
                match caught(watch.look()).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(panic) => {
                        watch.bad = None;
                        say(|| {
                            error!(
                                panic,
                                "looking for new certificate files has failed, it is tried again"
                            )
                        });
                    }
                }
            }
        });
    }

    /// Answers whether to go on looking.
    async fn look(&mut self) -> bool {
        let tls = self.tls.clone();
        let seen = tokio::task::spawn_blocking(move || {
            let files = tls.read();
            let fingerprint = files.as_ref().ok().map(|files| files.fingerprint());
            let checked = files.and_then(|files| tls.check(&files).map(drop));
            (fingerprint, checked)
        });
        let Ok((seen, checked)) = seen.await else {
            return true;
        };
        if seen == Some(self.used) {
            self.bad = None;
            return true;
        }
        let looks = match self.bad {
            Some((bad, looks)) if bad == seen => looks + 1,
            _ => 0,
        };
        self.bad = Some((seen, looks));
        let endpoint = self.connection.1.clone();
        if let Err(error) = checked {
            match looks {
                // Perhaps they are being written just now.
                0 => debug!(endpoint = &*endpoint, %error, "certificate files have changed"),
                1 => {
                    warn!(endpoint = &*endpoint, %error, "certificate files have changed and cannot be used, the connection with the old ones stays");
                }
                _ => {}
            }
            return true;
        }
        if looks % AGAIN_AFTER != 0 {
            return true;
        }
        let Some(shared) = self.store.upgrade() else {
            return false;
        };
        match EtcdStore::background(shared)
            .replace(self.connection.0, &endpoint)
            .await
        {
            Ok(()) => {
                info!(
                    endpoint = &*endpoint,
                    "certificate files have changed, the connection was replaced"
                );
                false
            }
            Err(error) if looks == 0 => {
                warn!(endpoint = &*endpoint, %error, "certificate files have changed and etcd cannot be reached with them, the connection with the old ones stays");
                true
            }
            Err(_) => true,
        }
    }
}

impl EtcdStore {
    /// Puts a new connection to the same endpoint in the place of this one. It is made first, so
    /// that nothing is lost if it cannot be.
    async fn replace(&self, generation: u64, endpoint: &str) -> Result<(), ClusterError> {
        let within = LONGEST.max(self.shared.options.connect_timeout);
        self.paced().await;
        let dialed = self.dial(endpoint, true, within).await?;
        let is_in_use = {
            let link = self.link();
            link.connection.is_some() && link.generation == generation
        };
        if is_in_use {
            self.connected(dialed, endpoint);
        }
        Ok(())
    }
}
