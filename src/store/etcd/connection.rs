//! One connection at a time, to one endpoint, and the choice of the next one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::breaker::Breaker;
use super::dialling::{Dialler, Pace};
use super::names::{Address, Names};
use super::round_trips::{LONGEST, RoundTrips};
use super::security::{Fingerprint, Token, connect_as, perhaps_https, status_of};
use super::watcher::WatchStreams;
use super::{EtcdStore, bounded, members};
use crate::error::ClusterError;
use crate::store::Circuit;

#[derive(Debug)]
pub(super) struct Link {
    /// In the order in which they are tried.
    pub(super) endpoints: Vec<Arc<str>>,
    pub(super) connection: Option<Connection>,
    /// Dropped with the connection: ends the streams on it that have not noticed yet.
    open: Option<watch::Sender<()>>,
    /// Counts connections, so that a failure is only held against the one it happened on.
    pub(super) generation: u64,
    /// The endpoint to try next.
    pub(super) next: usize,
    pub(super) names: Names,
    /// The task that makes a connection, while there is none.
    pub(super) dialler: Option<Dialler>,
    /// How many there have been.
    pub(super) diallers: u64,
    pub(super) pace: Pace,
    /// Requests in a row that were not answered in time on the connection before.
    missed: u32,
    warned_about_version: bool,
    pub(super) breaker: Breaker,
    /// Endpoints that refuse TLS or the user, told once each until they do not.
    refusing: BTreeMap<String, ClusterError>,
}

impl Link {
    pub(super) fn new(endpoints: &[String]) -> Self {
        Self {
            endpoints: endpoints
                .iter()
                .map(|endpoint| Arc::from(&**endpoint))
                .collect(),
            connection: None,
            open: None,
            generation: 0,
            next: 0,
            names: Names::default(),
            dialler: None,
            diallers: 0,
            pace: Pace::default(),
            missed: 0,
            warned_about_version: false,
            breaker: Breaker::default(),
            refusing: BTreeMap::new(),
        }
    }

    /// How many addresses the endpoints have, as far as it is known.
    pub(super) fn addresses(&self, endpoints: &[Arc<str>]) -> usize {
        self.names
            .addresses(endpoints.iter().map(|endpoint| &**endpoint))
    }
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
    round_trip: Duration,
    cluster: u64,
}

#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) endpoint: Arc<str>,
    pub(super) generation: u64,
    /// The one stream that every watch on this connection shares.
    pub(super) watches: WatchStreams,
    pub(super) token: Token,
    pub(super) round_trips: RoundTrips,
    /// The id of the cluster that it goes to; 0 if that is not known.
    pub(super) cluster: u64,
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
        // Lost again before it could be used: once more.
        for _ in 0..2 {
            let (waiting, started) = {
                let mut link = self.link();
                if let Some(connection) = &link.connection {
                    return Ok(connection.clone());
                }
                // The one that is let through waits for a round of dialling, which tells the breaker.
                if operation != RENEW {
                    link.breaker.admit(operation, Instant::now())?;
                }
                self.dialling(&mut link)
            };
            if let Some(dialling) = started {
                tokio::spawn(dialling.run());
            }
            self.dialled(waiting).await?;
        }
        Err(ClusterError::Unavailable {
            endpoint: self.endpoints().join(","),
            operation,
            reason: "connections break as soon as they are made".to_owned(),
        })
    }

    pub(super) fn count_failure(&self, link: &mut Link, error: &ClusterError) {
        let options = &self.shared.options;
        let was = link.breaker.circuit();
        let (threshold, pause) = (options.breaker_failures, options.breaker_pause);
        link.breaker.failed(error, threshold, pause, Instant::now());
        if was == Circuit::Closed && link.breaker.circuit() != was {
            warn!(%error, "etcd has failed again and again: it is asked only now and then until it answers");
        }
    }

    /// Once, not at each try: until it changes.
    pub(super) fn tell_refusal(&self, endpoint: &str, error: &ClusterError) {
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

    pub(super) fn connected(&self, dialed: Dialed, endpoint: &str) {
        let Dialed {
            client,
            version,
            files,
            token,
            round_trip,
            cluster,
        } = dialed;
        info!(endpoint, version, "connected to etcd");
        self.tell_token(endpoint, !token.is_missing());
        let (open, is_open) = watch::channel(());
        let endpoint: Arc<str> = Arc::from(endpoint);
        let options = &self.shared.options;
        let mut link = self.link();
        let round_trips = RoundTrips::new(round_trip, link.missed);
        let watches = WatchStreams::new(
            &client,
            endpoint.clone(),
            tells_progress(&version),
            options,
            round_trips.clone(),
            is_open,
        );
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
        link.next = self.position(&link, &endpoint);
        let connection = Connection {
            client,
            endpoint,
            generation: link.generation,
            watches,
            token,
            round_trips,
            cluster,
        };
        #[cfg(feature = "tls")]
        super::renewal::FileWatch::start(self, &connection, files, open.subscribe());
        #[cfg(not(feature = "tls"))]
        let _ = files;
        members::follow(self, &connection, open.subscribe());
        link.open = Some(open);
        link.connection = Some(connection);
    }

    /// The endpoints to try.
    pub(super) fn endpoints(&self) -> Vec<Arc<str>> {
        self.link().endpoints.clone()
    }

    pub(super) fn position(&self, link: &Link, endpoint: &str) -> usize {
        let mut endpoints = link.endpoints.iter();
        endpoints
            .position(|other| members::is_same(other, endpoint))
            .unwrap_or(0)
    }

    /// Connects to one endpoint and makes sure that it answers: connecting alone succeeds even
    /// where nobody listens. Without `quorum` a member that sees no leader will do, for what it can
    /// answer by itself. Each step takes `within` at most: to look
    /// the name up, to read files, and to be answered.
    pub(super) async fn dial(
        &self,
        endpoint: &str,
        quorum: bool,
        within: Duration,
    ) -> Result<Dialed, ClusterError> {
        let options = &self.shared.options;
        let connect = ConnectOptions::default()
            .with_connect_timeout(within)
            // A member that has lost its leader says so, instead of staying silent.
            .with_require_leader(quorum)
            .with_tcp_keepalive(options.keep_alive_interval)
            // Silence is judged by what is measured, later. This only ends what nobody uses.
            .with_keep_alive(
                options.keep_alive_interval,
                LONGEST.max(options.request_timeout),
            );
        let address = self.address_of(endpoint, within).await;
        let name = address.as_ref().map(|address| &*address.name);
        let secured = self.secured(endpoint, name, connect);
        let (connect, files, user) = in_time("connect", endpoint, within, secured).await?;
        let at = address
            .as_ref()
            .map_or(endpoint, |address| &*address.endpoint);
        // What the status takes: a connection is made by the first request on it.
        let steps = match (&options.credentials, endpoint.starts_with("https://")) {
            (Some(_), _) => 1,
            (None, false) => 2,
            (None, true) => 3,
        };
        let connecting = async {
            let (mut client, token) = connect_as(at, connect, user).await?;
            let asked = Instant::now();
            let member = status_of(&mut client).await?;
            let round_trip = asked.elapsed() / steps;
            Ok((client, token, member, round_trip))
        };
        let dialed = bounded("connect", endpoint, within, connecting)
            .await
            .map_err(|error| self.about_access(error, String::new));
        #[cfg(feature = "tls")]
        let dialed = match dialed {
            Err(error) => Err(self.diagnosed(endpoint, at, name, error).await),
            dialed => dialed,
        };
        let dialed = dialed.map_err(|error| match &options.tls {
            Some(_) => error,
            None => perhaps_https(endpoint, error),
        });
        let (client, token, member, round_trip) = dialed?;
        let unfit = match (member.has_leader, member.is_learner) {
            // It would refuse everything else. Asked again at each dial, for it may be promoted.
            (_, true) => Some("this member is a learner"),
            (false, false) => Some("this member sees no leader"),
            _ => None,
        };
        if let Some(reason) = unfit.filter(|_| quorum) {
            return Err(ClusterError::Unavailable {
                endpoint: endpoint.to_owned(),
                operation: "connect",
                reason: reason.to_owned(),
            });
        }
        if let Some(Address { index, .. }) = address
            && quorum
        {
            self.link().names.worked(endpoint, index);
        }
        Ok(Dialed {
            client,
            version: member.version,
            files,
            token,
            round_trip,
            cluster: member.cluster,
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
                current.watches = WatchStreams::new(
                    &current.client,
                    endpoint,
                    tells_progress,
                    options,
                    current.round_trips.clone(),
                    open,
                );
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
            if let Some(connection) = link.connection.take() {
                link.missed = connection.round_trips.missed();
                link.names.failed(&connection.endpoint);
            }
            link.open = None;
            link.next = (link.next + 1) % link.endpoints.len();
        }
    }
}

/// What is no request, but may take as long: files on a disk that does not answer.
pub(super) async fn in_time<T>(
    operation: &'static str,
    endpoint: &str,
    after: Duration,
    what: impl Future<Output = Result<T, ClusterError>>,
) -> Result<T, ClusterError> {
    let late = |_| ClusterError::Timeout {
        endpoint: endpoint.to_owned(),
        operation,
        after,
    };
    tokio::time::timeout(after, what).await.map_err(late)?
}

/// Whether somebody has to mend something.
pub(super) fn is_refusal(error: &ClusterError) -> bool {
    matches!(error, ClusterError::Tls { .. } | ClusterError::Auth { .. })
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
