//! One connection at a time, to one endpoint, and the choice of the next one.

use std::sync::Arc;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::breaker::Breaker;
use super::watcher::WatchStreams;
use super::{EtcdStore, bounded};
use crate::error::ClusterError;
use crate::store::Circuit;

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
    pub(super) breaker: Breaker,
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
    /// The connection in use, or a new one.
    pub(super) async fn connection(
        &self,
        operation: &'static str,
    ) -> Result<Connection, ClusterError> {
        if let Some(connection) = self.admit(operation)? {
            return Ok(connection);
        }
        let _dialing = self.shared.dialing.lock().await;
        let probe = {
            let mut link = self.link();
            // Somebody else may have been faster.
            if let Some(connection) = &link.connection {
                return Ok(connection.clone());
            }
            link.breaker.admit(operation, Instant::now())?
        };
        // A caller with little patience gives up in the middle: then the next one may try.
        let _probe = probe.then(|| Probe(self));
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
            match self.dial(endpoint, true).await {
                Ok((client, version)) => {
                    return Ok(self.connected(client, index, endpoint, &version));
                }
                Err(error) => {
                    debug!(endpoint, %error, "cannot connect to etcd");
                    last = Some(error);
                }
            }
        }
        let error = last.unwrap_or_else(|| ClusterError::config("endpoints", "must not be empty"));
        self.count_failure(&mut self.link(), &error);
        Err(error)
    }

    /// Answers at once where calls are not tried.
    fn admit(&self, operation: &'static str) -> Result<Option<Connection>, ClusterError> {
        let mut link = self.link();
        if let Some(connection) = &link.connection {
            return Ok(Some(connection.clone()));
        }
        if link.breaker.admit(operation, Instant::now())? {
            // It is this one's to try, once it is its turn.
            link.breaker.abandoned();
        }
        Ok(None)
    }

    fn count_failure(&self, link: &mut Link, error: &ClusterError) {
        let options = &self.shared.options;
        let was = link.breaker.circuit();
        let (threshold, pause) = (options.breaker_failures, options.breaker_pause);
        link.breaker.failed(error, threshold, pause, Instant::now());
        if was == Circuit::Closed && link.breaker.circuit() != was {
            warn!(%error, "etcd has failed again and again: it is asked only now and then until it answers");
        }
    }

    fn connected(&self, client: Client, index: usize, endpoint: &str, version: &str) -> Connection {
        info!(endpoint, version, "connected to etcd");
        let (open, is_open) = watch::channel(());
        let endpoint: Arc<str> = Arc::from(endpoint);
        let options = &self.shared.options;
        let watches = WatchStreams::new(&client, endpoint.clone(), version, options, is_open);
        let mut link = self.link();
        link.breaker.connected();
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
    /// where nobody listens. Without `quorum` a member that sees no leader will do, for what it can
    /// answer by itself.
    pub(super) async fn dial(
        &self,
        endpoint: &str,
        quorum: bool,
    ) -> Result<(Client, String), ClusterError> {
        let options = &self.shared.options;
        let connect = ConnectOptions::default()
            .with_connect_timeout(options.connect_timeout)
            // A member that has lost its leader says so, instead of staying silent.
            .with_require_leader(quorum)
            .with_tcp_keepalive(options.keep_alive_interval)
            .with_keep_alive(options.keep_alive_interval, options.request_timeout);
        let connecting = async {
            let mut client = Client::connect([endpoint], Some(connect)).await?;
            let status = client.status().await?;
            Ok((client, status.version().to_owned(), status.leader()))
        };
        let (client, version, leader) =
            bounded("connect", endpoint, options.connect_timeout, connecting).await?;
        if leader == 0 && quorum {
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
    pub(super) fn discard(&self, failed: u64, error: &ClusterError) {
        let mut link = self.link();
        if link.connection.is_some() && link.generation == failed {
            self.count_failure(&mut link, error);
            link.connection = None;
            link.open = None;
            link.next = (link.next + 1) % self.shared.options.endpoints.len();
        }
    }
}

/// The one call that is let through while the breaker is open.
struct Probe<'s>(&'s EtcdStore);

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        self.0.link().breaker.abandoned();
    }
}

fn parse(version: &str) -> (u32, u32, u32) {
    let mut parts = version
        .split(['.', '-', '+'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    (part(), part(), part())
}

/// Whether the revision of an answer to a progress request can be gone on from: before 3.5.13 it
/// could be ahead of events that were still to come.
pub(super) fn tells_progress(version: &str) -> bool {
    parse(version) >= (3, 5, 13)
}

/// Renewals of a revoked lease succeed before 3.5.23 and 3.6.5.
fn has_lease_bug(version: &str) -> bool {
    match parse(version) {
        (3, 5, patch) => patch < 23,
        (3, 6, patch) => patch < 5,
        (major, minor, _) => (major, minor) < (3, 5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_tell_progress() {
        assert!(
            ["3.5.13", "3.5.30", "3.6.0", "4.0.0"]
                .iter()
                .all(|version| tells_progress(version))
        );
        assert!(
            !["3.4.99", "3.5.12", "3.5.1", "?"]
                .iter()
                .any(|version| tells_progress(version))
        );
    }

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
