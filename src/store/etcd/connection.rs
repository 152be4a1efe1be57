//! One connection at a time, to one endpoint, and the choice of the next one.

use std::collections::BTreeMap;
use std::sync::Arc;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::breaker::Breaker;
use super::security::{Fingerprint, Token, connect_as, perhaps_https, status_of};
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
    pub(super) generation: u64,
    /// The endpoint to try next.
    next: usize,
    warned_about_version: bool,
    pub(super) breaker: Breaker,
    /// Endpoints that refuse TLS or the user, told once each until they do not.
    refusing: BTreeMap<String, ClusterError>,
}

/// The operation that is always tried: a lease that is not renewed in time is lost, and there are no
/// more renewals than leases.
pub(super) const RENEW: &str = "renew";

/// A client that has been answered.
pub(super) struct Dialed {
    pub(super) client: Client,
    version: String,
    files: Fingerprint,
    token: Token,
}

#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) endpoint: Arc<str>,
    pub(super) generation: u64,
    /// The one stream that every watch on this connection shares.
    pub(super) watches: WatchStreams,
    pub(super) token: Token,
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
            match operation {
                RENEW => false,
                _ => link.breaker.admit(operation, Instant::now())?,
            }
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
                Ok(dialed) => return Ok(self.connected(dialed, index, endpoint)),
                Err(error) => {
                    self.tell_refusal(endpoint, &error);
                    // One that says what to mend is not hidden by one that is only silent.
                    if !last.as_ref().is_some_and(is_refusal) || is_refusal(&error) {
                        last = Some(error);
                    }
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
        if operation != RENEW && link.breaker.admit(operation, Instant::now())? {
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

    /// Once, not at each try: until it changes.
    fn tell_refusal(&self, endpoint: &str, error: &ClusterError) {
        debug!(endpoint, %error, "cannot connect to etcd");
        if !is_refusal(error) {
            return;
        }
        let mut link = self.link();
        if link.refusing.get(endpoint) != Some(error) {
            warn!(endpoint, %error, "etcd cannot be used");
            link.refusing.insert(endpoint.to_owned(), error.clone());
        }
    }

    pub(super) fn connected(&self, dialed: Dialed, index: usize, endpoint: &str) -> Connection {
        let Dialed {
            client,
            version,
            files,
            token,
        } = dialed;
        info!(endpoint, version, "connected to etcd");
        self.tell_token(endpoint, !token.is_missing());
        let (open, is_open) = watch::channel(());
        let endpoint: Arc<str> = Arc::from(endpoint);
        let options = &self.shared.options;
        let watches = WatchStreams::new(
            &client,
            endpoint.clone(),
            tells_progress(&version),
            options,
            is_open,
        );
        let mut link = self.link();
        link.breaker.connected();
        link.refusing.remove(&*endpoint);
        if !link.warned_about_version && has_lease_bug(&version) {
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
            token,
        };
        #[cfg(feature = "tls")]
        super::renewal::FileWatch::start(self, &connection, files, open.subscribe());
        #[cfg(not(feature = "tls"))]
        let _ = files;
        link.open = Some(open);
        link.connection = Some(connection.clone());
        connection
    }

    /// Connects to one endpoint and makes sure that it answers: connecting alone succeeds even
    /// where nobody listens. Without `quorum` a member that sees no leader will do, for what it can
    /// answer by itself.
    pub(super) async fn dial(&self, endpoint: &str, quorum: bool) -> Result<Dialed, ClusterError> {
        let options = &self.shared.options;
        let connect = ConnectOptions::default()
            .with_connect_timeout(options.connect_timeout)
            // A member that has lost its leader says so, instead of staying silent.
            .with_require_leader(quorum)
            .with_tcp_keepalive(options.keep_alive_interval)
            .with_keep_alive(options.keep_alive_interval, options.request_timeout);
        let (connect, files, user) = self.secured(endpoint, connect).await?;
        let connecting = async {
            let (mut client, token) = connect_as(endpoint, connect, user).await?;
            let member = status_of(&mut client).await?;
            Ok((client, token, member))
        };
        let dialed = bounded("connect", endpoint, options.connect_timeout, connecting)
            .await
            .map_err(|error| self.about_access(error, String::new));
        #[cfg(feature = "tls")]
        let dialed = match dialed {
            Err(error) => Err(self.diagnosed(endpoint, error).await),
            dialed => dialed,
        };
        let dialed = dialed.map_err(|error| match &options.tls {
            Some(_) => error,
            None => perhaps_https(endpoint, error),
        });
        let (client, token, member) = dialed?;
        if !member.has_leader && quorum {
            return Err(ClusterError::Unavailable {
                endpoint: endpoint.to_owned(),
                operation: "connect",
                reason: "this member sees no leader".to_owned(),
            });
        }
        Ok(Dialed {
            client,
            version: member.version,
            files,
            token,
        })
    }

    /// A stream for watches that is opened with the token of now: the one there is goes on with the
    /// one it was opened with, for the watches that are on it.
    pub(super) fn with_fresh_watches(
        &self,
        mut connection: Connection,
        stale: &WatchStreams,
    ) -> Connection {
        let mut link = self.link();
        let Link {
            connection: Some(current),
            open: Some(open),
            ..
        } = &mut *link
        else {
            return connection;
        };
        if current.generation == connection.generation {
            // Somebody else may have been faster.
            if current.watches.is_same(stale) {
                let (endpoint, open) = (current.endpoint.clone(), open.subscribe());
                let tells_progress = current.watches.tells_progress;
                let options = &self.shared.options;
                current.watches =
                    WatchStreams::new(&current.client, endpoint, tells_progress, options, open);
            }
            connection.watches = current.watches.clone();
        }
        connection
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

/// Whether somebody has to mend something.
fn is_refusal(error: &ClusterError) -> bool {
    matches!(error, ClusterError::Tls { .. } | ClusterError::Auth { .. })
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
fn tells_progress(version: &str) -> bool {
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
            ["3.5.13", "3.5.28+", "3.5.30", "3.6.0", "4.0.0"]
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
        for version in [
            "3.5.23",
            "3.5.28+",
            "3.5.30",
            "3.6.5",
            "3.7.0-rc.1",
            "4.0.0",
        ] {
            assert!(!has_lease_bug(version), "{version}");
        }
    }
}
