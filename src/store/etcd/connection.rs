//! One connection at a time, to one endpoint, and the choice of the next one.

use std::sync::Arc;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::watcher::WatchStreams;
use super::{EtcdStore, bounded};
use crate::error::ClusterError;

#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) connection: Option<Connection>,
    /// Dropped with the connection: ends the streams on it that have not noticed yet.
    open: Option<watch::Sender<()>>,
    /// Counts connections, so that a failure is only held against the one it happened on.
    generation: u64,
    /// The endpoint to try next.
    next: usize,
    warned_about_version: bool,
}

#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) endpoint: Arc<str>,
    pub(super) generation: u64,
    /// The one stream that every watch on this connection shares.
    pub(super) watches: WatchStreams,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} #{})", self.endpoint, self.generation)
    }
}

impl EtcdStore {
    pub(super) async fn connection(&self) -> Result<Connection, ClusterError> {
        if let Some(connection) = &self.link().connection {
            return Ok(connection.clone());
        }
        let _dialing = self.shared.dialing.lock().await;
        // Somebody else may have been faster.
        if let Some(connection) = &self.link().connection {
            return Ok(connection.clone());
        }
        let endpoints = &self.shared.options.endpoints;
        let mut last = None;
        for _ in 0..endpoints.len() {
            // Moved on before the try: a caller with little patience gives up in the middle of it,
            // and the next one must not get stuck at the same silent endpoint.
            let index = {
                let mut link = self.link();
                let index = link.next % endpoints.len();
                link.next = (index + 1) % endpoints.len();
                index
            };
            let endpoint = &endpoints[index];
            match self.dial(endpoint).await {
                Ok((client, version)) => {
                    return Ok(self.connected(client, index, endpoint, &version));
                }
                Err(error) => {
                    debug!(endpoint, %error, "cannot connect to etcd");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| ClusterError::config("endpoints", "must not be empty")))
    }

    fn connected(&self, client: Client, index: usize, endpoint: &str, version: &str) -> Connection {
        info!(endpoint, version, "connected to etcd");
        let (open, is_open) = watch::channel(());
        let endpoint: Arc<str> = Arc::from(endpoint);
        let watches = WatchStreams::new(&client, endpoint.clone(), self.timeout(), is_open);
        let mut link = self.link();
        if !link.warned_about_version && has_lease_bug(version) {
            link.warned_about_version = true;
            warn!(
                endpoint = &*endpoint,
                version,
                "this etcd answers renewals of a revoked lease with success; upgrade to 3.5.23, \
                 3.6.5 or newer"
            );
        }
        link.generation += 1;
        link.next = index;
        let connection = Connection {
            client,
            endpoint,
            generation: link.generation,
            watches,
        };
        link.open = Some(open);
        link.connection = Some(connection.clone());
        connection
    }

    /// Connects to one endpoint and makes sure that it answers: connecting alone succeeds even
    /// where nobody listens.
    async fn dial(&self, endpoint: &str) -> Result<(Client, String), ClusterError> {
        let options = &self.shared.options;
        let connect = ConnectOptions::default()
            .with_connect_timeout(options.connect_timeout)
            // A member that has lost its leader says so, instead of staying silent.
            .with_require_leader(true)
            .with_tcp_keepalive(options.keep_alive_interval)
            .with_keep_alive(options.keep_alive_interval, options.request_timeout);
        let connecting = async {
            let mut client = Client::connect([endpoint], Some(connect)).await?;
            let status = client.status().await?;
            Ok((client, status.version().to_owned(), status.leader()))
        };
        let (client, version, leader) =
            bounded("connect", endpoint, options.connect_timeout, connecting).await?;
        if leader == 0 {
            return Err(ClusterError::Unavailable {
                endpoint: endpoint.to_owned(),
                operation: "connect",
                reason: "this member sees no leader".to_owned(),
            });
        }
        Ok((client, version))
    }

    /// Gives up the connection after a failure on it, unless it has been replaced already, and
    /// with it every stream on it: what holds for one holds for all.
    pub(super) fn discard(&self, failed: u64) {
        let mut link = self.link();
        if link.connection.is_some() && link.generation == failed {
            link.connection = None;
            link.open = None;
            link.next = (link.next + 1) % self.shared.options.endpoints.len();
        }
    }
}

/// Renewals of a revoked lease succeed before 3.5.23 and 3.6.5.
fn has_lease_bug(version: &str) -> bool {
    let mut parts = version
        .split(['.', '-', '+'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    match (part(), part(), part()) {
        (3, 5, patch) => patch < 23,
        (3, 6, patch) => patch < 5,
        (major, minor, _) => (major, minor) < (3, 5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_the_lease_bug() {
        for version in ["3.4.30", "3.5.1", "3.5.22", "3.6.0", "3.6.4", "nonsense"] {
            assert!(has_lease_bug(version), "{version}");
        }
        for version in ["3.5.23", "3.5.30", "3.6.5", "3.7.0-rc.1", "4.0.0"] {
            assert!(!has_lease_bug(version), "{version}");
        }
    }
}
